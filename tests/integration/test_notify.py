"""What a service manager hears of a real supervisor, on a socket of the test's own."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.notify import MAX_UNSENT, Notifier
from supervisor.systemd import take_notify_variables
from tests.supervised import Supervised, group, wait_until

SPEAKS = """
import os, socket
def run(worker):
    names = sorted(n for n in os.environ if n.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_")))
    worker.log.info("worker.environment", names=names, version={version})
    worker.ready()
    worker.accepting.wait()
"""


class Ear:
    """Where a service manager listens; remembers all messages, by default without WATCHDOG=1."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)
        self.messages: list[list[str]] = []
        self.lives = 0

    def hear(self) -> list[list[str]]:
        """Take what has come; return all messages so far."""
        while True:
            try:
                lines = self.socket.recv(8192).decode().split("\n")
            except BlockingIOError:
                return self.messages
            if lines == ["WATCHDOG=1"]:
                self.lives += 1
            else:
                self.messages.append(lines)

    def wait_for(self, *lines: str) -> list[str]:
        """Return the first message that has all of these lines, and forget it and those before it."""

        def found() -> list[str] | None:
            for position, message in enumerate(self.hear()):
                if set(lines) <= set(message):
                    del self.messages[: position + 1]
                    return message
            return None

        message: list[str] = wait_until(found, f"{lines}; there are only {self.messages}")
        return message

    def words(self) -> list[str]:
        """Return the order of what has come: READY, RELOADING and STOPPING."""
        lines = [line for message in self.hear() for line in message]
        return [line for line in lines if line.endswith("=1")]


@pytest.fixture
def abstract_ear() -> Iterator[Ear]:
    listening = Ear(f"@ackvisor-test-{os.getpid()}")
    with listening.socket:
        yield listening


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    listening = Ear(f"{tmp_path}/notify")
    with listening.socket:
        yield listening


def test_the_whole_life_in_its_order(abstract_ear: Ear, tmp_path: Path) -> None:
    """Start, reload, one that is refused, one that is rolled back, stop: each word once, in time."""
    ear = abstract_ear
    config = group("web", "speaks:run", count=2, min_ready_time="0")
    supervised = Supervised(
        tmp_path,
        config,
        env={"NOTIFY_SOCKET": ear.address, "LISTEN_FDS": "0"},
        modules={"speaks": SPEAKS.format(version=1)},
    )
    good = supervised.config.read_text()
    with supervised.start():
        ear.wait_for("STATUS=starting: 0 of 2 workers ready, generation 1")
        ear.wait_for("READY=1", "STATUS=2 of 2 workers ready, generation 1")
        supervised.ready()

        # Before its configuration is read, and with the time by which systemd tells it from others.
        (tmp_path / "speaks.py").write_text(SPEAKS.format(version=2))
        asked_at = supervised.signal(signal.SIGHUP)
        begun = ear.wait_for("RELOADING=1")
        assert begun[0] == "RELOADING=1"
        assert asked_at <= int(begun[1].removeprefix("MONOTONIC_USEC=")) / 1e6 <= time.monotonic()
        rolling = ear.wait_for("STATUS=rolling 0/2 to generation 2")
        assert rolling[1].startswith("EXTEND_TIMEOUT_USEC=")
        ear.wait_for("STATUS=rolling 1/2 to generation 2")
        ear.wait_for("READY=1", "STATUS=2 of 2 workers ready, generation 2")

        supervised.config.write_text(good + "nonsense = 1")
        refused = supervised.command("reload", "--wait")
        assert refused.returncode == 1
        # The command's answer and what the manager is told go out in the same turn.
        wait_until(lambda: ear.words() == ["RELOADING=1", "READY=1"], "both are told")
        ear.wait_for("RELOADING=1")
        ear.wait_for(
            "READY=1",
            "STATUS=2 of 2 workers ready, generation 2; the last reload was refused, see the log",
        )

        supervised.config.write_text(good)
        (tmp_path / "speaks.py").write_text("raise RuntimeError('broken')")
        rolled_back = supervised.command("reload", "--wait")
        assert rolled_back.returncode == 1
        assert ear.words() == ["RELOADING=1", "READY=1"]
        assert "; the last reload was rolled back (web-5 failed), see the log" in ear.hear()[-1][1]
        ear.messages.clear()

        # No worker has had the means to say anything, also not those of a later template.
        names = [line["names"] for line in supervised.events("worker.environment")]
        assert names == [[]] * 4

        assert supervised.stop() == 0
    stopping = ear.wait_for("STOPPING=1")
    assert stopping[1].startswith("STATUS=draining: 2 of 2 outstanding, ")
    assert stopping[2].startswith("EXTEND_TIMEOUT_USEC=")
    assert ear.hear()[-1] == ["STATUS=stopped: 2 workers, 2 drained, 0 killed"]
    assert ear.words() == []


def test_a_reload_that_replaces_nobody_is_told_as_well(ear: Ear, tmp_path: Path) -> None:
    """RELOADING=1 and READY=1 also come where settings are only applied to those who run."""
    supervised = Supervised(
        tmp_path,
        group("web", "speaks:run"),
        supervisor='grace = "3s"',
        env={"NOTIFY_SOCKET": ear.address},
        modules={"speaks": SPEAKS.format(version=1)},
    )
    with supervised.start():
        supervised.ready()
        ear.wait_for("READY=1")
        good = supervised.config.read_text()
        supervised.config.write_text(good.replace('grace = "3s"', 'grace = "4s"'))

        done = supervised.command("reload", "--wait")

        assert "nobody replaced" in done.stdout, done.stderr
        assert ear.words() == ["RELOADING=1", "READY=1"]
        assert supervised.stop() == 0


def test_more_time_is_asked_for_while_the_application_is_imported(ear: Ear, tmp_path: Path) -> None:
    """Nothing else happens until then, and it may take as long as ready_timeout says."""
    gate = tmp_path / "gate"
    source = (
        "import os, time\n"
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        "def run(worker):\n    worker.ready()\n    worker.accepting.wait()\n"
    )
    config = group("web", "slow:run", ready_timeout="20m")
    env = {"NOTIFY_SOCKET": ear.address}
    with Supervised(tmp_path, config, env=env, modules={"slow": source}) as supervised:
        said = ear.wait_for("STATUS=starting: 0 of 1 workers ready, generation 1")
        assert int(said[1].removeprefix("EXTEND_TIMEOUT_USEC=")) > 20 * 60 * 1_000_000
        gate.touch()
        ear.wait_for("READY=1")
        assert supervised.stop() == 0


def test_a_stop_during_a_roll_is_the_last_word(ear: Ear, tmp_path: Path) -> None:
    """RELOADING=1 is followed by STOPPING=1, never by READY=1; a SIGHUP after that says nothing."""
    config = group("web", "endless", min_ready_time="10m")
    env = {"NOTIFY_SOCKET": ear.address}
    with Supervised(tmp_path, config, supervisor='grace = "1s"', env=env) as supervised:
        ear.wait_for("READY=1")
        supervised.signal(signal.SIGHUP)
        ear.wait_for("RELOADING=1")
        ear.wait_for("STATUS=rolling 0/1 to generation 2")
        supervised.event("worker.ready", count=2)

        supervised.signal(signal.SIGTERM)
        ear.wait_for("STOPPING=1")
        supervised.signal(signal.SIGHUP)

        supervised.event("reload.rejected")
        supervised.wait()
    assert ear.words() == []
    assert all(message[0].startswith("STATUS=") for message in ear.messages)


def test_only_a_loop_that_turns_gives_signs_of_life(ear: Ear, tmp_path: Path) -> None:
    """They come while it is idle, stop while it is stopped, and go on after that."""
    env = {"NOTIFY_SOCKET": ear.address, "WATCHDOG_USEC": "200000"}
    with Supervised(tmp_path, group("web", "idle"), env=env) as supervised:
        ear.wait_for("READY=1")
        seen = ear.lives
        wait_until(lambda: ear.hear() is not None and ear.lives >= seen + 5, "five more")

        supervised.signal(signal.SIGSTOP)
        wait_until(lambda: _is_stopped(supervised.pid), "it is stopped")
        ear.hear()
        seen = ear.lives
        with pytest.raises(AssertionError):  # three intervals
            wait_until(lambda: ear.hear() is None or ear.lives > seen, "one more", 0.6)

        supervised.signal(signal.SIGCONT)
        wait_until(lambda: ear.hear() is not None and ear.lives > seen, "it goes on")
        assert supervised.stop() == 0


def test_an_idle_supervisor_sleeps_unless_it_is_watched(ear: Ear, tmp_path: Path) -> None:
    """A watchdog that is meant for another process is none, and costs no wake-up."""
    env = {
        "NOTIFY_SOCKET": ear.address,
        "WATCHDOG_USEC": "200000",
        "WATCHDOG_PID": "1",
    }
    with Supervised(tmp_path, group("web", "idle"), env=env) as supervised:
        ear.wait_for("READY=1")
        supervised.ready()
        switches = wait_until(lambda: _settled(supervised.pid), "it is at rest")
        with pytest.raises(AssertionError):
            wait_until(lambda: _switches(supervised.pid) != switches, "it wakes up", 1.0)
        ear.hear()
        assert ear.lives == 0
        assert supervised.stop() == 0


def test_a_manager_that_has_gone_is_no_reason_to_stumble(ear: Ear, tmp_path: Path) -> None:
    """One warning, and the supervisor goes on; a manager that comes back is told again."""
    config = group("web", "idle", count=2)
    env = {"NOTIFY_SOCKET": ear.address}
    with Supervised(tmp_path, config, env=env) as supervised:
        ear.wait_for("READY=1")
        os.unlink(ear.address)
        assert supervised.command("scale", "web=3", "--wait").returncode == 0
        assert supervised.command("scale", "web=1", "--wait").returncode == 0
        warning = supervised.event("notify.failed")
        assert (warning["level"], warning["address"]) == ("warning", ear.address)
        back = Ear(ear.address)
        with back.socket:
            assert supervised.command("scale", "web=2", "--wait").returncode == 0
            back.wait_for("STATUS=2 of 2 workers ready, generation 1")
            assert supervised.stop() == 0
        assert len(supervised.events("notify.failed")) == 1


def test_a_full_queue_keeps_the_order(tmp_path: Path) -> None:
    """What cannot be sent now is sent later, of the STATUS that wait only the last one."""
    listening = Ear(f"{tmp_path}/slow")
    notifier = Notifier(listening.address)
    with listening.socket:
        sent = 0
        while notifier.next_deadline() is None:
            notifier.send((f"STATUS={sent}",), 0.0)
            sent += 1
        notifier.send(("STATUS=too many",), 0.0)
        notifier.send(("STOPPING=1", "STATUS=end"), 0.0)
        notifier.send(("STATUS=a",), 0.0)
        notifier.send(("STATUS=b\nREADY=1",), 0.0)
        assert notifier.next_deadline() == 0.1

        listening.hear()
        notifier.flush(0.1)

        assert notifier.next_deadline() is None
        assert listening.hear()[sent - 1 :] == [
            ["STATUS=too many"],
            ["STOPPING=1", "STATUS=end"],
            ["STATUS=b READY=1"],
        ]
        assert sent < MAX_UNSENT or sent > 0
    notifier.close()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": ""}, None),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, None),
        ({"NOTIFY_SOCKET": "relative"}, None),
        ({"NOTIFY_SOCKET": "@"}, None),
        ({"NOTIFY_SOCKET": "/run/n"}, ("/run/n", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "3000000"}, ("@n", 3.0)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "7"}, ("@n", 1e-6)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "8"}, ("@n", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "0"}, ("@n", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "-5s"}, ("@n", None)),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, None),
    ],
)
def test_what_the_manager_has_set_is_taken_away(
    environment: dict[str, str], expected: tuple[str, float | None] | None
) -> None:
    """Whatever it is worth; the rest of the environment stays."""
    environ = {"HOME": "/", **environment}

    assert take_notify_variables(environ, 7) == expected
    assert environ == {"HOME": "/"}


def _is_stopped(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def _switches(pid: int) -> int:
    """Return how often a process has been woken."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        status = Path(f"/proc/{pid}/task/{task}/status").read_text()
        for line in status.splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def _settled(pid: int) -> int:
    """Return the switches of a process that has not been woken for a moment, else 0."""
    before = _switches(pid)
    time.sleep(0.2)
    return before if _switches(pid) == before else 0
