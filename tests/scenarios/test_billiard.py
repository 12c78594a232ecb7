"""billiard: the recipe of billiard#104 and #457."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

from tests.integration.test_budget import HAMMER, Budgeted
from tests.supervised import wait_until

KILLS = 40
WORKERS = 3
POOL = 4
BUDGET = WORKERS * POOL
GRANTED = BUDGET - 1  # one is kept for a roll


def test_sigkill_at_random_points(tmp_path):
    """billiard#104, #457: workers are killed at work, wherever they are; the budget is exact afterwards."""
    pick = random.Random(104)
    budgeted = Budgeted(
        tmp_path, HAMMER, f"sqlite:///{tmp_path}/killed.db", count=WORKERS, max_open=POOL,
        budget=BUDGET, options={"threads": POOL, "pause": 0.001},
    )  # fmt: skip
    text = budgeted.config.read_text(encoding="utf-8")
    quick = 'max_restarts = 100000\nbackoff = "1ms"\nbackoff_max = "1ms"\n'
    budgeted.config.write_text(text.replace("count = ", f"{quick}count = "), encoding="utf-8")
    with budgeted:
        budgeted.ready()
        budgeted.rates(0.1)
        for kill in range(KILLS):
            time.sleep(pick.uniform(0.0, 0.04))
            pids = budgeted.worker_pids()
            if pids:
                with contextlib.suppress(ProcessLookupError):  # its end is not in the log yet
                    os.kill(pick.choice(sorted(pids.values())), signal.SIGKILL)
            if kill % 20 == 0:
                assert budgeted.granted() <= BUDGET  # the parent answers throughout
        wait_until(lambda: budgeted.status()["groups"]["web"]["ready"] == WORKERS, "all are back")
        budgeted.rates(0.3)  # each works
        wait_until(lambda: _leases(budgeted) == (GRANTED, GRANTED), "what is granted is had")
        assert budgeted.stop() == 0
    assert len(budgeted.events("worker.exited")) > WORKERS


def _leases(budgeted: Budgeted) -> tuple[int, int]:
    """Return how many are granted, and how many all workers together say that they have."""
    status = budgeted.status()
    allowed = [worker["pools"]["main"]["max_open"] for worker in status["workers"]]
    return status["budgets"]["main"]["granted"], sum(allowed)
