"""Redis, by redis-py: what is lent is a ready client, bound to exactly one connection.

redis-py's own habits that a pool cannot have are switched off: a lent client takes no second
connection, and does not reconnect: its session is the one that it was lent, or none.

An answer that nobody has read is the answer to the next question, and so somebody else's data. So
the connection counts: what was sent and what was read to its end. Unless they are equal on the way
back, it is closed, whatever had happened.
"""

from __future__ import annotations

__all__ = [
    "BUSY",
    "PATIENCE",
    "OneConnection",
    "RedisDriver",
    "Watched",
    "from_url",
    "is_listening",
    "plain",
    "read_options",
]

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from workers.pool.drivers import sockets
from workers.pool.drivers.base import Driver
from workers.pool.errors import MissingDriverError

try:
    import redis
except ImportError as exc:
    raise MissingDriverError(
        'Redis needs redis-py, which is not installed: pip install "ackvisor[redis]"'
    ) from exc
from redis.backoff import NoBackoff
from redis.connection import Connection, parse_url
from redis.retry import Retry

# Commands after which a session is not what it was, until RESET.
_SESSION = frozenset((
    "ASKING", "AUTH", "CLIENT CACHING", "CLIENT NO-EVICT", "CLIENT NO-TOUCH", "CLIENT REPLY",
    "CLIENT SETINFO", "CLIENT SETNAME", "CLIENT TRACKING", "HELLO", "MONITOR", "PSUBSCRIBE",
    "QUIT", "READONLY", "READWRITE", "RESET", "SCRIPT DEBUG", "SELECT", "SSUBSCRIBE", "SUBSCRIBE",
))  # fmt: skip
_WITH_SUBCOMMANDS = frozenset(("CLIENT", "SCRIPT"))

# How long a cancelled command that does not block may take to end, in steps of seconds: a healthy
# server needs less, and a deaf one is found out.
PATIENCE = (0.005, 0.02, 0.1)
BUSY = 0.5  # seconds: who does not greet within them computes, perhaps the very script to cancel


class Watched:
    """Mixed into redis-py's connection classes: counts, and never reconnects. Also for asyncio."""

    dialled = False
    sock: Any
    """The socket; None where it is not connected."""
    unread = 0
    """Commands that were sent and whose answer has not been read to its end."""
    sent = 0
    number = 0
    """The server's, of this connection."""
    changed = False
    """The session is not what it was when it was new."""
    queueing = False
    """Between MULTI and EXEC."""
    watching = False
    _packed = 0

    def send_command(self, *args: Any, **kwargs: Any) -> Any:
        """Note what the command does to the session, and send it."""
        self._packed = 1
        self._note(args)
        return super().send_command(*args, **kwargs)  # type: ignore[misc]

    def pack_commands(self, commands: Iterable[Any]) -> Any:
        """Note what the commands of a pipeline do, and pack them."""
        commands = list(commands)
        self._packed = len(commands)
        for args in commands:
            self._note(args)
        return super().pack_commands(commands)  # type: ignore[misc]

    def send_packed_command(self, *args: Any, **kwargs: Any) -> Any:
        """Count them, and send."""
        if not self.sent:
            self._listen()
        self.unread += self._packed
        self._packed = 0
        self.sent += 1
        return super().send_packed_command(*args, **kwargs)  # type: ignore[misc]

    def _listen(self) -> None:
        """Keep an ear on a connection that is about to greet.

        A full server says so and hangs up at once; redis-py then fails to write, and closes the
        socket without having listened.
        """
        raise NotImplementedError

    def _note(self, args: Any) -> None:
        name = args[0]
        if type(name) is not str or not name.isupper():
            name = _text(name).upper()
        if name in _WITH_SUBCOMMANDS and len(args) > 1:
            name = f"{name} {_text(args[1])}".upper()
        if name in _SESSION:
            self.changed = True
        elif name == "MULTI":
            self.queueing = True
        elif name == "WATCH":
            self.watching = True
        elif name in ("EXEC", "DISCARD"):
            self.queueing = self.watching = False
        elif name == "UNWATCH" and not self.queueing:
            self.watching = False

    def _dial(self) -> None:
        if self.dialled:
            raise redis.ConnectionError(
                "this connection was closed, and a lent one is not replaced"
            )
        self.dialled = True


class _WatchedSync(Watched):
    socket_timeout: float | None
    dial_timeout: float | None = None
    """Seconds for each step of the dial, TLS and greeting included; None: `socket_timeout`."""
    ear: socket.socket | None = None

    @property
    def sock(self) -> Any:
        return self._sock  # type: ignore[attr-defined]

    def connect(self) -> None:
        try:
            super().connect()  # type: ignore[misc]
        except redis.ConnectionError as exc:
            if self.ear is not None and (farewell := sockets.last_words(self.ear)):
                raise redis.ConnectionError(farewell.lstrip("-")) from exc
            raise
        finally:
            if self.ear is not None:
                self.ear.close()

    def _connect(self) -> Any:
        self._dial()
        own = self.socket_timeout
        if self.dial_timeout is not None:
            self.socket_timeout = self.dial_timeout
        try:
            return super()._connect()  # type: ignore[misc]
        finally:
            self.socket_timeout = own

    def _listen(self) -> None:
        if type(self.sock) is socket.socket:  # not TLS
            self.ear = self.sock.dup()

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            response = super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError:
            self.unread -= 1
            raise
        self.unread -= 1
        return response


class OneConnection(redis.ConnectionPool):
    """What redis-py takes for a pool: the one connection of a lent client."""

    def __init__(self, connection_class: Any, **options: Any) -> None:
        super().__init__(connection_class=_watched(connection_class), **plain(options, Retry))
        self.link: Any = self.make_connection()
        self.free = [self.link]

    def get_connection(self, *_args: Any, **_options: Any) -> Any:
        """Hand the connection to a command, a pipeline or a subscription.

        Raises:
            redis.RedisError: another one has it.
        """
        try:
            return self.free.pop()
        except IndexError:
            raise redis.RedisError(
                "a lent client is one connection, and a pipeline, a subscription or another "
                "thread has it: borrow another one"
            ) from None

    def release(self, connection: Any) -> None:
        """Take it back."""
        if connection is self.link and not self.free:
            self.free.append(connection)

    def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: ARG002 (there is but one)
        """Close it."""
        self.link.disconnect()


class RedisDriver(Driver):
    """redis-py's client: unblocked on the server, cut at the socket, safe after a fork."""

    name = "redis"
    cancels = True
    cuts = True
    closes_at_once = True
    spares = True
    glance_after = 0.01

    def __init__(self) -> None:
        super().__init__()
        self._inodes: dict[int, int] = {}
        self._resettable = True
        self.tidy = self._differs

    def adopt(self, conn: Any) -> None:
        """Bind a client that is not from `from_url` to one connection; remember its socket."""
        pool = conn.connection_pool
        if not isinstance(pool, OneConnection):
            pool.disconnect()
            pool = OneConnection(pool.connection_class, **pool.connection_kwargs)
            pool.link.connect()
            pool.link.changed = False
            conn.connection_pool = pool
            conn.connection = None  # a single_connection_client has one of its own
        pool.link.send_command("CLIENT", "ID")
        self.remember(conn, pool.link.read_response())

    def remember(self, conn: Any, number: int) -> None:
        """Take how the session is now as how it is when it is new."""
        link = conn.connection_pool.link
        link.number = number
        # A handshake can be repeated; what `setup` has said to the session cannot.
        self._resettable = not link.changed
        link.changed = False
        self._inodes[id(conn)] = sockets.identity(link.sock)

    def _differs(self, conn: Any) -> bool:
        pool = conn.connection_pool
        link = pool.link
        return bool(
            link.unread
            or link.changed
            or link.watching
            or link.queueing
            or not pool.free
            or link.sock is None
        )

    def reset(self, conn: Any) -> None:
        """End a transaction; where more has been changed, RESET and repeat the handshake.

        Raises:
            redis.RedisError: it is broken, in the middle of something, or cannot be reset (before
                Redis 6.2, and where `setup` has changed the session).
        """
        link = conn.connection_pool.link
        command, answer = self.way_back(conn)
        _ask(link, command, answer)
        if command == "RESET":
            link.on_connect()
        self.arrived(conn)

    def way_back(self, conn: Any) -> tuple[str, bytes]:
        """Return the command that makes the session as new, and its answer."""
        pool = conn.connection_pool
        link = pool.link
        if link.unread or not pool.free:
            raise redis.ConnectionError("given back in the middle of something")
        if link.changed:
            if not self._resettable:
                raise redis.ConnectionError("what setup has done cannot be repeated")
            return "RESET", b"RESET"
        return ("DISCARD", b"OK") if link.queueing else ("UNWATCH", b"OK")

    def arrived(self, conn: Any) -> None:
        """Take note that the way back has been gone to its end."""
        link = conn.connection_pool.link
        link.changed = link.watching = link.queueing = False
        if self._differs(conn):
            raise redis.ConnectionError("not clean after a reset")

    def is_quiet(self, conn: Any) -> bool:
        """Whether the server has said nothing: then it says good-bye, or answers nobody's question."""
        return sockets.is_silent(conn.connection_pool.link.sock)

    def check(self, conn: Any) -> None:
        """Ping."""
        _ask(conn.connection_pool.link, "PING", b"PONG")

    def cancel(self, conn: Any, timeout: float) -> None:
        """Unblock a command that blocks, over another connection; wait a moment for any other.

        Raises:
            redis.RedisError: it neither blocks nor ends, or there is no connection to spare.
        """
        pool = conn.connection_pool
        link = pool.link
        seen = link.sent
        if is_listening(pool):
            raise redis.ConnectionError("a subscription ends with its connection")

        ended = False

        def unblock(other: Any) -> None:
            nonlocal ended
            for pause in PATIENCE:
                ended = bool(other.client_unblock(link.number, error=True))
                if not ended:
                    time.sleep(pause)
                    ended = link.sent != seen or not link.unread
                if ended:
                    return

        if not self.with_spare(unblock, min(timeout, BUSY)):
            raise redis.ConnectionError("all connections are lent: none is left to cancel with")
        if not ended:
            raise redis.TimeoutError("a cancelled command neither blocks nor ends")

    def is_busy(self, conn: Any) -> bool:
        """Whether an answer has not been read to its end, or whoever has it only listens."""
        pool = conn.connection_pool
        return bool(pool.link.unread) or is_listening(pool)

    def cut(self, conn: Any) -> None:
        """Shut its socket down. The server ends what blocks there when it sees that."""
        with suppress(Exception):  # closed by its borrower: then nobody is blocked on it
            sock = conn.connection_pool.link.sock
            sockets.shut_down(sock.fileno(), self._inodes.get(id(conn)))

    def close(self, conn: Any) -> None:
        """Close it. Redis needs no good-bye."""
        self.forget(conn)
        conn.connection_pool.disconnect()

    def forget(self, conn: Any) -> None:
        """Have no more to do with it."""
        self._inodes.pop(id(conn), None)

    def is_broken(self, conn: Any) -> bool:
        """Whether redis-py has given it up, or an answer is missing."""
        link = conn.connection_pool.link
        return link.sock is None or link.unread != 0

    def is_error(self, exc: BaseException) -> bool:
        """Whether it is one of redis-py's."""
        return isinstance(exc, redis.RedisError)

    def is_disconnect(self, exc: BaseException) -> bool:
        """Whether it says that the session is gone, or that its server is a replica now."""
        return isinstance(exc, redis.ConnectionError | redis.TimeoutError | redis.ReadOnlyError)

    def is_final(self, exc: BaseException) -> bool:
        """Whether it is a wrong password or database, rather than a server that is full or away."""
        return isinstance(exc, redis.AuthenticationError) or not isinstance(
            exc, redis.ConnectionError | redis.TimeoutError
        )

    def disown(self, conn: Any) -> None:
        """Put /dev/null in the place of the socket: the child's close would shut the parent's down."""
        sockets.null(conn.connection_pool.link.sock.fileno())


@cache
def _watched(kind: Any) -> Any:
    # Under its own name: it is what the borrower takes it for.
    return type(kind.__name__, (_WatchedSync, kind), {"__module__": kind.__module__})


def _ask(link: Any, command: str, wanted: bytes) -> None:
    link.send_command(command)
    answer = link.read_response()
    if answer not in (wanted, wanted.decode()):
        raise redis.ConnectionError(f"{command} was answered by something else")


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def is_listening(pool: OneConnection) -> bool:
    """Whether a subscription (or MONITOR) has the connection, and may wait there for ever."""
    return not pool.free and bool(pool.link.changed)


def from_url(url: str, application_name: str | None) -> tuple[Callable[[float], Any], Driver]:
    """Read `redis://user:password@host:port/db`, `rediss://…` (TLS) or `unix:///path?db=0`.

    The query's options are redis-py's.

    Raises:
        ValueError: it is not such a URL. The message does not show it.
    """
    options = read_options(url, application_name)
    kind = options.pop("connection_class", Connection)

    def connect(timeout: float) -> Any:
        pool = OneConnection(kind, **{"socket_connect_timeout": timeout, **options})
        link = pool.link
        link.dial_timeout = options.get("socket_connect_timeout", timeout)
        link.connect()
        link.sock.settimeout(link.socket_timeout)
        if "socket_keepalive" not in options:
            sockets.keep_alive(link.sock)
        link.changed = False
        return redis.Redis(connection_pool=pool)

    return connect, RedisDriver()


def plain(options: dict[str, Any], retry: Any) -> dict[str, Any]:
    """Return the options without those of redis-py's that replace a connection by another one."""
    kept = {
        name: value
        for name, value in options.items()
        if not name.startswith(("maint", "orig_", "retry", "oss_cluster"))
    }
    kept["retry"] = retry(NoBackoff(), 0)
    with suppress(ImportError):  # before redis-py 7 there is nothing to switch off
        from redis.maint_notifications import MaintNotificationsConfig

        kept["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
    return kept


def read_options(
    url: str, application_name: str | None, read: Callable[[str], Any] = parse_url
) -> dict[str, Any]:
    """Return what redis-py's connections take, of a URL."""
    try:
        options: dict[str, Any] = dict(read(url))
    except ValueError:
        raise ValueError("redis-py does not understand this Redis URL") from None
    for name in ("max_connections", "timeout"):
        options.pop(name, None)  # of redis-py's own pools
    if application_name is not None:
        options["client_name"] = application_name
    return options
