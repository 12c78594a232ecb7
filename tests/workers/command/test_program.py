"""A program is started with its sockets, and its end is seen."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

import pytest

from supervisor.errors import ProgramError
from workers.command.program import Program, start

TELL = """
import json, os, socket, sys
found = {name: value for name, value in os.environ.items() if name.startswith("LISTEN_")}
found["is_own"] = found.get("LISTEN_PID") == str(os.getpid())
found["descriptors"] = sorted(map(int, os.listdir("/proc/self/fd")))[:-1]
for fd in range(3, 3 + int(found.get("LISTEN_FDS", 0))):
    connection, _ = socket.socket(fileno=fd).accept()
    connection.send(b"%d" % fd)
    connection.close()
print(json.dumps(found))
"""


def run(program: Program) -> tuple[str, str]:
    """Return what a program has written by its end, and how that was."""
    for fd in (program.stdout, program.stderr):
        os.set_blocking(fd, True)
    with open(program.stdout, encoding="utf-8") as out, open(program.stderr, "rb"):
        text = out.read()
    ended = str(program.wait())
    program.signal(signal.SIGTERM)  # nobody is hit by a signal that comes too late
    os.close(program.pidfd)
    return text, ended


@pytest.mark.parametrize("count", [0, 1, 5])
def test_it_inherits_its_sockets_and_nothing_else(tmp_path, count: int) -> None:
    """From descriptor 3 on, in order, with their names, and meant for its own pid."""
    sockets = {f"s{number}": socket.create_server(("127.0.0.1", 0)) for number in range(count)}
    inheritable = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inheritable, True)
    try:
        environment = {b"PATH": os.environb[b"PATH"], b"LISTEN_PID": b"1"} if count else {}
        program = start([sys.executable, "-S", "-c", TELL], str(tmp_path), environment, sockets)
        for fd, server in enumerate(sockets.values(), start=3):
            with socket.create_connection(server.getsockname(), 15.0) as client:
                assert client.recv(10) == str(fd).encode()
        text, ended = run(program)
    finally:
        os.close(inheritable)
        for server in sockets.values():
            server.close()
    found = json.loads(text)
    assert ended == "ended with code 0"
    assert found.pop("descriptors") == list(range(3 + count))
    if count:
        names = ":".join(sockets)
        assert found.pop("LISTEN_PID") == str(program.pid)
        assert found == {"LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "is_own": True}
    else:
        assert found == {"is_own": False}


def test_it_is_looked_up_in_its_own_path(tmp_path) -> None:
    """PATH is the one that it will have; its words and variables are bytes, whatever they hold."""
    tool = tmp_path / "bin" / "tool"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$0 $1 $ODD"\n')
    tool.chmod(0o755)
    program = start(["tool", "a b"], str(tmp_path), {b"PATH": b"/nowhere:bin", b"ODD": b"\xff"}, {})
    for fd in (program.stdout, program.stderr):
        os.set_blocking(fd, True)
    with open(program.stdout, "rb") as out, open(program.stderr, "rb"):
        assert out.read() == f"{tool} a b ".encode() + b"\xff\n"
    program.wait()
    os.close(program.pidfd)


def test_its_signal_has_a_name(tmp_path) -> None:
    """Also one that has none."""
    for number, ended in ((9, "was ended by SIGKILL"), (40, "was ended by signal 40")):
        assert run(start(["sh", "-c", f"kill -{number} $$"], str(tmp_path), {}, {}))[1] == ended


def test_a_folder_that_is_not_there(tmp_path) -> None:
    """What went wrong between fork and exec is told, too."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProgramError, match=r'cannot start "/bin/true": cannot go to its folder'):
        start(["/bin/true"], str(tmp_path / "gone"), {}, {})
    assert len(os.listdir("/proc/self/fd")) == before
