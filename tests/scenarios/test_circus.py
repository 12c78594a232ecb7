"""circus: tests/test_watcher.py, tests/test_command_reload.py, and circus#1202."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

from tests.supervised import Supervised, group


def test_stopping_a_watcher_doesnt_spawn(tmp_path):
    """test_stopping_a_watcher_doesnt_spawn: who dies in the stop, of whatever, has no successor."""
    config = group("busy", "busy", {"seconds": 0.5}, count=4, backoff="1ms", backoff_max="1ms")
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        pids = supervised.worker_pids()
        supervised.signal(signal.SIGTERM)
        supervised.event("worker.acknowledged", count=4)
        for worker in ("busy-1", "busy-2"):
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(pids[worker], signal.SIGKILL)
        assert supervised.wait() == 0
        assert sorted(pids) == sorted(
            line["worker"] for line in supervised.events("worker.spawned")
        )


def test_reload_wid_4_workers(tmp_path):
    """test_reload_wid_4_workers: four places stay four, and no id comes twice, whatever replaces."""
    config = group("web", "idle", count=4, min_ready_time=0, backoff="1ms", backoff_max="1ms")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        first = set(supervised.worker_pids())
        supervised.signal(signal.SIGHUP)
        supervised.event("reload.done")
        assert len(supervised.worker_pids()) == 4
        assert not first & supervised.worker_pids().keys()
        for pid in supervised.worker_pids().values():
            os.kill(pid, signal.SIGKILL)
        supervised.event("worker.ready", count=12)
        assert supervised.stop() == 0
        spawned = [line["worker"] for line in supervised.events("worker.spawned")]
        assert sorted(spawned) == sorted(f"web-{number}" for number in range(1, 13))


def test_commands_never_conflict(tmp_path):
    """circus#1202: commands at the same moment are carried out or superseded, none is refused."""
    words = [
        ("reload", "--wait"),
        ("restart", "web", "--wait"),
        ("scale", "web=3", "--wait"),
        ("reload", "--wait"),
        ("scale", "web=1", "--wait"),
        ("status", "--json"),
    ]
    with Supervised(tmp_path, group("web", "idle", count=2, min_ready_time=0)) as supervised:
        supervised.ready()
        with ThreadPoolExecutor(len(words)) as pool:
            done = list(pool.map(lambda each: supervised.command(*each, due=60.0), words))
        for each, command in zip(words, done, strict=True):
            told = (each, command.returncode, command.stderr)
            assert command.returncode == 0 or "superseded" in command.stderr, told
        # They have left nothing behind that keeps the next ones from doing what they say.
        assert supervised.command("scale", "web=2", "--wait").returncode == 0
        status = supervised.status()
        assert (status["state"], status["groups"]["web"]["ready"]) == ("ready", 2)
        assert len(supervised.worker_pids()) == 2
        assert supervised.stop() == 0
        assert not supervised.events("worker.killed")
