"""Fuzzing of the notify socket: `python -m tests.fuzz.notify --seconds 60 --seed 1`.

Programs of a real supervisor, each with a notify socket, say what is nearly sd_notify(3): known and
unknown words with any value, bytes that are no text, datagrams of any length up to what the kernel
takes, with descriptors and without, one at a time and in floods, from themselves and from children
that have gone by the time that anybody looks. Their workers must stay, hold no descriptor more than
before, and believe nothing but what is said in order. The seed is printed.
"""

from __future__ import annotations

__all__ = ["Fuzzer", "fuzz", "heard"]

import argparse
import contextlib
import functools
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.supervised import REPO, Supervised, descriptors, wait_until
from workers.command.notify import MAX_DATAGRAM, parse

NAMES = ("READY", "STOPPING", "WATCHDOG", "STATUS", "EXTEND_TIMEOUT_USEC", "BARRIER", "RELOADING")
REFUSED = ("MAINPID", "MAINPIDFD", "FDSTORE", "NOTIFYACCESS")
VALUES = (b"", b"0", b"1", b"1 ", b"-1", b"1e9", b"9" * 13, b"9" * 14, b"\xd9\xa1", b"=", b"a=b\0c")
MOST_FDS = 253  # SCM_MAX_FD: the kernel takes no more


class Fuzzer:
    """Makes datagrams. The same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def line(self) -> bytes:
        """Return one assignment, or what looks like one."""
        pick = self.random
        name = pick.choice((*NAMES, *REFUSED, "", "ready", "X")).encode()
        value = pick.choice((*VALUES, pick.randbytes(pick.randrange(40)), b"x" * 300))
        return name + pick.choice((b"=", b"=", b"=", b"", b" = ")) + value

    def datagram(self) -> bytes:
        """Return one datagram."""
        pick = self.random
        match pick.randrange(8):
            case 0:
                return pick.randbytes(pick.choice((0, 1, MAX_DATAGRAM, MAX_DATAGRAM + 1)))
            case 1:
                size = pick.choice((MAX_DATAGRAM - 1, MAX_DATAGRAM, MAX_DATAGRAM + 1, 100_000))
                return (b"STATUS=" + b"x" * size)[:size]
            case 2:
                return b"\n" * pick.randrange(MAX_DATAGRAM)
            case _:
                return pick.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(
                    self.line() for _ in range(pick.randrange(1, 6))
                )

    def datagrams(self) -> Iterator[tuple[bytes, int]]:
        """Yield datagrams, and how many descriptors go with each."""
        while True:
            yield self.datagram(), self.random.choice((0, 0, 0, 1, 3, 32, 33, MOST_FDS))


def heard(datagram: bytes) -> list[tuple[str, str]]:
    """Return what may be made of a datagram: nothing of one that is too long, nothing refused."""
    if len(datagram) > MAX_DATAGRAM:
        return []
    return [(name, value) for name, value in parse(datagram) if name not in REFUSED]


def speak(address: str, seed: int, seconds: float) -> int:
    """Be the program: talk for so long; return how many datagrams have been sent."""
    fuzzer = Fuzzer(seed)
    sent = 0
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.connect(address)
        for datagram, count in fuzzer.datagrams():
            if time.monotonic() > end:
                return sent
            if fuzzer.random.randrange(200) == 0 and os.fork() == 0:
                speaker.send(datagram[:1000])
                os._exit(0)
            with contextlib.suppress(OSError):  # a size that the kernel does not take
                socket.send_fds(speaker, [datagram], [speaker.fileno()] * count)
                sent += 1
    return sent


def fuzz(folder: Path, seconds: float, seed: int, count: int = 2) -> int:
    """Let programs talk for so long; return how many datagrams their workers got.

    Raises:
        AssertionError: a worker has not stayed as it was, or the stop was not an orderly one.
    """
    program = [sys.executable, "-m", "tests.fuzz.notify", "--speak", "--seconds", str(seconds)]
    words = ", ".join(f'"{word}"' for word in (*program, "--seed", str(seed)))
    config = (
        f'[workers.mad]\ncommand = [{words}]\ncount = {count}\nnotify = true\nrestart = "never"\n'
        f'ready_timeout = "10m"\n[workers.mad.env]\nPYTHONPATH = "{REPO}"\n'
    )
    with Supervised(folder, config) as supervised:
        talked = [
            supervised.event("worker.output", due=seconds + 60.0, count=number + 1)
            for number in range(count)
        ]
        workers = supervised.worker_pids()
        assert len(workers) == count, "one has not stayed"
        for pid in workers.values():
            wait_until(functools.partial(_holds_nothing_of_it, pid), "what was passed is closed")
        assert supervised.status()["workers"]
        assert not supervised.events("worker.failed")
        sent = sum(int(line["line"]) for line in talked)
        reasons = len(REFUSED) + 2  # it is too long; its sender is a stranger
        most = count * reasons * (10 * sent).bit_length()  # ever more seldom; a few lines in each
        assert len(supervised.events("notify.dropped")) <= most
        assert supervised.stop() == 0
        assert not supervised.events("worker.killed")
    assert "Traceback" not in supervised.text()
    return sent


def _holds_nothing_of_it(pid: int) -> bool:
    """Tell that no socket is there twice: a speaker passes its own, mostly more than once."""
    sockets = [what for what in descriptors(pid).values() if what.startswith("socket:")]
    return len(sockets) == len(set(sockets))


def main() -> None:
    """Run from the command line; with --speak, be one of the programs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--speak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.speak:
        address = os.environ["NOTIFY_SOCKET"]
        print(speak(address, arguments.seed, arguments.seconds), flush=True)
        time.sleep(3600.0)
        return
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ackvisor-fuzz-") as folder:
        sent = fuzz(Path(folder), arguments.seconds, arguments.seed)
    print(f"{sent} sent; their workers stayed, and stopped as they should")


if __name__ == "__main__":
    main()
