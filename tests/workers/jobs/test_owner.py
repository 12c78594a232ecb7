"""Who holds a job, and what may be concluded about that process: never more than is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.supervised import wait_until
from workers.jobs.owner import Owner, is_known_dead


def _stat(pid):
    """Return the fields of /proc/PID/stat, from the state on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()


@pytest.fixture
def here():
    return Owner.here("jobs-1")


@pytest.fixture
def other(here):
    """Another living process, and the owner it would be."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process, Owner("jobs-2", process.pid, int(_stat(process.pid)[19]), here.place)
    process.kill()
    process.communicate()


def test_living_process_is_not_dead(here, other):
    """A process that runs is alive, and so is the one that asks."""
    _, owner = other
    assert not is_known_dead(owner, here)
    assert not is_known_dead(here, here)


def test_killed_process_is_dead_before_it_is_waited_for(here, other):
    """A zombie holds nothing any more: its jobs need not wait until its parent has reaped it."""
    process, owner = other
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: is_known_dead(owner, here), "the zombie is known to be dead")
    assert process.returncode is None, "it has been waited for: the test shows nothing"
    process.wait()
    assert is_known_dead(owner, here)


def test_stopped_process_is_not_dead(here, other):
    """A process that was stopped may go on: only its lease can tell when that was too long."""
    process, owner = other
    process.send_signal(signal.SIGSTOP)
    assert not is_known_dead(owner, here)


def test_reused_pid_is_told_apart(here, other):
    """The same pid with another start time is another process: the owner has gone."""
    _, owner = other
    assert is_known_dead(replace(owner, started=owner.started - 1), here)


def test_process_whose_main_thread_has_ended_is_alive(here):
    """A process with a dead main thread looks like a zombie, but its other threads work on."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('up', flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        wait_until(lambda: _stat(process.pid)[0] == "Z", "the main thread has ended")
        owner = Owner("jobs-2", process.pid, int(_stat(process.pid)[19]), here.place)
        assert not is_known_dead(owner, here)
        process.kill()


@pytest.mark.parametrize("change", [{"place": "another-boot:1:2"}, {"place": "?"}])
def test_nothing_is_known_of_another_host(here, change):
    """What runs on another host, in another container or before a reboot is left to its lease."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = Owner("jobs-2", gone.pid, 1, here.place)
    assert is_known_dead(owner, here)
    assert not is_known_dead(replace(owner, **change), here)


def test_unknown_place_is_not_equal_to_itself(here):
    """Two processes that don't know where they are know nothing of each other."""
    unknown = replace(here, place="?")
    assert not is_known_dead(replace(unknown, pid=2**22 + 1), unknown)


def test_owner_names_the_calling_process(here):
    """The owner is the process that asks, also after a fork or exec."""
    assert here.pid == os.getpid()
    assert here.worker == "jobs-1"


@given(
    st.builds(
        Owner,
        worker=st.text(min_size=1),
        pid=st.integers(min_value=1),
        started=st.integers(min_value=0),
        place=st.from_regex(r"[0-9a-f-]{36}:\d+:(\d+|-)", fullmatch=True),
    )
)
def test_text_form_round_trips(owner):
    """What stands in the table names the same owner again."""
    assert Owner.parse(str(owner)) == owner


@given(st.text())
def test_any_other_text_is_nobody(text):
    """Whatever else stands in the column is not an owner of ours, or reads back as itself."""
    owner = Owner.parse(text)
    assert owner is None or str(owner) == text
