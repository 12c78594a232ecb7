"""The table `jobs` in SQLite and in PostgreSQL: transactions, locks, and what a handler may not do.

A handler gets the driver's own connection. What it must not do is end the transaction that its
job's state belongs to: psycopg forbids that itself within `conn.transaction()`; for SQLite a guard
does, which the database asks before it prepares each statement.
"""

from __future__ import annotations

__all__ = ["PostgreSQL", "SQLite", "driver_errors", "foreign", "table_for"]

import contextlib
import random
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from workers.context import Context
from workers.jobs.table import UNSUSPECTED, Claim, Table, TransactionError


def table_for(conn: Any) -> Table:
    """Return the table as the database behind `conn` has it.

    Raises:
        TypeError: it is neither SQLite nor PostgreSQL.
    """
    if isinstance(conn, sqlite3.Connection):
        return SQLite()
    kind = type(conn)
    if kind.__module__.partition(".")[0] == "psycopg":
        return PostgreSQL()
    raise TypeError(
        f"jobs are kept in SQLite or PostgreSQL, not behind a {kind.__module__}.{kind.__qualname__}"
    )


def driver_errors() -> tuple[type[Exception], ...]:
    """Return what the drivers raise: of those that have been imported, since no other can."""
    psycopg = sys.modules.get("psycopg")
    return (sqlite3.Error,) if psycopg is None else (sqlite3.Error, psycopg.Error)


def foreign(error: Exception) -> str:
    """Return in a sentence that the table has other columns than ours; "" for any other error."""
    lacks_column = getattr(error, "sqlstate", None) == "42703" or (
        isinstance(error, sqlite3.OperationalError) and str(error).startswith("no such column")
    )
    if not lacks_column:
        return ""
    return (
        "there is a table jobs that is not of this version of workers.jobs, or of somebody else "
        f"({str(error).strip().splitlines()[0]}); rename it, and `python -m workers.jobs add` makes one"
    )


class SQLite(Table):
    """One file, one writer at a time: its lock is taken late, held shortly, waited for patiently.

    A handler's transaction begins with its first write, as sqlite3 has it (or with its own BEGIN
    IMMEDIATE): were it begun for it, whatever the handler reads first would pin a snapshot, and its
    write would fail as soon as anybody else had written meanwhile.
    """

    # julianday() is exact to the millisecond in every SQLite; unixepoch('subsec') came with 3.42.
    _now = "((julianday('now') - 2440587.5) * 86400.0)"
    _mark = "?"
    _identity = "INTEGER PRIMARY KEY AUTOINCREMENT"
    _unless_locked = ""  # whoever reads this holds the write lock

    @contextlib.contextmanager
    def writing(self, conn: Any, ctx: Context) -> Iterator[None]:
        """Take the write lock first: nothing read in the block can be out of date."""
        _patiently(conn, "BEGIN IMMEDIATE", ctx)
        try:
            yield
            _patiently(conn, "COMMIT", ctx)
        except BaseException:
            conn.rollback()
            raise

    def perform(
        self, conn: Any, ctx: Context, claim: Claim, work: Callable[[], str | None]
    ) -> None:
        """Let the handler begin; take the write lock for `done` where it has not written."""
        with _Guard(conn):
            result = work()
        if not conn.in_transaction:
            _patiently(conn, "BEGIN IMMEDIATE", ctx)
        self._finish(conn, claim, result)
        _patiently(conn, "COMMIT", ctx)

    def create(self, conn: Any, ctx: Context) -> None:
        """Create the table under the write lock."""
        with self.writing(conn, ctx):
            self._create(conn)
            self._demand_columns(conn)

    def add(self, conn: Any, payloads: Sequence[str]) -> tuple[int, int]:
        """Insert under the write lock, which makes the ids consecutive."""
        with contextlib.closing(self._cursor(conn)) as cursor:
            for payload in payloads:
                cursor.execute("INSERT INTO jobs (payload) VALUES (?)", (payload,))
            last = int(cursor.lastrowid)
        return last - len(payloads) + 1, last

    def claim(
        self, conn: Any, ctx: Context, owner: str, lease: float, *, suspects: bool = True
    ) -> Claim | None:
        """Look without a lock first: an idle worker never takes it."""
        delay = self.next_due(conn, suspects=suspects)
        if delay is None or delay > 0:
            return None
        among = "" if suspects else UNSUSPECTED
        with self.writing(conn, ctx):
            rows = self._rows(
                conn,
                "SELECT id, payload, attempts, failures, losses FROM jobs"  # noqa: S608  # ours
                f" WHERE state = 'queued' AND due <= {{now}}{among} ORDER BY due, id LIMIT 1",
            )
            if not rows:
                return None
            number, payload, attempts, failures, losses = rows[0]
            self._change(
                conn,
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, owner = ?,"
                " lease_until = {now} + ? WHERE id = ?",
                (owner, lease, number),
            )
        return Claim(number, payload, attempts + 1, failures, owner, losses)

    def is_missing(self, error: Exception) -> bool:
        """Return whether SQLite's message says so; it has no code for it."""
        return isinstance(error, sqlite3.OperationalError) and str(error) == "no such table: jobs"

    def is_conflict(self, error: BaseException) -> bool:
        """Return whether others held the lock, or wrote after what was read."""
        return isinstance(error, sqlite3.OperationalError) and _is_busy(error)

    def is_out_of_room(self, error: BaseException) -> bool:
        """Return whether the disk is full; SQLite says of some writes only that they failed."""
        return isinstance(error, sqlite3.Error) and _code(error) in _NO_ROOM

    def is_broken(self, conn: Any) -> bool:  # noqa: ARG002
        """Return False: there is no server to lose."""
        return False

    def _cursor(self, conn: Any) -> Any:
        """Return False: there is no server to lose."""
        cursor = conn.cursor(sqlite3.Cursor)
        cursor.row_factory = None
        return cursor


class _Guard:
    """Keeps a handler from ending its transaction, and notices what was written outside one.

    SQLite asks it when a statement is prepared, and its being set makes all be prepared anew; that
    costs some microseconds a statement.
    """

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self._refused = ""
        self._has_begun = False
        self._has_written_outside = False
        self._has_lost_work = False  # SQLite itself has rolled back, as some errors make it do
        if conn.isolation_level is None:  # then each of the handler's writes would be committed
            conn.isolation_level = "DEFERRED"
        self._autocommit = getattr(conn, "autocommit", None)  # from Python 3.12 on
        self._changes = conn.total_changes

    def __enter__(self) -> None:
        self._conn.set_authorizer(self._authorize)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # the handler has closed it
            self._conn.set_authorizer(None)
            if getattr(self._conn, "autocommit", None) != self._autocommit:
                # Setting it commits, which was refused; but it is set, and there is no more rollback.
                setattr(self._conn, "autocommit", self._autocommit)  # noqa: B010
            if not self._conn.in_transaction:
                self._look_for_changes()
        if self._has_written_outside:
            raise TransactionError(
                "the handler wrote outside of its transaction, so that its job's end could not be"
                " committed with it: sqlite3 begins one by itself only before a plain INSERT,"
                " UPDATE, DELETE or REPLACE; before others (WITH ... INSERT, executescript) say"
                ' conn.execute("BEGIN IMMEDIATE")',
                kept=True,
            ) from error
        if self._refused and isinstance(error, sqlite3.DatabaseError):
            raise TransactionError(
                f"the handler's {self._refused}: its transaction is committed together with the"
                " job's state, when it returns; to undo only a part of it, BEGIN and use savepoints"
            ) from error
        if self._has_lost_work and error is None:
            raise TransactionError(
                "an error made SQLite roll the handler's transaction back, and the handler went on"
            )

    def _authorize(self, action: int, what: str | None, *_more: str | None) -> int:
        if action == sqlite3.SQLITE_TRANSACTION and what == "BEGIN":
            self._look_for_changes()
            self._has_begun = True
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_TRANSACTION:
            self._refused = f"{what} was refused"
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_SAVEPOINT and not self._conn.in_transaction:
            # Released, it would commit.
            self._refused = "SAVEPOINT outside of a transaction was refused"
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def _look_for_changes(self) -> None:
        """Note what it means that rows have been changed, while no transaction is open."""
        if self._conn.total_changes == self._changes:
            return
        # A transaction that has begun cannot have been committed: that is refused.
        if self._has_begun:
            self._has_lost_work = True
        else:
            self._has_written_outside = True


_BUSY_PAUSE = (0.001, 0.02)  # seconds between two tries for the write lock; random, for fairness


def _patiently(conn: sqlite3.Connection, statement: str, ctx: Context) -> None:
    """Execute BEGIN IMMEDIATE or COMMIT, again and again while others hold the lock.

    SQLite's own waiting can't be interrupted, and backs off so far that late comers overtake: this
    waits between tries that don't.
    """
    with contextlib.closing(conn.cursor()) as cursor:
        cursor.row_factory = None
        [(timeout,)] = cursor.execute("PRAGMA busy_timeout").fetchall()
        cursor.execute("PRAGMA busy_timeout = 0")
        try:
            while not _has_succeeded(cursor, statement):
                ctx.wait(random.uniform(*_BUSY_PAUSE))  # noqa: S311
                ctx.check()
        finally:
            cursor.execute(f"PRAGMA busy_timeout = {timeout:d}")


def _has_succeeded(cursor: sqlite3.Cursor, statement: str) -> bool:
    try:
        cursor.execute(statement)
    except sqlite3.OperationalError as exc:
        if _is_busy(exc):
            return False
        raise
    return True


_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: sqlite3.Error) -> int:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF  # its extension (BUSY_SNAPSHOT) is above that byte


class PostgreSQL(Table):
    """One server, any number of workers on any number of machines; rows are locked, not the table.

    A handler's transaction is a `conn.transaction()` block: in it psycopg refuses `commit()` and
    `rollback()`, and the handler's own `conn.transaction()` blocks are savepoints.
    """

    _now = "extract(epoch FROM statement_timestamp())::double precision"
    _mark = "%s"
    _identity = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
    _unless_locked = " FOR UPDATE SKIP LOCKED"

    # Held while the table is created: CREATE TABLE IF NOT EXISTS alone can fail when raced.
    _CREATING = 0x61636B76_6A6F6273  # "ackvjobs"

    # What asks for the transaction to be run again: serialization failure, deadlock.
    _CONFLICTS = frozenset({"40001", "40P01"})

    def __init__(self) -> None:
        import psycopg  # who has such a connection has imported it

        self._in_transaction = psycopg.pq.TransactionStatus.INTRANS
        self._idle = psycopg.pq.TransactionStatus.IDLE
        self._tuples = psycopg.rows.tuple_row

    @contextlib.contextmanager
    def writing(self, conn: Any, ctx: Context) -> Iterator[None]:
        """Begin a transaction, also where a query has begun one that nobody needs."""
        del ctx  # the pool cancels a query that waits for a lock
        if conn.info.transaction_status != self._idle:
            conn.rollback()  # ends what an earlier query has begun: else this were a savepoint
        with conn.transaction():
            yield

    def perform(
        self, conn: Any, ctx: Context, claim: Claim, work: Callable[[], str | None]
    ) -> None:
        """Put the handler into a block of psycopg's, which refuses `commit()`."""
        with self.writing(conn, ctx):
            try:
                result = work()
            except BaseException as exc:
                self._check_has_not_ended(conn, exc)
                raise
            self._check_has_not_ended(conn, None)
            status = conn.info.transaction_status
            if status != self._in_transaction:
                raise TransactionError(
                    f"the handler returned with its transaction {status.name}: a statement of it"
                    " failed; to go on after an error, put the statement into a"
                    " `with conn.transaction():` block of its own"
                )
            self._finish(conn, claim, result)

    def _check_has_not_ended(self, conn: Any, error: BaseException | None) -> None:
        if conn.info.transaction_status == self._idle:
            raise TransactionError(
                "the handler ended its transaction: it is committed together with the job's state,"
                " when the handler returns",
                kept=True,
            ) from error

    def create(self, conn: Any, ctx: Context) -> None:
        """Create the table under an advisory lock, unless it can be seen already."""
        with self.writing(conn, ctx):
            if self._rows(conn, "SELECT to_regclass('jobs') IS NOT NULL") == [(True,)]:
                self._demand_columns(conn)
                return  # who adds jobs needs no right to create tables
            self._rows(conn, "SELECT pg_advisory_xact_lock(?)", (self._CREATING,))
            self._create(conn)

    def add(self, conn: Any, payloads: Sequence[str]) -> tuple[int, int]:
        """Insert all of them with one statement, in their order."""
        [(first, last)] = self._rows(
            conn,
            "WITH added AS (INSERT INTO jobs (payload) SELECT payload FROM"
            " unnest(?::text[]) WITH ORDINALITY AS new (payload, place) ORDER BY place RETURNING id)"
            " SELECT min(id), max(id) FROM added",
            (list(payloads),),
        )
        return int(first), int(last)

    def claim(
        self, conn: Any, ctx: Context, owner: str, lease: float, *, suspects: bool = True
    ) -> Claim | None:
        """Pass over rows that other workers are claiming at this moment."""
        among = "" if suspects else UNSUSPECTED
        with self.writing(conn, ctx):
            rows = self._rows(
                conn,
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, owner = ?,"  # noqa: S608
                " lease_until = {now} + ? WHERE id = (SELECT id FROM jobs WHERE state = 'queued'"
                f" AND due <= {{now}}{among} ORDER BY due, id LIMIT 1 FOR UPDATE SKIP LOCKED)"
                " RETURNING id, payload, attempts, failures, losses",
                (owner, lease),
            )
        if not rows:
            return None
        number, payload, attempts, failures, losses = rows[0]
        return Claim(number, payload, attempts, failures, owner, losses)

    def is_missing(self, error: Exception) -> bool:
        """Return whether it is `undefined_table`."""
        return getattr(error, "sqlstate", None) == "42P01"

    def is_conflict(self, error: BaseException) -> bool:
        """Return whether it is a serialization failure or a deadlock."""
        return getattr(error, "sqlstate", None) in self._CONFLICTS

    def is_out_of_room(self, error: BaseException) -> bool:
        """Return whether it is disk_full or another of the class "insufficient resources"."""
        return (getattr(error, "sqlstate", None) or "").startswith("53")

    def is_broken(self, conn: Any) -> bool:
        """Return whether it was closed by anybody but us."""
        return bool(conn.broken)

    def _cursor(self, conn: Any) -> Any:
        return conn.cursor(row_factory=self._tuples)
