"""SQLite, by the standard library.

A connection is a matter of this machine: opening it cannot hang, so the asker does it itself, and
there is nobody to ask whether it still lives. What SQLite is not: it must never be closed by
another thread while its borrower is in a call (that ends the interpreter), nor touched after a
fork (sqlite.org/howtocorrupt.html, 2.6).
"""

from __future__ import annotations

__all__ = ["SQLiteDriver", "from_url"]

import os
import sqlite3
from collections.abc import Callable
from math import inf
from operator import attrgetter
from time import monotonic
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, unquote

from workers.pool.drivers.base import Driver
from workers.pool.protocols import ContextLike

BUSY_TIMEOUT = 5.0  # seconds that a statement waits for another's write lock; sqlite3's own default
# Under a context SQLite waits this long at a time, since nothing can interrupt that wait.
BUSY_STEP = 0.05
# Opening may want a lock too, the first time. It is tried again, so one try need not take long.
OPEN_STEP = 0.1

_WAITED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_RECOVERY, sqlite3.SQLITE_BUSY_TIMEOUT)
_OPENS_TRANSACTION = ("INSERT", "UPDATE", "DELETE", "REPLACE")  # as sqlite3 has it

_session = attrgetter("in_transaction", "isolation_level", "row_factory", "text_factory")


class SQLiteDriver(Driver):
    """SQLite: interrupts a running statement, from any thread, within milliseconds."""

    name = "sqlite"
    local = True
    closes_at_once = True
    cancels = True

    def __init__(self) -> None:
        super().__init__()
        self._clean: tuple[Any, ...] = (False, "", None, str)
        self.tidy = self._differs

    def adopt(self, conn: Any) -> None:
        """Remember the settings that a borrower may change."""
        self._clean = (False, *_session(conn)[1:])

    def _differs(self, conn: Any) -> bool:
        return bool(_session(conn) != self._clean)

    def reset(self, conn: Any) -> None:
        """Roll back, and take back a changed isolation level, row factory or text factory."""
        if conn.in_transaction:
            conn.rollback()
        _, conn.isolation_level, conn.row_factory, conn.text_factory = self._clean

    def check(self, conn: Any) -> None:
        """Raise if it has been closed: more cannot happen to it."""
        _ = conn.in_transaction

    def cancel(self, conn: Any, timeout: float) -> None:  # noqa: ARG002 (it does not wait)
        """Interrupt. Harmless where nothing runs. It does not reach into a wait for a lock."""
        conn.interrupt()

    def bind(self, conn: Any, ctx: ContextLike | None) -> None:
        """Have its waits for another's lock end with the context."""
        if isinstance(conn, PatientConnection):
            conn.bind(ctx)

    def is_broken(self, conn: Any) -> bool:
        """Whether its borrower has closed it."""
        try:
            _ = conn.in_transaction
        except sqlite3.ProgrammingError:
            return True
        return False

    def is_error(self, exc: BaseException) -> bool:
        """Whether it is one of sqlite3's own."""
        return isinstance(exc, sqlite3.Error)

    def is_final(self, exc: BaseException) -> bool:
        """Whether it is anything but another's lock: a missing folder stays missing."""
        return not self.is_momentary(exc)

    def is_momentary(self, exc: BaseException) -> bool:
        """Whether others have it locked, as they do when a new file is made by several workers."""
        return isinstance(exc, sqlite3.OperationalError) and getattr(
            exc, "sqlite_errorcode", 0
        ) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class PatientConnection(sqlite3.Connection):
    """sqlite3's own, whose waits for another's lock end with the context that it is lent under.

    SQLite's wait cannot be interrupted. So under a context it is done in short steps, and a
    statement that was refused after such a step, and so has done nothing, is tried again. Without
    a context nothing is different from sqlite3.
    """

    patience = BUSY_TIMEOUT
    _ctx: ContextLike | None = None
    _in_steps = False  # how SQLite waits now

    def bind(self, ctx: ContextLike | None) -> None:
        """Wait in steps from the next cursor on; with None in one piece again."""
        self._ctx = ctx

    def cursor(self, factory: Any = None) -> Any:
        """Return a cursor, a patient one under a context."""
        under = self._ctx is not None
        if under is not self._in_steps:
            self.wait_at_once(min(BUSY_STEP, self.patience) if under else self.patience)
            self._in_steps = under
        if factory is None:
            factory = PatientCursor if under else sqlite3.Cursor
        return super().cursor(factory)

    def wait_at_once(self, seconds: float) -> None:
        """Set SQLite's own busy time-out."""
        super().cursor().execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """As sqlite3's."""
        return self.cursor().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any, /) -> Any:
        """As sqlite3's."""
        return self.cursor().executemany(sql, parameters)

    def executescript(self, script: str, /) -> Any:
        """As sqlite3's."""
        return self.cursor().executescript(script)

    def commit(self) -> None:
        """As sqlite3's."""
        self.patiently(super().commit)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        if self._ctx is None:
            return super().__exit__(kind, exc, traceback)
        try:  # sqlite3's own would not call our commit
            if exc is None:
                self.commit()
        finally:
            self.rollback()
        return False

    def patiently(self, step: Callable[[], Any]) -> Any:
        """Do something that may want another's lock."""
        ctx = self._ctx
        if ctx is None:
            return step()
        began = now = monotonic()
        while True:
            try:
                return step()
            except sqlite3.OperationalError as exc:
                # Refused without a wait: it would never be granted, whoever gives way.
                refused = exc.sqlite_errorcode not in _WAITED or monotonic() < now + BUSY_STEP / 2
                now = monotonic()
                if refused or ctx.done or now >= began + self.patience:
                    raise

    def in_one_piece(self, step: Callable[[], Any]) -> Any:
        """Do something that cannot be tried again: it waits, but only until the deadline."""
        ctx = self._ctx
        if ctx is None:
            return step()
        left = inf if ctx.deadline is None else ctx.deadline - monotonic()
        self.wait_at_once(max(0.0, min(self.patience, left)))
        try:
            return step()
        finally:
            self.wait_at_once(min(BUSY_STEP, self.patience))


class PatientCursor(sqlite3.Cursor):
    """A cursor of a connection that is lent under a context."""

    connection: PatientConnection

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """As sqlite3's."""
        execute = super().execute
        return self.connection.patiently(lambda: execute(sql, parameters))

    def executemany(self, sql: str, parameters: Any, /) -> Any:
        """As sqlite3's."""
        conn = self.connection
        executemany = super().executemany
        begins = conn.isolation_level is not None and not conn.in_transaction
        if begins and sql.lstrip().upper().startswith(_OPENS_TRANSACTION):
            # The lock first: the rows may come from an iterator, which cannot be begun again.
            conn.execute("BEGIN IMMEDIATE")
            return executemany(sql, parameters)
        return conn.in_one_piece(lambda: executemany(sql, parameters))

    def executescript(self, script: str, /) -> Any:
        """As sqlite3's."""
        executescript = super().executescript
        return self.connection.in_one_piece(lambda: executescript(script))


def from_url(url: str, _application_name: str | None) -> tuple[Callable[[float], Any], Driver]:
    """Read `sqlite:///relative.db` or `sqlite:////absolute.db`.

    The query may have `mode` (ro, rw, rwc), `timeout` (seconds for another's lock) and
    `journal_mode` (default wal: readers and a writer in many processes do not block each other).

    Raises:
        ValueError: it is not such a URL.
    """
    rest, _, query = url.partition("?")
    _, _, path = rest.partition("://")
    path = unquote(path)
    if not path.startswith("/") or path in ("/", "/:memory:"):
        raise ValueError(
            "a SQLite pool needs a file, as sqlite:///relative.db or sqlite:////absolute.db: "
            "a database in memory would be another one in each connection"
        )
    path = path[1:]
    if path.startswith("/"):
        path = "/" + path.lstrip("/")  # two slashes would begin a host
    options = dict(parse_qsl(query, keep_blank_values=True))
    mode = options.pop("mode", "rwc")
    journal = options.pop("journal_mode", "wal").lower()
    try:
        timeout = float(options.pop("timeout", BUSY_TIMEOUT))
    except ValueError:
        raise ValueError("timeout in a SQLite URL must be a number of seconds") from None
    if options:
        raise ValueError(
            f"unknown in a SQLite URL: {', '.join(sorted(options))}; "
            "known are mode, timeout and journal_mode"
        )
    if mode not in ("ro", "rw", "rwc"):
        raise ValueError(f"mode in a SQLite URL must be ro, rw or rwc, not {mode!r}")
    if journal not in ("wal", "delete", "truncate", "persist"):
        raise ValueError(
            f"journal_mode in a SQLite URL must be wal, delete, truncate or persist, not {journal!r}"
        )
    name = f"file:{quote(path)}?mode={mode}"

    def connect(_timeout: float) -> sqlite3.Connection:
        try:
            conn = _open(name)
        except sqlite3.OperationalError:
            if mode != "rwc" or not _make_folder(path):
                raise
            conn = _open(name)
        conn.patience = timeout
        try:
            # It is a property of the file. Writing it again would want a lock each time; and to
            # ask for it opens the whole log, where others have that open and so answer it.
            is_known = journal == "wal" and os.path.exists(f"{path}-wal")
            if mode != "ro" and not is_known and _journal_mode(conn) != journal:
                conn.execute(f"PRAGMA journal_mode = {journal}")
            conn.wait_at_once(timeout)
        except BaseException:
            conn.close()
            raise
        return conn

    return connect, SQLiteDriver()


def _open(name: str) -> PatientConnection:
    return sqlite3.connect(
        name, uri=True, timeout=OPEN_STEP, check_same_thread=False, factory=PatientConnection
    )


def _make_folder(path: str) -> bool:
    """Make the folder of the file as the file is made, not those above it; tell if it may be there."""
    try:
        os.mkdir(os.path.dirname(path) or ".")
    except FileExistsError:  # another worker was quicker
        return True
    except OSError:  # sqlite3 says what is wrong
        return False
    return True


def _journal_mode(conn: sqlite3.Connection) -> str:
    row: tuple[str] = conn.execute("PRAGMA journal_mode").fetchone()
    return row[0]
