"""The notify socket: systemd's words, said by whom they may be said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.command.notify import MAX_STATUS, Notify, _is_ours, parse


class Log:
    """Keeps why something was dropped."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def warning(self, _event: str, *, reason: str, **_: object) -> None:
        self.reasons.append(reason)


@pytest.fixture
def notify(tmp_path):
    """A notify socket; `_log` has what it has dropped."""
    made = Notify(str(tmp_path), Log())
    yield made
    made.close()
    assert not os.path.exists(made.path)


def say(notify: Notify, *datagrams: bytes) -> None:
    """Send these from this process, which leads no group but belongs to its own."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.connect(notify.path)
        for datagram in datagrams:
            speaker.send(datagram)


@pytest.mark.parametrize(
    ("datagram", "said"),
    [
        (b"READY=1", [("READY", "1")]),
        (b"READY=1\nSTATUS=warm\n", [("READY", "1"), ("STATUS", "warm")]),
        (b"READY=0\nREADY=\nREADY\n=1x", [("", "1x")]),
        (b"STATUS=a=b\x1b[2J", [("STATUS", "a=b [2J")]),
        (b"EXTEND_TIMEOUT_USEC=5000000", [("EXTEND_TIMEOUT_USEC", "5000000")]),
        (b"EXTEND_TIMEOUT_USEC=-1\nEXTEND_TIMEOUT_USEC=0\nEXTEND_TIMEOUT_USEC=1e9", []),
        (b"EXTEND_TIMEOUT_USEC=" + b"9" * 100, []),
        (b"WATCHDOG=1\nSTOPPING=1", [("WATCHDOG", "1"), ("STOPPING", "1")]),
        (b"", []),
        (b"\xff\x00\xfe", []),
    ],
)
def test_what_is_said_is_heard(datagram: bytes, said: list[tuple[str, str]]) -> None:
    """Assignments, one a line; what means nothing is passed over."""
    assert parse(datagram) == said


@given(st.binary(max_size=500))
def test_whatever_comes_is_harmless(datagram: bytes) -> None:
    """No bytes raise, and no status is long or has control characters."""
    for name, value in parse(b"STATUS=" + datagram):
        if name == "STATUS":
            assert len(value) <= MAX_STATUS
            assert value.isprintable() or value == ""


def test_the_own_group_is_heard_in_order(notify) -> None:
    """Two datagrams are two words."""
    say(notify, b"STATUS=one", b"READY=1")
    assert notify.receive() == ([("STATUS", "one"), ("READY", "1")], False)


def test_a_stranger_is_not_heard(notify) -> None:
    """Somebody who is neither of the group nor a descendant; our own child in another group is."""
    code = (
        "import os,socket,sys;os.setsid();"
        "pid=os.fork() if sys.argv[2]=='orphan' else 0\n"
        "if pid: sys.exit()\n"
        "import time\n"
        "while sys.argv[2]=='orphan' and os.getppid()!=int(sys.argv[3]): time.sleep(0.01)\n"
        "s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM);s.connect(sys.argv[1]);s.send(b'READY=1')\n"
        "print(flush=True);sys.stdin.readline()"
    )
    reaper = str(_reaper())
    for kind, heard in (("child", [("READY", "1")]), ("orphan", [])):
        with subprocess.Popen(
            [sys.executable, "-S", "-c", code, notify.path, kind, reaper],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as speaker:
            assert speaker.stdout is not None
            speaker.stdout.readline()  # it has spoken, and lives
            assert notify.receive()[0] == heard
            assert speaker.stdin is not None
            speaker.stdin.close()
            speaker.stdout.read()  # the orphan has ended, too
    assert "its sender does not belong to this worker" in notify._log.reasons


def _reaper() -> int:
    """Return who inherits orphans here: what the kernel says of one."""
    code = (
        "import os,time\npid=os.getpid()\n"
        "if os.fork(): os._exit(0)\n"
        "while os.getppid()==pid: time.sleep(0.01)\nprint(os.getppid())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, check=True)
    return int(done.stdout)


def test_who_has_ended_meanwhile_is_heard(notify) -> None:
    """A shell's `systemd-notify` has gone by the time that anybody can look."""
    code = "import socket,sys;s=socket.socket(1,2);s.connect(sys.argv[1]);s.send(b'READY=1')"
    subprocess.run([sys.executable, "-S", "-c", code, notify.path], check=True)
    assert notify.receive() == ([("READY", "1")], False)


def test_who_has_no_pid_here_is_not_heard() -> None:
    """A sender outside of our pid namespace has the pid 0, which means ourselves to the kernel."""
    assert _is_ours(os.getpid(), os.geteuid())
    assert not _is_ours(0, os.geteuid())
    assert not _is_ours(-1, os.geteuid())


def test_huge_datagrams_and_descriptors_are_harmless(notify) -> None:
    """What is too long is dropped whole; descriptors are closed, which ends a barrier."""
    say(notify, b"READY=1\n" + b"x" * 5000)
    assert notify.receive() == ([], False)
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.connect(notify.path)
        socket.send_fds(speaker, [b"BARRIER=1"], [write, write, write])
    os.close(write)
    assert notify.receive() == ([("BARRIER", "1")], False)
    assert os.read(read, 1) == b""  # nobody holds the other end any more
    os.close(read)
    assert notify._log.reasons == ["it is longer than 4096 bytes"]


def test_what_is_the_supervisors_business_is_refused(notify) -> None:
    """MAINPID above all: the program is who was started."""
    say(notify, b"MAINPID=1\nREADY=1", b"FDSTORE=1")
    assert notify.receive()[0] == [("READY", "1")]
    assert notify._log.reasons == [
        "MAINPID is the supervisor's business",
        "FDSTORE is the supervisor's business",
    ]


def test_another_user_than_the_supervisor_has_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    """It may not write to the supervisor's; what it made is gone in the end."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700 if os.geteuid() == 0 else 0o500)
    own, somebody = os.geteuid(), 65534
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")  # where everybody may
    if own == 0:
        os.seteuid(somebody)
    try:
        notify = Notify(str(folder), Log())
        assert os.path.dirname(notify.path) != str(folder)
        say(notify, b"READY=1")
        assert notify.receive()[0] == [("READY", "1")]
        notify.close()
        assert not os.path.exists(os.path.dirname(notify.path))
    finally:
        os.seteuid(own)


def test_the_file_of_a_killed_predecessor_is_in_nobodys_way(tmp_path) -> None:
    """A pid comes again; what has been left there is removed."""
    left = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.bind(str(tmp_path / f"notify-{os.getpid()}"))
    left.close()
    notify = Notify(str(tmp_path), Log())
    say(notify, b"READY=1")
    assert notify.receive()[0] == [("READY", "1")]
    notify.close()
