"""The template: what it shares, what it notices, and that nothing depends on its life."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.supervised import (
    Supervised,
    children,
    descriptors,
    group,
    is_alive,
    state,
    title,
    wait_until,
)
from tests.victims import AT_IMPORT

STORM: dict[str, Any] = {"max_restarts": 100_000, "backoff": "1ms", "backoff_max": "5ms"}


def test_a_template_has_one_thread_and_next_to_no_descriptors(tmp_path):
    """One thread, its standard streams, its socket, and a pidfd for each of its workers."""
    with Supervised(tmp_path, group("idle", "idle", count=3)) as supervised:
        supervised.ready()
        (template,) = supervised.templates()
        assert len(os.listdir(f"/proc/{template}/task")) == 1
        held = descriptors(template)
        assert sorted(held)[:4] == [0, 1, 2, 3]
        assert held[0] == "/dev/null"
        assert held[3].startswith("socket:")
        assert [held[fd] for fd in sorted(held)[4:]] == ["anon_inode:[pidfd]"] * 3
        assert title(template) == "supervisor: template of test, generation 1"
        assert supervised.stop() == 0


def test_imports_are_paid_once_and_their_heap_is_frozen(tmp_path):
    """A worker finds its application imported and frozen, and its own collector at work."""
    config = group("look", "surroundings", count=2)
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        supervised.event("victim.surroundings", count=2)
        assert supervised.stop() == 0
    for line in supervised.events("victim.surroundings"):
        assert line["frozen"] > 10_000
        assert line["collecting"]
        assert {"tests.victims", "zmq"} <= set(line["modules"])
        assert not {"supervisor.loop", "supervisor.core", "click", "pytest"} & set(line["modules"])


def test_groups_of_the_same_environment_share_one_template(tmp_path):
    """Another environment is another template: it was set before the imports."""
    config = group("a", "good:run") + group("b", "idle") + group("c", "surroundings")
    config = config.replace(
        'run = "tests.victims:surroundings"',
        'run = "tests.victims:surroundings"\nenv = { ONLY_HERE = "1" }',
    )
    with Supervised(tmp_path, config, modules=AT_IMPORT) as supervised:
        supervised.ready()
        assert len(supervised.templates()) == 2
        line = supervised.event("victim.surroundings")
        assert "ONLY_HERE" in line["environment"]
        for name in ("a-1", "b-1"):
            pid = supervised.worker_pids()[name]
            assert b"ONLY_HERE" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert supervised.stop() == 0


# --- what a fork does not survive ----------------------------------------------------------------


def test_a_thread_that_has_been_joined_may_take_a_moment_to_end(tmp_path):
    """The kernel has it a little longer than Python: nobody's imports are paid for again for that."""
    leaving = (
        AT_IMPORT["good"] + "import _thread, time\n_thread.start_new_thread(time.sleep, (0.02,))"
    )
    with Supervised(
        tmp_path, group("a", "leaving:run"), modules={"leaving": leaving}
    ) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    assert not supervised.events("template.tainted")


def test_threads_and_sockets_at_import_are_named_and_their_workers_run(tmp_path):
    """A warning names the entry point and what it has started; its workers import it themselves."""
    bad = ("with_thread", "with_socket", "with_zmq")
    config = "".join(group(name, f"{name}:run", count=2) for name in bad) + group(
        "good", "good:run"
    )
    with Supervised(tmp_path, config, modules=AT_IMPORT) as supervised:
        supervised.ready()
        assert len(supervised.templates()) == 1
        (template,) = supervised.templates()
        assert len(os.listdir(f"/proc/{template}/task")) == 1
        assert supervised.status()["groups"]["with_thread"]["ready"] == 2
        # One that comes later imports for itself, too.
        os.kill(supervised.worker_pids()["with_thread-1"], signal.SIGKILL)
        supervised.event("worker.ready", worker="with_thread-3")
        pid = supervised.worker_pids()["with_thread-3"]
        threads = {
            (Path(f"/proc/{pid}/task/{task}/comm")).read_text().strip()
            for task in os.listdir(f"/proc/{pid}/task")
        }
        assert len(os.listdir(f"/proc/{pid}/task")) >= 3, threads  # main, link, poller
        assert supervised.stop() == 0
    tainted = {
        line["entry_point"]: line["found"]
        for line in supervised.events("template.tainted", level="warning")
    }
    assert sorted(tainted) == ["with_socket:run", "with_thread:run", "with_zmq:run"]
    assert tainted["with_thread:run"] == ["thread poller"]
    assert re.fullmatch(r"socket on descriptor \d+", tainted["with_socket:run"][0])
    assert any("native code" in found for found in tainted["with_zmq:run"])
    assert len(supervised.events("template.tainted")) == 3
    assert not supervised.events("template.died")


def test_what_an_import_writes_to_the_templates_socket_is_dropped(tmp_path):
    """Bytes that are no message are logged, and hurt neither the supervisor nor the group."""
    with Supervised(tmp_path, group("odd", "writes:run"), modules=AT_IMPORT) as supervised:
        supervised.ready()
        (line,) = supervised.events("template.unclear", level="warning")
        assert "what is des" in line["error"]
        assert supervised.stop() == 0


# --- its death -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigkill_of_the_template_in_a_storm_of_restarts_loses_no_worker(tmp_path):
    """Whatever it was doing when it died: no worker is lost, doubled or orphaned."""
    count = 8
    with Supervised(tmp_path, group("idle", "idle", count=count, **STORM)) as supervised:
        supervised.ready()
        dead_templates = 0
        for round_ in range(60):
            living = supervised.worker_pids()
            for pid in list(living.values())[: 1 + round_ % count]:
                _kill(pid)
            if round_ % 3 == 0:
                for template in supervised.templates():
                    dead_templates += _kill(template)
            supervised.event("worker.ready", count=count + round_ + 1)
        wait_until(lambda: _is_complete(supervised, count), "the group is complete again")

        pids = supervised.worker_pids()
        spawned = [line["worker"] for line in supervised.events("worker.spawned")]
        exited = [line["worker"] for line in supervised.events("worker.exited")]
        assert len(spawned) == len(set(spawned))
        assert len(exited) == len(set(exited))
        assert len(spawned) - len(exited) == count == len(pids)
        # Nobody runs whom the supervisor does not know: session, children and books agree.
        wait_until(
            lambda: _strangers(supervised) == {},
            f"only its workers and its template are left; {_strangers(supervised)}",
        )
        assert len(supervised.templates()) == 1
        assert dead_templates >= 5
        assert supervised.status()["groups"]["idle"]["ready"] == count
        assert supervised.stop() == 0
    assert supervised.events("supervisor.stopped")[0]["drained"] == count


def _strangers(supervised: Supervised) -> dict[int, str]:
    """Return who is in the supervisor's session or its child, and is no worker and no template."""
    known = {supervised.pid, *supervised.worker_pids().values(), *supervised.templates()}
    everybody = {*supervised.processes(), *children(supervised.pid)}
    return {pid: title(pid) or "a zombie" for pid in everybody - known}


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def _is_complete(supervised: Supervised, count: int) -> bool:
    pids = supervised.worker_pids()
    ready = {line["worker"] for line in supervised.events("worker.ready")}
    return len(pids) == count and set(pids) <= ready and all(map(is_alive, pids.values()))


@pytest.mark.slow
def test_a_hundred_restarts_cost_no_descriptor(tmp_path):
    """Supervisor and template hold after 100 restarts what they held before."""
    count = 4
    with Supervised(tmp_path, group("idle", "idle", count=count, **STORM)) as supervised:
        supervised.ready()
        (template,) = supervised.templates()

        def held() -> list[list[str]]:
            return [
                sorted(re.sub(r"\d+", "N", what) for what in descriptors(pid).values())
                for pid in (supervised.pid, template)
            ]

        wait_until(lambda: _is_complete(supervised, count), "it is complete")
        before = held()
        for round_ in range(1, 26):
            for pid in supervised.worker_pids().values():
                _kill(pid)
            supervised.event("worker.ready", count=count * (round_ + 1))
        wait_until(lambda: held() == before, f"as before: {before}")
        assert len(supervised.events("worker.exited")) == 100
        assert supervised.stop() == 0


def test_a_template_that_stopped_is_given_up(tmp_path):
    """One that is alive and does nothing (SIGSTOP) is killed after ready_timeout, and replaced."""
    # Long enough for a template to boot on a machine that is busy.
    config = group("idle", "idle", count=2, ready_timeout="3s", **STORM)
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        (template,) = supervised.templates()
        os.kill(template, signal.SIGSTOP)
        wait_until(lambda: state(template) == "T", "it is stopped")
        os.kill(supervised.worker_pids()["idle-1"], signal.SIGKILL)
        supervised.event("template.died", pid=template, how="SIGKILL")
        wait_until(lambda: _is_complete(supervised, 2), "the group is complete again")
        assert supervised.stop() == 0
    why = [line["error"] for line in supervised.events("worker.not_spawned")]
    assert any("its template was stopped (SIGSTOP" in error for error in why)


def test_an_import_that_takes_too_long_for_some_goes_on_for_the_others(tmp_path):
    """Who has less time fails and is told why; nobody else does. One that nobody has time for ends."""
    # One try each: the next one would end a template that has loaded and is slow to fork.
    config = group("hasty", "slow:run", ready_timeout="50ms", max_restarts=0)
    config += group("patient", "slow:run")
    config += group("alone", "hangs:run", ready_timeout="100ms", max_restarts=0).replace(
        'run = "hangs:run"', 'run = "hangs:run"\nenv = { ANOTHER = "1" }'
    )
    slow = "import time\ntime.sleep(1.5)\n" + AT_IMPORT["good"]
    hangs = "import time, os\n" + 'if "ANOTHER" in os.environ: time.sleep(3600)\n'
    modules = {"slow": slow, "hangs": hangs + AT_IMPORT["good"]}
    with Supervised(tmp_path, config, modules=modules) as supervised:
        failed = supervised.event("group.failed", group="alone")
        hasty = supervised.event("group.failed", group="hasty")
        supervised.event("worker.ready", worker="patient-1")
        supervised.signal(signal.SIGQUIT)
        supervised.wait()
    assert (
        "alone-1 (it was not spawned within 0.1 s: its template was still imp" in failed["reason"]
    )
    assert "raise ready_timeout" in failed["reason"]
    assert not supervised.events("worker.not_spawned", group="patient")
    assert "still importing the application" in hasty["reason"]


def test_a_template_that_dies_idle_is_replaced_at_once(tmp_path):
    """The next restart finds a template that has imported already."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        supervised.ready()
        (first,) = supervised.templates()
        os.kill(first, signal.SIGTERM)
        supervised.event("template.died", pid=first, how="SIGTERM")
        wait_until(supervised.templates, "another one")
        assert len(supervised.worker_pids()) == 2
        assert supervised.stop() == 0
    assert not supervised.events("worker.not_spawned")


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import supervisor.cli, supervisor.loop, supervisor.config, workers.template", "False"),
        ("from workers import runtime; runtime.preload_entry('entries:plain', ())", "False"),
        ("from workers import runtime; runtime.preload_entry('entries:awaited', ())", "True"),
    ],
)
def test_asyncio_is_only_imported_for_who_is_async(tmp_path, program, printed):
    """It is 7 MB. Who has `async def run` has it from the template, who has not does without."""
    (tmp_path / "entries.py").write_text(
        "def plain(worker): ...\nasync def awaited(worker): ...\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print('asyncio' in sys.modules)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == printed


def test_a_logger_can_be_awaited():
    """structlog's own loggers find asyncio although it was not imported along with them."""
    program = (
        "from supervisor import log; log.configure('json', 'info'); import asyncio\n"
        "asyncio.run(log.get_logger().ainfo('awaited', line=1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr)["event"] == "awaited"
