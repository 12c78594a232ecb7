"""One contender, started: its tree of processes, watched from outside, the same for all.

- Ready is what the workers say: each writes its pid into one FIFO.
- Gone is what the kernel says: a pidfd of every process of the tree, opened before the signal,
  and a look over the whole process table after it.
- Idle is what the scheduler says: context switches, voluntary or not, of every thread.

This process is a child subreaper, so that what a dead supervisor leaves behind can be found,
and `close` leaves nothing: neither processes nor files, also on the way out of a Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

from bench.contenders import ROOT, Contender, Task

_READY_DEADLINE_S = 60.0
_GONE_DEADLINE_S = 30.0
_REPLACED_DEADLINE_S = 15.0
_KILLED_DEADLINE_S = 10.0
_LOG_TAIL = 1_500

_PR_SET_CHILD_SUBREAPER = 36


class ContenderError(Exception):
    """A contender did not do what is measured: it died, it was late, it lost work."""


class LateError(ContenderError):
    """Processes were still there at the deadline."""


class _Process(NamedTuple):
    pid: int
    started: int  # in ticks since boot: with the pid it names one process for good
    parent: int
    is_zombie: bool


def become_subreaper() -> None:
    """Have orphans of a dead supervisor become children of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


class Roll(NamedTuple):
    """What a roll came to, as seen from outside."""

    seconds: float  # from the signal to the end of the last old worker
    missing: int  # how many of the workers were not there in its worst moment
    old_code: int  # how many of the new ones run what was there before


class Fleet:
    """A context manager: starts `contender` with `workers` workers and waits until all are ready.

    Raises:
        ContenderError: it did not come up; `log` says what it printed.
    """

    _roots: ClassVar[set[int]] = set()  # pids of the supervisors of all open fleets

    def __init__(self, contender: Contender, *, workers: int, finish_s: float = 0.0) -> None:
        self.start_s = 0.0
        self.workers: list[int] = []  # the living, in the order in which they became ready
        self._folder = tempfile.TemporaryDirectory(prefix="ackvisor-bench-")
        self._task = Task(Path(self._folder.name), workers, finish_s)
        self._name = contender.name
        self._command = contender.command
        self._popen: subprocess.Popen[bytes] | None = None
        self._seen: set[tuple[int, int]] = set()  # pid and start of each process of the tree
        self._foreign = {p.pid for p in _process_table() if p.parent == os.getpid()}
        self._root = -1  # pidfd of the supervisor
        self._fifo = -1
        self._unread = b""
        self._versions: dict[int, int] = {}  # which code each worker runs

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        os.mkfifo(self._task.ready)
        self._task.release(1)
        # Open for writing too: the FIFO never ends, however few workers have it open.
        self._fifo = os.open(self._task.ready, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        command = self._command(self._task)
        with self._log_path.open("wb") as log, _undisturbed():
            begun = time.monotonic()
            self._popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._task.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._seen.add((self._popen.pid, _process(self._popen.pid).started))
            self._roots.add(self._popen.pid)
            self._root = os.pidfd_open(self._popen.pid)
        self._await_ready(self._task.workers, begun + _READY_DEADLINE_S)
        self.start_s = time.monotonic() - begun

    @property
    def _log_path(self) -> Path:
        return self._task.folder / "log"

    @property
    def _pid(self) -> int:
        if self._popen is None:
            raise RuntimeError("BUG: the fleet was not started")
        return self._popen.pid

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def _error(self, message: str) -> str:
        return f"{self._name} {message}; it said:\n{self.log()[-_LOG_TAIL:]}"

    def _await_ready(self, count: int, deadline: float) -> None:
        """Wait until `count` more workers have said that they are ready."""
        poll = select.poll()
        poll.register(self._fifo, select.POLLIN)
        poll.register(self._root, select.POLLIN)
        while count > 0:
            left_ms = (deadline - time.monotonic()) * 1_000
            happened = dict(poll.poll(left_ms)) if left_ms > 0 else {}
            if not happened:
                raise ContenderError(self._error(f"has {count} workers not ready in time"))
            if self._fifo not in happened:
                raise ContenderError(self._error("ended before its workers were ready"))
            born = self._read_ready()
            self.workers += born
            count -= len(born)

    def _read_ready(self) -> list[int]:
        """Return who has said that it is ready, and note which code it runs."""
        *lines, self._unread = (self._unread + os.read(self._fifo, 4_096)).split(b"\n")
        said = [tuple(map(int, line.split())) for line in lines]
        self._versions |= dict(said)
        return [pid for pid, _ in said]

    def processes(self) -> list[int]:
        """The living processes of the tree: all descendants, also of what has died since."""
        return [process.pid for process in self._tree() if not process.is_zombie]

    def _tree(self) -> list[_Process]:
        table = list(_process_table())
        # A child of this process that it did not start is an orphan of the tree: it was born and
        # lost its parent between two looks.
        known = self._foreign | self._roots
        tree = {
            p.pid: p
            for p in table
            if (p.pid, p.started) in self._seen or (p.parent == os.getpid() and p.pid not in known)
        }
        while found := {p.pid: p for p in table if p.parent in tree and p.pid not in tree}:
            tree |= found
        self._seen |= {(process.pid, process.started) for process in tree.values()}
        return list(tree.values())

    def stop(self) -> float:
        """SIGTERM to the supervisor; the seconds until the last process of the tree has gone.

        Raises:
            ContenderError: it did not go, ended with another status than 0, or did not finish
                what its workers had left.
        """
        elapsed_s = self._signal_and_await_all(signal.SIGTERM, _GONE_DEADLINE_S)
        code = self._popen.wait() if self._popen else None
        if code != 0:
            raise ContenderError(self._error(f"stopped with status {code}"))
        if elapsed_s < self._task.finish_s:
            raise ContenderError(self._error("stopped before its workers' work was done"))
        return elapsed_s

    def orphan(self, deadline_s: float) -> float:
        """SIGKILL to the supervisor; the seconds until the last process of the tree has gone.

        Raises:
            LateError: somebody lived longer than `deadline_s`.
        """
        return self._signal_and_await_all(signal.SIGKILL, deadline_s)

    def _signal_and_await_all(self, signum: int, deadline_s: float) -> float:
        with contextlib.ExitStack() as stack:
            # The supervisor first: it is mostly the last to go, so that this process is woken
            # once or twice and does not compete with those it measures.
            pids = [self._pid, *(pid for pid in self.processes() if pid != self._pid)]
            watched = _pidfds(pids, stack)
            begun = time.monotonic()
            signal.pidfd_send_signal(self._root, signum)
            while True:
                self._await_gone(watched.values(), begun + deadline_s)
                elapsed_s = time.monotonic() - begun
                # Somebody who was born meanwhile belongs to the tree as well.
                born = self.processes()
                if not born:
                    return elapsed_s
                watched = _pidfds(born, stack)

    def _await_gone(self, pidfds: Iterable[int], deadline: float) -> None:
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1_000):
                raise LateError(self._error(f"still has {len(self.processes())} processes"))

    def replace_one(self) -> float:
        """SIGKILL to the oldest worker; the seconds until its replacement is ready."""
        with contextlib.ExitStack() as stack:
            victims = _pidfds([self.workers.pop(0)], stack)
            if not victims:
                raise ContenderError(self._error("lost a worker that nobody killed"))
            begun = time.monotonic()
            for victim in victims.values():
                _send(victim, signal.SIGKILL)
            self._await_ready(1, begun + _REPLACED_DEADLINE_S)
            return time.monotonic() - begun

    def roll(self) -> Roll:
        """SIGHUP with other code on disk; what comes of it until all workers are new.

        Raises:
            ContenderError: they were not all replaced in time.
        """
        old, count = set(self.workers), len(self.workers)
        self._task.release(2)
        with contextlib.ExitStack() as stack:
            there = _pidfds(self.workers, stack)
            poll = select.poll()
            for descriptor in (self._fifo, *there.values()):
                poll.register(descriptor, select.POLLIN)
            fewest = count
            begun = time.monotonic()
            signal.pidfd_send_signal(self._root, signal.SIGHUP)
            while old & set(there) or len(there) < count:
                left_ms = (begun + _REPLACED_DEADLINE_S - time.monotonic()) * 1_000
                happened = {fd for fd, _ in poll.poll(max(0.0, left_ms))}
                if not happened:
                    raise ContenderError(self._error("did not replace its workers in time"))
                if self._fifo in happened:  # who comes before who goes, in one look
                    for pid, pidfd in _pidfds(self._read_ready(), stack).items():
                        there[pid] = pidfd
                        poll.register(pidfd, select.POLLIN)
                for pid in [pid for pid, pidfd in there.items() if pidfd in happened]:
                    poll.unregister(there.pop(pid))
                fewest = min(fewest, len(there))
            seconds = time.monotonic() - begun
        self.workers = list(there)
        stale = sum(self._versions[pid] < 2 for pid in there)
        return Roll(seconds, max(0, count - fewest), stale)

    def pss_bytes(self) -> int:
        """Proportional set size of the whole tree, the supervisor included."""
        return sum(_pss_bytes(pid) for pid in self.processes())

    def switches(self) -> dict[tuple[int, int], int]:
        """Context switches so far, by process and thread."""
        return dict(_switches(self.processes()))

    def close(self) -> None:
        """Kill and reap whatever is left, remove the folder. A Ctrl-C waits until that is done."""
        with _undisturbed():
            try:
                if self._popen is not None:
                    self._kill_all()
                    self._popen.wait()
                    self._roots.discard(self._popen.pid)
                    self._reap_orphans()
            finally:
                for descriptor in (self._fifo, self._root):
                    if descriptor >= 0:
                        os.close(descriptor)
                self._fifo = self._root = -1
                self._folder.cleanup()

    def _kill_all(self) -> None:
        with contextlib.ExitStack() as stack:
            stopped: dict[int, int] = {}
            # Stopped first, until nobody new is found: who is killed while it forks leaves a
            # child that nothing connects to the tree any more.
            while born := _pidfds((p for p in self.processes() if p not in stopped), stack):
                for pidfd in born.values():
                    _send(pidfd, signal.SIGSTOP)
                stopped |= born
            for pidfd in stopped.values():
                _send(pidfd, signal.SIGKILL)
            self._await_gone(stopped.values(), time.monotonic() + _KILLED_DEADLINE_S)

    def _reap_orphans(self) -> None:
        for process in self._tree():
            if process.parent == os.getpid():
                os.waitpid(process.pid, 0)


def run_to_end(command: list[str], task: Task, deadline_s: float) -> str:
    """Run a command that measures itself; return what it printed.

    Raises:
        ContenderError: it failed or was late.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=task.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as popen:
        try:
            printed, complaint = popen.communicate(timeout=deadline_s)
        except BaseException as error:
            # Not reaped yet: the number of its group is still its own.
            os.killpg(popen.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise ContenderError(f"{' '.join(command)} took over {deadline_s} s") from error
            raise
    if popen.returncode:
        raise ContenderError(f"{' '.join(command)} failed:\n{complaint[-_LOG_TAIL:]}")
    return printed


def _process_table() -> Iterator[_Process]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield _process(int(entry.name))


def _process(pid: int) -> _Process:
    # The name in parentheses may hold anything: what follows the last one counts.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _Process(pid, int(fields[19]), int(fields[1]), is_zombie=fields[0] in "ZX")


def _pidfds(pids: Iterable[int], stack: contextlib.ExitStack) -> dict[int, int]:
    """Open a pidfd for each process that is still there, in the same order; `stack` closes it."""
    opened = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            opened[pid] = os.pidfd_open(pid)
            stack.callback(os.close, opened[pid])
    return opened


def _send(pidfd: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signum)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is done: for what must not be half done."""
    held: list[int] = []
    handlers = {
        signum: signal.signal(signum, lambda number, _: held.append(number))
        for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for number in held:
            signal.raise_signal(number)


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1_024
    return 0


def _switches(pids: Iterable[int]) -> Iterator[tuple[tuple[int, int], int]]:
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
                counts = [
                    int(line.split()[1])
                    for line in status.splitlines()
                    if line.startswith(("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"))
                ]
                yield (pid, int(thread)), sum(counts)
