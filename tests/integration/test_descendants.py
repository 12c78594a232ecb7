"""Nothing that a worker starts outlives it, however it ends, and wherever that has hidden."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor import lineage
from tests.supervised import DUE, Supervised, children, group, is_alive, state, wait_until
from tests.victims import AT_IMPORT


def marked(pids: object) -> set[int]:
    """Return the living descendants of these processes, themselves left out."""
    found = set()
    for each in lineage.descendants(pids):  # type: ignore[arg-type]
        os.close(each.pidfd)
        found.add(each.pid)
    return found


@pytest.mark.parametrize("end", ["stop", "stop now", "killed"])
def test_what_has_left_the_group_goes_with_its_worker(tmp_path, end):
    """Four daemons in sessions of their own; all are gone before `exited`, which names them."""
    options = {"how": end}
    config = group("flees", "escapist", options, restart="never") + group("idle", "idle")
    with Supervised(tmp_path, config) as supervised:
        if end != "killed":
            supervised.ready()
            (worker,) = (w["pid"] for w in supervised.events("worker.ready", group="flees"))
            fled = marked([worker])
            assert len(fled) == 4
            assert {os.getsid(pid) for pid in fled}.isdisjoint({supervised.pid, worker})
            supervised.signal(signal.SIGTERM if end == "stop" else signal.SIGQUIT)
        exited = supervised.event("worker.exited", group="flees")
        names = [name.partition(" ")[0] for name in exited["leftovers"]]
        assert len(names) == 4, names
        assert "sleep" in names
        assert not marked([exited["pid"]])
        if end == "killed":
            assert is_alive(supervised.events("worker.ready", group="idle")[0]["pid"])
            supervised.signal(signal.SIGTERM)
        supervised.wait()


def test_a_daemon_lives_as_long_as_its_worker_and_no_other_ones_end_touches_it(tmp_path):
    """Another worker's crash is none of its business; and what is no worker's is left alone."""
    stranger = f"{sys.executable} -S -c 'import time; time.sleep(3600)' & exec \"$@\""
    config = group("flees", "escapist") + group("idle", "idle", backoff="1ms")
    through = ["sh", "-c", stranger, "sh"]
    with Supervised(tmp_path, config, through=through) as supervised:
        supervised.ready()
        pids = supervised.worker_pids()
        fled = marked([pids["flees-1"]])
        # A child that is no worker's: it was there before the supervisor was one.
        (known,) = (
            pid
            for pid in children(supervised.pid)
            if state(pid)
            and pid not in fled
            and pid not in pids.values()
            and pid not in supervised.templates()
        )
        os.kill(pids["idle-1"], signal.SIGKILL)
        supervised.event("worker.ready", worker="idle-2")
        assert "leftovers" not in supervised.event("worker.exited", worker="idle-1")
        assert marked([pids["flees-1"]]) == fled
        assert supervised.stop() == 0
        assert is_alive(known)
        os.kill(known, signal.SIGKILL)
        wait_until(lambda: not is_alive(known), "it is gone")


def test_what_flees_for_ever_cannot_keep_a_stop_from_ending(tmp_path):
    """Each child forks the next one and ends; it is caught, or given up and named."""
    with Supervised(tmp_path, group("bomb", "fork_bomb")) as supervised:
        supervised.ready()
        (worker,) = supervised.worker_pids().values()
        assert supervised.stop() == 0
        lineage.kill([worker], timeout=DUE)


def test_when_the_supervisor_is_killed_daemons_go_with_their_workers(tmp_path):
    """The template sees to it, also for those that have left their groups."""
    config = group("flees", "escapist")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        supervised.ready()
        (worker,) = supervised.worker_pids().values()
        assert len(marked([worker])) == 4
        supervised.signal(signal.SIGKILL)
        wait_until(lambda: not is_alive(worker) and not marked([worker]), "all are gone")
        supervised.wait()
        wait_until(lambda: not supervised.processes(), "and the template")


def test_what_an_import_has_started_ends_with_the_supervisor(tmp_path):
    """A helper process of the application's, in the template's group or out of it."""
    supervised = Supervised(tmp_path, group("helped", "with_helper:run"), modules=AT_IMPORT)
    with supervised:
        supervised.ready()
        (template,) = supervised.templates()
        helpers = marked([template])
        assert len(helpers) == 2
        assert supervised.stop() == 0
        wait_until(lambda: not any(is_alive(pid) for pid in helpers), "they are gone")


def test_what_an_import_has_started_ends_with_its_generation(tmp_path):
    """A reload starts it anew, and the old one goes when its last worker has gone."""
    supervised = Supervised(tmp_path, group("helped", "with_helper:run"), modules=AT_IMPORT)
    with supervised:
        supervised.ready()
        (template,) = supervised.templates()
        helpers = marked([template])
        done = supervised.command("reload", "--wait")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: not any(is_alive(pid) for pid in helpers), "the old ones are gone")
        (template,) = supervised.templates()
        assert len(marked([template])) == 2
        assert supervised.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a PID namespace")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_as_pid_1_it_reaps_strangers(tmp_path):
    """As in a container: orphans of whoever entered it leave no zombie, and live as they like."""
    through = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with Supervised(tmp_path, group("idle", "idle"), through=through) as supervised:
        supervised.ready()
        (pid,) = children(supervised.pid)
        assert _innermost(pid) == 1
        enter = ["nsenter", "-t", str(pid), "-p", "-m", "sh", "-c"]
        for _ in range(5):
            # Its child becomes an orphan, and ends.
            subprocess.run([*enter, "sleep 0.05 & exec true"], check=True, timeout=DUE)
        subprocess.run([*enter, "setsid sleep 3600 >&- 2>&- & exec true"], check=True, timeout=DUE)
        wait_until(lambda: not any(_is_zombie(child) for child in children(pid)), "all are reaped")
        sleeper = wait_until(
            lambda: [child for child in children(pid) if _words(child) == b"sleep\x003600\x00"],
            "it lives",
        )
        worker = next(child for child in children(pid) if b"worker idle-1" in _words(child))
        os.kill(worker, signal.SIGKILL)
        supervised.event("worker.ready", worker="idle-2")
        assert is_alive(sleeper[0])
        os.kill(pid, signal.SIGTERM)
        assert supervised.wait() == 0


def _innermost(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return -1


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
