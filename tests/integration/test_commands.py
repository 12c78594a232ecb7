"""The command line against a real supervisor: what it prints, how it ends, what it never does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.supervised import (
    REPO,
    SUPERVISOR,
    Supervised,
    group,
    is_alive,
    wait_until,
)

FLEET = group("plain", "idle", count=2) + group("busy", "endless") + group("none", "idle", count=0)
LIFE = ["worker.spawned", "worker.ready"]
STOP = ["worker.cancelled", "worker.acknowledged", "worker.drained", "worker.exited"]
JOBS = [sys.executable, "-m", "workers.jobs", "counts"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Give one running supervisor to all tests that only look at it."""
    with Supervised(tmp_path_factory.mktemp("fleet"), FLEET, supervisor='grace = "2s"') as fleet:
        fleet.ready()
        yield fleet


def run(*words: str, through: str = 'exec "$@"', **options) -> subprocess.CompletedProcess[str]:
    """Run `supervisor WORDS…` by way of a shell."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", through, "sh", *SUPERVISOR, *words],
        capture_output=True,
        text=True,
        timeout=30.0,
        check=False,
        **{"cwd": REPO, **options},
    )


# --- status --------------------------------------------------------------------------------------


def test_status_for_programs_has_the_promised_shape(fleet):
    """Every key of INTERFACE.md is there, with what is true of this fleet."""
    status = fleet.status()
    assert {key: status[key] for key in ("name", "pid", "state", "generation", "budgets")} == {
        "name": "test",
        "pid": fleet.pid,
        "state": "ready",
        "generation": 1,
        "budgets": {},
    }
    assert status["started"] <= fleet.events("worker.spawned")[0]["time"]
    shapes = {
        name: [found[key] for key in ("count", "ready", "state", "restarts")]
        for name, found in status["groups"].items()
    }
    assert shapes == {
        "plain": [2, 2, "ready", 0],
        "busy": [1, 1, "ready", 0],
        "none": [0, 0, "ready", 0],
    }
    workers = {worker["id"]: worker for worker in status["workers"]}
    assert {name: worker["pid"] for name, worker in workers.items()} == fleet.worker_pids()
    for name, worker in workers.items():
        assert worker["group"] == name.partition("-")[0]
        assert (worker["generation"], worker["state"], worker["ready"]) == (1, "ready", True)
        assert (worker["jobs_done"], worker["restarts"]) == (0, 0)
        assert worker["in_flight"] == (worker["group"] == "busy")
        assert 0 < worker["uptime_seconds"] < 600
        assert worker["rss_bytes"] > 1 << 20
        assert worker["pools"] == {}


def test_status_for_eyes_is_a_table(fleet):
    """Head, groups, workers: a line each, and nothing on standard error."""
    done = fleet.command("status")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rest = done.stdout.splitlines()
    assert head.startswith("test  ready  generation 1")
    assert str(fleet.pid) in head
    lines = [line.split() for line in rest if line]
    assert ["plain", "ready", "2/2", "0"] in lines
    for worker, pid in fleet.worker_pids().items():
        (line,) = [line for line in lines if line[:1] == [worker]]
        assert line[1:3] == ["ready", str(pid)]


def test_status_shows_a_worker_that_cannot_answer(tmp_path):
    """Who holds the interpreter lock, or is stopped, delays the table by a moment only."""
    with Supervised(tmp_path, group("holder", "lock_holder", {"after": 0.1})) as supervised:
        supervised.ready()
        supervised.event("victim.holding")
        (worker,) = supervised.status()["workers"]
        assert (worker["id"], worker["state"]) == ("holder-1", "ready")
        supervised.signal(signal.SIGQUIT)
        assert supervised.wait() == 1


def test_status_in_the_stop_names_who_is_outstanding(tmp_path):
    """The state, what is left of the grace, and who has not drained yet."""
    config = group("deaf", "deaf") + group("idle", "idle")
    with Supervised(tmp_path, config, supervisor='grace = "60s"') as supervised:
        supervised.ready()
        supervised.signal(signal.SIGTERM)
        supervised.event("worker.exited", worker="idle-1")
        status = supervised.status()
        assert status["state"] == "stopping"
        assert status["outstanding"] == ["deaf-1"]
        assert 0 < status["deadline_in_seconds"] <= 60
        assert [worker["state"] for worker in status["workers"]] == ["draining"]
        table = supervised.command("status").stdout
        assert "1 outstanding" in table
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 1


def test_sigusr1_and_sigusr2_write_to_the_log(tmp_path):
    """SIGUSR1 the status, SIGUSR2 the stacks of every worker; nobody is hurt by either."""
    config = group("idle", "idle") + group("deaf", "deaf")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        supervised.signal(signal.SIGUSR1)
        status = supervised.event("supervisor.status")
        assert status["groups"]["idle"]["ready"] == 1
        supervised.signal(signal.SIGUSR2)
        assert "_spin_for_ever" in supervised.event("worker.stacks", worker="deaf-1")["stacks"]
        assert "in idle" in supervised.event("worker.stacks", worker="idle-1")["stacks"]
        assert supervised.status()["groups"]["idle"]["ready"] == 1
        supervised.signal(signal.SIGQUIT)
        assert supervised.wait() == 1
    assert len(supervised.events("worker.spawned")) == 2


# --- events --------------------------------------------------------------------------------------


def test_events_prints_what_has_happened_and_ends(fleet):
    """One JSON object a line, the same as in the log, oldest first."""
    done = fleet.command("events")
    assert (done.returncode, done.stderr) == (0, "")
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    logged = [
        {key: value for key, value in line.items() if key != "level"}
        for line in fleet.lines()
        if line["event"].partition(".")[0] in {"supervisor", "worker"}
    ]
    assert printed == logged
    assert sorted(line["event"] for line in printed) == sorted(["supervisor.ready", *LIFE * 3])


@pytest.mark.slow
def test_followers_get_everything_up_to_the_end(tmp_path):
    """Two that read, one that does not until all is over: each has every event, and ends with 0."""
    config = group("idle", "idle", count=3, max_restarts=1000, backoff="1ms", backoff_max="1ms")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        followers = [
            subprocess.Popen(
                supervised.words("events", "--follow"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=REPO,
            )
            for _ in range(2)
        ]
        # More than a pipe holds: this one cannot go on before somebody reads.
        slow = subprocess.Popen(
            supervised.words("events", "--follow"), stdout=subprocess.PIPE, cwd=REPO
        )
        assert slow.stdout is not None
        slow.stdout.read(1)
        for count in range(1, 151):
            os.kill(next(iter(supervised.worker_pids().values())), signal.SIGKILL)
            supervised.event("worker.ready", count=3 + count)
        assert supervised.stop() == 0

        logged = [
            {key: value for key, value in line.items() if key != "level"}
            for line in supervised.lines()
            if line["event"].partition(".")[0] in {"supervisor", "worker"}
        ]
        assert logged[-1]["event"] == "supervisor.stopped"
        for follower in followers:
            out, err = follower.communicate(timeout=30.0)
            assert (follower.returncode, err) == (0, b"")
            assert [json.loads(line) for line in out.splitlines()] == logged
        late = b"{" + slow.stdout.read()
        assert slow.wait(30.0) == 0
        slow.stdout.close()
        assert [json.loads(line) for line in late.splitlines()] == logged
    assert len(logged) > 460


def test_a_follower_that_stood_still_finds_everything_when_it_goes_on(tmp_path):
    """Also when the supervisor has ended meanwhile: what it was sent counts, not who is first."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        supervised.ready()
        follower = subprocess.Popen(
            supervised.words("events", "--follow"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        assert follower.stdout is not None
        first = follower.stdout.readline()
        follower.send_signal(signal.SIGSTOP)
        assert supervised.stop() == 0
        follower.send_signal(signal.SIGCONT)
        with follower:  # not communicate(): it does not know what readline has read ahead
            out = follower.stdout.read()
            assert follower.stderr is not None
            assert follower.stderr.read() == ""
        assert follower.returncode == 0
    names = [json.loads(line)["event"] for line in (first + out).splitlines()]
    assert sorted(names[:5]) == sorted(["supervisor.ready", *LIFE * 2])
    assert names[5] == "supervisor.stopping"
    assert sorted(names[6:14]) == sorted(STOP * 2)
    assert names[14:] == ["supervisor.stopped"]


def test_a_follower_is_told_when_the_supervisor_dies(tmp_path):
    """Without a last event there is no good end: 69 and one sentence."""
    with Supervised(tmp_path, group("idle", "idle")) as supervised:
        supervised.ready()
        follower = subprocess.Popen(
            supervised.words("events", "--follow"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        assert follower.stdout is not None
        follower.stdout.readline()
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        _, err = follower.communicate(timeout=30.0)
        assert follower.returncode == 69
        assert len(err.splitlines()) == 1
        assert "has died" in err
        wait_until(lambda: not supervised.processes(), "nothing is left")


def test_ctrl_c_ends_a_follower_without_a_traceback(fleet):
    """It is how a person ends it."""
    follower = subprocess.Popen(
        fleet.words("events", "--follow"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    assert follower.stdout is not None
    follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30.0)
    assert follower.returncode == -signal.SIGINT
    assert err == ""


# --- stop ----------------------------------------------------------------------------------------


def test_stop_returns_when_the_supervisor_has_gone(tmp_path):
    """Who is busy may finish first; when the command returns, nobody runs any more."""
    with Supervised(
        tmp_path, group("busy", "busy", {"seconds": 0.5}), supervisor='grace = "30s"'
    ) as supervised:
        supervised.ready()
        done = supervised.command("stop")
        assert not is_alive(supervised.pid)
        assert not supervised.processes()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert supervised.wait() == 0
    assert supervised.events("victim.finished")
    assert supervised.events("supervisor.stopping")[0]["cause"] == "supervisor stop"


@pytest.mark.parametrize("words", [["--grace", "1s"], ["--now"]])
def test_stop_with_another_grace(tmp_path, words):
    """--grace replaces the configured one, --now leaves next to none."""
    with Supervised(tmp_path, group("deaf", "deaf"), supervisor='grace = "300s"') as supervised:
        supervised.ready()
        began = time.monotonic()
        done = supervised.command("stop", *words)
        assert (done.returncode, done.stderr) == (0, "")
        if words != ["--now"]:
            assert time.monotonic() >= began + 1.0
        assert supervised.wait() == 1
    (killed,) = supervised.events("worker.killed")
    assert "_spin_for_ever" in killed["stacks"]


def test_stop_shows_a_person_who_is_outstanding_and_how_it_ended(tmp_path):
    """On a terminal there is a line of progress, and a summary with the name of who was killed."""
    config = group("idle", "idle") + group("busy", "deaf")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        supervised.ready()
        ours, theirs = os.openpty()
        stop = subprocess.Popen(supervised.words("stop"), stderr=theirs, stdout=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
        assert stop.wait(30.0) == 0
        assert supervised.wait() == 1
    assert b"outstanding: busy-1" in shown
    assert b"stopped: 2 workers, 1 drained, killed: busy-1\r\n" in shown


def test_stopping_twice_hurries_nobody(tmp_path):
    """A second `stop` waits for the same end; only --now and the signals hurry it."""
    with Supervised(
        tmp_path, group("busy", "busy", {"seconds": 2.0}), supervisor='grace = "30s"'
    ) as supervised:
        supervised.ready()
        stops = [subprocess.Popen(supervised.words("stop"), cwd=REPO) for _ in range(2)]
        assert [stop.wait(30.0) for stop in stops] == [0, 0]
        assert supervised.wait() == 0
    assert supervised.events("victim.finished")


# --- why -----------------------------------------------------------------------------------------


def test_why_tells_the_story_of_a_worker_that_is_gone(tmp_path):
    """A kill from outside, the life of the one that came after it, and who never was."""
    with Supervised(tmp_path, group("idle", "idle")) as supervised:
        supervised.ready()
        os.kill(supervised.worker_pids()["idle-1"], signal.SIGKILL)
        supervised.event("worker.ready", worker="idle-2")
        gone = supervised.command("why", "idle-1").stdout.splitlines()
        assert gone[0].startswith("idle-1 of group idle, generation 1, ")
        assert gone[1].endswith(f"was spawned, pid {supervised.event('worker.spawned')['pid']}")
        assert gone[-1] == ("In short: idle-1 was killed by somebody else, by SIGKILL.")
        assert "In short: idle-2 is there" in supervised.command("why", "idle-2").stdout
        nobody = supervised.command("why", "idle-9")
        assert (nobody.returncode, nobody.stdout) == (2, "")
        assert "no event names 'idle-9'" in nobody.stderr
        assert supervised.stop() == 0


def test_what_a_worker_says_cannot_steer_the_terminal(tmp_path):
    """An exception's text with escape sequences is printed without them."""
    code = "def run(worker):\n    worker.ready()\n    raise ValueError('\\x1b]0;owned\\x07 \\x1b[2J')\n"
    config = '[workers.bad]\nrun = "bad:run"\nrestart = "never"\n'
    with Supervised(tmp_path, config, modules={"bad": code}) as supervised:
        supervised.event("worker.exited")
        told = supervised.command("why", "bad-1").stdout
        assert "owned" in told
        assert not {"\x1b", "\x07"} & set(told)


# --- a user's mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "Usage"),
        (["nonsense"], 2, "No such command"),
        (["status"], 2, "--config"),
        (["start"], 2, "--config"),
        (["status", "-c", "{config}", "more"], 2, "unexpected extra argument"),
        (["status", "-c", "{config}", "--jsn"], 2, "--json"),
        (["stop", "-c", "{config}", "--grace", "soon"], 2, "--grace"),
        (["stop", "-c", "{config}", "--grace", "-1s"], 2, "--grace"),
        (["stop", "-c", "{config}", "--grace", "1s", "--now"], 2, "--now"),
        (["start", "-c", "no/such.toml"], 78, "no such file"),
        (["status", "-c", "no/such.toml"], 78, "no such file"),
        (["check", "-c", "."], 78, "directory"),
        (["status", "-c", "{config}"], 69, "supervisor start"),
        (["events", "-c", "{config}"], 69, "supervisor start"),
        (["events", "--follow", "-c", "{config}"], 69, "supervisor start"),
        (["stop", "-c", "{config}"], 69, "supervisor start"),
        (["why", "-c", "{config}"], 2, "WORKER"),
        (["why", "-c", "{config}", "idle-1"], 69, "supervisor start"),
    ],
)
def test_a_mistake_ends_with_its_code_and_a_sentence(tmp_path, words, code, said):
    """Nothing on standard output, never a traceback, and the code that INTERFACE.md promises."""
    supervised = Supervised(tmp_path, group("idle", "idle"))
    done = run(*(word.format(config=supervised.config) for word in words))
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25


# Also root is somebody who may not read a file, once its right to read all of them is gone.
POWERLESS = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.parametrize(
    "command", [[*SUPERVISOR, "check"], [*SUPERVISOR, "start"], [*SUPERVISOR, "status"], JOBS]
)
def test_a_file_without_permission_is_a_wrong_configuration(tmp_path, command):
    """78 as INTERFACE.md promises, or a unit's RestartPreventExitStatus=78 would go for nothing."""
    config = tmp_path / "test.toml"
    config.write_text(group("jobs", "workers.jobs:run"), encoding="utf-8")
    config.chmod(0)
    done = subprocess.run(
        [*POWERLESS, *command, "-c", str(config)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        timeout=30.0,
    )
    assert done.returncode == 78, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"{config}: cannot be read: permission denied")


COMMANDS = ("check", "start", "status", "events", "why", "reload", "restart", "scale", "stop")


def test_help_everywhere(tmp_path):
    """Every command explains itself, and starts nothing."""
    for words in ([], *([word] for word in COMMANDS)):
        done = run(*words, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: " in done.stdout


def test_another_users_supervisor_is_out_of_reach(tmp_path):
    """Who may not enter its folder is told so, with 69."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv to become somebody else")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        with Supervised(folder, group("idle", "idle")) as supervised:
            supervised.ready()
            words = supervised.words("status")
            probe = [*nobody, words[0], "-c", "import supervisor.client"]
            if subprocess.run(probe, check=False, capture_output=True, cwd=REPO).returncode != 0:
                pytest.skip("this checkout or its interpreter is not for everybody")
            done = subprocess.run(
                [*nobody, *words], capture_output=True, text=True, check=False, cwd=REPO
            )
            assert done.returncode == 69
            assert len(done.stderr.splitlines()) == 1
            assert "same user" in done.stderr
            assert supervised.stop() == 0
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_supervisor_that_stands_still_does_not_hang_its_commands(tmp_path):
    """After some seconds each says that it does not answer, with 69; later it answers again."""
    with Supervised(tmp_path, group("idle", "idle")) as supervised:
        supervised.ready()
        supervised.signal(signal.SIGSTOP)
        commands = [
            subprocess.Popen(supervised.words(*words), stderr=subprocess.PIPE, text=True, cwd=REPO)
            for words in (["status"], ["events"], ["events", "--follow"], ["stop"])
        ]
        for command in commands:
            _, err = command.communicate(timeout=60.0)
            assert command.returncode == 69
            assert len(err.splitlines()) == 1
            assert "does not answer" in err
            assert f"kill -CONT {supervised.pid}" in err
        supervised.signal(signal.SIGCONT)
        assert supervised.status()["state"] == "ready"  # what was given up does not happen later
        assert supervised.stop() == 0


# --- its output ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "through",
    [
        '"$@" | head -1 >/dev/null',
        '"$@" | true',
        '"$@" >&-',
        '"$@" <&-',
        '"$@" >/dev/null 2>&-',
    ],
)
@pytest.mark.parametrize("words", [["events"], ["status"]])
def test_output_that_nobody_reads_is_no_error(fleet, words, through):
    """A reader that has gone, and streams that are closed, are no reason for a traceback."""
    done = run(words[0], "-c", str(fleet.config), *words[1:], through=through)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["events"], ["status"], ["status", "--json"], ["check"]])
def test_output_that_cannot_be_written_is_an_error_with_a_sentence(fleet, words):
    """A full disk: exit code 1."""
    done = run(words[0], "-c", str(fleet.config), *words[1:], through='"$@" >/dev/full')
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line


@pytest.mark.parametrize("words", [["--help"], ["status", "--help"], ["--version"]])
@pytest.mark.parametrize(("through", "code"), [('"$@" >/dev/full', 1), ('"$@" >&-', 0)])
def test_help_that_cannot_be_written_is_a_sentence_at_most(words, through, code):
    """What click itself writes is no exception."""
    done = run(*words, through=through)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == code


def test_workers_are_offered_while_their_supervisor_answers(fleet):
    """Beside the groups, to who presses Tab."""
    from supervisor.completion import workers

    ids = {worker["id"] for worker in fleet.status()["workers"]}
    assert ids
    assert set(workers(fleet.config)) == ids


def test_dump_of_who_has_gone_names_where_its_story_is(tmp_path):
    """Not "there is no such worker": there was one."""
    code = "def run(worker):\n    worker.ready()\n"
    config = '[workers.brief]\nrun = "brief:run"\nrestart = "never"\n'
    with Supervised(tmp_path, config, modules={"brief": code}) as supervised:
        supervised.event("worker.exited")
        done = supervised.command("dump", "brief-1")
        assert done.returncode == 2
        assert "brief-1 has gone; `supervisor why brief-1` tells how it ended" in done.stderr


def test_commands_work_from_anywhere(fleet):
    """Paths in the file are relative to the file, not to where the command is run."""
    done = run("status", "-c", str(fleet.config), cwd="/")
    assert done.returncode == 0
    relative = os.path.relpath(fleet.config, "/usr")
    assert run("status", "-c", relative, cwd="/usr").returncode == 0
    assert stat.S_ISSOCK((fleet.runtime_dir / "control.sock").stat().st_mode)
