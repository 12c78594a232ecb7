"""Settings that are applied to running workers: nobody is replaced, and everybody has them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.supervised import Supervised, group, wait_until

# Says in a file, again and again, how its pool is set and what its log lets through.
TELLS = """
import json, os
def run(worker):
    worker.ready()
    path = os.path.join(worker.options["folder"], worker.id)
    pool = worker.pools["main"]
    bound = worker.log.bind(bound=True)
    while not worker.accepting.wait(0.02):
        worker.log.debug("tells.debug")
        bound.debug("tells.bound")
        settings = pool._state.settings
        with open(path + ".new", "w") as file:
            json.dump([settings.max_open, settings.max_idle, settings.acquire_timeout], file)
        os.replace(path + ".new", path)
    with worker.job("last") as job:
        job.ctx.wait(worker.options["seconds"])
"""


class Live(Supervised):
    """Two workers that tell how they are set."""

    def __init__(self, folder: Path, seconds: float = 0.0, **keys: Any) -> None:
        self.told = folder / "told"
        self.told.mkdir()
        options = {"folder": str(self.told), "seconds": seconds}
        keys = {"max_open": 4, "acquire_timeout": "3s", **keys}
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        super().__init__(
            folder,
            'level = "info"\n[pools.main]\nurl = "sqlite:///live.db"\n'
            + "\n".join(lines)
            + "\n"
            + group("web", "app:run", options, count=2, min_ready_time=0),
            supervisor='grace = "2s"\nabort_margin = "1s"',
            modules={"app": TELLS},
        )

    def edit(self, old: str, new: str) -> None:
        text = self.config.read_text(encoding="utf-8")
        assert text.count(old) == 1
        self.config.write_text(text.replace(old, new), encoding="utf-8")

    def settings(self) -> list[list[float]]:
        """How each living worker says that its pool is set."""
        found = []
        for worker in self.worker_pids():
            path = self.told / worker
            found.append(json.loads(path.read_text()) if path.exists() else [])
        return found


def test_what_running_workers_can_take_is_applied_without_replacing_anybody(tmp_path):
    """Log level, pool sizes and times, grace, restart rules, the number of workers."""
    with Live(tmp_path) as live:
        live.ready()
        before = live.worker_pids()
        live.edit('level = "info"', 'level = "debug"')
        live.edit("max_open = 4", "max_open = 7")
        live.edit('acquire_timeout = "3s"', 'acquire_timeout = "9s"')
        live.edit('grace = "2s"', 'grace = "4s"')
        live.edit("count = 2", "count = 3\nbackoff = 0.5")
        done = live.command("reload", "--wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (
            "reload done, generation 1: nobody replaced, applied supervisor.grace, log.level, "
            "pools.main.max_open, pools.main.max_idle, pools.main.acquire_timeout, "
            "workers.web.count, workers.web.backoff\n"
        )
        after = live.worker_pids()
        assert before.items() <= after.items()
        assert len(after) == 3
        (event,) = live.events("reload.done")
        assert (event["replaced"], event["failed"], event["generation"]) == (0, [], 1)
        assert not live.events("reload.started")
        wait_until(lambda: live.settings() == [[7, 7, 9.0]] * 3, "all have them, the new one too")
        for worker in after:  # loggers that were made before, and what was bound to them
            live.event("tells.debug", worker=worker)
            live.event("tells.bound", worker=worker)
        status = live.status()["groups"]["web"]
        assert (status["count"], status["ready"], status["state"]) == (3, 3, "ready")

        # Who is restarted has them from the start.
        os.kill(after["web-1"], signal.SIGKILL)
        live.event("worker.ready", worker="web-4")
        wait_until(lambda: live.settings() == [[7, 7, 9.0]] * 3, "the restarted one has them")
        live.event("tells.debug", worker="web-4")

        live.edit("count = 3", "count = 1")
        assert live.command("reload", "--wait").returncode == 0
        assert len(live.worker_pids()) == 1
        assert live.stop() == 0
        stopping = live.event("supervisor.stopping")
        assert stopping["grace_seconds"] > 3.9


def test_orphans_live_by_the_grace_that_was_changed(tmp_path):
    """Worker and template have both been told: work that the old grace would end is done."""
    with Live(tmp_path, seconds=3.5) as live:
        live.ready()
        live.edit('grace = "2s"', 'grace = "20s"')
        assert live.command("reload", "--wait").returncode == 0
        pids = live.worker_pids()
        killed = live.signal(signal.SIGKILL)
        live.wait()
        wait_until(lambda: not live.processes(), "they end themselves")
        assert time.monotonic() - killed >= 3.5
        assert "has outlived its supervisor" not in live.text()
        assert pids


def test_code_that_has_changed_asks_for_a_roll(tmp_path):
    """The same edit of the file, but the module on disk is younger: everybody is replaced."""
    with Live(tmp_path) as live:
        live.ready()
        before = live.worker_pids()
        live.edit("max_open = 4", "max_open = 5")
        (tmp_path / "app.py").write_text(TELLS + "# another one\n")
        done = live.command("reload", "--wait")
        assert (done.returncode, done.stdout) == (0, "reload done, generation 2\n")
        assert live.event("reload.started")["reason"] == f"{tmp_path / 'app.py'} has changed"
        after = live.worker_pids()
        assert not set(before.values()) & set(after.values())
        wait_until(lambda: live.settings() == [[5, 5, 3.0]] * 2, "they have the new settings")

        # What is in force now is the young code: the next edit is live again.
        live.edit("max_open = 5", "max_open = 6")
        assert "nobody replaced" in live.command("reload", "--wait").stdout
        assert live.worker_pids() == after
        assert live.stop() == 0


def test_a_reload_of_the_same_file_and_code_rolls(tmp_path):
    """SIGHUP recycles the workers, and says so with no reason of its own."""
    with Live(tmp_path) as live:
        live.ready()
        before = live.worker_pids()
        live.signal(signal.SIGHUP)
        live.event("reload.done", generation=2)
        assert not set(before.values()) & set(live.worker_pids().values())
        assert "reason" not in live.event("reload.started")
        assert live.stop() == 0


def test_a_pool_under_a_budget_keeps_to_its_allowance(tmp_path):
    """Its size in the file bounds what it may ask for; what it has is what it was granted."""
    with Live(tmp_path, budget=9) as live:
        live.ready()
        assert live.settings()
        live.edit("max_open = 4", "max_open = 2")
        assert live.command("reload", "--wait").returncode == 0
        wait_until(lambda: live.settings() == [[2, 2, 3.0]] * 2, "the new bound")
        live.edit("max_open = 2", "max_open = 8")
        live.edit("budget = 9", "budget = 5\nmin = 2")
        done = live.command("reload", "--wait")
        assert (done.returncode, "(2 + 1) x 2 = 6 connections" in done.stderr) == (1, True)
        live.edit("budget = 5", "budget = 6")
        assert live.command("reload", "--wait").returncode == 0
        assert live.event("budget.changed")["budget"] == 6
        wait_until(
            lambda: live.status()["budgets"]["main"] == {"budget": 6, "granted": 4, "open": 0},
            "two each, all that they had",
        )
        assert live.settings() == [[2, 2, 3.0]] * 2
        assert live.stop() == 0


def test_more_workers_that_do_not_come_are_told(tmp_path):
    """The other settings are in force all the same; `--wait` says what failed, and exits with 1."""
    with Live(tmp_path) as live:
        live.ready()
        before = live.worker_pids()
        blocker = live.told / "web-3.new"  # where the third one wants to write
        blocker.mkdir()
        live.edit("min_ready_time = 0", "min_ready_time = 1\nmax_restarts = 0")
        live.edit("count = 2", "count = 3")
        done = live.command("reload", "--wait")
        assert done.returncode == 1
        assert "scale of web: " in done.stderr
        assert before.items() <= live.worker_pids().items()
        live.stop()


GROWS = """
def run(worker):
    grown = bytearray(200 << 20) if worker.id == "web-1" else b""
    worker.ready()
    worker.accepting.wait()
    len(grown)
"""


def test_a_worker_that_has_grown_too_large_is_replaced(tmp_path):
    """As soon as somebody looks, the replacement first; the other one is left alone."""
    with Supervised(
        tmp_path,
        group("web", "app:run", count=2, min_ready_time=0, max_rss="150MiB"),
        modules={"app": GROWS},
    ) as grown:
        grown.ready()
        assert grown.command("status").returncode == 0
        assert grown.event("worker.outgrown")["rss_bytes"] > 150 << 20
        assert grown.event("recycle.done")["target"] == "web-1"
        assert set(grown.worker_pids()) == {"web-2", "web-3"}
        names = [
            line["event"] for line in grown.events() if line.get("worker") in {"web-1", "web-3"}
        ]
        assert names.index("worker.outgrown") < names.index("worker.cancelled")
        assert len(grown.events("worker.outgrown")) == 1
        assert grown.stop() == 0
