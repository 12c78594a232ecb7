"""The program itself: started, signalled, its end. Only the worker's main thread starts one.

Theory of operation. Between fork and exec the child lives in a copy of a process that had more
threads: it imports nothing, takes no lock, and leaves by exec or `_exit`. What goes wrong there is
written to a pipe which a successful exec closes.
"""

from __future__ import annotations

__all__ = ["Ended", "Program", "start"]

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from supervisor.errors import ProgramError

EXEC_DUE = 30.0  # seconds for an exec: it may have to come over a network
FIRST_SOCKET = 3  # SD_LISTEN_FDS_START
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program has ended: by itself with a code, or by a signal."""

    code: int
    signal: int | None

    def __str__(self) -> str:
        """Read as `ended with code 3`, `was ended by SIGSEGV`."""
        if self.signal is None:
            return f"ended with code {self.code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(self.signal).name}"
        return f"was ended by signal {self.signal}"


@dataclass(frozen=True, slots=True)
class Program:
    """A program that runs. Its descriptors are never closed: this process ends with it."""

    path: str
    pid: int
    pidfd: int
    stdout: int
    stderr: int

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended. Any thread."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> Ended:
        """Return how it has ended, as soon as it has. Called once."""
        ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        assert ended is not None
        if ended.si_code == os.CLD_EXITED:
            return Ended(ended.si_status, None)
        return Ended(0, ended.si_status)


def start(
    argv: Sequence[str],
    folder: str,
    environment: Mapping[bytes, bytes],
    sockets: Mapping[str, socket.socket],
) -> Program:
    """Start a program as a child in this process group.

    Args:
        argv: its words; the first is looked up in the environment's PATH, or in `folder` where it
            has a slash.
        folder: where it runs.
        environment: all of it, but for what only the child can know.
        sockets: what it inherits, as sd_listen_fds(3) has it.

    Raises:
        ProgramError: it could not be started, and why.
    """
    path = _found(argv[0], folder, environment)
    out, their_out = os.pipe()
    err, their_err = os.pipe()
    report, their_report = os.pipe()
    child = _Child(
        path=path,
        argv=argv,
        folder=folder,
        environment={**environment, **_listening(sockets)},
        parent=os.getpid(),
        sockets=tuple(each.fileno() for each in sockets.values()),
        out=their_out,
        err=their_err,
        report=their_report,
        highest=max(map(int, os.listdir("/proc/self/fd"))),
        prctl=ctypes.CDLL(None, use_errno=True).prctl,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the module's docstring answers it
            pid = os.fork()
    except OSError as exc:
        raise ProgramError(f'cannot start "{argv[0]}": {exc.strerror}') from exc
    if pid == 0:
        child.become_it()
    for fd in (their_out, their_err, their_report):
        os.close(fd)
    pidfd = os.pidfd_open(pid)
    fault = _fault(report)
    os.close(report)
    if fault:
        os.waitid(os.P_PID, pid, os.WEXITED)
        for fd in (out, err, pidfd):
            os.close(fd)
        number, _, stage = fault.partition(" ")
        raise ProgramError(_why_not(argv[0], path, folder, int(number), stage))
    for fd in (out, err):
        os.set_blocking(fd, False)
    return Program(path, pid, pidfd, out, err)


def _found(program: str, folder: str, environment: Mapping[bytes, bytes]) -> str:
    """Return the path of a program, as a shell would find it in `folder`."""
    if "/" in program:
        return os.path.join(folder, program)
    places = os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath)))
    for place in places.split(os.pathsep):
        path = os.path.join(folder, place, program)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise ProgramError(f'cannot start "{program}": there is no such program in PATH ({places})')


def _listening(sockets: Mapping[str, socket.socket]) -> dict[bytes, bytes]:
    if not sockets:
        return {}
    names = ":".join(sockets)
    return {b"LISTEN_FDS": str(len(sockets)).encode(), b"LISTEN_FDNAMES": names.encode()}


def _fault(report: int) -> str:
    """Return what the child could not do; "" when it has become the program."""
    poll = select.poll()
    poll.register(report, select.POLLIN)
    if not poll.poll(EXEC_DUE * 1000):
        return ""  # it is still about it; its end tells what comes of it
    return os.read(report, 100).decode()


def _why_not(program: str, path: str, folder: str, number: int, stage: str) -> str:
    what = f'cannot start "{program}"'
    if stage == "chdir":
        return f"{what}: cannot go to its folder {folder}: {os.strerror(number)}"
    match number:
        case errno.ENOENT if os.path.exists(path):
            return f"{what}: the interpreter that {path} names in its first line does not exist"
        case errno.ENOENT:
            return f"{what}: there is no file {path}"
        case errno.EACCES:
            return f"{what}: {path} must be a file that user {os.geteuid()} may execute"
        case errno.ENOEXEC:
            return f"{what}: {path} is neither a program nor a script with #! in its first line"
        case _:
            return f"{what}: {stage}: {os.strerror(number)}"


@dataclass(frozen=True, slots=True)
class _Child:
    """What the child needs between fork and exec, made before the fork."""

    path: str
    argv: Sequence[str]
    folder: str
    environment: dict[bytes, bytes]
    parent: int
    sockets: tuple[int, ...]
    out: int
    err: int
    report: int
    highest: int  # the highest descriptor that is open; threads open none that is inherited
    prctl: Any

    def become_it(self) -> NoReturn:
        stage, report = "prctl", self.report
        try:
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                with contextlib.suppress(OSError):  # the C library's own
                    signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            # The parent's thread that forks is its main thread, which ends with the process only.
            self.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != self.parent:
                os._exit(1)  # it has died before that was in force
            stage = "descriptors"
            report = self._arrange_descriptors()
            stage = "chdir"
            os.chdir(self.folder)
            own = str(os.getpid()).encode()
            if self.sockets:
                self.environment[b"LISTEN_PID"] = own
            if b"WATCHDOG_USEC" in self.environment:
                self.environment[b"WATCHDOG_PID"] = own
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            stage = "exec"
            os.execve(self.path, list(self.argv), self.environment)  # noqa: S606
        except OSError as exc:
            os.write(report, f"{exc.errno} {stage}".encode())
        finally:
            os._exit(127)

    def _arrange_descriptors(self) -> int:
        """Have standard streams, then the sockets, and nothing else; return where `report` is.

        All of them are lifted above every place that is to be taken before one is put there.
        """
        end = FIRST_SOCKET + len(self.sockets)
        sources = (self.out, self.err, *self.sockets, self.report)
        lifted = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end + 1) for fd in sources]
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for target, fd in enumerate(lifted[:-1], start=1):
            os.dup2(fd, target)
        os.dup2(lifted[-1], end, inheritable=False)
        os.closerange(end + 1, max(*lifted, self.highest) + 1)
        return end
