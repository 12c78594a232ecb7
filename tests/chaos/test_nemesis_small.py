"""Every fault at least once, small enough for every run of the suite; `tests.chaos.nemesis` is long."""

from __future__ import annotations

import random

from tests.chaos.nemesis import Nemesis
from tests.workers.jobs.databases import SQLiteDatabase


def test_jobs_survive_everything_at_once(tmp_path):
    """Each job is done once, each kill is explained and not before its time, nothing is left."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    nemesis = Nemesis(
        tmp_path,
        SQLiteDatabase(str(tmp_path / "jobs.db")),
        jobs=150,
        seconds=6.0,
        seed=seed,
        restart_server=None,
    )
    print(nemesis.run())
    assert len(nemesis.faults) == 10
