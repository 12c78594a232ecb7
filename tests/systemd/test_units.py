"""The units, as they are shipped, under this machine's own systemd, booted for these tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from supervisor.config.settings import SupervisorSettings
from supervisor.core.standing import STOP_SLACK
from supervisor.unit import time_span
from tests.servers import unavailable
from tests.supervised import REPO, wait_until
from tests.systemd.box import Box, missing, refused, shown

UNITS = REPO / "systemd"
FILES = ("supervisor.service", "supervisor@.service")
SUPERVISOR = "/opt/ackvisor/bin/supervisor"  # as the units have it

CONFIG = f"""
[supervisor]
runtime_dir = "${{RUNTIME_DIRECTORY}}"
path = ["/srv/app", "{REPO}"]
[pools.main]
url = "sqlite:///${{STATE_DIRECTORY}}/data.db"
[workers.app]
run = "%(run)s"
count = 2
min_ready_time = "0"
max_restarts = 0
[workers.app.options]
seconds = %(seconds)s
"""

GATED = """
import os, pathlib, socket
def run(worker):
    while not pathlib.Path("/srv/app/open").exists():
        worker.accepting.wait(0.02)
    with worker.pools["main"].acquire() as conn:
        conn.execute("create table if not exists t (x)")
        conn.execute("insert into t values (?)", (worker.id,))
        conn.commit()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(b"STATUS=hijacked", "/run/systemd/notify")
    strange = [name for name in os.environ if name.startswith(("NOTIFY", "WATCHDOG", "LISTEN"))]
    worker.log.error("worker.environment", strange=strange)
    worker.ready()
    worker.accepting.wait()
"""

ECHO = """
def run(worker):
    listener = worker.sockets["web"]
    listener.settimeout(0.05)
    worker.ready()
    while not worker.accepting.done:
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            continue
        with peer:
            peer.sendall(b"generation %d" % worker.generation)
"""
ASK = """
import socket
with socket.create_connection(("127.0.0.1", 8000), 20) as peer:
    print(peer.recv(100).decode())
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """A systemd with the shipped units and what they need."""
    if why := refused():
        pytest.skip(why)
    if what := missing():
        unavailable(what)
    with Box() as box:
        for name in FILES:
            box.write(f"/etc/systemd/system/{name}", (UNITS / name).read_text())
            # What the tests run from may be under /root, where the units see nothing.
            binds = " ".join(shown())
            box.write(
                f"/etc/systemd/system/{name}.d/50-box.conf",
                f"[Service]\nProtectHome=tmpfs\nBindReadOnlyPaths={binds}\n",
            )
        box.write(
            SUPERVISOR,
            f"#!{sys.executable}\nfrom supervisor.__main__ import main\nmain()\n",
            mode=0o755,
        )
        box.run("systemctl", "daemon-reload")
        yield box


def configure(box: Box, name: str, run: str, seconds: float = 0.0) -> None:
    box.write(f"/etc/ackvisor/{name}.toml", CONFIG % {"run": run, "seconds": seconds})


def installed(name: str, folder: Path) -> Path:
    """Return a copy of a unit that is installed with this test's interpreter."""
    copy = folder / name
    copy.write_text((UNITS / name).read_text().replace(SUPERVISOR, sys.executable))
    return copy


def setting(name: str, key: str) -> str:
    """Return what a unit sets a key to."""
    found = re.findall(rf"^{key}=(.*)$", (UNITS / name).read_text(), re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


@pytest.fixture
def analyze() -> str:
    """systemd-analyze, which needs no systemd that runs."""
    found = shutil.which("systemd-analyze")
    if found is None:
        unavailable("systemd-analyze is not installed")
    assert found is not None
    return found


def test_systemd_finds_nothing_wrong_with_the_units(analyze: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` has not a word to say, also of the socket example."""
    for names in (["supervisor.service", "supervisor.socket"], ["supervisor@.service"]):
        files = [str(installed(name, tmp_path)) for name in names]

        done = subprocess.run(
            [analyze, "verify", "--man=no", *files], capture_output=True, text=True, check=False
        )

        assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_the_units_expose_little(analyze: str, name: str) -> None:
    """`systemd-analyze security` rates them at 2.0 or better."""
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", str(UNITS / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LANG": "C.UTF-8"},
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_systemd_waits_for_the_end_of_the_longest_stop(name: str) -> None:
    """TimeoutStopSec is above the default of grace and the kills after it."""
    defaults = {each.name: each.default for each in fields(SupervisorSettings)}
    grace: Any = defaults["grace"]
    timeout = time_span(setting(name, "TimeoutStopSec"))

    assert timeout is not None
    assert timeout >= grace + STOP_SLACK
    assert [
        setting(name, key) for key in ("KillMode", "RestartPreventExitStatus", "NotifyAccess")
    ] == ["mixed", "78", "main"]


def test_the_template_is_the_service_with_a_name() -> None:
    """The two do not drift apart."""
    service, template = (
        [line for line in (UNITS / name).read_text().splitlines() if not line.startswith("# ")]
        for name in FILES
    )

    assert service == [
        line.replace("%i.toml", "supervisor.toml")
        .replace("ackvisor/%i", "ackvisor/supervisor")
        .replace(": %i", "")
        for line in template
    ]


def main_pid(box: Box, unit: str) -> int:
    """Return the supervisor's pid as the box has it."""
    return int(box.show(unit, "MainPID")["MainPID"])


def test_a_service_from_its_start_over_its_reloads_to_its_crash(box: Box) -> None:
    """What `systemctl show` says is what the fleet is about, at each step."""
    box.write("/srv/app/gated.py", GATED)
    configure(box, "supervisor", "gated:run")
    first = "2 of 2 workers ready, generation 1"

    # READY=1 comes when all workers serve, and not before.
    box.run("systemctl", "start", "--no-block", "supervisor")
    starting = "starting: 0 of 2 workers ready, generation 1"
    box.shows("supervisor", ActiveState="activating", StatusText=starting)
    box.write("/srv/app/open", "")
    box.shows(
        "supervisor",
        ActiveState="active",
        SubState="running",
        StatusText=first,
        NRestarts="0",
        Result="success",
    )
    pid = main_pid(box, "supervisor")

    # The workers have tried to speak for it, each before it was ready; its lines keep their level.
    said = [e for e in box.entries("supervisor.service") if "worker.environment" in e["MESSAGE"]]
    assert [entry["PRIORITY"] for entry in said] == ["3", "3"]
    assert not any(
        "strange" in entry["MESSAGE"] for entry in said
    )  # none is an empty list: no field
    assert not any("\x1b" in entry["MESSAGE"] for entry in box.entries("supervisor.service"))
    assert "hijacked" not in box.show("supervisor", "StatusText")["StatusText"]

    # A reload that is rolled out, one that is rolled back, and one that is refused.
    done = box.run("systemctl", "reload", "supervisor")
    assert done.returncode == 0, box.journal("supervisor")
    box.shows("supervisor", ActiveState="active", StatusText="2 of 2 workers ready, generation 2")

    box.write("/srv/app/gated.py", "raise RuntimeError('password')")
    done = box.run("systemctl", "reload", "supervisor")
    assert done.returncode != 0
    rolled_back = wait_until(
        lambda: re.fullmatch(
            r"2 of 2 workers ready, generation 2; "
            r"the last reload was rolled back \(app-\d failed\), see the log",
            box.show("supervisor", "StatusText")["StatusText"],
        ),
        "the status tells, and does not repeat what user code has said",
    )
    assert rolled_back
    assert "password" in box.journal("supervisor")

    box.write("/etc/ackvisor/supervisor.toml", "[workers]\n")
    done = box.run("systemctl", "reload", "supervisor")
    assert done.returncode != 0
    box.shows(
        "supervisor",
        ActiveState="active",
        NRestarts="0",
        Result="success",
        MainPID=str(pid),
        StatusText="2 of 2 workers ready, generation 2; the last reload was refused, see the log",
    )

    # A crash.
    box.write("/srv/app/gated.py", GATED)
    configure(box, "supervisor", "gated:run")
    box.run("kill", "-KILL", str(pid))
    box.shows("supervisor", ActiveState="active", NRestarts="1", StatusText=first)
    assert main_pid(box, "supervisor") != pid


def test_a_wrong_configuration_is_not_tried_again(box: Box) -> None:
    """Exit code 78 is the end, and the journal has the sentence as an error."""
    box.write("/etc/ackvisor/wrong.toml", '[workers.app]\nrum = "gated:run"\n')

    started = box.run("systemctl", "start", "supervisor@wrong")

    assert started.returncode != 0
    box.shows(
        "supervisor@wrong",
        ActiveState="failed",
        Result="exit-code",
        ExecMainStatus="78",
        NRestarts="0",
    )
    entries = box.entries("supervisor@wrong.service")
    assert [
        (entry["PRIORITY"], "unknown key" in entry["MESSAGE"])
        for entry in entries
        if "rum" in entry["MESSAGE"]
    ] == [("3", True)]


def test_a_supervisor_that_hangs_is_killed_by_the_watchdog(box: Box) -> None:
    """Only a turn of the loop feeds it; the stack of the hung one is in the journal."""
    configure(box, "hung", "tests.victims:idle")
    box.write(
        "/etc/systemd/system/supervisor@hung.service.d/watchdog.conf",
        "[Service]\nWatchdogSec=3s\nRestart=no\n",
    )
    box.run("systemctl", "daemon-reload")
    assert box.run("systemctl", "start", "supervisor@hung").returncode == 0

    box.run("kill", "-STOP", str(main_pid(box, "supervisor@hung")))

    box.shows("supervisor@hung", ActiveState="failed", Result="watchdog", NRestarts="0")
    assert "Fatal Python error: Aborted" in box.journal("supervisor@hung")


def test_a_stop_has_the_time_that_its_workers_need(box: Box) -> None:
    """Also when the unit grants less: systemd is asked for more, and the start warns of it."""
    configure(box, "busy", "tests.victims:busy", seconds=2.4)
    box.write(
        "/etc/systemd/system/supervisor@busy.service.d/impatient.conf",
        "[Service]\nTimeoutStopSec=2s\n",
    )
    box.run("systemctl", "daemon-reload")
    assert box.run("systemctl", "start", "supervisor@busy").returncode == 0

    box.run("systemctl", "stop", "--no-block", "supervisor@busy")
    wait_until(
        lambda: re.fullmatch(
            r"draining: 2 of 2 outstanding, \d+ s left",
            box.show("supervisor@busy", "StatusText")["StatusText"],
        ),
        "the status tells who is waited for",
    )

    box.shows("supervisor@busy", ActiveState="inactive", Result="success", ExecMainStatus="0")
    journal = box.journal("supervisor@busy")
    assert journal.count("victim.finished") == 2
    assert "TimeoutStopSec of supervisor@busy.service is 2 s, and a stop may take 35 s" in journal


def test_a_connection_starts_the_service_and_none_is_refused_in_a_roll(box: Box) -> None:
    """Socket activation, as the shipped example has it: also while the service restarts."""
    box.write("/srv/app/echo.py", ECHO)
    config = CONFIG.replace("count = 2", 'count = 2\nsockets = ["web"]')
    box.write(
        "/etc/ackvisor/activated.toml",
        config % {"run": "echo:run", "seconds": 0.0} + '[sockets.web]\nlisten = "systemd:web"\n',
    )
    unit = (UNITS / "supervisor.socket").read_text()
    box.write(
        "/etc/systemd/system/activated.socket",
        unit.replace("Service=supervisor.service", "Service=supervisor@activated.service"),
    )
    box.run("systemctl", "daemon-reload")
    assert box.run("systemctl", "start", "activated.socket").returncode == 0
    box.shows("supervisor@activated", ActiveState="inactive")

    def asked() -> str:
        done = box.run(sys.executable, "-c", ASK)
        assert done.returncode == 0, done.stderr + box.journal("supervisor@activated")
        return done.stdout.strip()

    assert asked() == "generation 1"
    box.shows("supervisor@activated", ActiveState="active", NRestarts="0")
    assert box.run("systemctl", "reload", "supervisor@activated").returncode == 0
    assert asked() == "generation 2"
    assert box.run("systemctl", "restart", "--no-block", "supervisor@activated").returncode == 0
    assert asked() in ("generation 1", "generation 2")
    box.run("systemctl", "stop", "activated.socket", "supervisor@activated")
    box.shows("supervisor@activated", ActiveState="inactive", Result="success")


def test_from_systemd_253_on_it_can_signal_a_reload_itself(box: Box) -> None:
    """With the drop-in that is shipped it waits for READY=1, which comes however the reload ends."""
    version = int(box.run("systemctl", "--version").stdout.split()[1])
    if version < 253:
        pytest.skip(f"this is systemd {version}")
    configure(box, "signalled", "tests.victims:idle")
    drop_in = "/etc/systemd/system/supervisor@signalled.service.d/notify-reload.conf"
    box.write(drop_in, (UNITS / "notify-reload.conf").read_text())
    box.run("systemctl", "daemon-reload")
    assert box.run("systemctl", "start", "supervisor@signalled").returncode == 0

    assert box.run("systemctl", "reload", "supervisor@signalled").returncode == 0
    serves = "2 of 2 workers ready, generation 2"
    assert box.show("supervisor@signalled", "StatusText") == {"StatusText": serves}

    box.write("/etc/ackvisor/signalled.toml", "[workers]\n")
    assert box.run("systemctl", "reload", "supervisor@signalled").returncode == 0
    refused_too = f"{serves}; the last reload was refused, see the log"
    box.shows("supervisor@signalled", ActiveState="active", StatusText=refused_too)


def test_a_roll_has_the_time_that_its_steps_need(box: Box) -> None:
    """TimeoutStartSec bounds a reload that gets nowhere, not one that goes on."""
    configure(box, "slow", "tests.victims:busy", seconds=1.3)
    assert box.run("systemctl", "start", "supervisor@slow").returncode == 0
    box.write(
        "/etc/systemd/system/supervisor@slow.service.d/impatient.conf",
        "[Service]\nTimeoutStartSec=2s\n",
    )
    box.run("systemctl", "daemon-reload")

    box.run("systemctl", "kill", "--kill-whom=main", "--signal=HUP", "supervisor@slow")
    box.shows("supervisor@slow", ActiveState="reloading")

    serves = "2 of 2 workers ready, generation 2"
    box.shows("supervisor@slow", ActiveState="active", StatusText=serves)
    assert "timed out" not in box.journal("supervisor@slow")
