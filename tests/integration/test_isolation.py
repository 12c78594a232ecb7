"""What a worker inherits: what it should have, and nothing of whoever started the supervisor."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from tests.supervised import Supervised, children, descriptors, group, title

PRIVATE = {
    "NOTIFY_SOCKET": "/nowhere/notify",
    "WATCHDOG_USEC": "1000000",
    "WATCHDOG_PID": "1",
    "LISTEN_FDS": "1",
    "LISTEN_PID": "1",
    "LISTEN_FDNAMES": "web",
}


def masks(pid: int) -> dict[str, set[int]]:
    """Return the signals that a process's main thread blocks, ignores and catches."""
    found = {}
    for line in Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"SigBlk", "SigIgn", "SigCgt"}:
            bits = int(value, 16)
            found[name] = {number for number in range(1, 65) if bits >> (number - 1) & 1}
            found[name] -= {32, 33}  # glibc's own
    return found


def test_a_worker_is_what_it_is_told_and_belongs_to_the_supervisor(tmp_path):
    """Its parent is the supervisor, its group and title its own, its environment is the user's."""
    options = {"answer": 42, "words": ["a", "b"]}
    config = group("look", "surroundings", options, count=2)
    config = config.replace(
        'run = "tests.victims:surroundings"',
        'run = "tests.victims:surroundings"\nenv = { APP_MODE = "test", PATH = "/given" }',
    )
    with Supervised(tmp_path, config, env={**PRIVATE, "USERS_OWN": "1"}) as supervised:
        supervised.ready()
        pids = supervised.worker_pids()
        assert sorted(pids.values()) == sorted(
            set(children(supervised.pid)) - set(supervised.templates())
        )
        for worker, pid in pids.items():
            assert title(pid) == f"supervisor: worker {worker} of test, generation 1"
            line = supervised.event("victim.surroundings", worker=worker)
            assert line["parent"] == supervised.pid
            assert line["group"] == pid
            assert line["options"] == options
            assert line["ids"] == [worker, "look", 1]
            assert {"APP_MODE", "USERS_OWN", "HOME"} <= set(line["environment"])
            assert not set(PRIVATE) & set(line["environment"])
            assert line["threads"] == ["MainThread"]
        assert supervised.stop() == 0


def test_signal_mask_and_dispositions_are_clean(tmp_path):
    """Whatever the supervisor was started with, a worker blocks nothing and ignores HUP and INT."""
    blocked = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGRTMIN}
    ignored = (
        "import os,signal,sys;"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN);"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN);"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, {{{','.join(str(int(n)) for n in blocked)}}});"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    supervised = Supervised(tmp_path, group("idle", "idle"), through=["python3", "-c", ignored])
    with supervised:
        supervised.ready()
        (worker,) = supervised.worker_pids().values()
        found = masks(worker)
        assert found["SigBlk"] == set()
        # Python itself ignores SIGPIPE and SIGXFSZ.
        assert found["SigIgn"] == {
            signal.SIGHUP,
            signal.SIGINT,
            signal.SIGPIPE,
            signal.SIGXFSZ,
        }
        assert {signal.SIGTERM, signal.SIGUSR2, signal.SIGSEGV, signal.SIGABRT} <= found["SigCgt"]
        (template,) = supervised.templates()
        assert masks(template)["SigBlk"] == set()
        assert signal.SIGCHLD not in masks(template)["SigIgn"]
        # The supervisor itself hears what it was told to stop by, although its parent blocked it.
        assert masks(supervised.pid)["SigBlk"] & blocked == {signal.SIGRTMIN}
        assert supervised.stop() == 0


def test_descriptors_are_the_workers_own(tmp_path):
    """0, 1, 2, the lifeline and what its control thread needs; the rest stays with its owners."""
    reader, writer = os.pipe()
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    try:
        supervised = Supervised(tmp_path, group("idle", "idle", count=3))
        with supervised.start(pass_fds=(reader, writer, leaked)):
            supervised.ready()
            assert "/etc/passwd" in descriptors(supervised.pid).values()
            pids = list(supervised.worker_pids().values())
            tables = {pid: descriptors(pid) for pid in (*pids, *supervised.templates())}
            log = str(supervised.log_path)
            sockets: dict[str, list[int]] = {}
            for pid, held in tables.items():
                assert (held[0], held[1], held[2]) == ("/dev/null", log, log)
                rest = [what for fd, what in held.items() if fd > 2]
                assert {what.partition("[")[0].partition(":")[0] for what in rest} <= {
                    "socket",
                    "anon_inode",
                }
                for what in rest:
                    if what.startswith("socket:"):
                        sockets.setdefault(what, []).append(pid)
            for pid in pids:
                kinds = sorted(what for fd, what in tables[pid].items() if fd > 2)
                # The lifeline, and the connection to the supervisor's ROUTER.
                assert sum(what.startswith("socket:") for what in kinds) == 2, kinds
                # ZeroMQ's own: two epolls and a few eventfds; one eventfd wakes the control thread.
                assert kinds.count("anon_inode:[eventpoll]") == 2, kinds
                assert "anon_inode:[pidfd]" not in kinds
                assert len(kinds) <= 12, kinds
            # No socket is held by two of them: a lifeline that a sibling has would never end.
            assert all(len(owners) == 1 for owners in sockets.values())
            assert supervised.stop() == 0
    finally:
        for fd in (reader, writer, leaked):
            os.close(fd)


def test_a_replacement_inherits_no_more_than_the_first(tmp_path):
    """The hundredth worker's descriptors are those of the first."""
    config = group("idle", "idle", count=2, max_restarts=1000, backoff="1ms", backoff_max="1ms")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        first = len(descriptors(supervised.worker_pids()["idle-1"]))
        for count in range(3, 23):
            os.kill(next(iter(supervised.worker_pids().values())), signal.SIGKILL)
            supervised.event("worker.ready", count=count)
        last = supervised.worker_pids()["idle-22"]
        assert len(descriptors(last)) == first
        assert supervised.stop() == 0


def test_the_control_sockets_are_files_that_only_their_owner_reaches(tmp_path):
    """All of them lie in runtime_dir, which is 0700; nothing listens anywhere else."""
    with Supervised(
        tmp_path, group("idle", "idle"), through=["sh", "-c", 'umask 0; exec "$@"', "sh"]
    ) as supervised:
        supervised.ready()
        folder = supervised.runtime_dir
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {"control.sock": 0o700, "workers.sock": 0o700, "lock": 0o600}
        inodes = {
            what.removeprefix("socket:[").rstrip("]")
            for pid in supervised.processes()
            for what in descriptors(pid).values()
            if what.startswith("socket:")
        }
        for table in ("tcp", "tcp6", "udp", "udp6"):
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            assert not inodes & {line.split()[9] for line in lines}
        assert supervised.stop() == 0


def test_log_lines_of_a_worker_say_whose_they_are(tmp_path):
    """Each names worker, group and generation, whatever thread or library wrote it."""
    source = """
import logging, threading
logging.getLogger("early").warning("at import")
def run(worker):
    logging.getLogger("some.library").warning("from %s", "a library")
    worker.wg.go(lambda: logging.getLogger("deep").error("from a thread"))
    worker.log.info("from.user", extra=1)
    worker.ready()
    worker.accepting.wait()
"""
    with Supervised(tmp_path, group("talk", "talk:run"), modules={"talk": source}) as supervised:
        supervised.ready()
        wait = [
            supervised.event("from a library", logger="some.library"),
            supervised.event("from a thread", logger="deep", level="error"),
            supervised.event("from.user", extra=1),
        ]
        supervised.event("at import")
        assert supervised.stop() == 0
    for line in wait:
        assert (line["worker"], line["group"], line["generation"]) == ("talk-1", "talk", 1)


@pytest.mark.parametrize("level", ["warning", "info"])
def test_the_level_of_the_log_holds_for_workers(tmp_path, level):
    """A line that is less severe than the level is not written."""
    source = """
def run(worker):
    worker.log.info("a.detail")
    worker.log.warning("a.problem")
    worker.ready()
    worker.accepting.wait()
"""
    supervised = Supervised(tmp_path, group("talk", "talk:run"), modules={"talk": source})
    supervised.config.write_text(
        supervised.config.read_text().replace(
            'format = "json"', f'format = "json"\nlevel = "{level}"'
        )
    )
    with supervised:
        supervised.event("a.problem")
        assert supervised.stop() == 0
    assert len(supervised.events("a.detail")) == (level == "info")
