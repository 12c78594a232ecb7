"""puma: test/test_integration_cluster.rb."""

from __future__ import annotations

import os
import signal
import time

from tests.supervised import Supervised, group


def test_stuck_external_term_spawn(tmp_path):
    """test_stuck_external_term_spawn: all get SIGTERM from outside at work; each ends it, all come back."""
    config = group("web", "busy", {"seconds": 0.3}, count=4, backoff="1ms", backoff_max="1ms")
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        for pid in supervised.worker_pids().values():
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.05)
        supervised.event("worker.ready", count=8)
        assert len(supervised.events("victim.finished")) == 4
        assert len(supervised.worker_pids()) == 4
        assert supervised.stop() == 0
        assert not supervised.events("worker.killed")


def test_stuck_phased_restart(tmp_path):
    """test_stuck_phased_restart: old workers that hear nothing are killed in a roll, which goes on."""
    config = group("web", "deaf", count=2, min_ready_time=0)
    with Supervised(tmp_path, config, supervisor='grace = "500ms"') as supervised:
        supervised.ready()
        good = supervised.config.read_text(encoding="utf-8")
        supervised.config.write_text(good.replace(":deaf", ":idle"), encoding="utf-8")
        asked = supervised.signal(signal.SIGHUP)
        supervised.event("reload.done")
        assert time.monotonic() >= asked + 2 * 0.5  # one after the other, each at its own deadline
        assert sorted(supervised.worker_pids()) == ["web-3", "web-4"]
        assert supervised.stop() == 0  # what was killed before the stop does not count
    killed = supervised.events("worker.killed")
    assert [line["worker"] for line in killed] == ["web-1", "web-2"]
    assert all("_spin_for_ever" in line["stacks"] for line in killed)
    names = [(line["event"], line["worker"]) for line in supervised.lines() if "worker" in line]
    for old, new in (("web-1", "web-3"), ("web-2", "web-4")):
        assert names.index(("worker.ready", new)) < names.index(("worker.killed", old))


def test_culling_strategy_youngest(tmp_path):
    """test_culling_strategy_youngest, test_signal_ttin, …_ttou: one more and one less is the newest."""
    with Supervised(tmp_path, group("web", "idle", count=2, min_ready_time=0)) as supervised:
        supervised.ready()
        assert supervised.command("scale", "web=3", "--wait").returncode == 0
        assert sorted(supervised.worker_pids()) == ["web-1", "web-2", "web-3"]
        assert supervised.command("scale", "web=2", "--wait").returncode == 0
        assert sorted(supervised.worker_pids()) == ["web-1", "web-2"]
        assert supervised.stop() == 0
