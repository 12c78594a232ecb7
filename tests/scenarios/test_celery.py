"""celery: t/smoke/tests/test_worker.py. Cold is our second signal, hard the kill a second later."""

from __future__ import annotations

import signal
import time
from datetime import datetime
from pathlib import Path

from tests.supervised import Supervised, wait_until
from tests.workers.jobs.databases import SQLiteDatabase

CONFIG = """
[pools.main]
url = "{url}"
[workers.jobs]
run = "workers.jobs:run"
count = 2
[workers.jobs.options]
handler = "handlers:handle"
threads = 3
poll = "50ms"
"""
# Says that it has begun; then does what its name says, until the file "go" is there.
HANDLER = """
import pathlib, time
def handle(job, conn):
    here = pathlib.Path(job.payload)
    here.with_name(f"{here.name}.{job.attempts}").touch()
    while not here.with_name(f"{here.name}.go").exists():
        if here.name.startswith("deaf"):
            time.sleep(0.01)
        else:
            job.ctx.wait(0.01)
            job.ctx.check()
"""


def begun(folder: Path, name: str, attempt: int = 1) -> None:
    """Wait until that attempt at a job has begun."""
    wait_until((folder / f"{name}.{attempt}").exists, f"{name} has begun")


def test_hard_shutdown_from_warm(tmp_path):
    """test_warm_…, test_cold_…, test_hard_shutdown_from_warm: every job is done, given back or lost, once."""
    database = SQLiteDatabase(str(tmp_path / "jobs.db")).create()
    names = ["short", "long 1", "long 2", "deaf"]
    numbers = dict(zip(names, database.add(*(str(tmp_path / name) for name in names)), strict=True))
    supervised = Supervised(
        tmp_path,
        CONFIG.format(url=database.url),
        supervisor='grace = "60s"',
        modules={"handlers": HANDLER},
    )
    with supervised:
        for name in names:
            begun(tmp_path, name)
        # Warm: nothing is taken, what has begun goes on.
        supervised.signal(signal.SIGTERM)
        supervised.event("worker.acknowledged", count=2)
        [late] = database.add(str(tmp_path / "late"))
        (tmp_path / "short.go").touch()
        wait_until(lambda: database.job(numbers["short"], "state") == "done", "it is done")
        # Cold, and hard for who does not hear: long before the grace is over.
        asked = time.time()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait(30.0) == 1
        # Half of that half second is for those who hear: what they had goes back to the queue.
        for left in supervised.events("worker.threads_left"):
            assert datetime.fromisoformat(left["time"]).timestamp() >= asked + 0.24
        (killed,) = supervised.events("worker.killed")
        assert f"job {numbers['deaf']}" in [job["name"] for job in killed["jobs"]]
        counts = database.counts()
        # On a slow machine one that hears may have had no time to be given back in that moment.
        assert counts["queued"] + counts["running"] == 4, counts
        assert (counts["done"], counts["failed"]) == (1, 0)
        assert database.job(numbers["deaf"], "state") == "running"
        assert not (tmp_path / "late.1").exists()

        # The next one takes them all up: also the one whose worker was killed.
        for name in (*names, "late"):
            (tmp_path / f"{name}.go").touch()
        supervised.start()
        wait_until(lambda: database.counts()["done"] == 5, "all are done")
        assert database.job(late, "attempts") == 1
        assert database.job(numbers["short"], "attempts") == 1
        assert database.job(numbers["deaf"], "attempts", "losses") == (2, 1)
        assert supervised.stop() == 0
