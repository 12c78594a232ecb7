"""Every fault at least once, small enough for every run of the suite; `tests.chaos.nemesis` is long."""

from __future__ import annotations

import os
import random

import pytest

from tests.chaos.jobs import own_server
from tests.chaos.nemesis import Nemesis
from tests.chaos.surroundings import Surroundings
from tests.servers import postgresql_binaries, unavailable

# What is another fault where there is a server; what hits the supervisor alone is had on SQLite.
WITH_A_SERVER = {
    "clock_set",
    "connections_reset",
    "deaf",
    "deaf_to_the_server",
    "deaf_to_the_workers",
    "kill_worker",
    "murder_supervisor",
    "server_goes_away",
    "stop_worker",
}


@pytest.mark.slow
def test_jobs_survive_everything_at_once_on_sqlite(tmp_path):
    """Each job is done once, each kill is explained and not before its time, nothing is left."""
    with Surroundings.around(tmp_path, None) as around:
        kinds = _survives(around)
        assert len(kinds) == 13 - len(around.missing)


@pytest.mark.slow
def test_jobs_survive_everything_at_once_on_postgresql(tmp_path):
    """And the server has never counted more sessions than the budget allows."""
    if postgresql_binaries() is None:
        unavailable("PostgreSQL is not installed")
    with own_server() as server, Surroundings.around(tmp_path, server) as around:
        kinds = _survives(around, only=WITH_A_SERVER)
        assert kinds | {"clock_set"} == WITH_A_SERVER


def _survives(around, **which):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}, in {around.folder}")
    if os.environ.get("CI"):
        assert not around.missing, "CI must have every fault"
    nemesis = Nemesis(around, jobs=60, seconds=1.0, seed=seed, **which)
    print(nemesis.run())
    print(nemesis.table())
    print(nemesis.summary())
    assert not nemesis.unrecovered()
    return set(nemesis.kinds)
