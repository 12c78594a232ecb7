"""Jobs under a real supervisor: what a stop and a death mean for them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.supervised import REPO, Supervised, is_alive, wait_until
from workers.jobs.table import LOSSES_ALLOWED

GROUP = """
[pools.main]
url = "{url}"
[workers.jobs]
run = "workers.jobs:run"
count = {count}
[workers.jobs.options]
handler = "{handler}"
"""

# Writes an effect, then waits for its context's end or for a file that a test makes.
HANDLER = """
import pathlib, sqlite3
def handle(job, conn):
    mark = "?" if isinstance(conn, sqlite3.Connection) else "%s"
    if mark == "%s":  # on SQLite that would hold the lock
        conn.execute("INSERT INTO effects VALUES (%s, %s)", (job.id, job.attempts))
    pathlib.Path(job.payload + f".{job.attempts}").touch()
    while not pathlib.Path(job.payload).exists():
        job.ctx.wait(0.01)
        job.ctx.check()
    if mark == "?":
        conn.execute("INSERT INTO effects VALUES (?, ?)", (job.id, job.attempts))
"""


@pytest.fixture
def supervised(database, tmp_path):
    """Return a supervisor with two workers whose jobs wait for a file."""

    def make(grace):
        config = GROUP.format(url=database.url, count=2, handler="handlers:handle")
        modules = {"handlers": HANDLER}
        return Supervised(tmp_path, config, supervisor=f'grace = "{grace}"', modules=modules)

    return make


def until_begun(path, attempt):
    """Wait until an attempt at the job that waits for `path` has begun."""
    begun = path.with_name(f"{path.name}.{attempt}")
    wait_until(begun.exists, f"attempt {attempt} has begun")


def test_every_file_has_the_digest_of_sha256sum(database, tmp_path):
    """As the README says: add every file under a directory, and compare with sha256sum."""
    folder = REPO / "workers"
    config = GROUP.format(url=database.url, count=2, handler="workers.jobs:sha256")
    with Supervised(tmp_path, config) as supervisor:
        supervisor.ready()
        found = subprocess.run(
            ["find", folder, "-type", "f"], capture_output=True, check=True
        ).stdout
        subprocess.run(
            [sys.executable, "-m", "workers.jobs", "add", "-c", supervisor.config],
            input=found,
            check=True,
            cwd=REPO,
        )
        wait_until(lambda: database.counts()["done"] == len(found.splitlines()), "all are done")
        assert supervisor.stop() == 0
    printed = subprocess.run(
        ["xargs", "-d", "\n", "sha256sum"], input=found, capture_output=True, check=True
    ).stdout.decode()
    expected = {
        name: digest for digest, name in (line.split("  ") for line in printed.splitlines())
    }
    assert dict(database.rows("SELECT payload, result FROM jobs")) == expected


def test_stop_waits_for_jobs_in_flight(supervised, database, tmp_path):
    """A job that ends within the grace is done, and nobody was killed."""
    path = tmp_path / "go"
    [number] = database.add(str(path))
    with supervised("30s") as supervisor:
        until_begun(path, 1)
        supervisor.signal(signal.SIGTERM)
        supervisor.event("worker.acknowledged", count=2)
        path.touch()
        assert supervisor.wait() == 0
    assert database.job(number, "state") == "done"
    assert database.effects() == [(number, 1)]


def test_job_that_is_out_of_time_is_queued_again_before_its_worker_ends(
    supervised, database, tmp_path
):
    """A job that would last longer than the grace is rolled back and given back, in time."""
    path = tmp_path / "go"
    [number] = database.add(str(path))
    with supervised("2s") as supervisor:
        until_begun(path, 1)
        assert supervisor.stop() == 0, "nobody had to be killed"
        assert database.job(number, "state", "failures", "losses") == ("queued", 0, 0)
        path.touch()
        supervisor.start()
        wait_until(lambda: database.counts()["done"] == 1, "it is done by the next one")
        assert supervisor.stop() == 0
    assert database.effects() == [(number, 2)]


def test_job_of_a_killed_worker_goes_to_its_replacement_at_once(supervised, database, tmp_path):
    """A SIGKILL in the middle of a job leaves no trace of it, and no wait for its lease."""
    path = tmp_path / "go"
    [number] = database.add(str(path))
    with supervised("30s") as supervisor:
        until_begun(path, 1)
        supervisor.ready()
        owner = database.job(number, "owner").split()[0]
        pid = supervisor.worker_pids()[owner]
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        until_begun(path, 2)
        path.touch()
        wait_until(lambda: database.counts()["done"] == 1, "it is done")
        assert supervisor.stop() == 0
    assert database.effects() == [(number, 2)]
    assert database.job(number, "failures", "losses") == (0, 1)


POISON = """
import os
def handle(job, conn):
    if job.payload == "exits":
        os._exit(7)
    if job.payload == "is killed":
        os.kill(os.getpid(), 9)
    conn.execute("INSERT INTO effects VALUES (?, ?)", (job.id, job.attempts))
"""


def test_jobs_that_kill_their_workers_stop_no_others(on_sqlite, tmp_path):
    """Five of both kinds among two hundred, with the default `max_restarts`: nobody else suffers."""
    poison = ["exits", "is killed", "exits", "is killed", "exits"]
    bad = on_sqlite.add(*poison)
    good = on_sqlite.add(*["good"] * 200)
    config = GROUP.format(url=on_sqlite.url, count=2, handler="handlers:handle")
    config += "max_attempts = 2\n"
    with Supervised(tmp_path, config, modules={"handlers": POISON}) as supervisor:
        supervisor.ready()
        wait_until(lambda: on_sqlite.counts()["done"] == 200, "the good ones are done")

        def have_failed():
            on_sqlite.change(  # nobody waits here for what holds them back
                "UPDATE jobs SET due = 0,"
                f" losses = CASE WHEN losses > 1 THEN {LOSSES_ALLOWED - 1} ELSE losses END"
                " WHERE state = 'queued' AND failures = 0"
            )
            return on_sqlite.counts()["failed"] == 5

        wait_until(have_failed, "all of them have failed")
        assert not supervisor.events("group.failed")
        assert len(supervisor.events("worker.exited")) > 5, "more than max_restarts"
        wait_until(lambda: supervisor.status()["groups"]["jobs"]["ready"] == 2, "all are there")
        assert supervisor.stop() == 0
    assert on_sqlite.effects() == [(number, 1) for number in good]
    for number, payload in zip(bad, poison, strict=True):
        error = on_sqlite.job(number, "error")
        if payload == "exits":
            assert error.startswith("its worker died with it ")
            assert " exited with code 7; `supervisor why jobs-" in error
        else:
            assert error.startswith(f"given up after {LOSSES_ALLOWED} attempts without a verdict")


def test_orphan_keeps_its_job_while_a_new_supervisor_runs(supervised, database, tmp_path):
    """A worker that survives its supervisor finishes what it has; nobody takes it from it."""
    path = tmp_path / "go"
    [number] = database.add(str(path))
    with supervised("30s") as supervisor:
        until_begun(path, 1)
        supervisor.ready()
        orphans = list(supervisor.worker_pids().values())
        supervisor.signal(signal.SIGKILL)
        supervisor.wait()
        supervisor.start()
        supervisor.event("supervisor.ready", count=2)
        [other] = database.add(str(tmp_path / "other"))
        until_begun(tmp_path / "other", 1)
        assert database.job(number, "attempts") == 1
        path.touch()
        wait_until(lambda: database.counts()["done"] == 1, "the orphan has finished")
        wait_until(lambda: not any(map(is_alive, orphans)), "the orphans have gone")
        (tmp_path / "other").touch()
        wait_until(lambda: database.counts()["done"] == 2, "the new worker's own")
        assert supervisor.stop() == 0
    assert database.effects() == [(number, 1), (other, 1)]


def test_table_of_somebody_else_is_named(bare, tmp_path):
    """It is not waited for as a database that is away, and a user is told what to do."""
    with bare.connection() as (conn, _table):
        conn.execute("CREATE TABLE jobs (id INTEGER, payload TEXT, state TEXT)")
        conn.commit()
    config = GROUP.format(url=bare.url, count=1, handler="workers.jobs:sha256")
    with Supervised(tmp_path, config) as supervisor:
        failed = supervisor.event("worker.failed")
        assert "table jobs that is not of this version" in failed["error"]
        assert "rename it" in failed["error"]
        assert not supervisor.events("jobs.database_unavailable")
        add = [sys.executable, "-m", "workers.jobs", "add", "-c", str(supervisor.config), "x"]
        done = subprocess.run(add, capture_output=True, text=True, check=False, cwd=REPO)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [done.stderr.strip()]
        assert "rename it" in done.stderr
        assert supervisor.stop() == 0
