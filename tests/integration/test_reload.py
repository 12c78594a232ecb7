"""A rolling restart with real processes: new code, old code, and what comes of broken code."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from tests.supervised import Supervised, group, wait_until

COUNT = 4
SERVE = """
from workers.jobs import sha256  # something that a real module imports
def run(worker):
    worker.log.info("code.serves", version={version}, tag=worker.options.get("tag"))
    worker.ready()
    while not worker.accepting.done:
        with worker.job("turn"):
            worker.accepting.wait(0.005)
"""
RAISES_AT_IMPORT = "raise ValueError('broken at import')\n"
RAISES_LATE = """
import time
def run(worker):
    worker.ready()
    time.sleep(0.2)
    raise RuntimeError("broken at run time")
"""
NEVER_READY = """
def run(worker):
    worker.accepting.wait()
"""
THIRD_FAILS = """
from pathlib import Path
def run(worker):
    seen = Path({seen!r})
    with seen.open("a") as file:
        file.write("x")
    if len(seen.read_text()) >= 3:
        raise RuntimeError("the third one")
    worker.ready()
    worker.accepting.wait()
"""


class Rolled(Supervised):
    """A supervisor of four workers whose code a test rewrites on disk."""

    def __init__(self, folder: Path, **keys: object) -> None:
        self.code = folder / "rolled.py"
        self.write(SERVE.format(version=1))
        keys = {"count": COUNT, "min_ready_time": "300ms", "ready_timeout": "2s", **keys}
        super().__init__(folder, group("web", "rolled:run", **keys), supervisor='grace = "3s"')

    def write(self, code: str) -> None:
        self.code.write_text(code, encoding="utf-8")

    def served(self) -> dict[str, int]:
        """Which version each living worker runs."""
        living = self.worker_pids()
        versions = {line["worker"]: line["version"] for line in self.events("code.serves")}
        return {worker: versions.get(worker, 0) for worker in living}

    def ready_counts(self) -> list[int]:
        """How many workers were ready after each event, from the first time that all were."""
        ready: set[str] = set()
        counts: list[int] = []
        for line in self.lines():
            if line["event"] == "worker.ready":
                ready.add(line["worker"])
            elif line["event"] in ("worker.cancelled", "worker.failed", "worker.exited"):
                ready.discard(line["worker"])
            else:
                continue
            if counts or len(ready) == COUNT:
                counts.append(len(ready))
        return counts


def test_three_rolls_bring_new_code_and_never_fewer_ready_workers(tmp_path):
    """Under work, each SIGHUP puts the code on disk in force, one by one, without a gap."""
    with Rolled(tmp_path) as rolled:
        rolled.ready()
        for version in (2, 3, 4):
            rolled.write(SERVE.format(version=version))
            rolled.signal(signal.SIGHUP)
            rolled.event("reload.done", generation=version)
            assert sorted(rolled.served().values()) == [version] * COUNT
            status = rolled.status()
            assert {worker["generation"] for worker in status["workers"]} == {version}
            assert status["state"] == "ready"
        counts = rolled.ready_counts()
        living = 0
        for line in rolled.lines():
            living += {"worker.spawned": 1, "worker.exited": -1}.get(line["event"], 0)
            assert living <= COUNT + 1
        assert rolled.stop() == 0
    assert min(counts) >= COUNT


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (RAISES_AT_IMPORT, "broken at import"),
        (RAISES_LATE, "broken at run time"),
        (NEVER_READY, "was not ready within 2 s"),
        (None, "the third one"),
    ],
    ids=["import", "late", "never-ready", "third"],
)
def test_broken_code_is_rolled_back_to_the_old_code(tmp_path, code, error):
    """The old workers serve throughout; at the end all run the old code; a good roll goes through."""
    with Rolled(tmp_path) as rolled:
        rolled.ready()
        rolled.write(code or THIRD_FAILS.format(seen=str(tmp_path / "seen")))
        done = rolled.command("reload", "--wait")
        assert done.returncode == 1
        assert error in done.stderr
        (back,) = rolled.events("reload.rolled_back")
        assert back["generation"] == 1
        assert error in back["error"] + back["traceback"]
        assert sorted(rolled.served().values()) == [1] * COUNT
        status = rolled.status()
        assert (status["state"], status["groups"]["web"]["ready"]) == ("ready", COUNT)
        assert min(rolled.ready_counts()) >= COUNT
        if code is not None:  # nobody was replaced, so nobody had to come back
            assert {worker["id"] for worker in status["workers"]} == {
                f"web-{number}" for number in range(1, COUNT + 1)
            }

        rolled.write(SERVE.format(version=7))
        done = rolled.command("reload", "--wait")
        assert (done.returncode, done.stdout) == (0, "reload done, generation 3\n")
        assert sorted(rolled.served().values()) == [7] * COUNT
        assert rolled.stop() == 0


def test_a_bad_file_is_rejected_and_changes_nothing(tmp_path):
    """Broken TOML or a wrong key: reload.rejected, and nobody is touched; commands still work."""
    with Rolled(tmp_path) as rolled:
        rolled.ready()
        before = rolled.worker_pids()
        good = rolled.config.read_text(encoding="utf-8")
        rolled.config.write_text(good + "\n[workers\n", encoding="utf-8")
        done = rolled.command("reload", "--wait")
        assert done.returncode == 1
        assert "TOML" in done.stderr
        rolled.config.write_text(good + "cuont = 3\n", encoding="utf-8")
        rolled.signal(signal.SIGHUP)
        rejected = rolled.event("reload.rejected", count=2)
        assert 'did you mean "count"?' in rejected["reason"]
        assert rolled.worker_pids() == before
        assert not rolled.events("reload.started")
        assert rolled.command("status").returncode == 0
        rolled.config.write_text(good, encoding="utf-8")
        assert rolled.stop() == 0


def test_a_roll_takes_the_new_configuration_too(tmp_path):
    """Counts, options, new groups and groups that are gone: all of the file, or none of it."""
    with Rolled(tmp_path) as rolled:
        rolled.ready()
        head, _, _ = rolled.config.read_text(encoding="utf-8").partition("[workers.web]")
        keys = {"min_ready_time": 0, "count": 2}
        rolled.config.write_text(
            head
            + group("web", "rolled:run", {"tag": 11}, **keys)
            + group("more", "rolled:run", **keys),
            encoding="utf-8",
        )
        assert rolled.command("reload", "--wait").returncode == 0
        status = rolled.status()
        assert {name: g["ready"] for name, g in status["groups"].items()} == {"web": 2, "more": 2}
        assert len(rolled.worker_pids()) == 4
        assert len(rolled.events("code.serves", tag=11)) == 2

        rolled.config.write_text(head + group("more", "rolled:run", **keys), encoding="utf-8")
        assert rolled.command("reload", "--wait").returncode == 0
        assert {worker.partition("-")[0] for worker in rolled.worker_pids()} == {"more"}
        assert rolled.stop() == 0


def test_a_storm_of_hups_makes_at_most_one_more_roll(tmp_path):
    """Ten SIGHUPs in 100 ms during a roll: the newest is carried out, the others never begin."""
    with Rolled(tmp_path) as rolled:
        rolled.ready()
        rolled.signal(signal.SIGHUP)
        rolled.event("reload.started")
        for _ in range(10):
            rolled.signal(signal.SIGHUP)
            time.sleep(0.01)
        rolled.event("reload.done")
        assert len(rolled.events("reload.done")) == 1
        # The first one, and what began while the storm was still on.
        assert len(rolled.events("reload.started")) <= 3
        assert min(rolled.ready_counts()) >= COUNT
        assert rolled.stop() == 0


def test_sigterm_wins_over_a_roll_at_once(tmp_path):
    """A stop in the middle of a roll whose replacement never gets ready does not wait for it."""
    with Rolled(tmp_path, ready_timeout="60s") as rolled:
        rolled.ready()
        rolled.write(NEVER_READY)
        waiter = threading.Thread(target=lambda: codes.append(rolled.command("reload", "--wait")))
        codes: list = []
        waiter.start()
        wait_until(lambda: len(rolled.worker_pids()) == COUNT + 1, "a replacement")
        assert rolled.stop(due=10.0) == 0
        waiter.join(20.0)
        assert codes[0].returncode == 1
        assert "ended by a stop" in codes[0].stderr
        (stopped,) = rolled.events("supervisor.stopped")
        assert stopped["killed"] == []
        assert stopped["drained"] >= COUNT  # the replacement may not have said hello yet


def test_restart_and_scale(tmp_path):
    """One worker, a group, more workers, fewer: each waited for; what does not exist is refused."""
    with Rolled(tmp_path, min_ready_time=0) as rolled:
        rolled.ready()
        rolled.write(RAISES_AT_IMPORT)  # a restart stays with the code in force
        assert rolled.command("restart", "web-2", "--wait").returncode == 0
        assert set(rolled.worker_pids()) == {"web-1", "web-3", "web-4", "web-5"}
        assert rolled.command("restart", "web", "--wait").returncode == 0
        assert set(rolled.worker_pids()) == {f"web-{number}" for number in range(6, 10)}
        assert rolled.command("scale", "web=6", "--wait").returncode == 0
        assert rolled.status()["groups"]["web"]["ready"] == 6
        assert rolled.command("scale", "web=1", "--wait").returncode == 0
        assert len(rolled.worker_pids()) == 1
        for words in (("restart", "web-99"), ("restart", "nobody"), ("scale", "nobody=3")):
            done = rolled.command(*words)
            assert (done.returncode, "there is no" in done.stderr) == (2, True)
        assert rolled.command("scale", "web=-1").returncode == 2
        assert set(rolled.served().values()) == {1}
        assert rolled.stop() == 0


def test_workers_are_replaced_for_their_age_the_replacement_first(tmp_path):
    """`max_age` rolls one worker after the other, and never takes one away before its time."""
    with Rolled(tmp_path, min_ready_time=0, max_age="1s") as rolled:
        rolled.ready()
        rolled.event("recycle.done", count=COUNT)
        assert min(rolled.ready_counts()) >= COUNT
        for line in rolled.events("worker.cancelled", cause="replaced"):
            ready = rolled.events("worker.ready", worker=line["worker"])[0]
            assert _seconds(line) - _seconds(ready) >= 0.9
        assert rolled.stop() == 0


def _seconds(line: dict) -> float:
    hours, minutes, seconds = line["time"].partition("T")[2].rstrip("Z").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
