"""Jobs under fire, small enough for every run of the suite; `tests.chaos.jobs` is the full size."""

from __future__ import annotations

import random

from tests.chaos.jobs import Chaos
from tests.workers.jobs.databases import PostgreSQLDatabase, SQLiteDatabase


def test_jobs_survive_kills_on_sqlite(tmp_path):
    """Workers and supervisors are killed: every job is done once, right, and nothing is left."""
    _survives(Chaos(tmp_path, SQLiteDatabase(str(tmp_path / "jobs.db")), **_size()))


def test_jobs_survive_kills_on_postgresql(tmp_path, postgresql):
    """The same where rows are locked instead of the file."""
    database = PostgreSQLDatabase(postgresql)
    try:
        _survives(Chaos(tmp_path, database, **_size()))
    finally:
        database.remove()


def _size():
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return {"jobs": 250, "seconds": 10.0, "seed": seed}


def _survives(chaos):
    figures = chaos.run()
    print(figures)
    assert figures.kills >= 1, "nobody was killed: the test shows nothing"
    assert figures.supervisor_kills == 2
