"""treg#360: pools times workers times surge against what the server takes."""

from __future__ import annotations

import contextlib
import signal

import pytest

from tests.integration.test_budget import HAMMER, Budgeted, Sampler
from tests.servers import PostgreSQLServer, postgresql  # noqa: F401
from tests.supervised import wait_until

POOL = 31
WORKERS = 2
BUDGET = POOL * WORKERS  # so that a roll's third worker must borrow; there it was 3 x 31 and more


@pytest.fixture
def server(postgresql: PostgreSQLServer):  # noqa: F811  # the fixture
    """A server that refuses one connection more."""
    with contextlib.closing(postgresql.connect()) as conn:
        conn.execute(f"create role worker login connection limit {BUDGET}")
        yield postgresql
        conn.execute("drop role worker")


def test_pool_31_of_2_workers_in_a_roll(tmp_path, server):
    """treg#360: 2 workers x pool 31 and a surge of 1: never above the budget, at any sample."""
    with (
        Sampler(server) as sampler,
        Budgeted(
            tmp_path, HAMMER, server.url(user="worker"), count=WORKERS, max_open=POOL,
            budget=BUDGET, options={"threads": POOL, "pause": 0.05},
        ) as budgeted,
    ):  # fmt: skip
        budgeted.ready()
        wait_until(lambda: max(sampler.samples) >= BUDGET - 2, "the budget is used")
        budgeted.signal(signal.SIGHUP)
        budgeted.event("reload.done", generation=2)
        assert min(budgeted.ready_counts()) >= WORKERS
        assert budgeted.stop() == 0
        assert not budgeted.events("worker.failed")
    assert max(sampler.samples) <= BUDGET, sampler.most
