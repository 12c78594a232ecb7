"""`command = […]`: any program, in any language, as a worker.

The worker's process is the program's parent and stands in for it: it has the link to the supervisor
and the lifeline, so that cancel, receipt, drain, rolls, budgets of time and kills are those of every
worker, and the supervisor knows nothing of programs.

Theory of operation. `run` starts the program as a child in its own process group, and then watches
five things in one thread: the program's end, its two output streams, what it says on its notify
socket, and the cancel. The stop signal is sent by whichever thread cancels, so that a log that is
slow cannot hold it up. When the program has ended, so has `run`, and the process ends the same way:
with the program's exit code, or by its signal. What the program leaves behind is in the worker's
process group or a descendant of the worker: the supervisor kills it, and names it.

If this process is killed, the kernel kills the program (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

__all__ = ["run"]

import atexit
import faulthandler
import os
import resource
import select
import signal
import time
from typing import NoReturn

import msgspec

from supervisor.errors import ProgramError
from workers.command.notify import Notify
from workers.command.output import Output
from workers.command.program import Program, start
from workers.worker import Job, Worker

# When the program writes more than is logged, or talks without end, its next words wait this long:
# it is slowed down, and the processor is not ours alone.
PAUSE = 0.01
LEAST_DELAY = 0.1  # seconds


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to run; the supervisor makes it from the group's settings.

    `env` is added to the environment of this process. `is_ready_at_once`: it serves as soon as it is
    started.
    """

    argv: tuple[str, ...]
    folder: str
    env: dict[str, str]
    runtime_dir: str
    stop_signal: str
    notify: bool
    is_ready_at_once: bool
    watchdog: float  # seconds within which it must say WATCHDOG=1; 0: off


def run(worker: Worker) -> None:
    """Be the program's parent until it has ended; end as it did.

    Raises:
        ProgramError: it could not be started, or has ended with a failure that nobody asked for.
        SystemExit: with its exit code, which is not 0, after it had been told to stop.
    """
    command: Command = msgspec.convert(worker.options, Command)
    if worker.accepting.done:
        return
    notify = Notify(command.runtime_dir, worker.log) if command.notify else None
    try:
        environment = _environment(worker, command, notify)
        program = start(command.argv, command.folder, environment, worker.sockets)
        worker.program_pid = program.pid
        worker.log.info("worker.started", program=program.path, program_pid=program.pid)
        _Watch(worker, command, program, notify).until_its_end()
    finally:
        if notify is not None:
            notify.close()


def _environment(worker: Worker, command: Command, notify: Notify | None) -> dict[bytes, bytes]:
    """Return ours, the group's, and what tells the program where it is, as systemd's would."""
    named = {**command.env, "ACKVISOR_WORKER": worker.id, "ACKVISOR_GROUP": worker.group}
    if notify is not None:
        named["NOTIFY_SOCKET"] = notify.path
        if command.watchdog:
            named["WATCHDOG_USEC"] = str(round(command.watchdog * 1e6))
    ours = dict(os.environb)  # as bytes: not every variable is text
    return ours | {os.fsencode(name): os.fsencode(value) for name, value in named.items()}


class _Watch:
    """The loop of the main thread. Only `_stop` is called by others."""

    def __init__(
        self, worker: Worker, command: Command, program: Program, notify: Notify | None
    ) -> None:
        self._worker = worker
        self._command = command
        self._program = program
        self._notify = notify
        self._output = Output(
            {"stdout": program.stdout, "stderr": program.stderr}, worker.log, time.monotonic()
        )
        self._was_told_to_stop = False
        self._promised = 0.0  # by when it has said that it will be ready
        self._watched: Job | None = None  # from READY=1 on, where it has a watchdog
        self._poll = select.poll()
        for readable in (program.pidfd, program.stdout, program.stderr):
            self._poll.register(readable, select.POLLIN)
        if notify is not None:
            self._poll.register(notify, select.POLLIN)

    def until_its_end(self) -> None:
        """Carry what the program says, and conclude from its end."""
        if self._command.is_ready_at_once:
            self._worker.ready()
        self._worker.accepting.on_done(self._stop)
        while True:
            ready = {fd for fd, _ in self._poll.poll(self._timeout())}
            is_busy = self._hear(ready) | self._read(ready)
            if self._program.pidfd in ready:
                break
            if is_busy:
                time.sleep(PAUSE)
        self._output.finish(time.monotonic())
        self._conclude()

    def _timeout(self) -> float | None:
        due = self._output.due
        return None if due is None else max(0.0, due - time.monotonic()) * 1000 + 1

    def _hear(self, ready: set[int]) -> bool:
        """Take what it says of itself; True when there may be more."""
        notify = self._notify
        if notify is None or notify.fileno() not in ready:
            return False
        said, has_more = notify.receive()
        for name, value in said:
            match name:
                case "READY":
                    self._worker.ready()
                    self._begin_watching()
                case "WATCHDOG":
                    if self._watched is not None:
                        self._watched.busy_until(self._command.watchdog)
                case "STATUS" | "STOPPING":
                    self._worker.status = value if name == "STATUS" else "stopping"
                case "EXTEND_TIMEOUT_USEC":
                    self._delay(int(value) / 1e6)
                case _:
                    pass  # systemd's, and without a meaning here
        return has_more

    def _begin_watching(self) -> None:
        """Let its silence be a hang from now on: a job that each WATCHDOG=1 gives more time."""
        if self._command.watchdog and self._watched is None:
            self._watched = self._worker.job("watchdog").__enter__()

    def _delay(self, seconds: float) -> None:
        """Ask for more time to start; not for what makes no difference, however often it is said.

        A stop's deadline is the operator's word, and is not put off.
        """
        end = time.monotonic() + seconds
        if end > self._promised + LEAST_DELAY:
            self._promised = end
            self._worker.delay(seconds)

    def _read(self, ready: set[int]) -> bool:
        """Take what it writes; True when that is more than is logged."""
        now = time.monotonic()
        for fd in (self._program.stdout, self._program.stderr):
            if fd in ready and not self._output.read(fd, now):
                self._poll.unregister(fd)  # closed: it would be readable for ever
        self._output.time_passed(now)
        return self._output.is_over_its_limit

    def _stop(self) -> None:
        """Tell the program to stop. Any thread; never blocks.

        SIGCONT follows, since a stopped process would not hear of it.
        """
        self._was_told_to_stop = True
        self._program.signal(signal.Signals[self._command.stop_signal])
        self._program.signal(signal.SIGCONT)

    def _conclude(self) -> None:
        ended = self._program.wait()
        if self._watched is not None:
            self._watched.__exit__(None, None, None)
        name = os.path.basename(self._program.path)
        if ended.signal is not None:
            # At the very end of this process, so that the supervisor sees the signal itself.
            atexit.register(_end_by, ended.signal)
        if self._was_told_to_stop:
            raise SystemExit(ended.code)
        if ended.code or ended.signal is not None:
            raise ProgramError(f"{name} {ended}", self._output.last_lines, ended.code or 1)


def _end_by(number: int) -> NoReturn:
    """End this process by a signal, as its program ended; without another core dump."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    time.sleep(1.0)  # another thread may be the one to take it
    os._exit(128 + number)
