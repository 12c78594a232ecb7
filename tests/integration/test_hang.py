"""Hangs with real processes: found from outside, told with stacks and jobs, brought down; or not hangs.

And `dump`, which tells the same on demand: what needs the worker's help and what does not.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from tests.supervised import Supervised, group, is_alive, state, wait_until

MAIN = "tests/victims.py"
POOL = '[pools.main]\nurl = "sqlite:///app.db"\n'
SHORT = 'grace = "3s"\nabort_margin = "1s"'


def hanging(name: str, how: str, when: str = "/", **keys: Any) -> str:
    """Return a group whose worker does good jobs, and then one that never ends in this way.

    It begins as soon as the file `when` is there.
    """
    return group(name, "hanging", {"how": how, "when": when}, **keys)


def began(supervised: Supervised, worker: str) -> float:
    """Wait until the worker is in the job that hangs; return since when."""
    return float(supervised.event("victim.hanging", worker=worker)["began"])


def dump(supervised: Supervised, worker: str) -> dict[str, Any]:
    """Return what `dump WORKER --json` says."""
    done = supervised.command("dump", worker, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# --- hangs ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_hang_is_found_told_and_brought_down(tmp_path):
    """After the hang_timeout, never before: stacks and jobs are told, then cancel, TERM, KILL, a new one.

    Also while the interpreter lock is held, when nobody in the worker can say a word.
    """
    kinds = {
        "deaf": "deaf_for_ever",
        "in_c": "_sleep_in_c",
        "holding": "_sleep_in_c",
        "waiting": "hanging",
    }
    config = "".join(
        hanging(kind, kind.replace("_", " ").replace("in c", "in C"), hang_timeout="2s")
        for kind in kinds
    )
    config += group("aio", "hanging_async", hang_timeout="2s") + group(
        "busy", "long_but_busy", {"seconds": 6, "step": 8}, hang_timeout="2s"
    )
    config += group("idle", "idle", hang_timeout="1s") + group("off", "hanging", {"how": "deaf"})
    with Supervised(tmp_path, config, supervisor=SHORT) as supervised:
        since = {kind: began(supervised, f"{kind}-1") for kind in (*kinds, "aio")}
        hung = {}
        for kind, started in since.items():
            hung[kind] = supervised.event("worker.hung", worker=f"{kind}-1")
            assert time.monotonic() >= started + 2.0
        for kind in ("deaf", "in_c", "holding", "aio"):
            supervised.event("worker.killed", worker=f"{kind}-1")
            assert time.monotonic() >= since[kind] + 5.0
        for kind in hung:
            supervised.event("worker.ready", worker=f"{kind}-2")
        supervised.event("victim.finished", group="busy")
        assert is_alive(supervised.worker_pids()["off-1"])
        supervised.signal(signal.SIGQUIT)
        supervised.wait()
    for kind, place in kinds.items():
        assert place in hung[kind]["stacks"], kind
        (job,) = hung[kind]["jobs"]
        assert job["name"] == "bad"
        assert job["seconds"] >= 2.0
        assert f"thread {job['thread']}" in hung[kind]["stacks"].lower()
        assert "its job 'bad' is in flight for 2" in hung[kind]["why"]
    assert [job["name"] for job in hung["aio"]["jobs"]] == ["bad"]
    killed = {line["worker"]: line for line in supervised.events("worker.killed")}
    assert [step for step, _ in killed["holding-1"]["ladder"]] == [
        "hung",
        "cancel",
        "SIGTERM",
        "stacks",
        "SIGKILL",
    ]
    assert [job["name"] for job in killed["holding-1"]["jobs"]] == ["bad"]
    assert killed["holding-1"]["why"].startswith("it hung: its job 'bad'")
    # Who ends when its context does has hung all the same, and is not killed.
    assert supervised.life("waiting-1")[-5:] == [
        "hung",
        "cancelled",
        "acknowledged",
        "drained",
        "exited",
    ]
    told = {line["group"] for line in supervised.events("worker.hung")}
    assert told == {*kinds, "aio"}, "busy_until, an idle worker, and hang_timeout off are no hangs"


@pytest.mark.slow
def test_who_is_stopped_is_not_hung_and_has_its_whole_time_when_it_is_continued(tmp_path):
    """`worker.stopped` instead of `worker.hung`; status says so; a stop's deadline kills it as ever."""
    config = hanging("w", "stopped", hang_timeout="1s")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        stopped = supervised.event("worker.stopped", worker="w-1")
        assert [job["name"] for job in stopped["jobs"]] == ["bad"]
        assert supervised.status()["workers"][0]["stopped"] is True
        assert "ready (stopped)" in supervised.command("status").stdout
        time.sleep(2.5)  # more than two looks, and nothing happens in them
        assert supervised.life("w-1") == ["spawned", "ready", "stopped"]
        continued_at = time.monotonic()
        os.kill(supervised.worker_pids()["w-1"], signal.SIGCONT)
        supervised.event("worker.hung", worker="w-1")
        assert time.monotonic() >= continued_at + 1.0
        assert supervised.life("w-1")[:5] == ["spawned", "ready", "stopped", "continued", "hung"]
        supervised.event("worker.stopped", worker="w-2")
        assert supervised.stop() == 1
    (killed,) = supervised.events("worker.killed", worker="w-2")
    assert [job["name"] for job in killed["jobs"]] == ["bad"]
    assert "stopped" in killed["stacks_missing"]


@pytest.mark.slow
def test_a_supervisor_that_was_stopped_judges_nobody_at_once(tmp_path):
    """When it goes on, every job has its whole time again: it may have been frozen with it."""
    config = hanging("w", "stopping the supervisor", hang_timeout="2s")
    with Supervised(tmp_path, config) as supervised:
        wait_until(lambda: state(supervised.pid) == "T", "it is stopped")
        time.sleep(4.0)  # twice what a job may take
        continued = time.monotonic()
        os.kill(supervised.pid, signal.SIGCONT)
        supervised.event("worker.hung", worker="w-1")
        assert time.monotonic() >= continued + 2.0
        supervised.signal(signal.SIGQUIT)
        supervised.wait()


def test_a_start_that_takes_longer_is_no_hang(tmp_path):
    """Until `ready` it is for ready_timeout to judge, whatever job has begun before."""
    source = (
        "import ctypes\n"
        "def run(worker):\n"
        "    with worker.job('warm up'):\n"
        "        ctypes.PyDLL(None).usleep(900_000)\n"  # holds the interpreter lock
        "        ctypes.PyDLL(None).usleep(900_000)\n"
        "    worker.ready()\n"
        "    worker.accepting.wait()\n"
    )
    config = group("w", "warming:run", hang_timeout="500ms")
    with Supervised(tmp_path, config, modules={"warming": source}) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    assert not supervised.events("worker.hung")


def test_without_a_hang_timeout_the_jobs_of_a_killed_worker_are_asked_for(tmp_path):
    """Its link answers while its work does not; one that cannot answer has `jobs_missing`."""
    config = hanging("deaf", "deaf") + hanging("holding", "holding")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        began(supervised, "deaf-1")
        began(supervised, "holding-1")
        assert supervised.stop() == 1
    killed = {line["worker"]: line for line in supervised.events("worker.killed")}
    assert [job["name"] for job in killed["deaf-1"]["jobs"]] == ["bad"]
    assert "jobs_missing" not in killed["deaf-1"]
    assert killed["holding-1"]["jobs"] == []
    assert "did not answer" in killed["holding-1"]["jobs_missing"]


def test_a_fork_of_user_code_does_not_write_into_its_parents_scoreboard(tmp_path):
    """A child that dies in the middle of a job leaves no entry behind that nobody would end."""
    source = (
        "import os\n"
        "def run(worker):\n"
        "    worker.ready()\n"
        "    with worker.job('own'):\n"
        "        pass\n"
        "    if (pid := os.fork()) == 0:\n"
        "        worker.job('child').__enter__()\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    worker.log.info('victim.forked')\n"
        "    worker.accepting.wait()\n"
    )
    config = group("w", "forking:run", hang_timeout="300ms")
    with Supervised(tmp_path, config, modules={"forking": source}) as supervised:
        supervised.event("victim.forked")
        assert dump(supervised, "w-1")["jobs"] == []
        time.sleep(1.0)  # three looks
        assert supervised.stop() == 0
    assert not supervised.events("worker.hung")


# --- dump ----------------------------------------------------------------------------------------


def test_dump_shows_what_a_worker_has_in_hand(tmp_path):
    """Jobs with their threads, loans with the borrower's stack, threads by name; nothing is missing."""
    name = "sync postgresql://app:hunter2@db/orders?sslpassword=hunter3"
    config = POOL + group("w", "hanging", {"how": "borrowing", "name": name})
    with Supervised(tmp_path, config) as supervised:
        began(supervised, "w-1")
        wait_until(lambda: dump(supervised, "w-1")["loans"], "it has borrowed")
        found = dump(supervised, "w-1")
        text = supervised.command("dump", "w-1")
        supervised.signal(signal.SIGUSR2)
        logged = supervised.event("worker.stacks", worker="w-1")
        supervised.signal(signal.SIGQUIT)
        supervised.wait()
    (job,) = found["jobs"]
    (loan,) = found["loans"]
    assert job["name"] == "sync postgresql://app:***@db/orders?sslpassword=***"
    assert found["threads"][job["thread"]] == "MainThread"
    assert (loan["pool"], loan["thread"]) == ("main", "MainThread")
    assert "in hanging" in loan["stack"]
    assert "in deaf_for_ever" in loan["now"]
    assert 0.0 <= loan["held_seconds"] <= job["seconds"]
    assert "_stay_for_ever" in found["stacks"]
    assert (found["state"], found["halted"], found["tasks"]) == ("ready", "", [])
    assert found["missing"] == {}
    assert "jobs in flight: 1\n" in text.stdout
    assert "borrowed connections: 1\n" in text.stdout
    assert f'{job["thread"]} "MainThread" (most recent call first)' in text.stdout
    assert "hunter" not in text.stdout + json.dumps(found) + supervised.text()
    assert logged["jobs"][0]["name"] == job["name"]


def test_dump_shows_the_tasks_of_asyncio_down_to_what_they_wait_for(tmp_path):
    """By name, with the chain of what each awaits."""
    with Supervised(tmp_path, group("w", "hanging_async", hang_timeout="60s")) as supervised:
        began(supervised, "w-1")
        wait_until(lambda: dump(supervised, "w-1")["jobs"], "it is in its job")
        found = dump(supervised, "w-1")
        supervised.signal(signal.SIGQUIT)
        supervised.wait()
    tasks = {task["name"]: task for task in found["tasks"]}
    assert "in hanging_async.<locals>.wait_for_ever" in tasks["stuck"]["stack"]
    assert "Event.wait" in tasks["stuck"]["stack"]
    assert found["missing"] == {}


@pytest.mark.slow
def test_dump_of_one_that_cannot_answer_says_what_is_missing_and_why(tmp_path):
    """Stacks and written-down jobs come from outside while the lock is held; nothing, when stopped."""
    go = (
        tmp_path / "go"
    )  # who held the lock before its hello could not be told from who never says it
    config = hanging("holding", "holding", str(go), hang_timeout="60s") + hanging("stopped", "deaf")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        supervised.event("worker.ready", worker="holding-1")
        go.touch()
        began(supervised, "holding-1")
        began(supervised, "stopped-1")
        pid = supervised.worker_pids()["stopped-1"]
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state(pid) == "T", "it is stopped")
        holding, stopped = dump(supervised, "holding-1"), dump(supervised, "stopped-1")
        text = supervised.command("dump", "stopped-1").stdout
        supervised.signal(signal.SIGQUIT)
        supervised.wait()
    assert [job["name"] for job in holding["jobs"]] == ["bad"]
    assert "_sleep_in_c" in holding["stacks"]
    assert set(holding["missing"]) == {"tasks", "loans"}
    assert "holds the interpreter lock" in holding["missing"]["loans"]
    assert set(stopped["missing"]) == {"stacks", "jobs", "tasks", "loans"}
    assert all("it is stopped (SIGSTOP)" in why for why in stopped["missing"].values())
    assert "jobs in flight: not available: it is stopped (SIGSTOP)" in text


def test_dump_of_nobody_is_wrong_usage(tmp_path):
    """A group is told whom it could mean."""
    with Supervised(tmp_path, group("w", "idle", count=2)) as supervised:
        supervised.ready()
        nobody, whole = supervised.command("dump", "w-9"), supervised.command("dump", "w")
        assert supervised.stop() == 0
    assert (nobody.returncode, whole.returncode) == (2, 2)
    assert "no worker named 'w-9'" in nobody.stderr
    assert "name one of w-1, w-2" in whole.stderr


def test_dumps_while_workers_are_born_kill_nobody(tmp_path):
    """SIGUSR2 is the end of a process that does not know it: a newborn worker ignores it."""
    with Supervised(tmp_path, group("w", "idle", count=8)) as supervised:
        while not supervised.events("supervisor.ready"):
            for pid in supervised.worker_pids().values():
                os.kill(pid, signal.SIGUSR2)
            if supervised.events("worker.spawned"):
                supervised.signal(signal.SIGUSR2)
            assert not supervised.events("worker.exited")
            time.sleep(0.002)
        supervised.event("worker.stacks", count=8)
        assert supervised.stop() == 0
    assert len(supervised.events("worker.spawned")) == 8


def test_dumps_of_a_worker_whose_threads_are_all_busy_do_not_crash_it(tmp_path):
    """Its own thread looks at the others while none of them runs; no signal walks their frames."""
    source = (
        "def climb(n):\n"
        "    return n and climb(n - 1)\n"
        "def run(worker):\n"
        "    def work():\n"
        "        while not worker.accepting.done:\n"
        "            climb(200)\n"
        "    for _ in range(2):\n"
        "        worker.wg.go(work)\n"
        "    worker.ready()\n"
        "    worker.accepting.wait()\n"
    )
    with Supervised(tmp_path, group("w", "climbing:run"), modules={"climbing": source}) as here:
        here.ready()
        found = [dump(here, "w-1") for _ in range(4)]
        assert here.stop() == 0
    assert any("in climb" in each["stacks"] for each in found)
    assert not here.events("worker.exited", worker="w-1", signal=signal.SIGSEGV)
