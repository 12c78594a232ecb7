"""The table `jobs` and what may happen to a row: one set of rules, two databases.

Decides nothing about when: it takes a connection and does one thing to the table. It must not
retry, wait for work, or know of workers and threads.

Theory of operation.

    queued --claim--> running --finish--> done
      ^                  |  the handler has raised, or ended its worker:
      |                  |                           --fail--> queued, later | failed
      |                  |  the worker was stopped:  --give back--> queued, at once
      +--- retry --+     |  the attempt broke off:   --lose--> queued, at once, then later | failed
                   |     v
                 failed <+

A claim is a short transaction of its own; the handler's work is another one, which ends with
`finish`: so the effect and `done` are committed together or not at all. Every change of a running
row is fenced by (id, attempts, owner): `attempts` grows with each claim and never shrinks, so at
most one process can find its fence in place, and it finds it at most once. A holder that was taken
for dead, or slept through its lease, finds nothing to finish, and its work is rolled back.

`failures` counts what handlers did: they raised, or ended their worker (it exited or crashed, nobody
from outside did it, and no other job was in flight). Only these count towards `max_attempts`: what
the machinery did must not condemn a job. `losses` counts what came to no verdict: the worker was
killed, perhaps from outside, or crashed beside others; the connection broke, the database was locked
or its disk full. Who has some is a suspect, runs alone in its worker (`isolation`), is held back longer
and longer, and ends as failed after `LOSSES_ALLOWED`. These take more than five minutes, so no storm of
kills that is shorter condemns a good job, however many hit it.
"""

from __future__ import annotations

__all__ = [
    "LONGEST_WAIT",
    "STATES",
    "UNSUSPECTED",
    "Claim",
    "ClaimLostError",
    "Table",
    "TransactionError",
    "storable",
]

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from workers.context import Context

STATES = ("queued", "running", "done", "failed")

LOSSES_ALLOWED = 10
UNSUSPECTED = " AND losses = 0"  # in a query: of those that no attempt has been lost with
LONGEST_WAIT = 360  # seconds: no job is held back for longer


@dataclass(frozen=True, slots=True)
class Claim:
    """One attempt at one job: what it is, and the fence that lets only this attempt settle it."""

    id: int
    payload: str
    attempts: int
    failures: int
    owner: str
    losses: int = 0

    @property
    def fence(self) -> tuple[int, int, str]:
        """The values that {fence} stands for."""
        return (self.id, self.attempts, self.owner)


class ClaimLostError(Exception):
    """The job belongs to somebody else by now; this attempt's work has been rolled back."""


class TransactionError(Exception):
    """The handler did something to the job's transaction that only the job's end may do.

    Attributes:
        kept: whether something was committed before the job's end, so that trying again would
            repeat it.
    """

    def __init__(self, message: str, *, kept: bool = False) -> None:
        super().__init__(message)
        self.kept = kept


# The words in braces that the texts below are written with. {now} is the database's own clock, in
# seconds since the epoch: one clock for all machines that share the table.
_WORDS = {
    "{fence}": "id = ? AND attempts = ? AND owner = ? AND state = 'running'",
    "{free}": "owner = NULL, lease_until = NULL",
    # A job whose worker died is due again at once, then after 1, 4, 16, 60, 60 ... seconds.
    "{held_back}": (
        "CASE losses WHEN 0 THEN due WHEN 1 THEN {now} + 1 WHEN 2 THEN {now} + 4"
        " WHEN 3 THEN {now} + 16 ELSE {now} + 60 END"
    ),
    "{is_last}": f"losses + 1 >= {LOSSES_ALLOWED}",
    # What is due later than any back-off could have made it was written before the clock was set
    # back. Until its first failure or second loss a job is due at once.
    "{misdated}": (
        "state = 'queued' AND due > {now}"  # this alone can be looked up in the index
        " AND due > {now}"
        f" + CASE WHEN failures = 0 AND losses < 2 THEN 0 ELSE {LONGEST_WAIT} END"
    ),
}
_NEXT_DUE = "SELECT min(due) - {now} FROM jobs WHERE state = 'queued'"
_IS_SUSPECT_FIRST = (
    "SELECT losses > 0 FROM jobs WHERE state = 'queued' AND due <= {now} ORDER BY due, id LIMIT 1"
)
_FINISH = "UPDATE jobs SET state = 'done', result = ?, error = NULL, {free} WHERE {fence}"
_FAIL = (
    "UPDATE jobs SET state = 'queued', error = ?, failures = failures + 1, due = {now} + ?, {free}"
    " WHERE {fence}"
)
_FAIL_FOR_GOOD = (
    "UPDATE jobs SET state = 'failed', error = ?, failures = failures + 1, {free} WHERE {fence}"
)
_IS_A_LOSS = "failures = failures + 1, losses = losses + 1"
_GIVE_BACK = "UPDATE jobs SET state = 'queued', {free} WHERE {fence}"
_LOSE = (
    "UPDATE jobs SET state = CASE WHEN {is_last} THEN 'failed' ELSE 'queued' END,"
    " error = CASE WHEN {is_last} THEN ? ELSE error END,"
    " due = {held_back}, losses = losses + 1, {free} WHERE {fence}"
)
_RENEW = (
    "UPDATE jobs SET lease_until = {now} + ? WHERE id ="
    " (SELECT id FROM jobs WHERE {fence}{unless_locked})"
)
_IS_HELD = "SELECT count(*) FROM jobs WHERE {fence}"
_OWNERS = "SELECT owner, min(lease_until) < {now} FROM jobs WHERE state = 'running' GROUP BY owner"
_HELD_BY = "SELECT id, payload, attempts, failures, owner, losses FROM jobs WHERE state = 'running' AND owner = ?"
_EXPIRED = " AND lease_until < {now}"
_COUNTS = "SELECT state, count(*) FROM jobs GROUP BY state"
_RETRY = (
    "UPDATE jobs SET state = 'queued', failures = 0, losses = 0, due = {now} WHERE state = 'failed'"
)
_RETRY_ONE = _RETRY + " AND id = ?"
_COLUMNS = (
    "SELECT id, payload, state, attempts, result, error, failures, losses, due, owner, lease_until"
    " FROM jobs LIMIT 0"
)
_IS_MISDATED = "SELECT EXISTS (SELECT 1 FROM jobs WHERE {misdated})"
_REDATE = "UPDATE jobs SET due = {now} WHERE {misdated}"
_STATE = "SELECT state FROM jobs WHERE id = ?"
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS jobs_queued ON jobs (due, id) WHERE state = 'queued'",
    "CREATE INDEX IF NOT EXISTS jobs_running ON jobs (owner) WHERE state = 'running'",
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id {identity},
    payload TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    result TEXT,
    error TEXT,
    failures INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    due DOUBLE PRECISION NOT NULL DEFAULT {now},
    owner TEXT,
    lease_until DOUBLE PRECISION
)
"""


class Table(ABC):
    """The table as one database has it. Stateless: any thread, one connection per call.

    Methods that change rows are to be called within `writing`, but for `create`, `claim` and
    `perform`, which are transactions of their own. They raise the driver's errors.
    """

    _now: ClassVar[str]  # the clock, as an expression
    _mark: ClassVar[str]  # where a value goes
    _identity: ClassVar[str]  # the type of `id`
    _unless_locked: ClassVar[str]  # leaves out rows that an unfinished transaction holds

    # --- transactions ---------------------------------------------------------------------------

    @abstractmethod
    def writing(self, conn: Any, ctx: Context) -> contextlib.AbstractContextManager[None]:
        """Return a block that is one transaction: committed at its end, else rolled back.

        Raises:
            Cancelled: `ctx` ended while the database was locked by others; as does DeadlineExceeded.
        """

    @abstractmethod
    def perform(
        self, conn: Any, ctx: Context, claim: Claim, work: Callable[[], str | None]
    ) -> None:
        """Run `work`, and commit what it wrote through `conn` together with the job's `done`.

        Nothing is rolled back here on an error: that is for whoever lent the connection.

        Raises:
            ClaimLostError: the job was taken over meanwhile.
            TransactionError: `work` has ended or spoiled the transaction.
        """

    # --- the queue ------------------------------------------------------------------------------

    @abstractmethod
    def create(self, conn: Any, ctx: Context) -> None:
        """Create the table where it is missing. Any number of processes at once."""

    @abstractmethod
    def add(self, conn: Any, payloads: Sequence[str]) -> tuple[int, int]:
        """Add a job for each payload, at least one; return the first and the last id."""

    @abstractmethod
    def claim(
        self, conn: Any, ctx: Context, owner: str, lease: float, *, suspects: bool = True
    ) -> Claim | None:
        """Take the job that has been due for longest, None where none is due.

        Without `suspects` one that no attempt has been lost with, as in `next_due`.
        """

    def next_due(self, conn: Any, *, suspects: bool = True) -> float | None:
        """Return in how many seconds the next queued job is due, None where none is queued."""
        [(delay,)] = self._rows(conn, _NEXT_DUE + ("" if suspects else UNSUSPECTED))
        return None if delay is None else float(delay)

    def is_suspect_first(self, conn: Any) -> bool:
        """Return whether the job that is due for longest is one that an attempt was lost with."""
        rows = self._rows(conn, _IS_SUSPECT_FIRST)
        return bool(rows and rows[0][0])

    # --- an attempt's end -----------------------------------------------------------------------

    def fail(
        self, conn: Any, claim: Claim, error: str, again_in: float | None, *, lost: bool = False
    ) -> bool:
        """Record what the handler raised; due again in `again_in` seconds, None for never.

        With `lost` the handler has ended its worker, and its job is a suspect from now on.

        Returns:
            Whether the job was still this claim's; as do the next three.
        """
        text = _FAIL_FOR_GOOD if again_in is None else _FAIL
        if lost:
            text = text.replace("failures = failures + 1", _IS_A_LOSS)
        when = () if again_in is None else (again_in,)
        return self._change(conn, text, (storable(error), *when, *claim.fence)) == 1

    def give_back(self, conn: Any, claim: Claim) -> bool:
        """Queue it again as if it had not been taken, but for `attempts`."""
        return self._change(conn, _GIVE_BACK, claim.fence) == 1

    def lose(self, conn: Any, claim: Claim, why: str) -> bool:
        """Queue it again after an attempt that came to no verdict; fail it if it was the last."""
        error = (
            f"given up after {LOSSES_ALLOWED} attempts without a verdict: its worker was killed with"
            f" it, or the database failed it; the last: {why}"
        )
        return self._change(conn, _LOSE, (storable(error), *claim.fence)) == 1

    def renew(self, conn: Any, claim: Claim, lease: float) -> bool:
        """Let the claim's lease end `lease` seconds from now.

        A row that its own handler has locked is left alone: nobody else can take it meanwhile.
        """
        if self._change(conn, _RENEW, (lease, *claim.fence)) == 1:
            return True
        return self._rows(conn, _IS_HELD, claim.fence) == [(1,)]

    # --- other workers' jobs --------------------------------------------------------------------

    def owners(self, conn: Any) -> list[tuple[str, bool]]:
        """Return who holds running jobs, and whether a lease of theirs has ended."""
        return [(str(owner), bool(expired)) for owner, expired in self._rows(conn, _OWNERS)]

    def held_by(self, conn: Any, owner: str, *, expired: bool = False) -> list[Claim]:
        """Return the running jobs of `owner`; with `expired` only those whose lease has ended."""
        query = _HELD_BY + (_EXPIRED if expired else "") + "{unless_locked}"
        return [Claim(*row) for row in self._rows(conn, query, (owner,))]

    # --- the clock ------------------------------------------------------------------------------

    def is_misdated(self, conn: Any) -> bool:
        """Return whether jobs wait for a time that has come already: the clock was set back."""
        return bool(self._rows(conn, _IS_MISDATED)[0][0])

    def redate(self, conn: Any) -> int:
        """Let such jobs be due now; return how many that were."""
        return self._change(conn, _REDATE)

    # --- for people -----------------------------------------------------------------------------

    def counts(self, conn: Any) -> dict[str, int]:
        """Return how many jobs are in each state, in the order of a job's life."""
        return dict.fromkeys(STATES, 0) | dict(self._rows(conn, _COUNTS))

    def retry(self, conn: Any, number: int | None = None) -> int:
        """Queue one failed job again, or all of them; return how many that were."""
        if number is None:
            return self._change(conn, _RETRY)
        return self._change(conn, _RETRY_ONE, (number,))

    def state(self, conn: Any, number: int) -> str | None:
        """Return the state of one job, None where there is no such job."""
        rows = self._rows(conn, _STATE, (number,))
        return str(rows[0][0]) if rows else None

    # --- the driver's errors --------------------------------------------------------------------

    @abstractmethod
    def is_missing(self, error: Exception) -> bool:
        """Return whether the error says that there is no table `jobs`."""

    @abstractmethod
    def is_conflict(self, error: BaseException) -> bool:
        """Return whether the database asks for the transaction to be tried again."""

    @abstractmethod
    def is_out_of_room(self, error: BaseException) -> bool:
        """Return whether the database could not do it for want of disk or memory."""

    @abstractmethod
    def is_broken(self, conn: Any) -> bool:
        """Return whether the connection has been lost."""

    # --- for the two databases --------------------------------------------------------------------

    @abstractmethod
    def _cursor(self, conn: Any) -> Any:
        """Return a cursor whose rows are tuples, whatever a handler did to the connection."""

    def _sql(self, text: str) -> str:
        for word, meaning in _WORDS.items():
            text = text.replace(word, meaning)
        text = text.replace("{now}", self._now).replace("{unless_locked}", self._unless_locked)
        return text.replace("?", self._mark)

    def _rows(self, conn: Any, text: str, values: Sequence[Any] = ()) -> list[Any]:
        with contextlib.closing(self._cursor(conn)) as cursor:
            return list(cursor.execute(self._sql(text), values).fetchall())

    def _change(self, conn: Any, text: str, values: Sequence[Any] = ()) -> int:
        with contextlib.closing(self._cursor(conn)) as cursor:
            return int(cursor.execute(self._sql(text), values).rowcount)

    def _finish(self, conn: Any, claim: Claim, result: str | None) -> None:
        if self._change(conn, _FINISH, (result, *claim.fence)) != 1:
            raise ClaimLostError(f"job {claim.id} was taken over while it was running")

    def _demand_columns(self, conn: Any) -> None:
        """Raise the driver's error where the table that was there already is not ours."""
        self._rows(conn, _COLUMNS)

    def _create(self, conn: Any) -> None:
        for statement in (_SCHEMA.replace("{identity}", self._identity), *_INDEXES):
            self._change(conn, statement)


def storable(text: str) -> str:
    """Return `text` with what no database stores in a text (NUL, lone surrogates) written out."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
