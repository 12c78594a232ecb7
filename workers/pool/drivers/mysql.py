"""MySQL and MariaDB, by PyMySQL.

The server ends a statement when another session tells it to: `KILL QUERY`, over a connection that
the pool has to spare. Where it has none, the connection is given up and a new one in its place
ends its statement on the server; cutting alone would leave that running.

What PyMySQL cannot do is reset a session. A roll-back, autocommit and the cursor class are taken
back; session variables, `USE`, temporary tables and `GET_LOCK` of a borrower are there for the next
one. Who uses those sets them in `setup`, or gives back with `broken=True`.
"""

from __future__ import annotations

__all__ = ["MySQLDriver", "Watched", "from_url"]

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from workers.pool.drivers import sockets
from workers.pool.drivers.base import Driver
from workers.pool.errors import MissingDriverError

try:
    import pymysql
except ImportError as exc:
    raise MissingDriverError(
        'MySQL needs PyMySQL, which is not installed: pip install "ackvisor[mysql]"'
    ) from exc
from pymysql.constants import SERVER_STATUS

AUTOCOMMIT = SERVER_STATUS.SERVER_STATUS_AUTOCOMMIT
# What of the server's last word on a session must be as it was: transaction, autocommit, results
# that nobody has fetched.
STATUS = (
    AUTOCOMMIT
    | SERVER_STATUS.SERVER_STATUS_IN_TRANS
    | SERVER_STATUS.SERVER_MORE_RESULTS_EXISTS
)  # fmt: skip

# Error numbers, in the manuals' names.
GONE = frozenset((
    1053,  # ER_SERVER_SHUTDOWN
    1836,  # ER_READ_ONLY_MODE: demoted under us; a new dial may find the new primary
    1927,  # ER_CONNECTION_KILLED
    2006,  # CR_SERVER_GONE_ERROR
    2013,  # CR_SERVER_LOST
    2055,  # CR_SERVER_LOST_EXTENDED
    4031,  # ER_CLIENT_INTERACTION_TIMEOUT
))  # fmt: skip
OUT_OF_STEP = 2014  # CR_COMMANDS_OUT_OF_SYNC: an answer that does not belong to the question
PREVENTED = 1290  # ER_OPTION_PREVENTS_STATEMENT: --read-only, among other options
FINAL = frozenset((
    1044,  # ER_DBACCESS_DENIED_ERROR
    1045,  # ER_ACCESS_DENIED_ERROR
    1049,  # ER_BAD_DB_ERROR
    1130,  # ER_HOST_NOT_PRIVILEGED
    1251,  # ER_NOT_SUPPORTED_AUTH_MODE
    1698,  # ER_ACCESS_DENIED_NO_PASSWORD_ERROR
    2026,  # CR_SSL_CONNECTION_ERROR
    2059,  # CR_AUTH_PLUGIN_CANNOT_LOAD
))  # fmt: skip

# What a URL's query may hold, and how it is read.
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "autocommit": lambda text: _FLAGS[text.lower()],
    "bind_address": str,
    "charset": str,
    "collation": str,
    "connect_timeout": float,
    "init_command": str,
    "local_infile": lambda text: _FLAGS[text.lower()],
    "max_allowed_packet": int,
    "program_name": str,
    "read_default_file": str,
    "read_default_group": str,
    "read_timeout": float,
    "sql_mode": str,
    "ssl_ca": str,
    "ssl_cert": str,
    "ssl_disabled": lambda text: _FLAGS[text.lower()],
    "ssl_key": str,
    "ssl_verify_cert": lambda text: _FLAGS[text.lower()],
    "ssl_verify_identity": lambda text: _FLAGS[text.lower()],
    "unix_socket": str,
    "write_timeout": float,
}


class MySQLDriver(Driver):
    """PyMySQL's own Connection: killed on the server, cut at the socket, safe after a fork."""

    name = "mysql"
    cancels = True
    cuts = True
    closes_at_once = True
    spares = True
    glance_after = 0.01

    def __init__(self) -> None:
        super().__init__()
        self._status = 0
        self._autocommit_mode: bool | None = None
        self._cursorclass: Any = None
        self._inodes: dict[int, int] = {}
        self.tidy = self._differs

    def adopt(self, conn: Any) -> None:
        """Watch its calls from now on, and remember its settings and which socket it is."""
        conn.__class__ = _watched(conn.__class__)  # PyMySQL has no hook for that, and no slots
        self._status = conn.server_status & STATUS
        self._autocommit_mode = conn.autocommit_mode
        self._cursorclass = conn.cursorclass
        self._inodes[id(conn)] = sockets.identity(conn._sock)  # noqa: SLF001

    def _differs(self, conn: Any) -> bool:
        status = conn.server_status & STATUS
        return (
            status != self._status
            # A failed statement opens a transaction too, and its error does not say so.
            or (conn.touched and not status & AUTOCOMMIT)
            or conn.running
            or conn.out_of_step
            or conn._sock is None  # noqa: SLF001
            or conn.cursorclass is not self._cursorclass
            or _is_streaming(conn)
        )

    def reset(self, conn: Any) -> None:
        """Roll back, and take back autocommit and the cursor class.

        Raises:
            pymysql.MySQLError: it is broken, or in the middle of something without a clean end.
        """
        if conn.running or _is_streaming(conn):
            raise pymysql.OperationalError("given back in the middle of a query")
        conn.rollback()
        if conn.server_status & AUTOCOMMIT != self._status & AUTOCOMMIT:
            conn.autocommit(bool(self._status & AUTOCOMMIT))
        conn.autocommit_mode = self._autocommit_mode
        conn.cursorclass = self._cursorclass
        if self._differs(conn):
            raise pymysql.OperationalError("not clean after a roll-back")

    def is_quiet(self, conn: Any) -> bool:
        """Whether the server has said nothing: to an idle session it only says good-bye."""
        return sockets.is_silent(conn._sock)  # noqa: SLF001

    def check(self, conn: Any) -> None:
        """Ping. Never with PyMySQL's reconnect: that would be another session."""
        conn.ping(reconnect=False)

    def cancel(self, conn: Any, timeout: float) -> None:
        """Have another session end the statement; without one to spare, end the session too."""
        number = conn.thread_id()
        refusals: list[BaseException] = []

        def kill(other: Any) -> None:
            try:
                other.query(f"KILL QUERY {number}")
            except pymysql.MySQLError as exc:
                if self.is_broken(other):
                    raise
                refusals.append(exc)  # which is no fault of the messenger

        if self.with_spare(kill, timeout):
            if refusals:
                raise refusals[0]
            return
        self.cut(conn)
        other = self.dial(timeout)
        try:
            other.query(f"KILL {number}")
        finally:
            other.close()
        raise pymysql.OperationalError("all connections are lent: it gave its own to be cancelled")

    def is_busy(self, conn: Any) -> bool:
        """Whether a call is under way, or a result that is fetched from the server row by row."""
        return bool(conn.running or _is_streaming(conn))

    def cut(self, conn: Any) -> None:
        """Shut its socket down: PyMySQL's close would wait for the call that is under way."""
        with suppress(Exception):  # closed by its borrower: then nobody is blocked on it
            sockets.shut_down(conn._sock.fileno(), self._inodes.get(id(conn)))  # noqa: SLF001

    def close(self, conn: Any) -> None:
        """Say good-bye and close."""
        if getattr(conn, "running", False):
            self.cut(conn)
        if _is_streaming(conn):
            conn._result.unbuffered_active = False  # noqa: SLF001 (its finaliser would read on)
        self._inodes.pop(id(conn), None)
        conn.close()

    def is_broken(self, conn: Any) -> bool:
        """Whether PyMySQL has given it up, its borrower has closed it, or an answer is missing."""
        return conn.out_of_step or not conn.open

    def is_error(self, exc: BaseException) -> bool:
        """Whether it is one of PyMySQL's."""
        return isinstance(exc, pymysql.MySQLError)

    def is_disconnect(self, exc: BaseException) -> bool:
        """Whether it says that the session is gone, or that its server only reads from now on."""
        if not isinstance(exc, pymysql.MySQLError):
            return False
        number = _number(exc)
        return number in GONE or (number == PREVENTED and "read-only" in str(exc).lower())

    def is_final(self, exc: BaseException) -> bool:
        """Whether it is a wrong name or password, rather than a server that is full or away."""
        return not isinstance(exc, pymysql.OperationalError) or _number(exc) in FINAL

    def disown(self, conn: Any) -> None:
        """Put /dev/null in the place of the socket: a good-bye would end the parent's session."""
        sockets.null(conn._sock.fileno())  # noqa: SLF001


class Watched:
    """Mixed into PyMySQL's connection classes: knows what it is doing, which PyMySQL does not tell."""

    running = False
    """A call is under way."""
    touched = False
    """A statement was sent since the last commit or roll-back."""
    out_of_step = False
    """The answer to a call may not have been read to its end: it is never used again."""

    def query(self, sql: Any, unbuffered: bool = False) -> Any:
        """Send a statement; every cursor does it by this."""
        self.touched = True
        return self._watch(super().query, sql, unbuffered)  # type: ignore[misc]

    def begin(self) -> None:
        """Begin a transaction."""
        self._watch(super().begin)  # type: ignore[misc]

    def commit(self) -> None:
        """Commit."""
        self._watch(super().commit)  # type: ignore[misc]
        self.touched = False

    def rollback(self) -> None:
        """Roll back."""
        self._watch(super().rollback)  # type: ignore[misc]
        self.touched = False

    def ping(self, reconnect: bool = False) -> None:
        """Make a round trip."""
        self._watch(super().ping, reconnect)  # type: ignore[misc]

    def select_db(self, db: Any) -> None:
        """Change the database."""
        self._watch(super().select_db, db)  # type: ignore[misc]

    def _watch(self, call: Callable[..., Any], *args: Any) -> Any:
        self.running = True
        try:
            return call(*args)
        except BaseException as exc:
            # An error from the server is a whole answer. After an interrupt, or a value that could
            # not be converted, what is left of the answer would be taken for the answer to the
            # next call.
            whole = isinstance(exc, pymysql.MySQLError) and _number(exc) != OUT_OF_STEP
            self.out_of_step = self.out_of_step or not whole
            raise
        finally:
            self.running = False


@cache
def _watched(kind: Any) -> Any:
    # Under its own name: it is what the borrower takes it for.
    return type(kind.__name__, (Watched, kind), {"__module__": kind.__module__})


def _is_streaming(conn: Any) -> bool:
    result = conn._result  # noqa: SLF001
    return result is not None and bool(result.unbuffered_active)


def _number(exc: BaseException) -> object:
    return exc.args[0] if exc.args else None


def from_url(url: str, application_name: str | None) -> tuple[Callable[[float], Any], Driver]:
    """Read `mysql://user:password@host:port/database?option=value`.

    The options are PyMySQL's, as far as they are texts and numbers: `unix_socket`, `charset`,
    `autocommit`, `ssl_ca` and so on. Over a Unix socket there is no TLS unless one asks for it.

    Raises:
        ValueError: it is not such a URL. The message does not show it.
    """
    options = _options(url)
    if application_name is not None:
        options["program_name"] = application_name
    if "unix_socket" in options and not any(name.startswith("ssl_") for name in options):
        options["ssl_disabled"] = True
    bound = options.pop("connect_timeout", None)
    # PyMySQL's connect_timeout ends with the TCP handshake: a server that accepts and says nothing
    # would hold the dial for ever.
    reading = options.pop("read_timeout", None)
    writing = options.pop("write_timeout", None)

    def connect(timeout: float) -> Any:
        limit = timeout if bound is None else bound
        conn = pymysql.connections.Connection(
            **options,
            connect_timeout=limit,
            read_timeout=limit,
            write_timeout=limit,
            defer_connect=True,
        )
        if conn.unix_socket:
            # PyMySQL forgets to close it where nobody listens there.
            sock = _connect_unix(conn.unix_socket, limit)
            conn._secure = True  # noqa: SLF001 (no password is shown to anybody)
            conn.connect(sock)
        else:
            conn.connect()
        conn._read_timeout = reading  # noqa: SLF001
        conn._write_timeout = writing  # noqa: SLF001
        sockets.keep_alive(conn._sock)  # noqa: SLF001
        return conn

    return connect, MySQLDriver()


def _connect_unix(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError as exc:
        sock.close()
        raise pymysql.OperationalError(
            2002, f"Can't connect to local MySQL server through socket '{path}' ({exc})"
        ) from exc
    return sock


def _options(url: str) -> dict[str, Any]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # it quotes what it does not understand, and that may be the password
        raise ValueError("this MySQL URL has a host or a port that cannot be one") from None
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "user": None if parts.username is None else unquote(parts.username),
        "password": None if parts.password is None else unquote(parts.password),
        "database": unquote(parts.path[1:]) or None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        read = _OPTIONS.get(name)
        if read is None:
            raise ValueError(
                f"unknown in a MySQL URL: {name}; known are {', '.join(sorted(_OPTIONS))}"
            )
        try:
            options[name] = read(text)
        except (KeyError, ValueError):
            raise ValueError(f"{name} in a MySQL URL cannot have this value") from None
    return options
