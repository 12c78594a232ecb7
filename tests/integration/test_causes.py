"""Why a worker ended, told by a real kernel: a kill, want of memory, and no process to be had."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

import pytest

from supervisor.memory import OomCounter
from tests.cgroups import Cgroup, memory_limit
from tests.supervised import Supervised, group, is_alive, wait_until


def cgroup(controller: str, limits: Mapping[str, int] | None = None) -> Cgroup:
    """Return a new cgroup; skip where none can be made."""
    try:
        return Cgroup(controller, limits)
    except OSError as exc:
        pytest.skip(f"no such cgroup can be made: {exc}")


def test_a_kill_from_outside_is_told_as_one(tmp_path):
    """SIGKILL by somebody else is `killed`, and the worker is replaced."""
    with Supervised(tmp_path, group("web", "idle", count=1)) as supervised:
        supervised.ready()
        os.kill(supervised.worker_pids()["web-1"], signal.SIGKILL)
        ended = supervised.event("worker.exited", worker="web-1")
        # Who asks the journal for warnings must find it: nothing else tells of this end.
        assert (ended["cause"], ended["level"]) == ("killed", "warning")
        supervised.event("worker.ready", worker="web-2")
        assert supervised.stop() == 0
        ended = supervised.event("worker.exited", worker="web-2")
        assert ("cause" in ended, ended["level"]) == (False, "info")


def test_a_worker_that_is_killed_for_memory_is_told_from_one_that_somebody_killed(tmp_path):
    """The kernel's count of OOM kills has risen; the supervisor in the same cgroup lives on."""
    config = group("eater", "memory_eater", count=1, max_restarts=0)
    with (
        cgroup("memory", memory_limit(200 << 20)) as cage,
        Supervised(tmp_path, config, through=cage.through) as supervised,
    ):
        ended = supervised.event("worker.exited", worker="eater-1")
        assert (ended["signal"], ended["cause"]) == (signal.SIGKILL, "memory")
        assert supervised.event("group.failed")["cause"] == "memory"
        assert supervised.stop() == 1


@pytest.mark.parametrize("template_too", [False, True])
def test_no_process_to_be_had_is_waited_for(tmp_path, template_too):
    """fork fails with EAGAIN: the group is nobody's failure, and comes when there is room again."""
    config = group("web", "idle", count=3, max_restarts=0, backoff="20ms")
    with cgroup("pids") as cage:
        limit = cage.folder / "pids.max"
        with Supervised(tmp_path, config, through=cage.through) as supervised:
            supervised.ready()
            limit.write_text("1", encoding="ascii")
            if template_too:
                (template,) = supervised.templates()
                os.kill(template, signal.SIGKILL)
                wait_until(lambda: not is_alive(template), "the template has gone")
            for pid in supervised.worker_pids().values():
                os.kill(pid, signal.SIGTERM)  # a good end: none of them has failed
            refused = supervised.event("worker.not_spawned", count=4)
            assert "Resource temporarily unavailable" in refused["error"]
            assert supervised.status()["groups"]["web"]["failure"] == ""
            limit.write_text("max", encoding="ascii")
            supervised.event("worker.ready", count=6)
            assert supervised.stop() == 0
            assert not supervised.events("group.failed")


@pytest.mark.parametrize(
    ("files", "count"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.events": "oom 3\noom_kill 2\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/a\n0::/\n",
                "sys/fs/cgroup/memory/a/memory.oom_control": "under_oom 0\noom_kill 5\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/of/the/host\n",
                "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 6\n",
            },
            6,
        ),
        ({"proc/self/cgroup": "0::/\n", "proc/vmstat": "nr_free 1\noom_kill 8\n"}, 8),
        ({"proc/self/cgroup": "what?\n", "proc/vmstat": "oom_kill many\n"}, None),
        ({}, None),
    ],
)
def test_the_count_is_found_where_the_kernel_has_it(tmp_path, files, count):
    """In version 2's file, in version 1's, in the whole machine's, or nowhere."""
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="ascii")
    counter = OomCounter(tmp_path)

    assert (counter.read(), counter.read()) == (count, count)
