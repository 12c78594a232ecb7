"""pitchfork: test/integration/test_boot.rb and test_reforking.rb. Its mold is our template."""

from __future__ import annotations

import pytest

from tests.supervised import Supervised, group, wait_until

GOOD = """
def run(worker):
    worker.ready()
    worker.accepting.wait()
"""
MOLDS = {
    "test_stuck_mold": "import time\nprint('importing', flush=True)\ntime.sleep(3600)\n",
    "test_exiting_mold": "import os\nos._exit(1)\n",
    "test_signal_during_refork": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n",
}
ONE_IS_STUCK = """
import time
def run(worker):
    if worker.id == "web-2":
        time.sleep(3600)
    worker.ready()
    worker.accepting.wait()
"""


@pytest.mark.parametrize("scenario", MOLDS)
def test_a_mold_that_does_not_come(tmp_path, scenario):
    """test_stuck_mold, test_exiting_mold, test_signal_during_refork: the old serve on; the next roll goes."""
    config = group("web", "mold:run", count=2, ready_timeout="30s", min_ready_time=0, backoff="1ms")
    with Supervised(tmp_path, config, modules={"mold": GOOD}) as supervised:
        supervised.ready()
        before = supervised.worker_pids()
        good = supervised.config.read_text(encoding="utf-8")
        supervised.config.write_text(good.replace('"30s"', '"500ms"'), encoding="utf-8")
        (tmp_path / "mold.py").write_text(MOLDS[scenario] + GOOD)
        assert supervised.command("reload", "--wait").returncode == 1
        assert supervised.worker_pids() == before
        assert supervised.status()["groups"]["web"]["ready"] == 2

        supervised.config.write_text(good, encoding="utf-8")
        (tmp_path / "mold.py").write_text(GOOD)
        assert supervised.command("reload", "--wait").returncode == 0
        wait_until(lambda: len(supervised.templates()) == 1, "one template")
        assert supervised.stop() == 0
    assert not set(before) & {line["worker"] for line in supervised.events("worker.killed")}


def test_boot_worker_stuck_in_spawn(tmp_path):
    """test_boot_worker_stuck_in_spawn: one hangs before it serves; the other serves, and it is replaced."""
    config = group("web", "stuck:run", count=2, ready_timeout="3s", backoff="1ms")
    with Supervised(
        tmp_path, config, supervisor='grace = "500ms"', modules={"stuck": ONE_IS_STUCK}
    ) as supervised:
        supervised.event("worker.ready", worker="web-1")
        killed = supervised.event("worker.killed", worker="web-2")
        assert "in run" in killed["stacks"]
        exited = supervised.event("worker.exited", worker="web-2")
        assert "not ready within 3 s" in exited["reason"]
        supervised.event("worker.ready", worker="web-3")
        assert "web-1" in supervised.worker_pids()
        assert supervised.stop() == 0


def test_max_consecutive_spawn_timeout(tmp_path):
    """test_max_consecutive_spawn_timeout: with on_failed = "exit", workers that never boot end it with 1."""
    config = group(
        "web", "stuck_before_ready", count=3, ready_timeout="1s", max_restarts=2,
        backoff="1ms", on_failed="exit",
    )  # fmt: skip
    with Supervised(tmp_path, config, supervisor='grace = "100ms"') as supervised:
        assert supervised.wait() == 1
        assert not supervised.processes()
    (failed,) = supervised.events("group.failed")
    assert "failures" in failed["reason"]
    assert not supervised.events("worker.ready")
