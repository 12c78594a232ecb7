"""PostgreSQL, by psycopg 3.

The server is told to cancel over a connection of its own, and the connection is cut at its socket
only where that fails: cutting alone would leave the query running on the server.
"""

from __future__ import annotations

__all__ = ["PostgreSQLDriver", "end_sessions", "from_url"]

from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from time import monotonic, sleep
from typing import Any

from workers.pool.drivers import sockets
from workers.pool.drivers.base import Driver
from workers.pool.errors import MissingDriverError

# libpq's transaction status: of these only IDLE is reusable, only ACTIVE is in a query.
IDLE = 0
ACTIVE = 1
UNKNOWN = 4

SESSIONS_PAUSE = 0.02  # seconds between two looks whether sessions have ended
END_SESSIONS = (
    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
    " where application_name = %s and usename = session_user and pid <> pg_backend_pid()"
)

# TCP keepalive, where neither the URL nor the environment says otherwise: a peer that has vanished
# without a word is noticed after a minute, not after the two hours of the kernel's default.
KEEPALIVE = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3"}

# The server's words for a refusal that waiting does not change; libpq gives a failed dial no
# SQLSTATE. In another language than English such a dial is tried until the acquire times out.
FINAL = ("password authentication failed", "does not exist", "no pg_hba.conf entry")

_SETTINGS = (
    "autocommit", "isolation_level", "read_only", "deferrable",
    "row_factory", "cursor_factory", "prepare_threshold",
)  # fmt: skip
_session = attrgetter("pgconn.transaction_status", *_SETTINGS)


class PostgreSQLDriver(Driver):
    """psycopg 3's own Connection: cancel on the server, cut at the socket, safe after a fork."""

    name = "postgresql"
    cancels = True
    cuts = True
    closes_at_once = True
    glance_after = 0.01

    def __init__(self) -> None:
        super().__init__()
        import psycopg

        self._errors = psycopg.Error
        self._gone = (psycopg.OperationalError, psycopg.InterfaceError)
        self._clean: tuple[Any, ...] = ()
        self._inodes: dict[int, int] = {}
        self.tidy = self._differs

    def adopt(self, conn: Any) -> None:
        """Remember its settings, and which socket it is."""
        self._clean = (IDLE, *_session(conn)[1:])
        self._inodes[id(conn)] = sockets.identity(conn)

    def _differs(self, conn: Any) -> bool:
        return bool(_session(conn) != self._clean)

    def reset(self, conn: Any) -> None:
        """Roll back, and take back the settings of psycopg's that a borrower may change.

        Raises:
            psycopg.Error: it is broken, or in the middle of something that has no clean end.
        """
        self.refuse_unfinished(conn)
        if conn.pgconn.transaction_status != IDLE:
            conn.rollback()
        for name, value in zip(_SETTINGS, self._clean[1:], strict=True):
            if getattr(conn, name) != value:
                setattr(conn, name, value)
        self.refuse_dirty(conn)

    def refuse_unfinished(self, conn: Any) -> None:
        """Raise where it is in the middle of something that has no clean end."""
        if conn.pgconn.transaction_status in (ACTIVE, UNKNOWN):
            raise self._gone[0]("given back in the middle of a query")

    def refuse_dirty(self, conn: Any) -> None:
        """Raise where a roll-back has not been enough."""
        if self._differs(conn):
            raise self._gone[0]("not clean after a roll-back")

    def is_quiet(self, conn: Any) -> bool:
        """Whether its socket has nothing to read: an idle server speaks only to say good-bye.

        (Or to notify: then a round trip tells the difference.)
        """
        return sockets.is_silent(conn)

    def check(self, conn: Any) -> None:
        """Make the round trip of an empty query."""
        was_autocommit = conn.autocommit
        if not was_autocommit:
            conn.autocommit = True  # psycopg would begin a transaction: three round trips for one
        try:
            conn.execute("")
        finally:
            if not was_autocommit and not conn.closed:
                conn.autocommit = False

    def cancel(self, conn: Any, timeout: float) -> None:
        """Send a cancel request, and wait until the server has taken it."""
        conn.cancel_safe(timeout=timeout)

    def is_busy(self, conn: Any) -> bool:
        """Whether a query is under way."""
        return bool(conn.pgconn.transaction_status == ACTIVE)

    def cut(self, conn: Any) -> None:
        """Shut its socket down, if that is still its socket: the number may be another's by now."""
        with suppress(Exception):  # closed by its borrower meanwhile: then nobody is blocked on it
            sockets.shut_down(conn.fileno(), self._inodes.get(id(conn)))

    def close(self, conn: Any) -> None:
        """Say good-bye and close; libpq does not block on it."""
        self.forget(conn)
        conn.close()

    def forget(self, conn: Any) -> None:
        """Have no more to do with it."""
        self._inodes.pop(id(conn), None)

    def is_broken(self, conn: Any) -> bool:
        """Whether libpq has given it up, or its borrower has closed it."""
        return bool(conn.closed)

    def is_error(self, exc: BaseException) -> bool:
        """Whether it is one of psycopg's."""
        return isinstance(exc, self._errors)

    def is_disconnect(self, exc: BaseException) -> bool:
        """Whether psycopg says so; what the connection itself knows is asked by `is_broken`."""
        return isinstance(exc, self._gone) and getattr(exc, "sqlstate", None) in (
            "57P01",  # admin_shutdown
            "57P02",  # crash_shutdown
            "57P03",  # cannot_connect_now
        )

    def is_final(self, exc: BaseException) -> bool:
        """Whether it is a wrong name or password, rather than a server that is full or away."""
        if not isinstance(exc, self._gone[0]):
            return True
        return any(words in str(exc) for words in FINAL)

    def is_outage(self, exc: BaseException) -> bool:
        """Whether the server has gone, or did not let itself be dialled.

        Where it could not say so itself there is no SQLSTATE; nor is there for the use of a connection
        that was closed before, which tells nothing about the server.
        """
        if self.is_disconnect(exc):
            return True
        return (
            isinstance(exc, self._gone[0])
            and getattr(exc, "sqlstate", None) is None
            and "the connection is closed" not in str(exc)
            and not self.is_final(exc)
        )

    def disown(self, conn: Any) -> None:
        """Put /dev/null in the place of the socket: a good-bye would end the parent's session."""
        sockets.null(conn.fileno())


def from_url(url: str, application_name: str | None) -> tuple[Callable[[float], Any], Driver]:
    """Read a libpq URL (`postgresql://user:password@host/database?option=value`).

    Raises:
        MissingDriverError: psycopg is not installed.
        ValueError: libpq does not understand it. The message does not show it.
    """
    options = read_options(url, application_name)
    own_timeout = "connect_timeout" in options

    def connect(timeout: float) -> Any:
        import psycopg

        if not own_timeout:
            options["connect_timeout"] = max(2, round(timeout))  # libpq's least, in whole seconds
        return psycopg.connect(**options)

    return connect, PostgreSQLDriver()


def end_sessions(conn: Any, application_name: str, seconds: float) -> None:
    """End all other sessions of this role that have this name, and wait until they have gone.

    Raises:
        TimeoutError: some are still there after so many seconds.
        psycopg.Error: the server refuses.
    """
    due = monotonic() + seconds
    while True:
        (left,) = conn.execute(END_SESSIONS, (application_name,)).fetchone()
        conn.rollback()  # within one transaction the server shows the same sessions again
        if not left:
            return
        if monotonic() >= due:
            raise TimeoutError(f"{left} sessions have not ended within {seconds:g} s")
        sleep(SESSIONS_PAUSE)


def read_options(url: str, application_name: str | None) -> dict[str, Any]:
    """Return what psycopg's connect takes, of a URL; raises as `from_url`."""
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as exc:
        raise MissingDriverError(
            "PostgreSQL needs psycopg 3, which is not installed or finds no libpq: "
            'pip install "ackvisor[postgresql]"'
        ) from exc
    scheme, _, rest = url.partition("://")
    url = f"{scheme.partition('+')[0]}://{rest}"  # SQLAlchemy's postgresql+psycopg://
    try:
        options: dict[str, Any] = dict(conninfo_to_dict(url))
    except psycopg.Error:
        # libpq quotes what it does not understand, and that may be the password.
        raise ValueError("libpq does not understand this PostgreSQL URL") from None
    for name, value in KEEPALIVE.items():
        options.setdefault(name, value)
    if application_name is not None:
        options["application_name"] = application_name
    return options
