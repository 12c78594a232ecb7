"""What it costs to see everything: jobs per second, a job and an acquire, with everything off and on.

    python -m bench.cost [--rounds 100]

Two supervisors side by side, each with one worker. One has everything on that can be: `listen` with a
scrape every second, `hang_timeout`, `leak_threshold`, `max_rss`, a `budget`, a follower of the
events, the log in full. The other has all of that off. They take turns in slices of milliseconds,
another one first each time, so that a noisy machine is as noisy for both. What is compared is the
least processor time of all slices: noise only ever adds to it. Both are started anew several times,
because how a process happens to lie in memory makes it faster or slower, too. What a worker does
besides its jobs, most of it for the scrapes, falls into few slices: it is measured while there are no
jobs, and taken off the jobs per second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from prettytable import PrettyTable

from bench.contenders import ROOT

FLEETS, ROUNDS = 5, 100  # slices of each kind in each pair of them
SCRAPE_S = 1.0
REST_S = 2
READY_DUE_S = 30.0
STOP_DUE_S = 15.0

MOST_PERCENT = 3.0
MOST_MICROSECONDS = 0.3


class Rest(NamedTuple):
    """Processor time a second while there are no jobs."""

    worker: float
    supervisor: float
    scrapes: int


class Supervised:
    """A supervisor with one worker, which does what it is told. A context manager."""

    def __init__(self, *, everything: bool) -> None:
        self._everything = everything
        self._port = _free_port()
        self._temporary = tempfile.TemporaryDirectory(prefix="ackvisor-bench-")
        self._folder = Path(self._temporary.name)
        self._config = self._folder / "cost.toml"
        self._end = threading.Event()
        self._stack = contextlib.ExitStack()
        self.scrapes = 0
        pool = 'leak_threshold = "5s"\nbudget = 10\n' if everything else 'leak_threshold = "0"\n'
        group = 'hang_timeout = "30s"\nmax_rss = "1GiB"\n' if everything else ""
        listen = f'listen = "127.0.0.1:{self._port}"\n' if everything else ""
        self._config.write_text(
            f'[supervisor]\nruntime_dir = "run"\npath = ["{ROOT}"]\ngrace = "5s"\n{listen}'
            f'[log]\nformat = "json"\nlevel = "{"debug" if everything else "warning"}"\n'
            f'[pools.main]\nurl = "sqlite:///orders.db"\nmax_open = 4\n{pool}'
            f'[workers.cost]\nrun = "bench.ours.cost:run"\n{group}'
            f'[workers.cost.options]\nfolder = "{self._folder}"\n'
        )

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.callback(self._temporary.cleanup)
            self._log = self._stack.enter_context((self._folder / "log").open("wb"))
            self._supervisor = self._start("start", self._log)
            self._connect()
            if self._everything:
                self._start("events", subprocess.DEVNULL, "--follow")
                scraper = threading.Thread(target=self._scrape)
                scraper.start()
                self._stack.callback(scraper.join)
                self._stack.callback(self._end.set)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, command: str, output: object, *words: str) -> subprocess.Popen[bytes]:
        popen = subprocess.Popen(
            [sys.executable, "-m", "supervisor", command, "-c", str(self._config), *words],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,  # type: ignore[call-overload]
            start_new_session=True,
        )  # fmt: skip
        self._stack.callback(_stop, popen)
        return popen

    def _connect(self) -> None:
        deadline = time.monotonic() + READY_DUE_S
        connection = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        while True:
            try:
                connection.connect(f"{self._folder}/socket")
                break
            except OSError as exc:
                if time.monotonic() > deadline or self._supervisor.poll() is not None:
                    said = (self._folder / "log").read_text()[-2000:]
                    raise RuntimeError(f"its worker was not ready in time:\n{said}") from exc
                time.sleep(0.02)
        self._orders = self._stack.enter_context(connection.makefile("rw", buffering=1))

    def _scrape(self) -> None:
        while not self._end.wait(SCRAPE_S):
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=5.0) as r:
                self.scrapes += b"supervisor_jobs_total" in r.read()

    def seconds(self, what: str, count: int) -> float:
        """Have the worker do this so many times; return the processor time that one took."""
        print(what, count, file=self._orders)
        return float(self._orders.readline()) / count

    def rest(self, seconds: int) -> Rest:
        """Have no jobs for a while, and see what is done all the same."""
        scrapes, own = self.scrapes, self._own_seconds()
        worker = self.seconds("seconds of rest", seconds)
        return Rest(worker, (self._own_seconds() - own) / seconds, self.scrapes - scrapes)

    def _own_seconds(self) -> float:
        """The processor time of the supervisor so far."""
        fields = Path(f"/proc/{self._supervisor.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stop(popen: subprocess.Popen[bytes]) -> None:
    popen.send_signal(signal.SIGTERM)
    try:
        popen.wait(STOP_DUE_S)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Samples:
    """Pairs of seconds: off, on."""

    def __init__(self) -> None:
        self._pairs: list[tuple[float, float]] = []

    def take(self, off: Supervised, on: Supervised, what: str, count: int) -> None:
        """Take a slice of both, another one first each time."""
        if len(self._pairs) % 2:
            second, first = on.seconds(what, count), off.seconds(what, count)
            self._pairs.append((first, second))
        else:
            self._pairs.append((off.seconds(what, count), on.seconds(what, count)))

    @property
    def least(self) -> tuple[float, float]:
        off, on = zip(*self._pairs, strict=True)
        return min(off), min(on)


# What, how often in a slice, how it is called; how much more µs are allowed.
BARE = (
    ("empty jobs", 2_000, "a job that does nothing, µs", MOST_MICROSECONDS),
    ("named jobs", 2_000, "  each with a name of its own", None),
    ("acquires", 1_000, "with acquire(), µs", MOST_MICROSECONDS),
)


def measure(rounds: int) -> str:
    orders, bare = Samples(), {what: Samples() for what, *_ in BARE}
    for _ in range(FLEETS):
        with Supervised(everything=False) as off, Supervised(everything=True) as on:
            for _ in range(rounds):
                orders.take(off, on, "orders", 100)
                for what, count, *_ in BARE:
                    bare[what].take(off, on, what, count)
            rests = [each.rest(REST_S) for each in (off, on)]
    table = PrettyTable(["figure", "everything off", "everything on", "on - off", "must be", ""])
    table.align = "r"
    table.align["figure"] = "l"
    without, all_of_it = (
        (1 - rest.worker) / seconds for rest, seconds in zip(rests, orders.least, strict=True)
    )
    less = (1 - all_of_it / without) * 100
    table.add_row(
        [
            "jobs/s, an update on SQLite each",
            f"{without:,.0f}",
            f"{all_of_it:,.0f}",
            f"{-less:+.1f} %",
            f"≥ -{MOST_PERCENT:g} %",
            "ok" if less <= MOST_PERCENT else "MISS",
        ]
    )
    for what, _, title, most in BARE:
        without, all_of_it = (seconds * 1e6 for seconds in bare[what].least)
        more = all_of_it - without
        bound = "" if most is None else f"≤ {most:g} µs"
        verdict = "" if most is None else "ok" if more <= most else "MISS"
        table.add_row([title, f"{without:.2f}", f"{all_of_it:.2f}", f"{more:+.2f}", bound, verdict])
    for title, each in (("  besides its jobs, ms a second", 0), ("the supervisor, ms a second", 1)):
        table.add_row([title, *(f"{rest[each] * 1e3:.1f}" for rest in rests), "", "", ""])
    return (
        f"{table}\nThe least processor time of {FLEETS} x {rounds} slices in turns; besides its jobs: in {REST_S} s"
        f" with {rests[1].scrapes} scrapes. {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(argv)
    print(measure(options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
