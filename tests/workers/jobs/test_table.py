"""What may happen to a row of `jobs`: the same on both databases, and fenced against the past."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.supervised import REPO
from tests.workers.jobs.databases import EFFECTS, soon
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.jobs.dialects import SQLite, driver_errors, table_for
from workers.jobs.table import LOSSES_ALLOWED, Claim, ClaimLostError, TransactionError, storable

ME = "jobs-1 100 1000 here:1:1"
OTHER = "jobs-2 200 2000 here:1:1"


def perform(database, claim, work=None):
    """Carry out an attempt as a worker does: with a connection whose rest is rolled back."""
    with database.connection() as (conn, table):

        def effect():
            conn.execute(
                "INSERT INTO effects VALUES (?, ?)".replace("?", database.mark),
                (claim.id, claim.attempts),
            )
            return work(conn) if work else "result"

        try:
            table.perform(conn, soon(), claim, effect)
        finally:
            with contextlib.suppress(*driver_errors()):
                conn.rollback()


def settle(database, what, claim, *values):
    """Call one of `fail`, `give_back`, `lose` in a transaction of its own."""
    with database.connection() as (conn, table), table.writing(conn, soon()):
        return getattr(table, what)(conn, claim, *values)


# --- one job's life ----------------------------------------------------------------------------------


def test_done_job_has_its_result_and_one_effect(database):
    """A job that was carried out is done, with its result, its attempt counted, its owner gone."""
    [number] = database.add("payload")
    claim = database.claim(ME)
    assert (claim.id, claim.payload, claim.attempts, claim.owner) == (number, "payload", 1, ME)
    assert database.job(number, "state", "attempts", "owner") == ("running", 1, ME)
    perform(database, claim)
    columns = ("state", "attempts", "result", "error", "owner", "lease_until")
    assert database.job(number, *columns) == ("done", 1, "result", None, None, None)
    assert database.effects() == [(number, 1)]


def test_jobs_are_taken_in_the_order_of_their_adding(database):
    """First come, first served."""
    numbers = database.add("a", "b", "c") + database.add("d")
    assert [database.claim(ME).id for _ in numbers] == numbers


def test_empty_queue_gives_nothing(database):
    """Where nothing is queued there is nothing to claim, and nothing due."""
    with database.connection() as (conn, table):
        assert table.claim(conn, soon(), ME, 60.0) is None
        assert table.next_due(conn) is None


def test_raised_error_rolls_the_effect_back(database):
    """What a handler wrote before it raised is gone, and the job is still its attempt's to settle."""
    [number] = database.add("x")
    claim = database.claim(ME)

    def boom(_conn):
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        perform(database, claim, boom)
    assert database.effects() == []
    assert database.job(number, "state") == "running"
    assert settle(database, "fail", claim, "the traceback", 30.0)
    assert database.job(number, "state", "failures", "error") == ("queued", 1, "the traceback")


def test_failed_attempt_is_due_later(database):
    """A job that failed is not taken before its time, and `next_due` says when that is."""
    database.add("x")
    assert settle(database, "fail", database.claim(ME), "e", 30.0)
    with database.connection() as (conn, table):
        assert table.claim(conn, soon(), ME, 60.0) is None
        assert 20.0 < table.next_due(conn) <= 30.0
    database.change("UPDATE jobs SET due = due - 30")
    assert database.claim(ME).attempts == 2


def test_job_that_failed_for_good_stays_failed_until_it_is_retried(database):
    """A failed job keeps its traceback and is taken again only after `retry`."""
    [number] = database.add("x")
    assert settle(database, "fail", database.claim(ME), "the last straw", None)
    assert database.job(number, "state", "error") == ("failed", "the last straw")
    with database.connection() as (conn, table):
        assert table.claim(conn, soon(), ME, 60.0) is None
        with table.writing(conn, soon()):
            assert table.retry(conn, number + 1) == 0
            assert table.retry(conn, number) == 1
            assert table.retry(conn) == 0, "it is not failed any more"
    claim = database.claim(ME)
    assert (claim.attempts, claim.failures) == (2, 0), "all its chances again, in new attempts"
    perform(database, claim)
    assert database.job(number, "state", "error") == ("done", None)


def test_job_that_was_given_back_is_due_at_once(database):
    """A stop is nobody's failure: the job is first in the queue again."""
    first, second = database.add("x", "y")
    assert settle(database, "give_back", database.claim(ME))
    assert database.job(first, "state", "failures", "losses") == ("queued", 0, 0)
    assert [database.claim(OTHER).id for _ in range(2)] == [first, second]


def test_lost_job_is_due_at_once_then_later_and_later_and_ends_as_failed(database):
    """A job that takes its worker down with it each time cannot do so for ever, nor quickly."""
    [number] = database.add("x")
    waits = []
    for _ in range(LOSSES_ALLOWED):
        claim = database.claim(ME)
        assert settle(database, "lose", claim, "its worker died")
        with database.connection() as (conn, table):
            waits.append(table.next_due(conn))
        database.change("UPDATE jobs SET due = 0")
    *delays, last = waits
    assert delays[0] <= 0, "at once"
    for delay, at_most in zip(delays[1:], [1, 4, 16, *[60] * len(delays)], strict=False):
        assert at_most * 0.8 < delay <= at_most
    assert last is None
    assert database.job(number, "state", "losses") == ("failed", LOSSES_ALLOWED)
    error = database.job(number, "error")
    assert error.startswith("given up after 10 attempts without a verdict: its worker was killed")
    assert error.endswith("the last: its worker died")
    assert sum(map(round, delays)) >= 300, "a storm of kills of five minutes condemns nobody"


def test_job_that_ended_its_worker_has_failed_and_is_a_suspect(database):
    """It counts towards `max_attempts`, and is passed over by those who have others in flight."""
    first, second = database.add("x", "y")
    claim = database.claim(ME)
    with database.connection() as (conn, table):
        with table.writing(conn, soon()):
            assert table.fail(conn, claim, "its worker died with it", 0.0, lost=True)
        assert database.job(first, "state", "failures", "losses") == ("queued", 1, 1)
        database.change("UPDATE jobs SET due = 0 WHERE id = ?", first)
        assert table.is_suspect_first(conn)
        assert table.claim(conn, soon(), ME, 60.0, suspects=False).id == second
        assert table.claim(conn, soon(), ME, 60.0, suspects=False) is None
        assert table.next_due(conn, suspects=False) is None
        assert table.next_due(conn) < 0
        again = table.claim(conn, soon(), ME, 60.0)
        assert (again.id, again.failures, again.losses) == (first, 1, 1)
        assert not table.is_suspect_first(conn)


# --- fences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [ME, OTHER])
def test_attempt_that_was_taken_over_has_no_effect(database, again):
    """Who was taken for dead and was not finds its claim gone; its work is rolled back."""
    [number] = database.add("x")
    stale = database.claim(ME)
    assert settle(database, "lose", stale, "taken for dead")
    current = database.claim(again)
    with pytest.raises(ClaimLostError):
        perform(database, stale)
    assert database.effects() == []
    perform(database, current)
    with pytest.raises(ClaimLostError):
        perform(database, stale)
    assert database.effects() == [(number, 2)]
    for what, values in {"fail": ("e", 0.0), "give_back": (), "lose": ("e",)}.items():
        assert not settle(database, what, stale, *values)
    assert database.job(number, "state") == "done"


def test_two_that_finish_one_job_at_once_have_one_effect(database):
    """Taken over in the middle of the commit: one of the two transactions wins, whole."""
    for _ in range(10):
        [number] = database.add("x")
        stale = database.claim(ME)
        barrier = threading.Barrier(2)
        outcomes: list[str] = []

        def finish(claim=stale, barrier=barrier, outcomes=outcomes):
            with database.connection() as (_, table):
                barrier.wait()
                try:
                    perform(database, claim)
                    outcomes.append("done")
                except Exception as exc:
                    assert isinstance(exc, ClaimLostError) or table.is_conflict(exc)

        def take_over(claim=stale, barrier=barrier):
            barrier.wait()
            settle(database, "lose", claim, "taken for dead")

        threads = [threading.Thread(target=target) for target in (finish, take_over)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = database.job(number, "state")
        assert (state == "done") == (outcomes == ["done"])
        assert len([job for job, _ in database.effects() if job == number]) == len(outcomes)
        database.change("DELETE FROM jobs")


def test_lease_that_has_ended_shows_and_can_be_renewed(database):
    """Others see a lease's end; its holder may still renew it as long as nobody has acted on it."""
    first, _ = database.add("x", "y")
    claim = database.claim(ME, lease=0.001)
    database.claim(ME, lease=60.0)
    database.change("UPDATE jobs SET lease_until = lease_until - 1 WHERE id = ?", first)
    with database.connection() as (conn, table):
        assert table.owners(conn) == [(ME, True)]
        with table.writing(conn, soon()):
            assert [held.id for held in table.held_by(conn, ME, expired=True)] == [first]
            assert len(table.held_by(conn, ME)) == 2
            assert table.renew(conn, claim, 60.0)
        assert table.owners(conn) == [(ME, False)]
        with table.writing(conn, soon()):
            assert table.lose(conn, claim, "too late")
            assert not table.renew(conn, claim, 60.0)


def test_job_locked_by_its_own_handler_is_left_alone(on_postgresql):
    """On PostgreSQL neither a renewal nor a taking back waits for a handler that locks its row."""
    database = on_postgresql
    database.add("x")
    claim = database.claim(ME)
    with database.connection() as (handler, _):
        handler.execute("SELECT * FROM jobs FOR UPDATE")
        with database.connection() as (conn, table), table.writing(conn, soon()):
            conn.execute("SET LOCAL lock_timeout = '1s'")
            assert table.held_by(conn, ME) == []
            assert table.renew(conn, claim, 60.0)


def test_workers_that_claim_at_once_never_share_a_job(database):
    """Four processes empty one queue: each job goes to exactly one of them."""
    numbers = database.add(*[f"job {n}" for n in range(200)])
    code = (
        "import sys\n"
        "from tests.workers.jobs.databases import soon\n"
        "from workers.jobs.dialects import table_for\n"
        "from workers.pool import Pool\n"
        "url, owner = sys.argv[1:]\n"
        "sys.stdin.readline()\n"
        "with Pool.from_url(url) as pool, pool.acquire() as conn:\n"
        "    while claim := table_for(conn).claim(conn, soon(), owner, 60.0):\n"
        "        print(claim.id, flush=True)\n"
    )
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", code, database.url, f"jobs-{n} 1 1 x"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        for n in range(4)
    ]
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    outputs = [claimer.communicate(timeout=60)[0].split() for claimer in claimers]
    assert [claimer.returncode for claimer in claimers] == [0] * 4
    assert sorted(int(word) for output in outputs for word in output) == numbers


# --- what a handler may do to its transaction -------------------------------------------------------


def test_handler_cannot_commit_early(database):
    """`commit()` in a handler is refused with a sentence, and nothing of it is kept."""
    database.add("x")
    with pytest.raises(Exception, match=r"COMMIT was refused|commit\(\) forbidden"):
        perform(database, database.claim(ME), lambda conn: conn.commit())
    assert database.effects() == []


def test_handler_cannot_roll_back(database):
    """`rollback()` in a handler is refused too: what it has undone would count as done."""
    database.add("x")
    with pytest.raises(Exception, match=r"ROLLBACK was refused|rollback\(\) forbidden"):
        perform(database, database.claim(ME), lambda conn: conn.rollback())
    assert database.effects() == []


@pytest.mark.parametrize("then", ["returns", "raises"])
def test_handler_that_commits_in_sql_is_found_out(database, then):
    """COMMIT as a statement is refused where that can be, and else the job fails for good."""
    database.add("x")

    def commit(conn):
        conn.execute("COMMIT")
        if then == "raises":
            raise ValueError("after that")

    with pytest.raises(TransactionError) as caught:
        perform(database, database.claim(ME), commit)
    assert caught.value.kept == bool(database.effects())


def test_handler_may_use_savepoints(database):
    """A handler may undo a part of its work."""
    [number] = database.add("x")

    def partly(conn):
        conn.execute("SAVEPOINT part")
        conn.execute("DELETE FROM effects")
        conn.execute("ROLLBACK TO part")
        return "partly"

    perform(database, database.claim(ME), partly)
    assert database.effects() == [(number, 1)]
    assert database.job(number, "state") == "done"


def test_handler_that_goes_on_after_an_error_in_its_transaction_fails(on_postgresql):
    """On PostgreSQL a swallowed error has spoiled the transaction: the job must not be done."""
    database = on_postgresql
    database.add("x")

    def swallow(conn):
        with contextlib.suppress(*driver_errors()):
            conn.execute("SELECT nonsense")

    with pytest.raises(TransactionError, match="INERROR") as caught:
        perform(database, database.claim(ME), swallow)
    assert not caught.value.kept
    assert database.effects() == []


def test_handler_with_row_factories_of_its_own_disturbs_nobody(database):
    """A connection on which a handler has set a row factory still serves the table."""
    database.add("x", "y")
    with database.connection() as (conn, table):
        if isinstance(table, SQLite):
            conn.row_factory = sqlite3.Row
        else:
            from psycopg.rows import dict_row

            conn.row_factory = dict_row
        claim = table.claim(conn, soon(), ME, 60.0)
        assert claim is not None
        table.perform(conn, soon(), claim, lambda: None)
        assert table.counts(conn) == {"queued": 1, "running": 0, "done": 1, "failed": 0}


def writes_outside(statement):
    """Return a handler that writes one effect by `statement` where no transaction is open."""

    def work(conn):
        assert not conn.in_transaction
        conn.executescript(statement) if ";" in statement else conn.execute(statement)

    return work


OUTSIDE = {
    "WITH ... INSERT": "WITH one AS (SELECT 1) INSERT INTO effects SELECT 7, 1 FROM one",
    "executescript": "INSERT INTO effects VALUES (7, 1); INSERT INTO effects VALUES (7, 2);",
}


@pytest.mark.parametrize("then", ["returns", "writes", "raises"])
@pytest.mark.parametrize("statement", OUTSIDE.values(), ids=OUTSIDE)
def test_write_outside_of_a_transaction_is_found_out(on_sqlite, statement, then):
    """What sqlite3 commits by itself can't be one with the job's end: it fails, for good."""
    on_sqlite.add("x")
    claim = on_sqlite.claim(ME)
    with on_sqlite.connection() as (conn, table):

        def work():
            writes_outside(statement)(conn)
            if then == "writes":
                conn.execute("INSERT INTO effects VALUES (8, 1)")
            if then == "raises":
                raise ValueError("after that")

        with pytest.raises(TransactionError, match="wrote outside") as caught:
            table.perform(conn, soon(), claim, work)
        conn.rollback()
    assert caught.value.kept
    assert on_sqlite.job(claim.id, "state") == "running"
    assert {job for job, _ in on_sqlite.effects()} == {7}


def test_write_outside_becomes_one_inside_after_begin(on_sqlite):
    """The remedy that the message names works."""
    on_sqlite.add("x")
    claim = on_sqlite.claim(ME)
    with on_sqlite.connection() as (conn, table):

        def work():
            conn.execute("BEGIN IMMEDIATE")
            writes = "WITH one AS (SELECT 1) INSERT INTO effects SELECT 7, 1 FROM one"
            conn.execute(writes)

        table.perform(conn, soon(), claim, work)
    assert on_sqlite.effects() == [(7, 1)]
    assert on_sqlite.job(claim.id, "state") == "done"


def test_outermost_savepoint_is_refused(on_sqlite):
    """A savepoint without a transaction would commit when it is released."""
    on_sqlite.add("x")
    claim = on_sqlite.claim(ME)
    with on_sqlite.connection() as (conn, table):
        with pytest.raises(TransactionError, match="SAVEPOINT outside"):
            table.perform(conn, soon(), claim, lambda: conn.execute("SAVEPOINT a"))
        conn.rollback()


@pytest.mark.parametrize("then", ["returns", "writes"])
def test_transaction_that_sqlite_rolled_back_does_not_count_as_done(on_sqlite, then):
    """An error that takes the whole transaction with it, swallowed, loses no effect silently."""
    on_sqlite.change("CREATE TABLE one (n INTEGER PRIMARY KEY)")
    on_sqlite.add("x")
    claim = on_sqlite.claim(ME)

    def swallow(conn):
        conn.execute("INSERT INTO one VALUES (1)")
        with contextlib.suppress(sqlite3.IntegrityError):
            conn.execute("INSERT OR ROLLBACK INTO one VALUES (1)")
        assert not conn.in_transaction
        if then == "writes":
            conn.execute("INSERT INTO one VALUES (2)")

    with pytest.raises(TransactionError, match="made SQLite roll") as caught:
        perform(on_sqlite, claim, swallow)
    assert not caught.value.kept, "nothing was: it may be tried again"
    assert on_sqlite.effects() == []
    assert on_sqlite.job(claim.id, "state") == "running"


def test_guard_is_gone_after_the_handler(on_sqlite):
    """The next one to borrow the connection may commit as he likes, whatever the handler did."""
    on_sqlite.add("x")
    claim = on_sqlite.claim(ME)
    with on_sqlite.connection() as (conn, table):

        def work():
            conn.execute("INSERT INTO effects VALUES (7, 1)")
            conn.isolation_level = None  # which would commit

        with pytest.raises(TransactionError, match="COMMIT was refused"):
            table.perform(conn, soon(), claim, work)
        conn.rollback()
        conn.execute("INSERT INTO effects VALUES (9, 1)")
        conn.commit()
    assert on_sqlite.effects() == [(9, 1)]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has no autocommit before 3.12")
def test_autocommit_in_a_handler_is_refused_and_taken_back(on_sqlite):
    """Setting `autocommit` would commit at once and for ever: it does neither."""
    on_sqlite.add("x")
    claim = on_sqlite.claim(ME)
    with on_sqlite.connection() as (conn, table):
        before = conn.autocommit

        def work():
            conn.execute("INSERT INTO effects VALUES (7, 1)")
            conn.autocommit = True

        with pytest.raises(TransactionError, match="COMMIT was refused"):
            table.perform(conn, soon(), claim, work)
        assert conn.autocommit == before
        conn.rollback()
    assert on_sqlite.effects() == []


def test_handler_that_reads_first_is_not_disturbed_by_other_writers(on_sqlite):
    """A handler may read, take its time while others write, and write: no conflict, no retry."""
    [number] = on_sqlite.add("x")
    claim = on_sqlite.claim(ME)
    with on_sqlite.connection() as (conn, table):

        def work():
            conn.execute("SELECT count(*) FROM effects").fetchall()
            on_sqlite.change("INSERT INTO effects VALUES (1000, 1)")
            conn.execute("INSERT INTO effects VALUES (?, 1)", (number,))

        table.perform(conn, soon(), claim, work)
    assert on_sqlite.effects() == [(number, 1), (1000, 1)]


# --- a locked database -------------------------------------------------------------------------------


def test_writer_waits_for_the_lock_of_another(on_sqlite):
    """A claim made while another writes is made as soon as the other has committed."""
    [number] = on_sqlite.add("x")
    with on_sqlite.connection() as (holder, _), on_sqlite.connection() as (conn, table):
        holder.execute("BEGIN IMMEDIATE")
        claims = []
        thread = threading.Thread(target=lambda: claims.append(table.claim(conn, soon(), ME, 60.0)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert claims == []
        holder.commit()
        thread.join()
        assert [claim.id for claim in claims] == [number]


def test_waiting_for_the_lock_ends_with_the_context(on_sqlite):
    """Nothing waits for a lock longer than its context lasts."""
    on_sqlite.add("x")
    with on_sqlite.connection() as (holder, _), on_sqlite.connection() as (conn, table):
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(DeadlineExceeded):
            table.claim(conn, Context.background().with_timeout(0.05), ME, 60.0)
        cancelled = Context.background().with_cancel()
        cancelled.cancel("stop")
        with pytest.raises(Cancelled), table.writing(conn, cancelled):
            pass
        holder.rollback()


# --- creating and adding ----------------------------------------------------------------------------


def test_missing_table_is_recognized(bare):
    """The error that says that there is no table `jobs` is told from others."""
    with bare.connection() as (conn, table):
        for query, missing in (("SELECT * FROM jobs", True), ("SELECT nonsense", False)):
            with pytest.raises(driver_errors()) as caught:
                conn.execute(query)
            conn.rollback()
            assert table.is_missing(caught.value) is missing


def test_table_may_be_created_by_many_at_once(bare):
    """Eight that create the table at the same time all succeed, and there is one table."""
    barrier = threading.Barrier(8)
    errors = []

    def create():
        with bare.connection() as (conn, table):
            barrier.wait()
            try:
                table.create(conn, soon())
                with table.writing(conn, soon()):
                    table.add(conn, ["x"])
            except Exception as exc:
                errors.append(exc)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert bare.counts() == {"queued": 8, "running": 0, "done": 0, "failed": 0}


def test_application_may_add_jobs_in_its_own_transaction(database):
    """A plain INSERT with nothing but a payload is a job that is due at once."""
    database.change("INSERT INTO jobs (payload) VALUES (?)", "theirs")
    assert database.claim(ME).payload == "theirs"


@pytest.mark.parametrize(
    "payload", ["", " \t", "käse ☃ 🦀", "a\nb\r", "'; DROP TABLE jobs; --", "?%s{now}"]
)
def test_payload_comes_back_as_it_was_added(database, payload):
    """A payload is any text, whatever it looks like to SQL."""
    database.add(payload)
    assert database.claim(ME).payload == payload


def test_error_with_what_no_database_stores_is_kept(database):
    """NUL and lone surrogates in a traceback don't keep it from being stored."""
    [number] = database.add("x")
    assert settle(database, "fail", database.claim(ME), "a\0b\udce9c", None)
    assert database.job(number, "error") == "a\\x00b\\udce9c"


def test_storable_leaves_other_text_alone():
    """What can be stored is stored as it is."""
    assert storable("käse \\x00 🦀\n") == "käse \\x00 🦀\n"


def test_other_databases_are_refused():
    """A connection to something else is refused by its name."""

    class Elsewhere:
        pass

    with pytest.raises(TypeError, match="Elsewhere"):
        table_for(Elsewhere())


# --- everything in any order -------------------------------------------------------------------------

ANY = st.integers(min_value=0, max_value=1000)


class AnyOrder(RuleBasedStateMachine):
    """Claims, old and new, settled in every way and order, against a model of what must hold."""

    def __init__(self):
        super().__init__()
        self.conn = sqlite3.connect(":memory:")
        self.table = SQLite()
        self.table.create(self.conn, soon())
        self.conn.execute(EFFECTS)
        self.conn.commit()
        self.claims: list[Claim] = []
        self.current: dict[int, Claim] = {}  # job -> the one claim that may settle it
        self.states: dict[int, str] = {}
        self.attempts: dict[int, int] = {}

    def teardown(self):
        self.conn.close()

    @rule()
    def add(self):
        with self.table.writing(self.conn, soon()):
            number, _ = self.table.add(self.conn, ["x"])
        self.states[number] = "queued"
        self.attempts[number] = 0

    @rule(owner=st.sampled_from([ME, OTHER]))
    def claim(self, owner):
        self.conn.execute("UPDATE jobs SET due = 0")  # time passes
        self.conn.commit()
        claim = self.table.claim(self.conn, soon(), owner, 60.0)
        queued = [job for job, state in self.states.items() if state == "queued"]
        assert (claim is None) == (not queued)
        if claim is not None:
            assert claim.id == min(queued)
            assert claim.attempts == self.attempts[claim.id] + 1
            self.attempts[claim.id] += 1
            self.claims.append(claim)
            self.current[claim.id] = claim
            self.states[claim.id] = "running"

    def settled(self, claim, state):
        """Return whether `claim` may settle its job, and note what it becomes."""
        if claim not in self.current.values():
            return False
        del self.current[claim.id]
        self.states[claim.id] = state
        return True

    @precondition(lambda self: self.claims)
    @rule(which=ANY)
    def finish(self, which):
        claim = self.claims[which % len(self.claims)]

        def work():
            self.conn.execute("INSERT INTO effects VALUES (?, ?)", (claim.id, claim.attempts))
            return "result"

        try:
            self.table.perform(self.conn, soon(), claim, work)
            done = True
        except ClaimLostError:
            self.conn.rollback()
            done = False
        assert done == self.settled(claim, "done")

    @precondition(lambda self: self.claims)
    @rule(which=ANY, what=st.sampled_from(["fail", "fail for good", "give back", "lose"]))
    def settle(self, which, what):
        claim = self.claims[which % len(self.claims)]
        with self.table.writing(self.conn, soon()):
            match what:
                case "fail":
                    ours = self.table.fail(self.conn, claim, "e", 5.0)
                case "fail for good":
                    ours = self.table.fail(self.conn, claim, "e", None)
                case "give back":
                    ours = self.table.give_back(self.conn, claim)
                case _:
                    ours = self.table.lose(self.conn, claim, "e")
        assert ours == self.settled(claim, "failed" if what == "fail for good" else "queued")

    @precondition(lambda self: self.claims)
    @rule(which=ANY)
    def renew(self, which):
        claim = self.claims[which % len(self.claims)]
        with self.table.writing(self.conn, soon()):
            assert self.table.renew(self.conn, claim, 60.0) == (self.current.get(claim.id) is claim)

    @rule()
    def retry(self):
        failed = [job for job, state in self.states.items() if state == "failed"]
        with self.table.writing(self.conn, soon()):
            assert self.table.retry(self.conn) == len(failed)
        self.states.update(dict.fromkeys(failed, "queued"))

    @invariant()
    def every_job_is_in_the_state_it_should_be(self):
        assert dict(self.conn.execute("SELECT id, state FROM jobs")) == self.states

    @invariant()
    def exactly_the_done_jobs_have_one_effect_each(self):
        effects = [job for (job,) in self.conn.execute("SELECT job FROM effects ORDER BY job")]
        assert effects == sorted(job for job, state in self.states.items() if state == "done")

    @invariant()
    def exactly_the_running_jobs_have_an_owner_and_a_lease(self):
        rows = self.conn.execute(
            "SELECT id, owner FROM jobs WHERE owner IS NOT NULL AND lease_until IS NOT NULL"
        )
        assert dict(rows) == {job: claim.owner for job, claim in self.current.items()}


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
