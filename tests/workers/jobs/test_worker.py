"""The worker of `workers.jobs`, in this process: real threads, a real pool, a real database."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from supervisor.protocol import Death
from tests.servers import PostgreSQLServer
from tests.supervised import REPO, wait_until
from tests.workers.jobs.databases import Database, PostgreSQLDatabase, SQLiteDatabase
from tests.workers.jobs.handlers import ACTIONS
from workers.context import Cancelled, DeadlineExceeded
from workers.jobs import run
from workers.jobs.options import Options, OptionsError
from workers.jobs.owner import Owner
from workers.jobs.runner import Verdict, _Runner, judge
from workers.jobs.table import ClaimLostError, TransactionError
from workers.pool import ConnectError, Pool, PoolEvent
from workers.worker import Worker

HANDLER = "tests.workers.jobs.handlers:call"
EFFECT = "INSERT INTO effects (job, attempt) VALUES (?, ?)"


class Log:
    """Keeps what is logged, as structlog's loggers are called."""

    def __init__(self, lines=None, **bound):
        self.lines = [] if lines is None else lines
        self.bound = bound

    def bind(self, **fields):
        return Log(self.lines, **self.bound, **fields)

    def _log(self, event, **fields):
        self.lines.append((event, {**self.bound, **fields}))

    debug = info = warning = error = _log

    def of(self, event):
        """The fields of each line of that name."""
        return [fields for name, fields in list(self.lines) if name == event]


class Running:
    """A worker that runs `run` in a thread of its own. Use as a `with` block.

    Leaving the block stops it as a supervisor would, first gently, then hard; all in time.
    """

    def __init__(self, database: Database, pool_settings=None, **options):
        self.database = database
        self.events: list[PoolEvent] = []
        self.pool = Pool.from_url(
            database.url, name="main", listener=self.events.append, **(pool_settings or {})
        )
        self.log = Log()
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.worker = Worker(
            id="jobs-1",
            group="jobs",
            generation=1,
            options={"handler": HANDLER, "poll": "50ms", **options},
            pools={"main": self.pool},
            log=self.log,
            on_ready=self.ready.set,
            on_delay=lambda _seconds: None,
        )
        self.thread = threading.Thread(target=self._run, name="runs-jobs")

    def _run(self):
        try:
            run(self.worker)
        except BaseException as exc:
            self.error = exc

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        try:
            self.stop(5.0)
        finally:
            self.abort()
            self.pool.close(5.0)
        assert not self.thread.is_alive(), "run has not returned"

    def stop(self, seconds=20.0):
        """End `accepting`, and wait until `run` has returned."""
        self.worker.accepting.cancel("stop")
        self.thread.join(seconds)

    def abort(self):
        """End all contexts, and wait until every thread has ended."""
        self.worker.ctx.cancel("stop")
        self.thread.join(20.0)
        self.worker.wg.wait(20.0)

    def until(self, **counts):
        """Wait until there are so many jobs in these states."""

        def reached():
            assert self.error is None, self.error
            found = self.database.counts()
            return all(found[state] == count for state, count in counts.items())

        wait_until(reached, f"{counts}; the log: {self.log.lines}")
        return self


@pytest.fixture(autouse=True)
def _actions():
    ACTIONS.clear()
    yield
    ACTIONS.clear()


class Gate:
    """An action that a test lets in and out of: `entered` is set, then it waits for `open`."""

    def __init__(self):
        self.entered = threading.Event()
        self.open = threading.Event()
        self.ended_with = None

    def __call__(self, job, conn):
        self.entered.set()
        try:
            while not self.open.wait(0.01):
                job.ctx.check()
        except BaseException as exc:
            self.ended_with = exc
            raise
        return "opened"

    def wait(self):
        assert self.entered.wait(20.0)


# --- carrying out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_every_job_is_done_once(database, threads):
    """All jobs are done, with their results and one effect each."""
    numbers = database.add(*[f"job {n}" for n in range(30)])
    with Running(database, threads=threads) as running:
        running.until(done=30)
    assert database.effects() == [(number, 1) for number in numbers]
    assert database.rows("SELECT result FROM jobs WHERE result <> payload") == []
    assert running.worker.jobs.tally()[1:4] == (30, 0, 0)
    assert running.error is None


def test_two_workers_share_one_table(database):
    """What one worker has taken the other does not take: one effect each."""
    numbers = database.add(*["x"] * 60)
    with Running(database, threads=2) as one, Running(database, threads=2) as two:
        two.until(done=60)
    assert database.effects() == [(number, 1) for number in numbers]
    assert one.worker.jobs.tally().done + two.worker.jobs.tally().done == 60


def test_rollback_journal_serves_too(on_sqlite):
    """Without WAL readers keep writers waiting, at the commit even: they wait, and lose nothing."""
    on_sqlite.change("PRAGMA journal_mode = delete")
    on_sqlite.url += "?journal_mode=delete"
    numbers = on_sqlite.add(*["x"] * 60)
    with Running(on_sqlite, threads=2), Running(on_sqlite, threads=2) as two:
        two.until(done=60)
    assert on_sqlite.rows("PRAGMA journal_mode") == [("delete",)]
    # A handler that meets a lock which waiting can't resolve is run again.
    assert [job for job, _ in on_sqlite.effects()] == numbers


def test_one_connection_is_enough(database):
    """A pool of a single connection serves a worker; it is told what that costs."""
    database.add(*["x"] * 5)
    with Running(database, {"max_open": 1}, threads=1) as running:
        running.until(done=5)
    assert running.log.of("jobs.no_spare_connection")


def test_more_threads_than_connections_lose_nothing(database):
    """Threads that find no connection cost no job an attempt that counts."""
    database.add(*["x"] * 20)
    settings = {"max_open": 2, "acquire_timeout": 0.05}
    ACTIONS["x"] = lambda job, _conn: job.ctx.wait(0.08)
    with Running(database, settings, threads=6) as running:
        running.until(done=20)
    assert database.rows("SELECT sum(failures), sum(losses) FROM jobs") == [(0, 0)]


def test_jobs_added_while_idle_are_found(database):
    """An idle worker finds what is added later."""
    with Running(database) as running:
        assert running.ready.wait(20.0)
        database.add("x")
        running.until(done=1)


def test_worker_waits_for_a_table_that_nobody_has_created_yet(tmp_path):
    """A worker that starts before the first `add` is ready, and takes jobs once there are some."""
    database = SQLiteDatabase(str(tmp_path / "jobs.db"))
    with Running(database) as running:
        assert running.ready.wait(20.0)
        wait_until(lambda: running.log.of("jobs.no_table"), "it says what it waits for")
        database.create()
        database.add("x")
        running.until(done=1)


@pytest.mark.parametrize(
    ("returned", "result"),
    [
        (None, None),
        ("text", "text"),
        ("", ""),
        (7, "7"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
    ],
)
def test_what_a_handler_returns_is_its_result(on_sqlite, returned, result):
    """A text as it is, None as NULL, anything else as JSON."""
    [number] = on_sqlite.add("value")
    ACTIONS["value"] = lambda _job, _conn: returned
    with Running(on_sqlite) as running:
        running.until(done=1)
        assert on_sqlite.job(number, "result") == result


@pytest.mark.parametrize("returned", [object(), b"bytes", "a\0b", "\udce9", {1: {2}}])
def test_result_that_cannot_be_stored_fails_the_job(on_sqlite, returned):
    """Nothing is made up for what can't be stored: the job fails, with nothing kept."""
    [number] = on_sqlite.add("value")
    ACTIONS["value"] = lambda _job, _conn: returned
    with Running(on_sqlite, max_attempts=1) as running:
        running.until(failed=1)
        assert "the handler" in on_sqlite.job(number, "error")
        assert on_sqlite.effects() == []


def test_handler_sees_its_job(database):
    """A handler gets number, payload, attempt and a context that lives."""
    [number] = database.add("look")
    seen = []

    def look(job, _conn):
        seen.append((job.id, job.payload, job.attempts, job.ctx.done))
        if job.attempts == 1:
            raise ValueError("again")

    ACTIONS["look"] = look
    with Running(database) as running:
        running.until(done=1)
        assert seen == [(number, "look", 1, False), (number, "look", 2, False)]


# --- failing -----------------------------------------------------------------------------------------


def boom(_job, _conn):
    raise ValueError("boom")


def test_job_that_raises_is_tried_again_and_then_kept_as_failed(database):
    """Up to `max_attempts`, not before its time, with the traceback from the handler on."""
    number, other = database.add("boom", "x")
    times = []

    def timed(job, conn):
        times.append(time.monotonic())
        boom(job, conn)

    ACTIONS["boom"] = timed
    with Running(database, max_attempts=2) as running:
        running.until(failed=1, done=1)
    state, attempts, error = database.job(number, "state", "attempts", "error")
    assert (state, attempts, len(times)) == ("failed", 2, 2)
    assert times[1] - times[0] >= 0.8, "the first back-off is a second, 20 % jitter"
    assert error.splitlines()[0] == "Traceback (most recent call last):"
    assert "handlers.py" in error.splitlines()[1], "our own frames are left out"
    assert error.splitlines()[-1] == "ValueError: boom"
    assert database.effects() == [(other, 1)]
    assert running.worker.jobs.tally()[1:4] == (1, 2, 0)
    assert [line["again_in_seconds"] is None for line in running.log.of("job.failed")] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), Cancelled("own"), DeadlineExceeded("own")]
)
def test_whatever_a_handler_raises_fails_only_its_job(on_sqlite, error):
    """Not even sys.exit in a handler ends the worker, and its own contexts' ends are failures."""
    on_sqlite.add("odd", "x")

    def odd(_job, _conn):
        raise error

    ACTIONS["odd"] = odd
    with Running(on_sqlite, max_attempts=1) as running:
        running.until(failed=1, done=1)


def test_job_that_committed_too_early_is_not_repeated(on_sqlite):
    """What has been committed once would be committed again: such a job fails at once."""
    [number] = on_sqlite.add("bare")

    def outside(_job, conn):
        conn.executescript("INSERT INTO effects VALUES (1, 1);")
        boom(None, None)

    ACTIONS["bare"] = outside
    with Running(on_sqlite, max_attempts=5) as running:
        running.until(failed=1)
    assert on_sqlite.effects() == [(1, 1)]
    assert on_sqlite.job(number, "attempts") == 1
    assert "wrote outside of its transaction" in on_sqlite.job(number, "error")


def test_connection_lost_in_a_handler_is_not_the_jobs_fault(on_postgresql):
    """A server that ends the session costs an attempt, but no failure: the job is done after."""
    [number] = on_postgresql.add("cut")

    def cut(job, conn):
        if job.attempts == 1:
            on_postgresql.rows("SELECT pg_terminate_backend(?)", conn.info.backend_pid)
            conn.execute("SELECT 1")

    ACTIONS["cut"] = cut
    with Running(on_postgresql) as running:
        running.until(done=1)
    assert on_postgresql.job(number, "attempts", "failures", "losses") == (2, 0, 1)
    assert on_postgresql.effects() == [(number, 2)]


def test_conflict_between_transactions_is_not_the_jobs_fault(on_postgresql):
    """A serialization failure asks for another try, and gets it."""
    [number] = on_postgresql.add("conflict")

    def conflict(job, conn):
        if job.attempts == 1:
            conn.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

    ACTIONS["conflict"] = conflict
    with Running(on_postgresql) as running:
        running.until(done=1)
    assert on_postgresql.job(number, "attempts", "failures", "losses") == (2, 0, 1)


def test_locked_database_in_a_handler_is_not_the_jobs_fault(on_sqlite):
    """A handler whose write meets another's lock for too long is run again."""
    [number] = on_sqlite.add("bare")
    on_sqlite.url += "?timeout=0.05"

    def meet_a_lock(job, conn):
        with on_sqlite.connection() as (holder, _):
            if job.attempts == 1:
                holder.execute("BEGIN IMMEDIATE")
            conn.execute("INSERT INTO effects VALUES (?, ?)", (job.id, job.attempts))

    ACTIONS["bare"] = meet_a_lock
    with Running(on_sqlite) as running:
        running.until(done=1)
    assert on_sqlite.job(number, "attempts", "failures", "losses") == (2, 0, 1)
    assert on_sqlite.effects() == [(number, 2)]


@pytest.mark.parametrize("tried", [0, 1])
def test_job_does_not_wait_for_a_clock_that_was_set_back(database, tried):
    """What is due later than any back-off could make it is due now; a back-off is waited for."""
    database.add("late", "held back")
    database.change("UPDATE jobs SET losses = ?, due = due + 7200 WHERE payload = 'late'", tried)
    database.change("UPDATE jobs SET losses = 4, due = due + 60 WHERE payload = 'held back'")
    with Running(database) as running:
        running.until(done=1)
        assert running.log.of("jobs.clock_was_set_back") == [{"jobs": 1}]
    assert database.rows("SELECT payload FROM jobs WHERE state = 'done'") == [("late",)]


def test_full_disk_in_a_handler_is_not_the_jobs_fault(database):
    """What has no room is tried again as a loss, however often: no attempt of the job is used up."""
    [number] = database.add("bare")

    def fill_up(job, conn):
        if job.attempts > 2:
            conn.execute(EFFECT.replace("?", database.mark), (job.id, job.attempts))
        elif database.mark == "?":  # SQLite's own limit has the error of a full disk
            [(pages,)] = conn.execute("PRAGMA page_count").fetchall()
            conn.execute(f"PRAGMA max_page_count = {pages}")
            try:
                conn.execute("INSERT INTO effects SELECT zeroblob(100000), 0")
            finally:
                conn.execute("PRAGMA max_page_count = 1000000")
        else:
            conn.execute("DO $$BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = '53100'; END$$")

    ACTIONS["bare"] = fill_up
    with Running(database, max_attempts=1) as running:
        running.until(done=1)
    assert database.job(number, "attempts", "failures", "losses") == (3, 0, 2)
    assert database.effects() == [(number, 3)]


def test_constraint_that_is_checked_at_the_commit_fails_the_job(on_postgresql):
    """An error that only the commit brings is the handler's all the same, and is kept with the job."""
    [number] = on_postgresql.add("x")
    on_postgresql.change("ALTER TABLE effects ADD UNIQUE (job) DEFERRABLE INITIALLY DEFERRED")
    on_postgresql.change("INSERT INTO effects VALUES (?, 0)", number)
    with Running(on_postgresql, max_attempts=1) as running:
        running.until(failed=1)
        assert "UniqueViolation" in on_postgresql.job(number, "error")


@pytest.mark.parametrize(
    ("error", "circumstances", "verdict"),
    [
        (ClaimLostError(), {"begun": True}, Verdict.TAKEN_OVER),
        (ClaimLostError(), {"begun": True, "stopped": True}, Verdict.TAKEN_OVER),
        (ValueError(), {"begun": True}, Verdict.FAILED),
        (ValueError(), {"begun": True, "stopped": True}, Verdict.GIVEN_BACK),
        (ValueError(), {"begun": True, "excused": True}, Verdict.BROKEN_OFF),
        (ValueError(), {"begun": True, "stopped": True, "excused": True}, Verdict.GIVEN_BACK),
        (ValueError(), {"begun": False}, Verdict.GIVEN_BACK),
        (ValueError(), {"begun": False, "excused": True}, Verdict.GIVEN_BACK),
        (TransactionError(""), {"begun": True, "stopped": True}, Verdict.GIVEN_BACK),
        (TransactionError("", kept=True), {"begun": True, "stopped": True}, Verdict.FAILED),
        (Cancelled(), {"begun": True}, Verdict.FAILED),
        (Cancelled(), {"begun": True, "stopped": True}, Verdict.GIVEN_BACK),
        (SystemExit(), {"begun": True}, Verdict.FAILED),
    ],
)
def test_verdict(error, circumstances, verdict):
    """A stop is nobody's failure, an excuse is not the job's, and anything else is."""
    assert judge(error, **({"stopped": False, "excused": False} | circumstances)) is verdict


# --- stopping ----------------------------------------------------------------------------------------


def test_work_in_flight_is_finished_and_no_more_is_taken(database):
    """When `accepting` ends, what runs is done, what is queued stays queued, and `run` returns."""
    gate = ACTIONS["gate"] = Gate()
    database.add("gate", "x")
    with Running(database) as running:
        gate.wait()
        running.worker.accepting.cancel("stop")
        gate.open.set()
        running.stop()
        assert not running.thread.is_alive()
    assert database.counts() == {"queued": 1, "running": 0, "done": 1, "failed": 0}
    assert running.error is None


def test_idle_worker_stops_at_once(database):
    """An idle worker does not sleep out its pause before it stops."""
    with Running(database, poll="1h") as running:
        assert running.ready.wait(20.0)
        running.stop()
        assert not running.thread.is_alive()


def test_work_that_is_out_of_time_goes_back(database):
    """When the worker's context ends, what runs is rolled back and queued as before, at once."""
    gate = ACTIONS["gate"] = Gate()
    [number] = database.add("gate")
    with Running(database) as running:
        gate.wait()
        running.abort()
        assert not running.thread.is_alive()
        assert database.counts()["queued"] == 1
    assert isinstance(gate.ended_with, Cancelled)
    assert gate.ended_with.cause == "stop"
    assert database.effects() == []
    assert database.job(number, "failures", "losses", "error") == (0, 0, None)
    assert running.worker.jobs.tally()[1:4] == (0, 0, 1)
    with Running(database) as again:
        gate.open.set()
        again.until(done=1)
    assert database.effects() == [(number, 2)]


ENDLESS = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    "postgresql": "SELECT pg_sleep(3600)",
}


def test_running_query_is_cancelled_when_it_is_out_of_time(database):
    """A handler that is in the middle of a query is got out of it, and its job goes back."""
    entered = threading.Event()
    [number] = database.add("query")

    def query(_job, conn):
        entered.set()
        kind = "sqlite" if isinstance(database, SQLiteDatabase) else "postgresql"
        conn.execute(ENDLESS[kind]).fetchall()

    ACTIONS["query"] = query
    with Running(database) as running:
        assert entered.wait(20.0)
        running.abort()
        assert database.job(number, "state", "failures", "losses") == ("queued", 0, 0)
    assert database.effects() == []
    assert running.pool.close().leaked == []


def test_handler_that_makes_another_error_of_the_stop_has_not_failed(database):
    """Whatever a handler raises once it is out of time, its job goes back uncounted."""
    gate = ACTIONS["gate"] = Gate()

    def disguise(job, conn):
        try:
            gate(job, conn)
        except BaseException:
            raise ValueError("something of its own") from None

    ACTIONS["disguise"] = disguise
    [number] = database.add("disguise")
    with Running(database) as running:
        gate.wait()
        running.abort()
    assert database.job(number, "state", "failures", "losses") == ("queued", 0, 0)


def test_handler_that_finishes_although_it_is_out_of_time_is_done_or_goes_back(database):
    """A handler that does not look at its context ends one way or the other, never in between."""
    for _ in range(5):
        database.change("DELETE FROM jobs")
        database.change("DELETE FROM effects")
        entered, leave = threading.Event(), threading.Event()

        def stubborn(_job, _conn, entered=entered, leave=leave):
            entered.set()
            leave.wait(20.0)

        ACTIONS["stubborn"] = stubborn
        [number] = database.add("stubborn")
        with Running(database) as running:
            assert entered.wait(20.0)
            running.worker.ctx.cancel("stop")
            leave.set()
            running.abort()
        running.worker.wg.wait(20.0)
        state = database.job(number, "state")
        assert (state, len(database.effects())) in (("queued", 0), ("done", 1))


# --- the living and the dead -------------------------------------------------------------------------


@pytest.fixture
def dead():
    """The owner of a process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here = Owner.here("jobs-0")
    return str(Owner("jobs-9", process.pid, here.started, here.place))


def _pid(dead):
    return int(dead.split()[1])


def test_jobs_of_a_dead_worker_are_taken_at_once(database, dead):
    """A replacement does not wait for the lease of the worker that it replaces."""
    [number] = database.add("x")
    database.claim(dead, lease=3600.0)
    with Running(database) as running:
        assert running.ready.wait(20.0)
        assert database.job(number, "losses") == 1, "taken back before it was ready"
        running.until(done=1)
    assert database.job(number, "attempts") == 2
    assert database.effects() == [(number, 2)]


@pytest.mark.parametrize(
    ("code", "died_of", "words"),
    [(7, None, "exited with code 7"), (None, 11, "was ended by SIGSEGV")],
)
def test_job_that_ends_its_worker_fails_like_one_that_raises(on_sqlite, dead, code, died_of, words):
    """The supervisor says that nobody from outside did it: that is an attempt, and its last."""
    [job] = on_sqlite.add("x")
    on_sqlite.claim(dead, lease=3600.0)
    running = Running(on_sqlite, max_attempts=1)
    running.worker.deaths.append(Death("jobs-9", _pid(dead), code, died_of, by_itself=True))
    with running:
        running.until(failed=1)
    error = f"its worker died with it: jobs-9 (pid {_pid(dead)}) {words}"
    assert on_sqlite.job(job, "failures") == 1
    assert on_sqlite.job(job, "error").startswith(error)


def test_who_crashed_beside_others_is_not_known(on_sqlite, dead):
    """With two in flight it may be the other's doing: neither has failed, both run alone."""
    numbers = on_sqlite.add("x", "x")
    for _ in numbers:
        on_sqlite.claim(dead, lease=3600.0)
    running = Running(on_sqlite, max_attempts=1)
    running.worker.deaths.append(Death("jobs-9", _pid(dead), 7, None, True))
    with running:
        running.until(done=2)
    assert on_sqlite.rows("SELECT failures, losses FROM jobs") == [(0, 1), (0, 1)]


def test_suspects_run_alone_and_others_beside_each_other(on_sqlite):
    """With three threads, a job that was lost before has nobody beside it, before and after it."""
    lock, beside, most = threading.Lock(), set(), []

    def count(job, _conn):
        with lock:
            beside.add(job.id)
            most.append(set(beside))
        time.sleep(0.02)
        with lock:
            beside.remove(job.id)

    ACTIONS["bare"] = count
    numbers = on_sqlite.add(*["bare"] * 12)
    suspects = set(numbers[::4])
    on_sqlite.change("UPDATE jobs SET losses = 1 WHERE id % 4 = ?", numbers[0] % 4)
    with Running(on_sqlite, threads=3) as running:
        running.until(done=12)
    assert all(group == group & suspects for group in most if group & suspects)
    assert all(len(group) == 1 for group in most if group & suspects)


def test_who_hangs_is_not_given_back_for_ever(on_sqlite):
    """An attempt that was ended for a hang is a loss: it is held back, and has an end."""
    gate = ACTIONS["bare"] = Gate()
    [number] = on_sqlite.add("bare")
    with Running(on_sqlite) as running:
        gate.wait()
        running.worker.accepting.cancel("hang")
        running.worker.ctx.cancel("hang")
        wait_until(lambda: on_sqlite.job(number, "state") == "queued", "it is queued")
    assert on_sqlite.job(number, "failures", "losses") == (0, 1)


def test_jobs_of_a_worker_that_dies_while_others_idle_are_taken(database, dead):
    """Idle workers look after dead ones, without being told."""
    with Running(database) as running:
        assert running.ready.wait(20.0)
        database.change(
            "INSERT INTO jobs (payload, state, attempts, owner, lease_until)"
            " SELECT 'x', 'running', 1, ?, due + 3600 FROM (SELECT max(due) AS due FROM jobs) AS j",
            dead,
        )
        running.until(done=1)
    [(attempts, losses)] = database.rows("SELECT attempts, losses FROM jobs")
    assert (attempts, losses) == (2, 1)


def test_jobs_of_a_living_worker_are_its_own_until_its_lease_ends(database):
    """Who lives keeps its job; who is not heard of for a lease loses it."""
    [number] = database.add("x")
    code = "from workers.jobs.owner import Owner; print(Owner.here('jobs-9'), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    ) as living:
        assert living.stdout is not None
        owner = living.stdout.readline().strip()
        database.claim(owner, lease=3600.0)
        with Running(database) as running:
            [other] = database.add("x")
            running.until(done=1)
            assert database.job(number, "owner") == owner
            database.change("UPDATE jobs SET lease_until = 0 WHERE id = ?", number)
            running.until(done=2)
        living.communicate("done\n")
    assert database.effects() == [(number, 2), (other, 1)]


def test_lease_is_renewed_as_long_as_the_job_runs(database):
    """A job that takes longer than its lease stays with its worker."""
    gate = ACTIONS["bare"] = Gate()
    [number] = database.add("bare")
    with Running(database, lease="300ms") as one:
        gate.wait()
        with Running(database, lease="300ms"):
            first = database.job(number, "lease_until")
            wait_until(lambda: database.job(number, "lease_until") > first + 1.0, "renewals")
            assert database.job(number, "attempts") == 1
            gate.open.set()
            one.until(done=1)
    assert database.job(number, "attempts") == 1


def test_job_that_was_taken_over_is_stopped(database):
    """A handler whose job is somebody else's by now is told so, and nothing of it is kept."""
    gate = ACTIONS["bare"] = Gate()
    [number] = database.add("bare")
    with Running(database, lease="200ms") as running:
        gate.wait()
        running.worker.accepting.cancel("stop")  # it must not take the job again
        database.change(
            "UPDATE jobs SET attempts = 2, owner = ?, lease_until = lease_until + 3600",
            "elsewhere 1 1 ?",
        )
        running.stop()
    assert gate.ended_with is not None
    assert "another worker" in str(gate.ended_with)
    assert database.job(number, "state", "owner") == ("running", "elsewhere 1 1 ?")


def test_claim_that_nobody_has_heard_of_is_released(database):
    """A claim that was committed although its worker saw an error does not wait for its lease."""
    [number] = database.add("x")
    running = Running(database)  # only for its worker and its pool
    runner = _Runner(running.worker, running.pool, lambda *_: "done", Options(handler="x"))
    database.claim(str(runner._owner), lease=3600.0)
    runner._note_strays()
    thread = threading.Thread(target=runner.run)
    thread.start()
    running.until(done=1)
    running.worker.accepting.cancel("stop")
    thread.join(20.0)
    running.pool.close(5.0)
    assert database.job(number, "attempts", "losses") == (2, 0)


def test_claim_that_nobody_has_heard_of_is_released_at_the_end(database):
    """The last thread gives back what runs in the worker's name, and leaves what is in flight."""
    numbers = database.add("first", "second")
    running = Running(database)
    gate = Gate()
    runner = _Runner(running.worker, running.pool, gate, Options(handler="x"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    gate.wait()
    database.claim(str(runner._owner), lease=3600.0)
    running.worker.accepting.cancel("stop")
    runner._note_strays()
    gate.open.set()
    thread.join(20.0)
    running.pool.close(5.0)
    assert [database.job(number, "state") for number in numbers] == ["done", "queued"]
    assert running.log.of("job.unsettled") == []


# --- a database that is away -------------------------------------------------------------------------


def test_worker_without_its_database_is_not_ready_and_says_why(tmp_path):
    """Where the database refuses for good, `run` raises before it has called `ready`."""
    database = SQLiteDatabase(str(tmp_path / "jobs.db"))
    database.url = f"sqlite:///{tmp_path}/no/such/folder/jobs.db"
    with Running(database) as running:
        running.thread.join(20.0)
        assert isinstance(running.error, ConnectError)
        assert not running.ready.is_set()


def test_sessions_that_the_server_ends_are_survived(on_postgresql):
    """A server that throws everybody out costs no job and no worker."""
    numbers = on_postgresql.add(*["x"] * 50)
    ACTIONS["x"] = lambda job, _conn: job.ctx.wait(0.02)
    with Running(on_postgresql, threads=3) as running:
        for _ in range(5):
            before = on_postgresql.counts()["done"]
            on_postgresql.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            _until_more_are_done(on_postgresql, before)
        running.until(done=50)
    assert [job for job, _ in on_postgresql.effects()] == numbers
    assert on_postgresql.rows("SELECT sum(failures) FROM jobs") == [(0,)]


def test_restart_of_the_server_is_survived(postgresql):
    """While its server is away a worker waits; when it is back, all jobs are done, once each."""
    server = PostgreSQLServer(postgresql.binaries)
    try:
        server.start()
        database = PostgreSQLDatabase(server).create()
        numbers = database.add(*["x"] * 40)
        ACTIONS["x"] = lambda job, _conn: job.ctx.wait(0.02)
        with Running(database, {"acquire_timeout": 0.5}, threads=3) as running:
            wait_until(lambda: database.counts()["done"] > 5, "it is at work")
            server.stop(signal.SIGQUIT)
            wait_until(lambda: running.log.of("jobs.database_unavailable"), "it says so")
            server.start()
            running.until(done=40)
            assert running.log.of("jobs.database_available")
        assert [job for job, _ in database.effects()] == numbers
        assert database.rows("SELECT sum(failures) FROM jobs") == [(0,)]
    finally:
        server.remove()


def _until_more_are_done(database, before):
    wait_until(lambda: database.counts()["done"] > before or before == 50, "more are done")


# --- idling ------------------------------------------------------------------------------------------


def test_idle_worker_asks_less_and_less_often_and_once_for_all_threads(on_sqlite):
    """An idle worker borrows a connection once per pause, which doubles up to `poll`."""
    with Running(on_sqlite, threads=8, poll="400ms") as running:
        assert running.ready.wait(20.0)
        began = time.monotonic()
        running.worker.accepting.wait(2.0)
        borrowed = [event for event in running.events if event.name == "ConnectionCheckedOut"]
        # The first contact; pauses of 20, 40, 80, 160, 320 ms; then one in at least 320 ms.
        assert len(borrowed) <= 7 + (time.monotonic() - began) / 0.32
        assert len(borrowed) >= 4


def test_failed_job_is_tried_again_when_it_is_due_however_long_the_pause(on_sqlite):
    """A long `poll` does not delay a job whose time is known."""
    on_sqlite.add("once")

    def once(job, _conn):
        if job.attempts == 1:
            raise ValueError("once")

    ACTIONS["once"] = once
    with Running(on_sqlite, poll="1h") as running:
        running.until(done=1)


def test_pause_ends_when_a_job_is_due_and_grows_up_to_poll_else(on_sqlite):
    """How long a worker rests is up to what it knows of the queue, with some jitter."""
    with Running(on_sqlite) as running:
        runner = _Runner(running.worker, running.pool, lambda *_: None, Options(handler="x"))
        runner._pause = 0.5
        assert 0.08 <= runner._rest(0.1) <= 0.1
        assert runner._rest(-1.0) == 0.0
        for _ in range(3):
            assert 0.8 <= runner._rest(None) <= 1.0, "poll"


# --- options -----------------------------------------------------------------------------------------


def test_options_have_defaults():
    """Only the handler has to be named."""
    assert Options.read({"handler": "a:b"}) == Options(
        handler="a:b", threads=1, max_attempts=5, lease=60.0, poll=1.0
    )


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("250ms", 0.25), ("30s", 30), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), (2, 2), (0.5, 0.5)],
)
def test_durations_are_written_as_everywhere(written, seconds):
    """Durations are strings with units, or a number of seconds."""
    assert Options.read({"handler": "a:b", "lease": written}).lease == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "options.handler: name the function"),
        ({"handler": 7}, "options.handler: name the function"),
        ({"handler": "a:b", "thread": 1}, 'options.thread: unknown option; did you mean "threads"'),
        ({"handler": "a:b", "colour": 1}, "there are handler, threads, max_attempts, lease, poll"),
        ({"handler": "a:b", "threads": 0}, "options.threads: a whole number from 1 on"),
        ({"handler": "a:b", "threads": True}, "options.threads: a whole number"),
        ({"handler": "a:b", "threads": 1.5}, "options.threads: a whole number"),
        ({"handler": "a:b", "max_attempts": "5"}, "options.max_attempts: a whole number"),
        ({"handler": "a:b", "lease": "soon"}, 'options.lease: a duration as "30s"'),
        ({"handler": "a:b", "lease": ""}, "options.lease: a duration"),
        ({"handler": "a:b", "poll": 0}, "options.poll: 0 is out of range"),
        ({"handler": "a:b", "poll": -1}, "options.poll: -1 is out of range"),
        ({"handler": "a:b", "poll": float("nan")}, "options.poll: nan is out of range"),
        ({"handler": "a:b", "poll": True}, "options.poll: a duration"),
    ],
)
def test_wrong_options_are_named(options, message):
    """A wrong option is one sentence that names it."""
    with pytest.raises(OptionsError) as caught:
        Options.read(options)
    assert message in str(caught.value)


async def coroutine(_job, _conn):
    """Not a handler."""


def nothing_to_give():
    """Not a handler either."""


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("nowhere", 'not of the form "module:function"'),
        ("no.such.module:handle", "No module named"),
        ("workers.jobs:nothing", "can't be imported"),
        ("workers.jobs.table:STATES", "is a tuple, no function"),
        (f"{__name__}:coroutine", "is async"),
        (f"{__name__}:nothing_to_give", "is called with (job, conn)"),
    ],
)
def test_wrong_handler_is_named_before_the_worker_is_ready(on_sqlite, handler, message):
    """A handler that can't be had ends `run` with one sentence, before `ready`."""
    with Running(on_sqlite, handler=handler) as running:
        running.thread.join(20.0)
    assert isinstance(running.error, OptionsError)
    assert message in str(running.error)
    assert not running.ready.is_set()
