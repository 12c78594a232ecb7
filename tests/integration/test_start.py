"""A start with real processes: what comes when, and what it makes of a hostile environment."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.supervised import (
    REPO,
    Supervised,
    descriptors,
    group,
    is_alive,
    wait_until,
)
from tests.victims import AT_IMPORT


def through(script: str) -> list[str]:
    """Return what runs a shell script, which ends in `exec "$@"`, before the supervisor."""
    return ["sh", "-c", script, "sh"]


def test_each_worker_is_spawned_then_ready_and_then_the_supervisor_is(tmp_path):
    """Every worker of every group comes up once, under a name of its own."""
    config = group("plain", "idle", count=3) + group("aio", "idle_async", count=2)
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        names = [line["event"] for line in supervised.lines()]
        pids = supervised.worker_pids()
        assert supervised.stop() == 0
    assert sorted(pids) == ["aio-1", "aio-2", "plain-1", "plain-2", "plain-3"]
    assert len(set(pids.values())) == 5
    assert sorted(names[:-1]) == ["worker.ready"] * 5 + ["worker.spawned"] * 5
    assert names[-1] == "supervisor.ready"
    for worker, pid in pids.items():
        assert supervised.life(worker)[:2] == ["spawned", "ready"]
        assert {line["pid"] for line in supervised.events(worker=worker) if "pid" in line} == {pid}
        assert {line["group"] for line in supervised.events(worker=worker)} == {
            worker.partition("-")[0]
        }
    for line in supervised.lines():
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["time"])


@pytest.mark.parametrize("on_path", [True, False])
def test_a_person_is_told_what_to_try_next(tmp_path, on_path):
    """With the console format, the greeting holds commands that can be copied and work."""
    home = Path(sys.executable).parent
    if not (home / "supervisor").exists():
        pytest.skip("the command is not installed here")
    folder = tmp_path / "a b"  # short: it is part of a socket's path
    folder.mkdir()
    env = {"PATH": f"{home}:/usr/bin:/bin" if on_path else "/usr/bin:/bin"}
    with Supervised(folder, group("idle", "idle"), log_format="console", env=env) as supervised:
        wait_until(lambda: "supervisor events --follow" in supervised.text(), "the greeting")
        (command,) = re.findall(
            r"^ *(\S*supervisor status [^#]*?) +#", supervised.text(), re.MULTILINE
        )
        assert command.startswith("supervisor") is on_path
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, cwd=REPO, check=False, env=env
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert supervised.stop() == 0


# --- one supervisor of a name --------------------------------------------------------------------


def test_a_second_supervisor_of_the_same_name_refuses(tmp_path):
    """It says so in one sentence and ends with 69; the first one does not notice."""
    with Supervised(tmp_path, group("idle", "idle")) as first:
        first.ready()
        second = first.command("start")
        assert second.returncode == 69
        assert second.stdout == ""
        (sentence,) = second.stderr.splitlines()
        assert "already runs" in sentence
        assert str(first.pid) in sentence
        assert first.status()["groups"]["idle"]["ready"] == 1
        assert first.stop() == 0
    assert len(first.events("worker.spawned")) == 1


def test_a_start_beside_stale_sockets_works(tmp_path):
    """What a killed supervisor has left in the folder stops nobody."""
    with Supervised(tmp_path, group("idle", "idle")) as supervised:
        supervised.ready()
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        assert {"control.sock", "lock", "workers.sock"} <= set(os.listdir(supervised.runtime_dir))
        supervised.start()
        supervised.event("supervisor.ready", count=2)
        assert supervised.status()["pid"] == supervised.pid
        assert supervised.stop() == 0
        wait_until(lambda: not supervised.processes(), "the first one's workers have gone, too")
    assert os.listdir(supervised.runtime_dir) == ["lock"]


# --- wrong from the beginning --------------------------------------------------------------------


def test_a_wrong_configuration_starts_nothing(tmp_path):
    """78, every problem on a line of its own, and the template launched in advance is gone."""
    with Supervised(tmp_path, group("idle", "idle", cuont=2, max_restarts=-1)) as supervised:
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    lines = supervised.text().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("supervisor: ") for line in lines)
    assert 'did you mean "count"?' in lines[0]


def test_a_folder_that_somebody_else_may_write_to_is_refused(tmp_path):
    """Where others may have planted something, no lock and no socket is made."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    supervised.runtime_dir.mkdir()
    supervised.runtime_dir.chmod(0o777)
    with supervised:
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    assert "runtime_dir" in supervised.text()
    assert "chmod 700" in supervised.text()
    assert os.listdir(supervised.runtime_dir) == []
    assert stat.S_IMODE(supervised.runtime_dir.stat().st_mode) == 0o777


@pytest.mark.parametrize("mode", [0o1777, 0o777])
def test_nobody_is_told_to_take_a_folder_away_from_others(tmp_path, mode):
    """`runtime_dir = "/tmp"`: what others use is not to be made private, by hand neither."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    supervised.runtime_dir.mkdir()
    if mode == 0o777:
        (supervised.runtime_dir / "theirs").touch()
    supervised.runtime_dir.chmod(mode)
    with supervised:
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    assert "chmod" not in supervised.text()
    assert "name a folder of its own" in supervised.text()


def test_a_folder_that_others_may_only_read_is_made_private(tmp_path):
    """systemd makes RuntimeDirectory with 0755: nobody can have planted anything there."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    supervised.runtime_dir.mkdir(mode=0o755)
    with supervised:
        supervised.ready()
        assert stat.S_IMODE(supervised.runtime_dir.stat().st_mode) == 0o700
        assert supervised.stop() == 0


def test_a_folder_with_other_things_in_it_is_not_made_private(tmp_path):
    """`runtime_dir = "/run"` must not lock everybody else out of /run."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    supervised.runtime_dir.mkdir(mode=0o755)
    (supervised.runtime_dir / "sshd.pid").touch()
    with supervised:
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    assert "sshd.pid" in supervised.text()
    assert stat.S_IMODE(supervised.runtime_dir.stat().st_mode) == 0o755


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """The pid is never written into a file that a link in the folder points to."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    supervised.runtime_dir.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (supervised.runtime_dir / "lock").symlink_to(precious)
    with supervised:
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    assert precious.read_text() == "keep me"


@pytest.mark.parametrize("kind", ["file", "of another user", "link to another user's"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, kind):
    """78 with one sentence that names the folder."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    if kind == "file":
        supervised.runtime_dir.touch()
    elif os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    elif kind == "of another user":
        supervised.runtime_dir.mkdir(mode=0o700)
        os.chown(supervised.runtime_dir, 65534, 65534)
    else:
        (tmp_path / "target").mkdir(mode=0o700)
        supervised.runtime_dir.symlink_to("target")
        os.lchown(supervised.runtime_dir, 65534, 65534)
    with supervised:
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    (line,) = supervised.text().splitlines()
    assert line.startswith(f"supervisor: {supervised.config}: supervisor.runtime_dir: ")
    assert str(supervised.runtime_dir) in line


# --- where and how it is started -----------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        'exec "$@" <&-',
        'exec "$@" >&-',
        'exec "$@" <&- >&- 2>&-',
        'umask 777; mkdir "$GONE"; cd "$GONE"; rmdir "$GONE"; exec "$@"',
        "trap '' TERM INT HUP QUIT USR1 USR2 PIPE CHLD; umask 077; exec \"$@\"",
        'exec env -i PYTHONSAFEPATH=1 LC_ALL=C PYTHONUTF8=0 PATH=/nowhere HOME=/nowhere "$@"',
    ],
)
def test_a_hostile_start_changes_nothing(tmp_path, script):
    """Whatever its own parent has left it with, it starts, answers, works, and stops with 0."""
    supervised = Supervised(
        tmp_path,
        group("busy", "busy", {"seconds": 0.05}, count=2),
        through=through(script),
        env={"GONE": str(tmp_path / "gone")},
    )
    with supervised:
        status = supervised.status_once_ready()
        pids = [worker["pid"] for worker in status["workers"]]
        for process in (supervised.pid, *pids):
            for number in range(3):
                assert not descriptors(process).get(number, "closed").startswith("socket:")
                assert number in descriptors(process)
        assert supervised.stop() == 0
        assert not any(map(is_alive, pids))


def test_too_few_descriptors_are_told_before_anything_is_started(tmp_path):
    """A limit that cannot hold the fleet: one sentence with both numbers, and nothing spawned."""
    with Supervised(
        tmp_path, group("idle", "idle", count=100), through=through('ulimit -n 64; exec "$@"')
    ) as supervised:
        assert supervised.wait() == 1
        wait_until(lambda: not supervised.processes(), "the template launched in advance has gone")
    (line,) = supervised.text().splitlines()
    assert "64" in line
    assert "101 workers, those of a roll included" in line


def test_a_low_soft_limit_is_raised_for_the_supervisor_and_kept_for_workers(tmp_path):
    """The usual soft limit does not hold hundreds of workers; what they see of it is unchanged."""
    with Supervised(
        tmp_path, group("idle", "idle", count=20), through=through('ulimit -S -n 60; exec "$@"')
    ) as supervised:
        supervised.ready()
        soft, hard = resource.prlimit(supervised.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        assert hard > 60
        (template,) = supervised.templates()
        os.kill(template, signal.SIGKILL)
        supervised.event("template.died")
        os.kill(supervised.worker_pids()["idle-1"], signal.SIGKILL)
        supervised.event("worker.ready", worker="idle-21")  # forked by the second template
        for pid in supervised.worker_pids().values():
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (60, hard)
        assert supervised.stop() == 0


# --- a log that nobody reads ---------------------------------------------------------------------


def closed_pipe() -> int:
    """Return the writing end of a pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("output", ["a pipe without reader", "a full disk"])
def test_a_log_that_cannot_be_written_stops_nobody(tmp_path, output, log_format):
    """Supervisor and workers go on without it: the work counts, not the words about it."""
    config = group("busy", "busy", {"seconds": 0.1}, count=2, backoff="1ms")
    supervised = Supervised(tmp_path, config, log_format=log_format)
    full = os.open("/dev/full", os.O_WRONLY) if output == "a full disk" else closed_pipe()
    try:
        with supervised.start(output=full):
            first = {worker["pid"] for worker in supervised.status_once_ready()["workers"]}
            os.kill(min(first), signal.SIGKILL)
            wait_until(lambda: not is_alive(min(first)), "it is gone")
            status = wait_until(
                lambda: (now := supervised.status())["groups"]["busy"]["ready"] == 2 and now,
                "it is replaced",
            )
            assert max(first) in {worker["pid"] for worker in status["workers"]}
            assert supervised.stop() == 0
            assert not supervised.processes()
    finally:
        os.close(full)


# --- killed while it starts ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_at_any_moment_of_its_start_it_leaves_nothing(tmp_path, number):
    """Between its first instruction and the last worker's ready: nothing is left, nothing moans."""
    supervised = Supervised(tmp_path, group("idle", "idle", count=4), supervisor='grace = "1s"')
    supervised.start()
    with supervised:
        supervised.ready()
        supervised.stop()
        took = _seconds_to_ready(supervised)
        for step in range(8):
            supervised.start()
            _wait_until_the_clock_says(time.monotonic() + took * step / 7)
            supervised.signal(number)
            supervised.wait()  # with what code depends on whether it has come to life already
        wait_until(lambda: not supervised.processes(), "nothing is left")
    assert f'File "{REPO}/supervisor/cli' not in supervised.text()
    assert f'File "{REPO}/workers' not in supervised.text()


def _wait_until_the_clock_says(moment: float) -> None:
    wait_until(lambda: time.monotonic() >= moment, "some moment of the start")


def _seconds_to_ready(supervised: Supervised) -> float:
    began = time.monotonic()
    supervised.start()
    supervised.event("supervisor.ready", count=2)
    took = time.monotonic() - began
    supervised.stop()
    return took


def test_a_stop_while_the_application_is_imported_does_not_wait_for_that(tmp_path):
    """An import that takes for ever ends with the stop: nobody waits for workers never born."""
    with Supervised(
        tmp_path,
        group("slow", "slow:run"),
        modules=AT_IMPORT,
        supervisor='grace = "60s"',
    ) as supervised:
        wait_until(lambda: "importing" in supervised.text(), "it imports")
        asked = supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        assert time.monotonic() - asked < 30.0
        assert not supervised.processes()
    assert not supervised.events("worker.spawned")
    assert supervised.events("supervisor.stopped")
