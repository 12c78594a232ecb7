"""Control sockets: one ROUTER to the workers, one to the command line. Files in `runtime_dir`.

A worker is whoever shows the token that was handed to it at its spawn; everything else that comes
in (frames that do not parse, strangers, what comes after an end) is counted, logged and dropped.
"""

from __future__ import annotations

__all__ = ["Control", "Flooded", "RuntimeDir", "client_endpoint"]

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from supervisor.core.flood import Meter
from supervisor.errors import (
    AlreadyRunningError,
    ConfigError,
    Problem,
    SupervisorError,
    WireError,
)
from supervisor.protocol import (
    MAX_BYTES,
    FromClient,
    FromWorker,
    Hello,
    LeakFound,
    ToClient,
    ToWorker,
    decode,
    encode,
)

# What one turn of the loop reads from each side at most, so that a flood cannot stall the rest. A
# ROUTER takes from its peers in turn: who has one message to say is heard in the same turn.
WORKER_BUDGET = 300  # messages
CLIENT_BUDGET = 20
TURN_BYTES = 1 << 22
# What waits in memory for us, or for a peer that does not read, of each connection.
WORKER_QUEUE = 64  # messages of at most MAX_BYTES
CLIENT_QUEUE = 16
MAX_REQUEST = 1 << 16  # bytes; a client names a group, no more
HANDSHAKE_MS = 10_000  # who connects has said what it speaks by then, or is cut off
BACKLOG = 1024  # who connects when it is full tries again a tenth of a second later
LEAK_WEIGHT = 20  # a leak that is reported is written: it counts as so many messages
MAX_DETAIL = 200  # characters of what a stranger says that are logged
LOCK_DUE = 0.5  # seconds in which a command that holds the lock has let go of it
COMMANDS_DUE = 5.0  # and in which all of them have, however many there are
FAREWELL_MS = 300  # how long the end of the process may wait for answers to be sent

_LOCK = "lock"
_SOCKETS = ("workers.sock", "control.sock")
_OURS = (_LOCK, *_SOCKETS, "held")


def client_endpoint(runtime_dir: Path) -> str:
    """Return where a supervisor answers the command line."""
    return f"ipc://{runtime_dir}/control.sock"


class RuntimeDir:
    """The private folder of one supervisor, locked for its life.

    Args:
        path: the folder; it is made where it is missing.
        name: the supervisor's.
        source: the file that names the folder, for who reads what is wrong with it.

    Raises:
        AlreadyRunningError: another supervisor holds the lock.
        ConfigError: the folder cannot be made, or is not private.
        SupervisorError: its disk is full.
    """

    def __init__(self, path: Path, name: str, source: str = "supervisor") -> None:
        self.path = path
        self._source = source
        try:
            if path.exists() and not path.is_dir():
                raise self._unfit(f"{path} is no folder")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._demand_private(path)
            # A link would have us write into whatever it points to.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(path / _LOCK, flags, 0o600)
        except OSError as exc:
            raise self._refused(exc) from exc
        if not self._locked(self._lock):
            pid = self._pid()
            os.close(self._lock)
            raise AlreadyRunningError(
                f"a supervisor named {name!r} already runs (pid {pid or 'unknown'}) in {path}"
            )
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            os.close(self._lock)
            raise self._refused(exc) from exc
        # What tidies /tmp by age leaves alone, with all that is in it, a folder that is locked: else
        # the lock itself would go, and nobody could find this supervisor, or start none beside it.
        self._locked(self._folder)

    def _locked(self, descriptor: int) -> bool:
        """Take the lock. A command that looks who holds it has it for a moment."""
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = time.monotonic() - begun
                if waited >= COMMANDS_DUE or (waited >= LOCK_DUE and self._is_left_by_the_living()):
                    return False
                time.sleep(0.001)
            else:
                return True

    def _pid(self) -> str:
        return os.pread(self._lock, 32, 0).decode(errors="replace").strip()

    def _is_left_by_the_living(self) -> bool:
        """Whether whoever wrote the lock last is still there; else it is commands that hold it."""
        written = self._pid()
        if not written.isdecimal() or int(written) == os.getpid():
            return False
        try:
            os.kill(int(written), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _demand_private(self, path: Path) -> None:
        """Have the folder be ours alone, without taking anything away from anybody."""
        found = path.stat()
        # Also a link must be ours: somebody else's would choose the folder.
        if {found.st_uid, path.lstat().st_uid} != {os.geteuid()}:
            raise self._unfit(f"{path} belongs to another user")
        mode = stat.S_IMODE(found.st_mode)
        strangers = sorted(set(os.listdir(path)) - set(_OURS)) if mode & 0o077 else []
        if mode & 0o022:
            is_shared = strangers or mode & stat.S_ISVTX
            remedy = "name a folder of its own" if is_shared else "chmod 700 it"
            raise self._unfit(f"{path} may be written to by other users; {remedy}")
        if strangers:
            raise self._unfit(
                f"{path} is not private and holds other things ({strangers[0]}); "
                "name a folder of its own"
            )
        if mode != 0o700:  # noqa: PLR2004
            path.chmod(0o700)

    def _refused(self, exc: OSError) -> SupervisorError:
        """Return what is wrong: the file, unless it is something that passes."""
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            return SupervisorError(f"nothing can be written to {self.path}: {exc.strerror}")
        return self._unfit(f"{self.path}: {exc.strerror}")

    def _unfit(self, message: str) -> ConfigError:
        return ConfigError(self._source, [Problem("supervisor.runtime_dir", message)])

    def release(self) -> None:
        """Remove the sockets, then give up the lock. What a crash leaves is removed at a start."""
        # Those of programs are left by workers that were killed.
        notify = [name for name in os.listdir(self.path) if name.startswith("notify-")]
        for name in (*_SOCKETS, *notify):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()
        os.close(self._folder)
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class Flooded:
    """A worker has sent so much that it counts as gone mad. Nothing more of it is heard."""

    why: str


class Control:
    """Both ROUTERs. Owned by the loop's thread.

    Args:
        runtime_dir: the folder; its lock must be held.
        on_drop: told the reason of each frame that is dropped, and how often it has come by now.
    """

    def __init__(self, runtime_dir: Path, on_drop: Callable[[str, str, int], None]) -> None:
        self._on_drop = on_drop
        self._drops: Counter[str] = Counter()
        self._tokens: dict[str, str] = {}
        self._worker_of: dict[bytes, str] = {}  # routing id -> worker, since its hello
        self._route_of: dict[str, bytes] = {}
        self._meters: dict[str, Meter] = {}
        self._muted: set[str] = set()
        self.workers_path = f"{runtime_dir}/workers.sock"
        self.workers_endpoint = f"ipc://{self.workers_path}"
        self._context = zmq.Context()
        self.workers = self._router(self.workers_endpoint, MAX_BYTES, received=WORKER_QUEUE)
        self.clients = self._router(
            client_endpoint(runtime_dir), MAX_REQUEST, received=CLIENT_QUEUE, sent=CLIENT_QUEUE
        )

    def _router(
        self, endpoint: str, largest: int, *, received: int, sent: int = 1000
    ) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.router_mandatory = True  # an unknown peer is an error here, not silence
        router.maxmsgsize = largest
        router.rcvhwm = received
        router.sndhwm = sent
        router.handshake_ivl = HANDSHAKE_MS
        router.backlog = BACKLOG
        before = os.umask(0o077)
        try:
            router.bind(endpoint)
        finally:
            os.umask(before)
        return router

    # --- workers -------------------------------------------------------------------------------

    def open_to_users(self) -> None:
        """Let workers of other users connect: those to whom a descriptor of the socket is handed.

        Its folder is 0700 and stays it, so that nobody else gets as far as the socket.
        """
        os.chmod(self.workers_path, 0o666)  # noqa: S103  see above

    def expect(self, worker: str, token: str) -> None:
        """Accept the worker that shows this token."""
        self._tokens[worker] = token

    def forget(self, worker: str) -> None:
        """Drop whatever still comes from this worker."""
        self._tokens.pop(worker, None)
        self._meters.pop(worker, None)
        self._muted.discard(worker)
        route = self._route_of.pop(worker, None)
        if route is not None:
            del self._worker_of[route]

    def from_workers(self) -> Iterator[tuple[str, Any]]:
        """Yield (worker, message) for what proven workers have sent. Never blocks.

        One that floods us is told of by `Flooded`, once; it can still be sent to.
        """
        now = time.monotonic()
        for route, frames in _received(self.workers, WORKER_BUDGET):
            worker = self._worker_of.get(route)
            if worker in self._muted:
                self._drop("flood", f"what {worker} goes on sending")
                continue
            message = self._parsed(frames, FromWorker)
            if worker is not None:
                weight = LEAK_WEIGHT if isinstance(message, LeakFound) else 1
                meter = self._meters[worker]
                if meter.take(now, sum(map(len, frames)), weight):
                    self._muted.add(worker)
                    yield worker, Flooded(f"it floods its supervisor: {meter}")
                    continue
            if message is None:
                continue
            if isinstance(message, Hello):
                if worker is not None or not self._proves(message):
                    self._drop("stranger", f"hello as {message.worker!r}")
                    continue
                if _pid_of(frames[0]) not in (message.pid, None):
                    self._drop("liar", f"hello as {message.worker!r} by another process")
                    continue
                worker = message.worker
                self._worker_of[route] = worker
                self._route_of[worker] = route
                self._meters[worker] = Meter()
            elif worker is None:
                self._drop("stranger", f"{type(message).__name__} before any hello")
                continue
            yield worker, message

    def _proves(self, hello: Hello) -> bool:
        token = self._tokens.get(hello.worker)
        if token is None or hello.worker in self._route_of:
            return False
        # Not in constant time: who can measure that is in our 0700 folder, and of our own user.
        return token == hello.token

    def to_worker(self, worker: str, message: ToWorker) -> bool:
        """Send to one worker; False when it can't be reached. Never blocks."""
        route = self._route_of.get(worker)
        return route is not None and self._sent(self.workers, route, encode(message))

    # --- the command line ------------------------------------------------------------------------

    def from_clients(self) -> Iterator[tuple[bytes, Any]]:
        """Yield (client, request). Never blocks."""
        for route, frames in _received(self.clients, CLIENT_BUDGET):
            message = self._parsed(frames, FromClient)
            if message is not None:
                yield route, message

    def to_client(self, client: bytes, message: ToClient) -> bool:
        """Answer one client; False when it has gone or does not read. Never blocks."""
        return self._sent(self.clients, client, encode(message))

    # --- both ------------------------------------------------------------------------------------

    def _parsed(self, frames: list[zmq.Frame], kind: Any) -> Any:
        if len(frames) != 1:
            self._drop("malformed", f"{len(frames)} frames instead of one")
            return None
        try:
            return decode(frames[0].bytes, kind)
        except WireError as exc:
            self._drop("malformed", str(exc))
            return None

    def _sent(self, router: zmq.Socket[bytes], route: bytes, frame: bytes) -> bool:
        try:
            router.send_multipart([route, frame], zmq.DONTWAIT)
        except zmq.ZMQError as exc:
            if exc.errno not in {zmq.EHOSTUNREACH, zmq.EAGAIN}:
                raise
            return False
        return True

    def _drop(self, reason: str, detail: str) -> None:
        self._drops[reason] += 1
        self._on_drop(reason, detail[:MAX_DETAIL], self._drops[reason])

    def close(self) -> None:
        """Close both sockets; the last answers get a moment to leave."""
        self.workers.close(linger=0)
        self.clients.close(linger=FAREWELL_MS)
        self._context.term()


def _received(router: zmq.Socket[bytes], budget: int) -> Iterator[tuple[bytes, list[zmq.Frame]]]:
    size = 0
    for _ in range(budget):
        try:
            route, *frames = router.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return
        yield route.bytes, frames
        size += sum(map(len, frames))
        if size >= TURN_BYTES:
            return


def _pid_of(frame: zmq.Frame) -> int | None:
    """Return the process at the other end of the connection, as the kernel knows it."""
    try:
        # "localhost:uid:gid:pid", from SO_PEERCRED at the time of its connect.
        return int(str(frame.get("Peer-Address")).rpartition(":")[2])
    except (zmq.ZMQError, ValueError):
        return None
