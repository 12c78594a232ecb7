"""Every fault at least once, small enough for every run of the suite; `tests.chaos.nemesis` is long."""

from __future__ import annotations

import os
import random

import pytest

from tests.chaos.jobs import own_server
from tests.chaos.nemesis import Nemesis, Surroundings
from tests.servers import postgresql_binaries, unavailable


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["sqlite", "postgresql"])
def test_jobs_survive_everything_at_once(tmp_path, pool):
    """Each job is done once, each kill is explained and not before its time, nothing is left."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}, {pool}, in {tmp_path}")
    if pool == "sqlite":
        _survives(tmp_path, None, seed)
        return
    if postgresql_binaries() is None:
        unavailable("PostgreSQL is not installed")
    with own_server() as server:
        _survives(tmp_path, server, seed)


def _survives(folder, server, seed):
    with Surroundings.around(folder, server) as around:
        nemesis = Nemesis(around, jobs=60, seconds=1.0, seed=seed)
        print(nemesis.run())
        print(nemesis.table())
        print(nemesis.summary())
        assert not nemesis.unrecovered()
        if os.environ.get("CI"):
            assert not around.missing, "CI must have every fault"
        assert len(nemesis.kinds) == (18 if server else 13) - len(around.missing)
