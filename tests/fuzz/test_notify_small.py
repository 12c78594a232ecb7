"""The notify socket under fuzz: by Hypothesis in this process, and the short form of tests.fuzz.notify."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.notify import MOST_FDS, NAMES, REFUSED, fuzz, heard
from workers.command.notify import MAX_BATCH, MAX_DATAGRAM, Notify

lines = st.tuples(
    st.sampled_from((*NAMES, *REFUSED, "", "ready")),
    st.sampled_from(["=", "", "=="]),
    st.text(max_size=30) | st.sampled_from(["1", "0", "9" * 13, "9" * 14, "x" * 300, "\u0661"]),
).map("".join)
datagrams = (
    st.binary(max_size=200)
    | st.lists(lines, max_size=5).map(lambda all_: "\n".join(all_).encode())
    | st.sampled_from([MAX_DATAGRAM, MAX_DATAGRAM + 1, 20_000]).map(b"STATUS=".ljust)
)
passed = st.sampled_from([0, 0, 0, 1, 31, 32, 33, MOST_FDS])


class Log:
    """Counts what is said of what was dropped."""

    def __init__(self) -> None:
        self.lines = 0

    def warning(self, _event: str, *, reason: str, sender_pid: int, times: int) -> None:
        assert reason
        assert times & (times - 1) == 0
        assert sender_pid == os.getpid()
        self.lines += 1


@pytest.fixture
def notify(tmp_path):
    made = Notify(str(tmp_path), Log())
    yield made
    made.close()


def all_of(notify: Notify) -> list[tuple[str, str]]:
    """Return what has been said, over as many turns as that takes."""
    said: list[tuple[str, str]] = []
    more = True
    while more:
        words, more = notify.receive()
        said += words
    return said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(datagrams, passed), max_size=8))
@example([(b"READY=1", MOST_FDS), (b"STATUS=" + b"x" * MAX_DATAGRAM, MOST_FDS), (b"READY=1", 0)])
@example([(b"", 0), (b"\n", 3), (b"\0=\0", 33)])
def test_any_datagrams_with_any_descriptors(notify, sent):
    """What is well said is heard in order, the rest is dropped; of what was passed nothing stays open."""
    held = os.listdir("/proc/self/fd")
    said: list[tuple[str, str]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.connect(notify.path)
        speaker.setblocking(False)
        for datagram, count in sent:
            fds = [speaker.fileno()] * count
            try:
                socket.send_fds(speaker, [datagram], fds)
            except BlockingIOError:  # the kernel keeps only so much for one that does not listen
                said += all_of(notify)
                socket.send_fds(speaker, [datagram], fds)
    said += all_of(notify)
    assert said == [word for datagram, _ in sent for word in heard(datagram)]
    assert os.listdir("/proc/self/fd") == held


def test_a_flood_is_read_in_portions(notify):
    """One turn takes so many datagrams, whatever they hold, and tells that there may be more."""
    said = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        speaker.connect(notify.path)
        speaker.setblocking(False)
        sent = 0
        while sent <= 2 * MAX_BATCH:
            try:
                speaker.send(b"FDSTORE=1\nREADY=1")
                sent += 1
            except BlockingIOError:
                words, _ = notify.receive()
                assert len(words) <= MAX_BATCH
                said += len(words)
    said += len(all_of(notify))
    assert said == sent
    assert notify._log.lines <= sent.bit_length()


def test_mad_programs_cost_their_workers_nothing(tmp_path):
    """A second and a half of them with a real supervisor: they stay, and the stop is an orderly one."""
    assert fuzz(tmp_path, seconds=1.5, seed=1) > 100
