"""Any program as a worker: started, heard, told to stop, rolled, killed; whatever it does."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from tests.servers import unavailable
from tests.supervised import Supervised, children, is_alive, title, wait_until

SH = ("sh", "-c")
PYTHON = (sys.executable, "-S", "-u", "-c")
# Python does not fork here: what is started is the program itself, and its children are its own.
SPEAK = """
import os, socket, sys, time
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.connect(os.environ["NOTIFY_SOCKET"])
        speaker.send(text.encode())
"""


def program(name: str, *argv: str, **keys: object) -> str:
    """Return the TOML of a group."""
    lines = [f"[workers.{name}]", f"command = {json.dumps(argv)}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if key != "env"]
    env = keys.get("env")
    if isinstance(env, dict):
        lines += [f"[workers.{name}.env]", *(f"{k} = {json.dumps(v)}" for k, v in env.items())]
    return "\n".join(lines) + "\n"


def output(supervised: Supervised, worker: str, stream: str = "stdout") -> list[str]:
    """Return what a worker's program has written."""
    return [
        line["line"] for line in supervised.events("worker.output", worker=worker, stream=stream)
    ]


def said(supervised: Supervised, worker: str, text: str) -> None:
    """Wait until a worker's program has written this line."""
    wait_until(lambda: text in output(supervised, worker), f"{worker} says {text!r}")


def script(path: Path, *lines: str) -> None:
    """Write a program."""
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)


# --- what it is given ----------------------------------------------------------------------------


def test_its_surroundings(tmp_path):
    """Its folder is the file's, it has the group's env, nothing of systemd's, three descriptors."""
    code = (
        "import json,os,signal;ignored=[s.name for s in signal.Signals if s not in (9,19)"
        " and signal.getsignal(s) is signal.SIG_IGN];print(json.dumps([os.getcwd(),dict(os.environ),"
        "sorted(os.listdir('/proc/self/fd'))[:-1],os.getpgid(0)==os.getppid(),ignored,"
        "sorted(signal.pthread_sigmask(0,()))]));import sys;print('oops',file=sys.stderr);signal.pause()"
    )
    config = program("web", *PYTHON, code, env={"MODE": "prod", "HOME": "/nowhere"})
    env = {"NOTIFY_SOCKET": "/run/systemd/notify", "WATCHDOG_USEC": "1", "LISTEN_FDS": "3"}
    with Supervised(tmp_path, config, env=env) as supervised:
        supervised.ready()
        folder, found, descriptors, in_group, ignored, mask = json.loads(_first(supervised))
        wait_until(lambda: output(supervised, "web-1", "stderr") == ["oops"], "its errors are told")
        started = supervised.event("worker.started")
        status = supervised.status()["workers"][0]
        assert supervised.stop() == 0
    assert folder == str(tmp_path)
    assert (found["MODE"], found["HOME"]) == ("prod", "/nowhere")
    assert (found["ACKVISOR_WORKER"], found["ACKVISOR_GROUP"]) == ("web-1", "web")
    assert found["PATH"] == os.environ["PATH"]
    assert not [name for name in found if name.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))]
    assert (descriptors, in_group, mask) == (["0", "1", "2"], True, [])
    assert set(ignored) <= {"SIGPIPE", "SIGXFSZ"}  # Python ignores these itself
    assert started["program_pid"] == status["program_pid"] != status["pid"]
    assert status["rss_bytes"] > 0


def _first(supervised: Supervised) -> str:
    wait_until(lambda: output(supervised, "web-1"), "it has written something")
    return output(supervised, "web-1")[0]


def test_it_can_die_of_a_broken_pipe(tmp_path):
    """Python ignores SIGPIPE; a program must not inherit that, or `yes | head` never ends."""
    with Supervised(tmp_path, program("web", *SH, "yes | head -1; echo over; sleep 60")) as it:
        said(it.ready(), "web-1", "over")
        assert it.stop() == 0


# --- notify --------------------------------------------------------------------------------------


def test_a_shell_program_says_when_it_is_ready(tmp_path):
    """Not before it says so; its status is shown; it is told to stop and says how it ends."""
    script(tmp_path / "speak", f"#!{sys.executable} -S", SPEAK + "say(sys.argv[1])")
    script(
        tmp_path / "serve",
        "#!/bin/sh",
        """
trap 'echo stopping; ./speak STOPPING=1; exit 0' TERM
./speak 'STATUS=warming up'
until test -e go; do sleep 0.02; done
./speak 'READY=1
STATUS=warm'
while :; do sleep 0.05; done
""",
    )
    config = program("web", "./serve", notify=True)
    with Supervised(tmp_path, config) as supervised:
        supervised.event("worker.started")
        wait_until(
            lambda: supervised.status()["workers"][0]["status"] == "warming up", "its status"
        )
        assert not supervised.events("worker.ready")
        (tmp_path / "go").touch()
        supervised.ready()
        wait_until(lambda: supervised.status()["workers"][0]["status"] == "warm", "it is warm")
        assert "warm" in supervised.command("status").stdout
        assert supervised.stop() == 0
        assert "stopping" in output(supervised, "web-1")
        assert not list(supervised.runtime_dir.glob("notify-*"))
    assert supervised.life("web-1") == [
        "spawned", "ready", "cancelled", "acknowledged", "drained", "exited",
    ]  # fmt: skip
    assert supervised.event("worker.exited")["code"] == 0


def test_node_says_when_it_is_ready(tmp_path):
    """A program in another language: it serves, and drains itself when it is told to."""
    if not shutil.which("node"):
        unavailable("Node is not installed")
    (tmp_path / "serve.js").write_text("""
const { execFileSync } = require("child_process");
const speak = (text) => execFileSync("./speak", [text]);
const timer = setInterval(() => {}, 1000);
process.on("SIGTERM", () => { console.log("drained"); clearInterval(timer); });
speak("READY=1\\nSTATUS=node " + process.version);
""")
    config = program("web", "node", "serve.js", notify=True)
    script(tmp_path / "speak", f"#!{sys.executable} -S", SPEAK + "say(sys.argv[1])")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        assert supervised.status()["workers"][0]["status"].startswith("node v")
        assert supervised.stop() == 0
    assert output(supervised, "web-1") == ["drained"]
    assert supervised.event("worker.exited")["code"] == 0


@pytest.mark.slow
def test_one_that_is_slow_to_start_can_ask_for_time(tmp_path):
    """EXTEND_TIMEOUT_USEC puts off `ready_timeout`; who does not ask is sent away."""
    code = SPEAK + "say(sys.argv[1]); time.sleep(5.5); say('READY=1'); time.sleep(60)"
    keys = {"notify": True, "ready_timeout": "5s", "restart": "never"}
    config = program("asks", *PYTHON, code, "EXTEND_TIMEOUT_USEC=60000000", **keys)
    config += program("mute", *PYTHON, "import time; time.sleep(60)", **keys)
    with Supervised(tmp_path, config) as supervised:
        supervised.event("worker.cancelled", worker="mute-1", cause="was not ready within 5 s")
        ready = supervised.event("worker.ready", worker="asks-1")
        assert ready["seconds"] > 5.0
        assert not supervised.events("worker.cancelled", worker="asks-1")


def test_one_whose_watchdog_falls_silent_is_a_hang(tmp_path):
    """WATCHDOG=1 gives it more time, again and again; its silence ends it, and a successor comes."""
    code = (
        SPEAK + "say('READY=1'); [(time.sleep(0.2), say('WATCHDOG=1')) for _ in range(10)];"
        "print('silent', flush=True); time.sleep(60)"
    )
    config = program("web", *PYTHON, code, notify=True, hang_timeout="1s", backoff="10ms")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        hung = supervised.event("worker.hung", worker="web-1")
        assert "silent" in output(supervised, "web-1"), "it was given more time"
        assert [job["name"] for job in hung["jobs"]] == ["watchdog"]
        assert supervised.event("worker.exited", worker="web-1")["cause"] == "hang"
        supervised.event("worker.ready", worker="web-2")
        assert supervised.stop() == 0


def test_a_program_cannot_say_who_it_is(tmp_path):
    """MAINPID is refused; a flood of nonsense on the socket changes nothing."""
    code = (
        SPEAK
        + "say('MAINPID=1')\nfor n in range(200): say('x' * 5000); say('\\0' * n)\nsay('READY=1');time.sleep(60)"
    )
    with Supervised(tmp_path, program("web", *PYTHON, code, notify=True)) as supervised:
        supervised.ready()
        supervised.event("notify.dropped", reason="MAINPID is the supervisor's business")
        assert len(supervised.events("notify.dropped")) < 20
        assert supervised.stop() == 0


# --- how it ends ---------------------------------------------------------------------------------


def test_its_end_is_the_workers(tmp_path):
    """Code and signal are the program's; a failure that nobody asked for is told with its last lines."""
    config = (
        program("code", *SH, "echo fatal: no disk; exit 7", restart="never")
        + program("signal", *SH, "kill -SEGV $$", restart="never")
        + program("fine", *SH, "echo done", restart="on-failure")
        + program("twice", *SH, "mkdir once && exit 3; exec sleep 60", restart="on-failure")
        + program("deaf", *PYTHON, "import signal as s,time;s.signal(15,s.SIG_IGN);s.signal(10,"
                  "lambda *_:__import__('os')._exit(5));print('up');time.sleep(60)", stop_signal="SIGUSR1")
    )  # fmt: skip
    with Supervised(tmp_path, config) as supervised:
        assert supervised.event("worker.exited", worker="code-1")["code"] == 7
        assert supervised.event("worker.exited", worker="signal-1")["signal"] == signal.SIGSEGV
        assert supervised.event("worker.exited", worker="fine-1")["code"] == 0
        assert supervised.event("worker.exited", worker="twice-1")["code"] == 3
        supervised.event("worker.ready", worker="twice-2")
        failed = supervised.event("worker.failed", worker="code-1")
        assert (failed["error"], failed["traceback"]) == ("sh ended with code 7", "fatal: no disk")
        assert supervised.event("worker.failed", worker="signal-1")["error"] == (
            "sh was ended by SIGSEGV"
        )
        said(supervised, "deaf-1", "up")
        assert supervised.stop() == 1  # two groups have failed for good
        assert not supervised.events("worker.spawned", worker="fine-2")
        assert not supervised.events("worker.killed")
        assert supervised.event("worker.exited", worker="deaf-1")["code"] == 5
        assert supervised.event("worker.exited", worker="twice-2")["signal"] == signal.SIGTERM


def test_one_that_ignores_the_stop_and_its_grandchildren_are_gone_at_the_deadline(tmp_path):
    """SIGKILL to the whole process group, by name; not before the deadline."""
    code = "trap '' TERM; (sleep 61 & sleep 62) & echo up; sleep 63"
    with Supervised(tmp_path, program("deaf", *SH, code), supervisor='grace = "1s"') as it:
        said(it.ready(), "deaf-1", "up")
        assert it.stop() == 1
        killed = it.event("worker.killed", worker="deaf-1")
        assert dict(killed["ladder"])["SIGKILL"] >= 1.0
        # On its way out the harness demands that no process is left.


def test_what_it_leaves_behind_goes_with_it(tmp_path):
    """A program that ends in order: its background processes are killed, and named."""
    code = "trap '' TERM; sleep 64 & (sleep 65 & ) ; trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done"
    with Supervised(tmp_path, program("shell", *SH, code)) as supervised:
        said(supervised.ready(), "shell-1", "up")
        assert supervised.stop() == 0
        leftovers = supervised.event("worker.exited")["leftovers"]
        assert sum(name.startswith("sleep (pid ") for name in leftovers) >= 2


def test_what_has_left_its_group_goes_with_it(tmp_path):
    """A daemon that a program has made is found and named, too."""
    code = "setsid sh -c 'sleep 66 & exec sleep 67' & sleep 0.3; echo up; exec sleep 68"
    with Supervised(tmp_path, program("shell", *SH, code)) as supervised:
        said(supervised.ready(), "shell-1", "up")
        assert supervised.stop() == 0
        leftovers = supervised.event("worker.exited")["leftovers"]
        assert sum(name.startswith("sleep (pid ") for name in leftovers) == 2


def test_a_stopped_program_hears_its_stop_signal(tmp_path):
    """SIGCONT comes after it."""
    with Supervised(tmp_path, program("web", "sleep", "60")) as supervised:
        supervised.ready()
        os.kill(supervised.event("worker.started")["program_pid"], signal.SIGSTOP)
        assert supervised.stop() == 0
        assert supervised.event("worker.exited")["signal"] == signal.SIGTERM


def test_it_ends_with_its_worker(tmp_path):
    """Whoever kills the worker's own process kills the program; a successor takes its place."""
    with Supervised(tmp_path, program("web", "sleep", "60")) as supervised:
        supervised.ready()
        started = supervised.event("worker.started")
        os.kill(supervised.worker_pids()["web-1"], signal.SIGKILL)
        supervised.event("worker.ready", worker="web-2")
        assert not is_alive(started["program_pid"])
        assert supervised.stop() == 0


def test_it_ends_when_everything_above_it_is_killed_at_once(tmp_path):
    """Supervisor, template and worker: nobody is left to see to it but the kernel."""
    with Supervised(tmp_path, program("web", "sleep", "60", count=3)) as supervised:
        supervised.ready()
        ours = [supervised.pid, *children(supervised.pid)]
        programs = [line["program_pid"] for line in supervised.events("worker.started")]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in ours:
                os.kill(pid, number)
        supervised.wait()
        wait_until(lambda: not any(map(is_alive, programs)), "the programs are gone")


def test_it_is_told_to_stop_when_the_supervisor_is_killed(tmp_path):
    """It gets its stop signal and the grace; who ignores it is gone by the end of that."""
    config = program("good", *SH, "trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done")
    config += program("deaf", *SH, "trap '' TERM; while :; do sleep 0.05; done")
    with Supervised(tmp_path, config, supervisor='grace = "3s"') as supervised:
        supervised.ready()
        programs = {
            line["worker"]: line["program_pid"] for line in supervised.events("worker.started")
        }
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        said(supervised, "good-1", "bye")
        wait_until(lambda: not is_alive(programs["good-1"]), "it has ended by itself")
        wait_until(lambda: not supervised.processes(), "nothing is left")
        assert not is_alive(programs["deaf-1"])


# --- what cannot be started ----------------------------------------------------------------------


def test_a_program_that_is_not_there(tmp_path):
    """`check` finds it, a start tells it in one sentence, and a reload of it is rejected."""
    (tmp_path / "text").write_text("no program\n")
    script(tmp_path / "script", "#!/no/such/interpreter")
    script(tmp_path / "nothing", "neither")
    keys = {"restart": "never"}
    config = (
        program("missing", "./no-such-program", **keys)
        + program("unknown", "no-such-program", **keys)
        + program("plain", "./text", **keys)
        + program("script", "./script", **keys)
        + program("nothing", "./nothing", **keys)
    )
    sentences = {
        "missing": f'cannot start "./no-such-program": there is no file {tmp_path}/./no-such-program',
        "unknown": 'cannot start "no-such-program": there is no such program in PATH (/bin:/usr/bin)',
        "plain": f'cannot start "./text": {tmp_path}/./text must be a file that user '
        f"{os.geteuid()} may execute",
        "script": f'cannot start "./script": the interpreter that {tmp_path}/./script names in its '
        "first line does not exist",
        "nothing": f'cannot start "./nothing": {tmp_path}/./nothing is neither a program nor a '
        "script with #! in its first line",
    }
    with Supervised(tmp_path, config, env={"PATH": "/bin:/usr/bin"}) as supervised:
        for name, sentence in sentences.items():
            failed = supervised.event("worker.failed", group=name)
            assert (failed["error"], failed["traceback"]) == (sentence, "")
        assert "Traceback" not in supervised.text()
        checked = supervised.command("check")
        assert checked.returncode == 78
        lines = checked.stderr.splitlines()
        assert len(lines) == 3
        assert "workers.missing.command: there is no file" in lines[0]
        assert 'workers.unknown.command: there is no program "no-such-program" in PATH' in lines[1]
        assert "is not executable; chmod +x it" in lines[2]
        reloaded = supervised.command("reload")
        assert reloaded.returncode == 1
        assert "workers.missing.command" in reloaded.stderr


# --- what it writes ------------------------------------------------------------------------------


def test_a_flood_harms_nobody(tmp_path):
    """A log that is flooded by one program says how much it has dropped, and others are heard."""
    config = (
        program("flood", "yes", "more and more")
        + program("long", *PYTHON, "import sys,time;w=sys.stdout.write;w('x'*10_000_000+'\\n');"
                  "w('after\\n');sys.stdout.flush();time.sleep(60)")
        + program("binary", *SH, "head -c 100000 /dev/urandom; echo; echo after; sleep 60")
        + program("closed", *SH, "exec >&- 2>&-; sleep 60")
        + program("good", *SH, "while :; do echo tick; sleep 0.1; done")
    )  # fmt: skip
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        dropped = supervised.event("worker.output_dropped", worker="flood-1")
        assert dropped["lines"] > 0
        assert dropped["bytes"] > dropped["lines"]
        said(supervised, "long-1", "after")
        (cut,) = [line for line in supervised.events("worker.output") if "cut_bytes" in line][:1]
        assert cut["cut_bytes"] == 10_000_000 - len(cut["line"])
        said(supervised, "binary-1", "after")
        said(supervised, "good-1", "tick")
        workers = {worker["id"]: worker["pid"] for worker in supervised.status()["workers"]}
        assert len(workers) == 5
        assert _peak_memory(workers["long-1"]) < 100 << 20
        assert supervised.stop() == 0
    seconds = supervised.event("worker.exited", worker="flood-1")["uptime_seconds"]
    assert len(output(supervised, "flood-1")) <= 1000 * (seconds + 2)


def _peak_memory(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


# --- redis, as it is -----------------------------------------------------------------------------


def test_redis_unmodified_and_rolled_without_a_gap(tmp_path):
    """It says READY by itself; while it is rolled, one of them always answers; nobody is killed."""
    if not shutil.which("redis-server"):
        unavailable("redis-server is not installed")
    start = "exec redis-server --port 0 --unixsocket $ACKVISOR_WORKER.sock --supervised systemd"
    config = program("redis", *SH, f"{start} --save ''", notify=True, count=2, min_ready_time=0.1)
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        assert {w["status"] for w in supervised.status()["workers"]} == {
            "Ready to accept connections"
        }
        asker = _Asker(tmp_path)
        done = supervised.command("reload", "--wait")
        assert (done.returncode, done.stdout) == (0, "reload done, generation 2\n")
        done = supervised.command("restart", "redis", "--wait")
        assert done.returncode == 0
        answers = asker.end()
        assert supervised.stop() == 0
        assert not supervised.events("worker.killed")
        assert {line["code"] for line in supervised.events("worker.exited")} == {0}
        assert len(supervised.events("worker.exited")) == 6
    assert answers > 10
    assert not glob.glob(f"{tmp_path}/*.sock")  # redis has removed them itself


class _Asker:
    """Somebody who wants an answer all the time, from whichever of them gives one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers = 0
        self._gaps = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def end(self) -> int:
        """Return how often there was an answer; there always must have been one."""
        self._over.set()
        self._thread.join()
        assert self._gaps == 0
        return self._answers

    def _ask(self) -> None:
        while not self._over.wait(0.005):
            # A socket that goes while we look is no gap: its successor serves already. Look again.
            if any(self._answered(path) for _ in range(2) for path in self._sockets()):
                self._answers += 1
            else:
                self._gaps += 1

    def _sockets(self) -> list[str]:
        return glob.glob(f"{self._folder}/*.sock")

    def _answered(self, path: str) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as redis:
                redis.settimeout(15.0)
                redis.connect(path)
                redis.sendall(b"PING\r\n")
                return redis.recv(7) == b"+PONG\r\n"
        except OSError:
            return False


# --- before the others ---------------------------------------------------------------------------


def test_migrations_come_first_at_a_start_and_at_a_reload(tmp_path):
    """The others start when it has ended well; one that fails rejects the reload with its last lines."""
    code = "echo migrating; cat schema || exit 3; sleep 0.3; touch migrated"
    config = program("web", *SH, "test -e migrated || exit 9; exec sleep 60", min_ready_time=0)
    config += program("migrate", *SH, code, before=True)
    (tmp_path / "schema").write_text("create table t\n")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        assert supervised.life("migrate-1") == ["spawned", "drained", "exited"]
        order = [line["event"] for line in supervised.lines() if line.get("pid")]
        assert order.index("worker.exited") < order.index("worker.ready")

        done = supervised.command("reload", "--wait")
        assert done.returncode == 0, done.stderr
        (tmp_path / "schema").unlink()
        done = supervised.command("reload", "--wait")
        assert done.returncode == 1
        assert "migrate-3: sh ended with code 3" in done.stderr
        assert "cat: schema: No such file or directory" in done.stderr
        rejected = supervised.event("reload.rejected")
        assert rejected["reason"] == "migrate-3: sh ended with code 3"
        assert rejected["traceback"].startswith("migrating\ncat: schema")
        status = supervised.status()
        assert (status["generation"], status["state"]) == (2, "ready")
        assert [worker["id"] for worker in status["workers"]] == ["web-2"]
        assert supervised.command("restart", "migrate").returncode == 2
        assert supervised.command("scale", "migrate=2").returncode == 2
        wait_until(lambda: len(supervised.templates()) <= 1, "the rejected template has gone")
        assert supervised.stop() == 0


def test_a_migration_that_fails_at_the_start_ends_it_with_1(tmp_path):
    """Nobody else has been started."""
    config = program("web", "sleep", "60") + program("migrate", *SH, "echo no; exit 3", before=True)
    with Supervised(tmp_path, config) as supervised:
        assert supervised.wait() == 1
        assert supervised.event("group.failed", group="migrate")["reason"] == "sh ended with code 3"
        assert supervised.event("worker.failed")["traceback"] == "no"
        assert not supervised.events("worker.spawned", group="web")


def test_a_migration_that_does_not_end_is_ended_and_the_start_fails(tmp_path):
    """At its `ready_timeout`, like in a stop: SIGTERM first, SIGKILL to who is deaf to it."""
    code = "trap '' TERM; echo deaf; while :; do sleep 60; done"
    config = program("web", "sleep", "60")
    config += program("migrate", *SH, code, before=True, ready_timeout="500ms")
    with Supervised(tmp_path, config, supervisor='grace = "500ms"') as supervised:
        said(supervised, "migrate-1", "deaf")
        assert supervised.wait() == 1
    too_late = "did not end within 0.5 s"
    assert supervised.event("worker.cancelled", worker="migrate-1")["cause"] == too_late
    assert supervised.event("worker.killed", worker="migrate-1")
    assert too_late in supervised.event("group.failed", group="migrate")["reason"]
    assert not supervised.events("worker.spawned", group="web")


def test_what_has_finished_can_be_started_again(tmp_path):
    """`restart --wait` waits for its good end, and says why it was none."""
    (tmp_path / "good").touch()
    config = program("once", *SH, "test -e good", count=2, restart="never")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        wait_until(lambda: _state_of(supervised) == "finished", "both have finished")
        done = supervised.command("restart", "once", "--wait")
        assert done.returncode == 0, done.stderr
        assert len(supervised.events("worker.exited", code=0)) == 4
        (tmp_path / "good").unlink()
        done = supervised.command("restart", "once", "--wait")
        assert done.returncode == 1
        assert "ended with code 1" in done.stderr
        assert _state_of(supervised) == "finished"
        assert supervised.stop() == 0


def _state_of(supervised):
    return supervised.status()["groups"]["once"]["state"]


def test_an_import_that_hangs_is_in_no_programs_way(tmp_path):
    """Programs have a template of their own, and what an application sets stays with it."""
    slow = "import os, time\nos.environ['LEAKED'] = 'yes'\ntime.sleep(3600)\n"
    config = '[workers.slow]\nrun = "hangs:run"\n'
    config += program("web", *SH, "echo leaked=$LEAKED; exec sleep 60")
    with Supervised(tmp_path, config, modules={"hangs": slow}) as supervised:
        said(supervised, "web-1", "leaked=")
        assert any("supervisor: worker web-1" in title(pid) for pid in children(supervised.pid))
        supervised.signal(signal.SIGQUIT)
        supervised.wait()


def test_who_goes_into_the_background_is_told_how_to_stay(tmp_path):
    """A daemon that forks and ends well would come up for ever: the log names the remedy."""
    fork = "setsid sleep 600 & exit 0"
    with Supervised(tmp_path, program("daemon", *SH, fork)) as supervised:
        ended = supervised.event("worker.exited")
        assert ended["code"] == 0
        assert "it went into the background (left running: " in ended["error"]
        assert "--no-daemon" in ended["error"]
        assert "went into the background" in supervised.command("why", ended["worker"]).stdout
        supervised.stop()
