"""Who reaps whom: the supervisor is the parent of workers, templates, and of orphans it never made.

Each test runs in a process of its own, since a subreaper takes whatever children there are.
"""

from __future__ import annotations

import subprocess
import sys

from tests.supervised import REPO

BEGIN = """
import os, select, signal, socket
from supervisor.processes import Processes, _Child

processes = Processes()

def expect(worker):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    child = _Child(worker, "group", None, ours, -1)
    processes._children[worker] = child
    processes._watch(ours.fileno(), lambda _: processes._lifeline_readable(child))
    return theirs

def fork(code, lifeline=None):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        if lifeline is not None:
            lifeline.send(b"+")
        os._exit(code)
    return pid

def has_ended(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def tell():
    for report in processes.reports(0.0):
        print(type(report).__name__, report.worker, getattr(report, "code", None))

def children():
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        print("no child")
"""


def run(source: str) -> list[str]:
    """Run the source after BEGIN; return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + source],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=30.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_worker_that_ends_before_its_birth_is_read_is_not_taken_for_an_orphan():
    """It is nobody's orphan: its exit status is told, in whichever order signals and words come."""
    assert run("""
has_ended(fork(7, expect("w-1")))
processes.reap_strangers()
tell()
tell()
children()
""") == ["WorkerBorn w-1 None", "WorkerExited w-1 7", "no child"]


def test_an_orphan_is_reaped_although_a_worker_has_ended_before_it():
    """One SIGCHLD may stand for both: the orphan does not wait for the next."""
    assert run("""
lifeline = expect("w-1")
worker = fork(0, lifeline)
select.select([processes], [], [])
tell()
orphan = fork(0)
has_ended(worker)
has_ended(orphan)
processes.reap_strangers()
tell()
children()
""") == ["WorkerBorn w-1 None", "WorkerExited w-1 0", "no child"]
