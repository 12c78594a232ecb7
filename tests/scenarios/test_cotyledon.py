"""cotyledon: tests/test_functional.py, and the script of cotyledon#23."""

from __future__ import annotations

import signal
import time

import pytest

from tests.supervised import Supervised, children, group, wait_until
from tests.victims import AT_IMPORT

RUNS = {"the start": 20, "the first child": 4}
WINDOW = 0.010  # seconds of a start in which a SIGTERM was lost there


@pytest.mark.parametrize("since", RUNS)
def test_sigterm_during_startup(tmp_path, since):
    """cotyledon#23: a SIGTERM in the first 10 ms hangs nothing and leaves nothing, in any run."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        for run in range(RUNS[since]):
            if run:
                supervised.start()
            if since == "the first child":
                wait_until(lambda: children(supervised.pid), "a child")
            time.sleep(WINDOW * run / (RUNS[since] - 1))
            assert supervised.stop() in {0, -signal.SIGTERM}
            wait_until(lambda: not supervised.processes(), "nothing is left")
    assert "Traceback" not in supervised.text()
    assert not supervised.events("worker.killed")


def test_badly_coded(tmp_path):
    """test_badly_coded: a service whose code always raises does not keep SIGTERM from ending it."""
    config = group("bad", "raises:run", backoff="20s", backoff_max="20s") + group("good", "idle")
    with Supervised(tmp_path, config, modules=AT_IMPORT) as supervised:
        supervised.event("worker.failed")
        supervised.event("worker.exited", group="bad")
        assert supervised.stop() == 0
        assert len(supervised.events("worker.spawned", group="bad")) == 1
