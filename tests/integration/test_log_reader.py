"""A log that nobody reads, or that cannot be written: supervision goes on, and says what is missing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from supervisor import log
from tests.supervised import DUE, Supervised, group, is_alive, wait_until

TALKER = """
def run(worker):
    worker.ready()
    number = 0
    while not worker.accepting.wait(0.002):
        number += 1
        worker.log.info("talk", number=number, padding="x" * 1000)
"""


class FullPipe:
    """A pipe that is full, and whose reader does not read until it is told to."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.reader, self.writer = ends
        self.read = bytearray()
        self._thread: threading.Thread | None = None
        filler = os.open(f"/proc/self/fd/{self.writer}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(filler, b"." * 4096)
        os.close(filler)

    def begin_to_read(self) -> None:
        """Read all there is, in a thread, until nobody has the other end."""
        os.close(self.writer)
        self.writer = -1
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self.reader, 65536):
            self.read += data

    def lines(self) -> list[dict[str, Any]]:
        """Return the log lines that have been read by now."""
        text = bytes(self.read).lstrip(b".")
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    def close(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
        if self._thread is not None:
            self._thread.join(DUE)
        os.close(self.reader)


@pytest.fixture
def full_pipe() -> Iterator[FullPipe]:
    pipe = FullPipe(os.pipe())
    yield pipe
    pipe.close()


def test_a_log_pipe_that_nobody_reads_stops_neither_supervision_nor_work(tmp_path, full_pipe):
    """Commands answer, the dead are replaced, work goes on, and a stop is an orderly one."""
    config = group("idle", "idle", count=2, backoff="1ms") + group("talk", "talker:run", count=2)
    supervised = Supervised(tmp_path, config, modules={"talker": TALKER})
    with supervised.start(output=full_pipe.writer):
        status = supervised.status_once_ready()
        victim = next(worker for worker in status["workers"] if worker["group"] == "idle")
        os.kill(victim["pid"], signal.SIGKILL)

        def is_replaced() -> bool:
            now = supervised.status()
            pids = {worker["pid"] for worker in now["workers"]}
            return victim["pid"] not in pids and now["groups"]["idle"]["ready"] == 2

        wait_until(is_replaced, "it is replaced")
        # Whoever shares the pipe with us finds it as it was.
        assert not fcntl.fcntl(full_pipe.writer, fcntl.F_GETFL) & os.O_NONBLOCK
        assert supervised.stop() == 0, "workers were killed because their log is not read"


def test_what_was_kept_comes_when_somebody_reads_again(tmp_path, full_pipe):
    """The first megabyte of each process, in order, and a line that says how much is missing."""
    config = group("talk", "talker:run", count=2)
    supervised = Supervised(tmp_path, config, modules={"talker": TALKER})
    with supervised.start(output=full_pipe.writer):
        supervised.status_once_ready()
        for _ in range(3):  # each of these is a line
            supervised.signal(signal.SIGUSR1)
        supervised.status()
        full_pipe.begin_to_read()
        wait_until(
            lambda: [line for line in full_pipe.lines() if line["event"] == "supervisor.status"],
            "what the supervisor has kept is written without anything else happening",
        )
        assert supervised.stop() == 0
    wait_until(lambda: full_pipe.lines()[-1]["event"] == "supervisor.stopped", "the last line")
    lines = full_pipe.lines()
    names = [line["event"] for line in lines if "worker" not in line]
    assert names[0] == "supervisor.ready"
    assert names[-1] == "supervisor.stopped"
    for worker in ("talk-1", "talk-2"):
        numbers = [
            line["number"] for line in lines if line.get("number") and line["worker"] == worker
        ]
        assert numbers == sorted(set(numbers))
        assert numbers[0] == 1


def test_lines_that_do_not_fit_are_counted(full_pipe):
    """Nothing is lost without a word: kept and missing lines are all that were written."""
    program = (
        "from supervisor import log\n"
        "log.configure('json', 'info', patience=0.0)\n"
        "for number in range(5000):\n"
        "    log.get_logger().info('line', number=number, padding='x' * 1000)\n"
        "print('written', flush=True)\n"
        "input()\n"
        "while log.backlog() is not None:\n"
        "    log.flush(0.1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=full_pipe.writer,
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"written\n"
        full_pipe.begin_to_read()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(DUE) == 0
    wait_until(lambda: full_pipe.lines()[-1]["event"] == "log.lines_lost", "the account")
    *kept, account = full_pipe.lines()
    assert [line["number"] for line in kept] == list(range(len(kept)))
    assert len(kept) + account["lines"] == 5000
    assert 500 < len(kept) < 2000


@pytest.mark.parametrize("room", [0, 20])
def test_what_a_full_disk_has_cost_is_told_when_there_is_room_again(tmp_path, room):
    """Each write fails, and nothing else does; the first one that does not is followed by a count.

    A line that had room for its beginning only spoils no other.
    """
    path = tmp_path / "log"
    program = (
        "import resource; from supervisor import log\n"
        "log.configure('json', 'info', patience=0.0)\n"
        "_, most = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, most))\n"
        "for number in range(7): log.get_logger().info('line', number=number)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "log.get_logger().info('line', number=7)\n"
        "log.get_logger().info('line', number=8)\n"
    )
    with path.open("ab") as file:
        subprocess.run([sys.executable, "-c", program], stderr=file, check=True, timeout=DUE)
    text = path.read_bytes()
    whole = text.splitlines()[1:] if room else text.splitlines()
    lines = [json.loads(line) for line in whole]
    assert [(line["event"], line.get("number", line.get("lines"))) for line in lines] == [
        ("line", 7),
        ("log.lines_lost", 7),
        ("line", 8),
    ]


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_log_socket_that_nobody_reads_stops_nobody(size):
    """systemd gives a socket: what does not fit is kept, and its blocking mode stays what it was."""
    ours, theirs = socket.socketpair()
    program = (
        "import sys; from supervisor import log\n"
        "log.configure('json', 'info')\n"
        f"for number in range(30): log.get_logger().info('line', number=number, text='x' * {size})\n"
        "print(log.backlog(), flush=True)\n"
        "input()\n"
        "log.flush(10.0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs.fileno(),
    )
    with process, ours:
        assert process.stdin is not None
        assert process.stdout is not None
        waits = process.stdout.readline().strip()
        assert waits == (b"2" if size > 1000 else b"None")
        assert theirs.getblocking()
        theirs.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        text = bytearray()
        while data := ours.recv(1 << 20):
            text += data
        assert process.wait(DUE) == 0
    lines = [json.loads(line) for line in text.splitlines()]
    kept = [line["number"] for line in lines if line["event"] == "line"]
    lost = sum(line["lines"] for line in lines if line["event"] == "log.lines_lost")
    assert kept == list(range(len(kept)))
    assert len(kept) + lost == 30


def test_an_unread_log_does_not_keep_the_guard_from_its_work(tmp_path, full_pipe):
    """The supervisor dies, its workers are stopped: all are killed, though no line can be written."""
    config = group("idle", "idle", count=3)
    supervised = Supervised(tmp_path, config, supervisor='grace = "500ms"')
    with supervised.start(output=full_pipe.writer):
        pids = [worker["pid"] for worker in supervised.status_once_ready()["workers"]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        os.kill(supervised.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in pids), "all are gone")
        wait_until(lambda: not supervised.processes(), "the template has gone, too")


def test_a_line_waits_less_than_a_receipt():
    """A line's patience is far below the second after which a cancel counts as unheard."""
    assert log.PATIENCE <= 0.25
