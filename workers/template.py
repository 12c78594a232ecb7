"""The template: one process per generation that imports the application once and forks workers.

It must never hold what a fork does not survive: no thread, no ZeroMQ context, no socket but the
one to its supervisor, no pool.

Theory of operation. A worker must become the supervisor's own child, or its end could not be waited
for. So the template forks a *midwife*, the midwife forks the workers and exits, and the kernel gives
its children to the nearest subreaper, which is the supervisor:

    template --fork--> midwife --fork--> worker, worker, ...
       |   <--- pids ---  |
       | opens a pidfd of each (a pid cannot be reused while its parent, the midwife, lives)
       +--- release --->  exits;  each worker waits for that, then reports its birth by its lifeline

Its last service: when the supervisor dies, every worker drains itself by its deadline; what is still
there then (stopped by SIGSTOP, holding the interpreter lock) is killed by the template, which holds
the pidfds. It imports nothing any more at that time and depends on nobody.
"""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from typing import NoReturn

import msgspec
from setproctitle import setproctitle

from supervisor import lineage, log
from supervisor.errors import WireError
from supervisor.protocol import (
    Fork,
    FromTemplate,
    Grace,
    Identity,
    Load,
    Loaded,
    ToTemplate,
    Unloadable,
    decode,
    encode,
)
from workers import runtime

CONTROL_FD = 3  # supervisor.launch.CONTROL_FD: where the socket to the supervisor is
MAX_MESSAGE = 1 << 20
LEAVING = 0.25  # seconds that a thread may take to end once it has been joined
MAX_HELD = 64  # descriptors for the workers of one midwife: a lifeline each, and their sockets
MAX_RECEIVED = 128  # descriptors with one request
_PID = _FD = struct.Struct("=i")
# Workers get the limits that the template was started with; for itself it raises them.
_DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)
# Workers end themselves at their deadline; the guard comes after that, or it would race with them.
GUARD_MARGIN = 0.5
LAST_LINES = 0.2  # seconds that a log which nobody reads may keep the guard

_Request = tuple[Fork, list[int]]  # its lifeline first, then its sockets


def main() -> NoReturn:
    """Serve one supervisor until it ends. Never returns; never raises into the interpreter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a pidfd for each worker
    lineage.mark(os.getpid())
    control = socket.socket(fileno=CONTROL_FD)
    control.set_inheritable(False)
    try:
        _Template(control).serve()
    except BaseException:  # a template that dies is replaced; its traceback must not be lost
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


class _Template:
    """What the template knows: its supervisor, and the workers that it has forked."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._supervisor = os.getppid()
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._workers: dict[int, tuple[int, str]] = {}  # pidfd -> pid, worker id
        self._grace = 0.0
        self._endpoint = ""  # where workers connect, if not where they are told

    def serve(self) -> None:
        """Carry out requests until the supervisor has gone; then see its workers off."""
        while True:
            ready = [fd for fd, _ in self._poll.poll()]
            # First of all: the supervisor's end comes before the ends that follow from it, and
            # what those workers leave behind is ours to end then.
            if self._control.fileno() in ready:
                ready.remove(self._control.fileno())
                if not self._requests():
                    self._guard()
                    return
            for pidfd in ready:
                self._forget(pidfd)

    # --- requests ------------------------------------------------------------------------------

    def _requests(self) -> bool:
        """Take all requests that are there, forks in batches. False: the supervisor has gone."""
        batch: list[_Request] = []
        held = 0
        alive = True
        while alive and held < MAX_HELD:
            try:
                frame, fds = _receive(self._control)
            except BlockingIOError:
                break
            except ConnectionError:
                frame, fds = b"", []
            if not frame:
                alive = False
            elif (message := self._decoded(frame)) is None:
                _close(fds)
            elif isinstance(message, Load):
                self._load(message, fds)
            elif isinstance(message, Grace):
                self._grace = message.seconds
            elif len(fds) != 1 + len(message.assignment.sockets):
                # There are no descriptors left; its lifeline tells that it is not born.
                _close(fds)
            else:
                batch.append((self._reachable(message), fds))
                held += len(fds)
        if batch and alive:
            self._beget(batch)
        return alive

    def _reachable(self, fork: Fork) -> Fork:
        """Have the worker go through the descriptor that we hold, where the path is closed to it."""
        if not self._endpoint:
            return fork
        return Fork(msgspec.structs.replace(fork.assignment, endpoint=self._endpoint))

    def _decoded(self, frame: bytes) -> Load | Fork | Grace | None:
        try:
            return decode(frame, ToTemplate)  # type: ignore[arg-type]
        except WireError as exc:  # one version of the code speaks to itself: a bug, not an attack
            print(f"BUG: template: {exc}", file=sys.stderr, flush=True)  # noqa: T201
            return None

    def _load(self, load: Load, fds: list[int]) -> None:
        setproctitle(f"supervisor: template of {load.name}, generation {load.generation}")
        self._grace = load.grace
        log.configure(
            load.log_format, load.log_level
        )  # what the application configures comes later
        if load.identity is not None:  # before any line of the application's runs
            self._become(load.identity)
            self._endpoint = f"ipc:///proc/self/fd/{fds[0]}"
        os.environ.update(load.env)
        sys.path[:0] = [folder for folder in load.path if folder not in sys.path]
        runtime.preload(load.schemes)
        gc.freeze()  # what is the same for every application need not be looked through
        gc.enable()
        for entry_point in load.entry_points:
            # What does not import here, each worker finds out and reports with its traceback.
            with contextlib.suppress(BaseException):
                runtime.preload_entry(entry_point, load.schemes)
            found = _unforkable(self._control.fileno())
            if found:
                self._tell(Unloadable(entry_point, found))
                os._exit(0)
        loaded = Loaded(_folders())
        gc.collect()
        gc.disable()  # a collection in the parent would unshare the pages of its children
        gc.freeze()
        self._tell(loaded)

    def _become(self, user: Identity) -> None:
        from supervisor.privileges import become

        try:
            become(user)
        except OSError as exc:
            log.get_logger().error("template.kept_rights", user=user.name, error=str(exc))
            log.flush(LAST_LINES)
            os._exit(1)

    def _tell(self, message: FromTemplate) -> None:
        with contextlib.suppress(ConnectionError):  # its end is seen where requests are read
            self._control.send(encode(message))

    # --- forking -------------------------------------------------------------------------------

    def _beget(self, batch: list[_Request]) -> None:
        """Fork one worker per request, each of them the supervisor's own child."""
        news, news_out = os.pipe()
        release_in, release = os.pipe()
        try:
            midwife = os.fork()
        except OSError as exc:
            _refuse(batch, exc)
            _close([news, news_out, release_in, release])
            return
        if midwife == 0:
            try:
                self._control.close()
                _close([*self._workers, news, release])
                _midwife(batch, self._supervisor, news_out, release_in)
            finally:
                os._exit(1)
        _close([news_out, release_in, *(fd for _, fds in batch for fd in fds)])
        for fork, pid in zip((fork for fork, _ in batch), _pids(news), strict=False):
            if pid > 0:
                pidfd = os.pidfd_open(pid)
                self._workers[pidfd] = (pid, fork.assignment.worker)
                self._poll.register(pidfd, select.POLLIN)
        _close([news, release])
        os.waitpid(midwife, 0)

    def _forget(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        del self._workers[pidfd]
        os.close(pidfd)

    # --- when the supervisor has died --------------------------------------------------------------

    def _guard(self) -> None:
        """Wait until the workers have drained themselves; kill what is left at the deadline.

        What a worker leaves behind in its process group goes with it, as in every stop.
        """
        deadline = time.monotonic() + self._grace + GUARD_MARGIN
        self._poll.unregister(self._control)
        workers = [pid for pid, _ in self._workers.values()]
        while self._workers and (left := deadline - time.monotonic()) > 0:
            for pidfd, _ in self._poll.poll(left * 1000):
                pid, _ = self._workers[pidfd]
                self._forget(pidfd)
                _kill_group(pid)
        for pid, _ in self._workers.values():
            _kill_group(pid)
        lineage.kill([*workers, os.getpid()])  # what has left its group, and what the imports began
        # Last of all: who reads the log may have died as well, or may not read.
        for pid, worker in self._workers.values():
            log.write(
                f"supervisor: worker {worker} (pid {pid}) has outlived its supervisor by "
                f"{self._grace:g} s of grace: SIGKILL to its process group\n"
            )
        log.flush(LAST_LINES)


def _kill_group(pgid: int) -> None:
    # A number that a group still has is not given to a new process, so nobody else is hit.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one message and its descriptors (`socket.recv_fds` ignores its flags)."""
    frame, ancillary, _, _ = control.recvmsg(
        MAX_MESSAGE,
        socket.CMSG_LEN(MAX_RECEIVED * _FD.size),
        socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
    )
    return frame, [
        fd
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for (fd,) in _FD.iter_unpack(data[: len(data) - len(data) % _FD.size])
    ]


def _midwife(batch: list[_Request], supervisor: int, news: int, release: int) -> None:
    # Readable once her children have another parent; a pipe's end would come before that.
    herself = os.pidfd_open(os.getpid())
    runtime.prepare()
    # Python forgets, in a new process, the signals that it has seen but not handled yet: what comes
    # in the first moment of a worker's life must wait in the kernel.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    for position, (fork, (lifeline, *sockets)) in enumerate(batch):
        try:
            pid = os.fork()
        except OSError as exc:
            _refuse([batch[position]], exc)
            os.write(news, _PID.pack(0))
            continue
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            _close([news, release, *(fd for _, fds in batch[position + 1 :] for fd in fds)])
            select.select([herself], [], [])
            os.close(herself)
            resource.setrlimit(resource.RLIMIT_NOFILE, _DESCRIPTORS)
            runtime.live(fork.assignment, lifeline, supervisor, sockets)
        lineage.mark(pid)  # it waits for our end, so it has started nothing yet
        _close([lifeline, *sockets])
        os.write(news, _PID.pack(pid))
    os.close(news)
    os.read(release, 1)  # until the template holds the pidfds
    os._exit(0)


def _pids(news: int) -> Iterable[int]:
    """Yield the pids that a midwife reports, 0 for a fork that failed, until she is done."""
    data = b""
    while True:
        while len(data) >= _PID.size:
            yield int(_PID.unpack_from(data)[0])
            data = data[_PID.size :]
        more = os.read(news, 4096)
        if not more:
            return
        data += more


def _refuse(batch: list[_Request], exc: OSError) -> None:
    """Say on each lifeline why no worker comes of it. Closing it means the same without reason."""
    for _, (lifeline, *sockets) in batch:
        with contextlib.suppress(OSError):
            os.write(lifeline, f"!fork: {exc.strerror}".encode())
        _close([lifeline, *sockets])


def _unforkable(*own: int) -> tuple[str, ...]:
    """Name what a fork would not survive: threads, also those of C code, and sockets."""
    # A thread that has been joined is the kernel's a moment longer (an executor that was shut down).
    deadline = time.monotonic() + LEAVING
    while _count_threads() > threading.active_count() and time.monotonic() < deadline:
        time.sleep(0.001)
    found = [
        f"thread {thread.name}"
        for thread in threading.enumerate()
        if thread is not threading.main_thread()
    ]
    native = _count_threads() - 1 - len(found)
    if native > 0:
        found.append(f"{native} thread(s) of native code")
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor has gone by now
            target = os.readlink(f"/proc/self/fd/{name}")
            if int(name) > 2 and int(name) not in own and target.startswith("socket:"):  # noqa: PLR2004
                found.append(f"socket on descriptor {name}")
    return tuple(found)


def _count_threads() -> int:
    """Count the threads that the kernel knows."""
    return len(os.listdir("/proc/self/task"))


def _folders() -> tuple[str, ...]:
    """Return where the modules that are imported came from, the standard library's apart."""
    # Not by getattr: a module may import others when it is asked for an attribute.
    files = (getattr(m, "__dict__", {}).get("__file__") for m in list(sys.modules.values()))
    folders = {os.path.dirname(file) for file in files if isinstance(file, str)}
    library = os.path.dirname(os.__file__)
    return tuple(
        folder
        for folder in sorted(folders)
        if not folder.startswith(library) or "site-packages" in folder
    )


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
