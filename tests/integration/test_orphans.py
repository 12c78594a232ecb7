"""A budget whose supervisor was killed: its successor grants nothing that orphans still hold."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Self

import pytest

from supervisor.core.budgets import SETTLE
from supervisor.orphans import FOLDER, KILLED_BY, Notes, Orphans
from tests.supervised import Supervised, descriptors, group, wait_until

BUDGET = 7
KEEPER = """
from workers.pool import PoolTimeout
def run(worker):
    worker.ready()
    held = []
    while not worker.accepting.wait(0.01):
        if len(held) < 3:
            try:
                held.append(worker.pools["main"].get(timeout=0.2))
            except PoolTimeout:
                pass
    with worker.job("last words"):
        worker.ctx.wait()
    for conn in held:
        worker.pools["main"].put(conn)
"""


class Counter:
    """How many connections to a file all processes of the sessions have open, again and again."""

    def __init__(self, supervised: Supervised) -> None:
        self.most = 0
        self.now = 0
        self._supervised = supervised
        self._until = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._until.wait(0.01):
            self.now = self.count()
            self.most = max(self.most, self.now)

    def count(self) -> int:
        count = 0
        for pid in self._supervised.processes():
            try:
                count += sum(path.endswith("/held.db") for path in descriptors(pid).values())
            except OSError:
                continue  # it has ended
        return count

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._until.set()
        self._thread.join()


def test_a_successor_grants_only_what_no_orphan_holds(tmp_path):
    """It serves as soon as there is one lease, and has the whole budget when they have gone."""
    supervised = Supervised(
        tmp_path,
        f'[pools.main]\nurl = "sqlite:///held.db"\nmax_open = 4\nbudget = {BUDGET}\n'
        'leak_threshold = "0"\n' + group("web", "app:run", count=2),
        supervisor='grace = "6s"\nabort_margin = "1s"',
        modules={"app": KEEPER},
    )
    with supervised, Counter(supervised) as counter:
        supervised.ready()
        notes = supervised.runtime_dir / FOLDER
        assert len(list(notes.iterdir())) == 2
        wait_until(lambda: counter.now == 6, "each holds three")
        old = set(supervised.worker_pids().values())
        supervised.signal(signal.SIGKILL)
        supervised.wait()

        supervised.start()
        told = supervised.event("budget.orphans")
        assert sorted(told["workers"]) == ["web-1", "web-2"]
        assert told["connections"] == {"main": BUDGET}
        assert old <= set(supervised.processes())
        supervised.event("supervisor.ready", count=2)
        wait_until(lambda: counter.now == 6 and not old & set(supervised.processes()), "all is new")
        status = supervised.status()["budgets"]["main"]
        assert status["granted"] <= BUDGET
        assert supervised.stop() == 0
        assert not notes.exists()
    assert counter.most <= BUDGET


def test_only_the_very_process_counts(tmp_path):
    """Another one with its number, one that has gone, another boot, half a note: none is held for."""
    mine = Notes(tmp_path, pytest.fail)
    mine.born("web-1", os.getpid(), 10.0, {"main": (4, 9), "more": (2, 2)})
    (path,) = (tmp_path / FOLDER).iterdir()
    note = json.loads(path.read_text())

    for change in ({"started": note["started"] + 1}, {"pid": 2**22 + 1}, {"boot": "another"}):
        path.write_text(json.dumps({**note, **change}))
        found = Orphans(tmp_path, 100.0)
        assert (found.held(), path.exists()) == ({}, False)
        found.close()
    for text in ("", '{"pid": 1}', "[]", json.dumps({**note, "pools": {"main": 3}})):
        path.write_text(text)
        found = Orphans(tmp_path, 100.0)
        assert (found.held(), path.exists()) == ({}, False)
        found.close()

    path.write_text(json.dumps(note))
    found = Orphans(tmp_path, 100.0)
    assert found.held() == {"main": 4, "more": 2}
    due = found.next_deadline()
    assert due == 100.0 + 10.0 + KILLED_BY + SETTLE
    assert not found.time_passed(due - 0.001)
    assert found.time_passed(due)
    assert (found.held(), path.exists()) == ({}, False)
    found.close()


def test_all_together_never_had_more_than_their_budget(tmp_path):
    """Four that could have ten each, under a budget of twenty: twenty, then ten for the last one."""
    mine = Notes(tmp_path, pytest.fail)
    mine.born("web-1", os.getpid(), 10.0, {"main": (10, 20)})
    (path,) = (tmp_path / FOLDER).iterdir()
    for number in range(3):
        path.with_name(f"copy-{number}").write_text(path.read_text())
    found = Orphans(tmp_path, 0.0)
    assert found.held() == {"main": 20}
    for orphan in found._orphans[1:]:
        orphan.until = 1.0
    assert found.time_passed(1.0)
    assert found.held() == {"main": 10}
    found.close()
    mine.changed(99.0, {"main": (5, 30)})
    assert json.loads(path.read_text())["pools"] == {"main": [10, 30]}
    mine.ended("web-1")
    mine.close()
    assert not (tmp_path / FOLDER / path.name).exists()


def test_a_folder_that_cannot_be_written_is_told_and_harms_nobody(tmp_path):
    """The supervisor goes on; its successor would only know less."""
    Path(tmp_path / FOLDER).write_text("a file in its place")
    told: list[str] = []
    mine = Notes(tmp_path, told.append)
    mine.born("web-1", os.getpid(), 10.0, {"main": (10, 20)})
    assert "held" in told[0]
    mine.ended("web-1")
    found = Orphans(tmp_path, 0.0)
    assert found.held() == {}
    found.close()


@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_leaves_no_part_of_a_note(tmp_path, room):
    """A note that has no room is told of, and nothing of it outlives its worker."""
    told: list[str] = []
    mine = Notes(tmp_path, told.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        mine.born("web-1", os.getpid(), 1.0, {"main": (2, 4)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(told) == 1
    mine.ended("web-1")
    mine.close()
    assert not Path(tmp_path, FOLDER).exists()


def test_a_note_that_had_no_room_is_written_when_there_is_some(tmp_path):
    """It is told of once, tried again every few seconds, and then nothing is left to be done."""
    told: list[str] = []
    (tmp_path / FOLDER).touch()  # no folder can be made there
    mine = Notes(tmp_path, told.append)
    mine.born("web-1", os.getpid(), 1.0, {"main": (2, 4)})
    mine.time_passed(100.0)
    first = mine.next_deadline()
    assert first is not None and first > 100.0
    mine.time_passed(first)
    assert len(told) == 1
    (tmp_path / FOLDER).unlink()
    mine.time_passed(first + 1.0)  # too early
    assert not (tmp_path / FOLDER).exists()
    again = mine.next_deadline()
    assert again is not None and again > first
    mine.time_passed(again)
    found = Orphans(tmp_path, again)
    assert found.names == ["web-1"]
    found.close()
    mine.time_passed(again + 100.0)
    assert mine.next_deadline() is None
    mine.ended("web-1")
    mine.close()
