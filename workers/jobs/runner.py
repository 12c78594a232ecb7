"""The worker: threads that take jobs, run the handler and settle each attempt.

Decides when to ask, whom to take jobs back from, and what an attempt's end means for its job. What
a row may go through is `table`'s; who is dead is `owner`'s.

Threads. `threads` job threads take turns at asking the table, so that an idle worker asks once, not
once per thread. The thread that called `run` keeps the leases of what is in flight. A job is in
`_in_flight` from the moment it is claimed until its outcome has been written.

Stop. `accepting` ends: the thread whose turn it is stops asking, the others finish their jobs. The
contexts of jobs end with `worker.ctx`: whatever a handler raises then, its transaction is rolled
back and its job is given back. What can't be written by then (the database is down, the pools are
closed) needs no help: this process is known to be dead soon, and others take its jobs back.
"""

from __future__ import annotations

__all__ = ["Verdict", "judge", "run"]

import contextlib
import enum
import functools
import json
import random
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import workers.scoreboard  # noqa: F401  # imported by the template, it is shared by all workers
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.correlation import bind
from workers.jobs.deaths import Deaths, how_it_ended
from workers.jobs.dialects import driver_errors, foreign, table_for
from workers.jobs.isolation import Isolation
from workers.jobs.options import Handler, Job, Options, find_handler
from workers.jobs.owner import Owner, is_known_dead
from workers.jobs.table import (
    LONGEST_WAIT,
    Claim,
    ClaimLostError,
    Table,
    TransactionError,
    storable,
)
from workers.pool import ConnectError, Pool, PoolClosed, PoolError
from workers.worker import Job as WorkerJob
from workers.worker import Worker

# An idle worker asks again after this many seconds, then twice as many, up to `poll`.
_FIRST_PAUSE = 0.02
# A busy worker looks after dead ones this often: their jobs must not starve behind a long queue.
_SWEEP_EVERY = 5.0
_LOOK_AT_CLOCK_EVERY = 1.0  # seconds: what waits after the clock was set back waits so long
# Seconds for one try to write an outcome; a dead server must not hold a thread longer than this.
_SETTLE_WITHIN = 5.0
_LONGEST_PAUSE = 10.0  # seconds between two tries while the database does not answer
# Seconds until a failed job is tried again, before jitter; 1, 2, 4, 8 ... before that.
_LONGEST_BACK_OFF = LONGEST_WAIT / 1.2
_LONGEST_TRACEBACK = 50_000  # characters: a recursion's says the same thing a thousand times

_OUR_CODE = {str(Path(__file__).with_name(name)) for name in ("runner.py", "dialects.py")}

_T = TypeVar("_T")


def run(worker: Worker) -> None:
    """Take jobs from the table `jobs` of the group's first pool, until the worker has to stop.

    Raises:
        OptionsError: the group's options are wrong.
        TypeError: the pool is neither SQLite nor PostgreSQL.
    """
    options = Options.read(worker.options)
    handler = find_handler(options.handler)
    if not worker.pools:
        raise ValueError("workers.jobs keeps its table in the group's first pool, but it has none")
    pool = next(iter(worker.pools.values()))
    _Runner(worker, pool, handler, options).run()


class Verdict(enum.Enum):
    """What an attempt's end means for its job."""

    DONE = "done"
    TAKEN_OVER = "taken over"  # it is somebody else's: nothing to write
    GIVEN_BACK = "given back"  # it was stopped, or never begun: queued as before
    BROKEN_OFF = "broken off"  # nobody knows what the handler would have said: queued, held back
    FAILED = "failed"  # the handler has raised


def judge(error: BaseException, *, begun: bool, stopped: bool, excused: bool) -> Verdict:
    """Return what an attempt means that has ended with `error`.

    Args:
        error: what came out of it.
        begun: whether the handler has been called.
        stopped: whether the job's context has ended.
        excused: whether the database lost the connection, has no room, or asks for another try.
    """
    if isinstance(error, ClaimLostError):
        return Verdict.TAKEN_OVER
    if isinstance(error, TransactionError) and error.kept:
        return Verdict.FAILED  # whatever else happened: another try would repeat what was kept
    # Whatever a handler makes of the stop (its driver's error, one of its own) is not its failure.
    if stopped or not begun:
        return Verdict.GIVEN_BACK
    if excused:
        return Verdict.BROKEN_OFF
    return Verdict.FAILED


class _Runner:
    """One worker's jobs."""

    def __init__(self, worker: Worker, pool: Pool, handler: Handler, options: Options) -> None:
        self._worker = worker
        self._pool = pool
        self._handler = handler
        self._options = options
        self._owner = Owner.here(worker.id)
        self._table: Table  # known as soon as there has been a connection
        # Ends when there is nothing more to wait for in `run`.
        self._working = worker.ctx.with_cancel()
        self._isolation = Isolation(worker.accepting)
        self._deaths = Deaths(worker.deaths)
        self._turn = threading.Lock()  # held by the one thread that asks for work
        self._pause = _FIRST_PAUSE  # the rest: only with the turn
        self._sweep_at = 0.0
        self._awaits_word = False  # somebody was found dead, and how is not known yet
        self._look_at_clock_at = 0.0
        self._lock = threading.Lock()  # the rest: only with the lock
        self._in_flight: dict[Claim, Context | None] = {}
        self._threads = options.threads
        self._complaint = ""  # the kind of error that keeps us from the database
        self._has_strays = False  # rows may be running in our name that are not in flight

    def run(self) -> None:
        """Live until every thread has ended, or the worker's context."""
        if not self._begin():
            return
        self._worker.ready()
        for _ in range(self._options.threads):
            self._worker.wg.go(self._take_jobs)
        while not self._working.wait(self._options.lease / 3):
            self._keep_leases()

    def _begin(self) -> bool:
        """Reach the database and queue what dead workers held; False when there is no time for it.

        A worker that can't reach its database is not ready: it is for `ready_timeout` to end that.

        Raises:
            ConnectError: the database refuses for a reason that waiting does not change.
        """
        if self._pool.stats().max_open <= self._options.threads:
            self._worker.log.warning(
                "jobs.no_spare_connection",
                threads=self._options.threads,
                max_open=self._pool.stats().max_open,
                consequence="leases can't be renewed while every connection is lent: another"
                " worker may begin a job that takes longer than its lease",
            )
        return self._with_connection(self._look, refusable=True) is not None

    def _look(self, conn: Any) -> bool:
        self._table = table_for(conn)
        try:
            self._sweep(conn, at_once=True)
        except driver_errors() as exc:
            if not self._table.is_missing(exc):
                _demand_own(exc)
                raise
            self._worker.log.info("jobs.no_table", remedy="python -m workers.jobs add creates it")
        return True

    # --- asking for work --------------------------------------------------------------------------

    def _take_jobs(self) -> None:
        """Take and carry out one job after the other."""
        try:
            while (claim := self._next_claim()) is not None:
                self._attempt(claim)
        except BaseException:
            self._working.cancel("a job thread has failed")
            raise
        finally:
            with self._lock:
                self._threads -= 1
                is_last = self._threads == 0
            if is_last:
                if self._has_strays:
                    self._write(self._give_back_strays, only_once=True)
                self._working.cancel("all job threads have ended")

    def _next_claim(self) -> Claim | None:
        """Wait for a job; return None when no new one may be taken."""
        with self._turn:
            self._isolation.wait()
            while (answer := self._with_connection(self._ask)) is not None:
                if isinstance(answer, Claim):
                    self._pause = _FIRST_PAUSE
                    with self._lock:
                        self._in_flight[answer] = None
                    self._isolation.begin(answer)
                    return answer
                self._worker.accepting.wait(answer)
        return None

    def _ask(self, conn: Any) -> Claim | float:
        """Claim a job, or return for how many seconds there is no use in asking again."""
        try:
            if self._awaits_word or time.monotonic() >= self._sweep_at:
                self._sweep(conn)
            if time.monotonic() >= self._look_at_clock_at:
                self._look_at_clock(conn)
            first = functools.partial(self._table.is_suspect_first, conn)
            if self._isolation.makes_room(first, time.monotonic()):
                return _FIRST_PAUSE
            alone = self._isolation.is_alone
            claim = self._claim(conn, suspects=alone)
            if claim is None and self._sweep(conn):
                claim = self._claim(conn, suspects=alone)
            return claim or self._rest(self._table.next_due(conn, suspects=alone))
        except driver_errors() as exc:
            if self._table.is_conflict(exc):
                return _FIRST_PAUSE
            if self._table.is_missing(exc):
                return self._rest(None)
            _demand_own(exc)
            raise

    def _claim(self, conn: Any, *, suspects: bool) -> Claim | None:
        accepting, owner = self._worker.accepting, str(self._owner)
        return self._table.claim(conn, accepting, owner, self._options.lease, suspects=suspects)

    def _rest(self, next_due: float | None) -> float:
        if self._awaits_word:
            return _FIRST_PAUSE
        pause = self._pause
        self._pause = min(pause * 2, self._options.poll)
        if next_due is not None:
            pause = min(pause, max(next_due, 0.0))
        return pause * random.uniform(0.8, 1.0)  # noqa: S311  # so that workers don't ask in step

    def _with_connection(
        self, action: Callable[[Any], _T], *, refusable: bool = False
    ) -> _T | None:
        """Return what `action` does with a connection, trying until no new work may be taken.

        Raises:
            ConnectError: only where it is `refusable`: the database will not have us.
        """
        accepting = self._worker.accepting
        pause = _FIRST_PAUSE
        while not accepting.done:
            try:
                with self._pool.acquire(accepting) as conn:
                    result = action(conn)
            except (Cancelled, PoolClosed):
                self._note_strays()
                return None
            except _unavailable() as exc:
                if isinstance(exc, ConnectError) and refusable:
                    raise
                self._note_strays()
                self._complain(exc)
            else:
                self._complain_no_more()
                return result
            accepting.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        return None

    def _complain(self, error: Exception) -> None:
        """Log what keeps us from the database: once for each kind, not at each try."""
        kind = type(error).__name__
        with self._lock:
            is_new = kind != self._complaint
            self._complaint = kind
        if is_new:
            self._worker.log.warning("jobs.database_unavailable", error=str(error).strip())

    def _complain_no_more(self) -> None:
        with self._lock:
            was_away = self._complaint != ""
            self._complaint = ""
        if was_away:
            self._worker.log.info("jobs.database_available")

    # --- jobs that nobody works on any more -------------------------------------------------------

    def _sweep(self, conn: Any, *, at_once: bool = False) -> int:
        """Queue what dead workers hold and what has outlived its lease; return how many jobs.

        With `at_once` nobody's word is waited for: what was known when this worker was made, it knows.
        """
        self._sweep_at = time.monotonic() + _SWEEP_EVERY
        self._awaits_word = False
        count = 0
        for text, has_expired in self._table.owners(conn):
            owner = Owner.parse(text)
            if owner == self._owner:
                if has_expired or self._has_strays:
                    count += self._release_strays(conn)
            elif owner is not None and is_known_dead(owner, self._owner):
                if self._deaths.awaits_word(owner, time.monotonic()) and not at_once:
                    self._awaits_word = True
                    continue
                death = self._deaths.of(owner)
                by_itself = death is not None and death.by_itself
                why = how_it_ended(owner, death)
                count += self._take_back(conn, text, why, by_itself=by_itself)
            elif has_expired:
                name = text if owner is None else owner.name
                why = f"{name} has not renewed its lease"
                count += self._take_back(conn, text, why, expired=True)
        return count

    def _look_at_clock(self, conn: Any) -> None:
        """Queue at once what would wait for as long as the database's clock was set back."""
        self._look_at_clock_at = time.monotonic() + _LOOK_AT_CLOCK_EVERY
        if self._table.is_misdated(conn):
            with self._table.writing(conn, self._worker.accepting):
                count = self._table.redate(conn)
            if count:
                self._worker.log.warning("jobs.clock_was_set_back", jobs=count)

    def _take_back(
        self, conn: Any, owner: str, why: str, *, expired: bool = False, by_itself: bool = False
    ) -> int:
        with self._table.writing(conn, self._worker.accepting):
            held = self._table.held_by(conn, owner, expired=expired)
            # Beside others nobody knows whose doing it was: each of them runs alone next time.
            if by_itself and len(held) == 1:
                count = int(self._crashed(conn, held[0], why))
            else:
                count = sum(self._table.lose(conn, claim, why) for claim in held)
        if count:
            self._worker.log.info("jobs.taken_back", jobs=count, why=why)
        return count

    def _crashed(self, conn: Any, claim: Claim, why: str) -> bool:
        """Count against a job that it has ended its worker."""
        again_in = self._again_in(claim)
        times = f" {claim.losses + 1} times; the last" if claim.losses else ""
        error = f"its worker died with it{times}: {why}"
        self._worker.log.warning(
            "job.failed",
            job=claim.id,
            attempts=claim.attempts,
            error=error,
            again_in_seconds=again_in,
        )
        return self._table.fail(conn, claim, error, again_in, lost=True)

    def _release_strays(self, conn: Any) -> int:
        with self._table.writing(conn, self._worker.accepting):
            return self._give_back_strays(conn)

    def _give_back_strays(self, conn: Any) -> int:
        """Queue what runs in our name and is not in flight: with the turn, or by the last thread.

        Otherwise a claim that is not in flight yet would be taken for a stray.
        """
        with self._lock:
            self._has_strays = False
            in_flight = set(self._in_flight)  # before the query: what ends meanwhile is settled
        strays = set(self._table.held_by(conn, str(self._owner))) - in_flight
        return sum(self._table.give_back(conn, claim) for claim in strays)

    def _note_strays(self) -> None:
        """Remember that a claim may have been committed although it was not heard of."""
        with self._lock:
            self._has_strays = True

    # --- one attempt ------------------------------------------------------------------------------

    def _attempt(self, claim: Claim) -> None:
        """Run the handler, and write what has become of the job."""
        is_settled = False
        # The worker counts a job by what leaves its block: nothing, an Exception, another one.
        with contextlib.suppress(_HandlerFailedError, Cancelled):
            try:
                with self._job_for(claim) as unit:
                    bind(unit, {"job_id": claim.id, "attempt": claim.attempts})
                    verdict, is_settled = self._perform(claim, unit)
                    if verdict is Verdict.FAILED:
                        raise _HandlerFailedError
                    if verdict is not Verdict.DONE:
                        raise Cancelled(verdict.value)
            finally:
                with self._lock:
                    del self._in_flight[claim]
                    self._has_strays |= not is_settled
                self._isolation.end(claim)

    def _job_for(self, claim: Claim) -> WorkerJob:
        name = f"job {claim.id}"
        tracing = self._worker.tracing
        if tracing is None:
            return self._worker.job(name)
        return tracing.attempt(self._worker, name, claim.id, claim.attempts)

    def _perform(self, claim: Claim, unit: WorkerJob) -> tuple[Verdict, bool]:
        """Return what has become of the job, and whether that could be written."""
        ctx = unit.ctx
        begun = committed = excused = False

        def work() -> str | None:
            nonlocal begun
            begun = True
            return _as_result(
                self._handler(Job(claim.id, claim.payload, claim.attempts, ctx, unit), conn)
            )

        with self._lock:
            self._in_flight[claim] = ctx
        try:
            # A job that takes long has not leaked its connection.
            with self._pool.acquire(ctx, leak_threshold=0) as conn:
                try:
                    self._table.perform(conn, ctx, claim, work)
                    committed = True
                except BaseException as exc:
                    excused = (
                        self._table.is_conflict(exc)
                        or self._table.is_out_of_room(exc)
                        or self._table.is_broken(conn)
                    )
                    raise
        except BaseException as exc:  # whatever user code raises is the job's, not the worker's
            if committed:
                return Verdict.DONE, True  # what the way back raised is the pool's business
            # Of those that are stopped for a hang one hangs: given back, it would hang for ever.
            hung = ctx.done and ctx.cause == "hang"
            verdict = judge(
                exc, begun=begun, stopped=ctx.done and not hung, excused=excused or hung
            )
            if self._worker.tracing is not None and verdict is Verdict.FAILED:
                self._worker.tracing.failed(unit, exc)
            return verdict, self._settle(claim, verdict, exc)
        return Verdict.DONE, True

    def _settle(self, claim: Claim, verdict: Verdict, error: BaseException) -> bool:
        """Write the outcome of an attempt that was not done; return whether that was possible."""
        table, log = self._table, self._worker.log.bind(job=claim.id, attempts=claim.attempts)
        summary = traceback.format_exception_only(error)[-1].strip()
        match verdict:
            case Verdict.FAILED:
                again_in = self._again_in(claim, error)
                text = _traceback(error)
                log.warning("job.failed", error=summary, again_in_seconds=again_in)
                return self._write(lambda conn: table.fail(conn, claim, text, again_in))
            case Verdict.GIVEN_BACK:
                log.info("job.given_back", why=summary)
                return self._write(lambda conn: table.give_back(conn, claim))
            case Verdict.BROKEN_OFF:
                log.warning("job.broken_off", error=summary)
                return self._write(lambda conn: table.lose(conn, claim, summary))
            case _:
                log.warning("job.taken_over", why=summary)
                return True

    def _again_in(self, claim: Claim, error: BaseException | None = None) -> float | None:
        """Return in how many seconds a job that has failed is tried again, None for never."""
        if isinstance(error, TransactionError) and error.kept:
            return None
        if claim.failures + 1 >= self._options.max_attempts:
            return None
        jitter = random.uniform(0.8, 1.2)  # noqa: S311
        return round(min(2.0**claim.failures, _LONGEST_BACK_OFF) * jitter, 3)

    def _write(self, change: Callable[[Any], object], *, only_once: bool = False) -> bool:
        """Commit `change`, trying until there is no time left; return whether it was possible."""
        pause = _FIRST_PAUSE
        while True:
            is_last = only_once or self._worker.ctx.done
            try:
                with (
                    Context.background().with_timeout(_SETTLE_WITHIN) as ctx,
                    self._pool.acquire(ctx) as conn,
                    self._table.writing(conn, ctx),
                ):
                    change(conn)
            except _unavailable() as exc:
                if is_last or isinstance(exc, PoolClosed):
                    self._worker.log.warning("job.unsettled", error=str(exc).strip())
                    return False
                self._complain(exc)
            else:
                self._complain_no_more()
                return True
            self._worker.ctx.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    # --- leases -----------------------------------------------------------------------------------

    def _keep_leases(self) -> None:
        """Renew the leases of what is in flight; stop what has been taken over."""
        with self._lock:
            held = [(claim, ctx) for claim, ctx in self._in_flight.items() if ctx is not None]
        if not held:
            return
        lease = self._options.lease
        try:
            with (
                Context.background().with_timeout(lease / 3) as limit,
                self._pool.acquire(limit) as conn,
                self._table.writing(conn, limit),
            ):
                lost = [ctx for claim, ctx in held if not self._table.renew(conn, claim, lease)]
        except _unavailable() as exc:
            self._worker.log.warning("jobs.leases_not_renewed", error=str(exc).strip())
            return
        for ctx in lost:
            ctx.cancel("its lease had ended, and another worker has taken it")


def _unavailable() -> tuple[type[Exception], ...]:
    """Return what is raised when the database can't be had, or doesn't do as it is told."""
    return (DeadlineExceeded, PoolError, *driver_errors())


def _demand_own(error: Exception) -> None:
    """Raise where the error says that the table is not ours: no waiting will change that.

    Raises:
        ValueError: it is not.
    """
    if sentence := foreign(error):
        raise ValueError(sentence) from error


class _HandlerFailedError(Exception):
    """Tells the worker's account that this job has failed."""


def _as_result(value: Any) -> str | None:
    """Return what stands in `result` for what a handler has returned.

    Raises:
        TypeError: it can't be written as JSON.
        ValueError: it holds what a text in a database can't (NUL, a lone surrogate).
    """
    if value is None:
        return None
    if not isinstance(value, str):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError) as exc:
            raise TypeError(
                f"the handler returned a {type(value).__name__}; a result is a str, None, or what"
                f" JSON can hold ({exc})"
            ) from None
    if storable(value) != value:
        raise ValueError("the handler's result holds a NUL or a lone surrogate, which no text may")
    return str(value)


def _traceback(error: BaseException) -> str:
    """Return the traceback from the handler on: how we called it is of no use to its author."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OUR_CODE:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))[-_LONGEST_TRACEBACK:]
