"""Jobs and their allowances: what the work loop writes down, and what can be read of it from outside."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from supervisor import scoreboard
from supervisor.core.jobs import JobSeen
from supervisor.protocol import BOARD_BYTES, BOARD_ENTRY
from tests.workers.alone import alone
from workers.context import Context
from workers.scoreboard import Scoreboard
from workers.worker import Job, Worker

ENTRIES = BOARD_BYTES // BOARD_ENTRY.size - 1


@pytest.fixture
def board() -> Iterator[int]:
    """The descriptor that the supervisor keeps."""
    made = scoreboard.make("w-1")
    yield made
    os.close(made)


@pytest.fixture
def worker(board: int) -> Iterator[Worker]:
    """A worker whose jobs stand on that board."""
    jobs = Scoreboard(os.dup(board))
    yield alone(jobs=jobs)
    jobs.disinherit()  # it holds on to the board no longer


def names(board: int) -> list[str]:
    return [job.name for job in scoreboard.read(board)]


def test_a_job_can_be_seen_while_it_lasts(board: int, worker: Worker) -> None:
    """With its name, its begin and the thread that has it; then its place is free."""
    before = time.monotonic()
    with worker.job("report"):
        (seen,) = scoreboard.read(board)
    assert (seen.name, seen.until, seen.thread) == ("report", 0.0, threading.get_ident())
    assert before <= seen.since <= time.monotonic()
    assert scoreboard.read(board) == ()


def test_a_job_that_raises_is_over(board: int, worker: Worker) -> None:
    """However it ends."""
    with pytest.raises(ValueError, match="no"), worker.job("report"):
        raise ValueError("no")
    assert scoreboard.read(board) == ()


def test_busy_until_in_seconds_and_by_a_context(board: int, worker: Worker) -> None:
    """The last one counts, also where it is shorter; a context means its deadline."""
    with worker.job("long") as job:
        before = time.monotonic()
        job.busy_until(600)
        (seen,) = scoreboard.read(board)
        assert before + 600 <= seen.until <= time.monotonic() + 600
        job.busy_until(1)
        assert scoreboard.read(board)[0].until < before + 600
        job.busy_until(Context.background().with_deadline(before + 77))
        assert scoreboard.read(board)[0].until == before + 77


def test_the_workers_busy_until_is_for_all_jobs_of_the_calling_thread(
    board: int, worker: Worker
) -> None:
    """One may lie within another; those of other threads are none of its business."""
    begun, over = threading.Event(), threading.Event()

    def other() -> None:
        with worker.job("other"):
            begun.set()
            over.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(30)
    with worker.job("outer"), worker.job("inner"):
        worker.busy_until(60)
        untils = {job.name: job.until for job in scoreboard.read(board)}
    over.set()
    thread.join()
    assert untils["outer"] == untils["inner"] > time.monotonic()
    assert untils["other"] == 0.0


@pytest.mark.parametrize("is_watched", [True, False])
def test_busy_until_refuses_what_cannot_be_meant(board: int, is_watched: bool) -> None:
    """The same with and without a hang_timeout, so that a mistake shows before production."""
    worker = alone(jobs=Scoreboard(os.dup(board)) if is_watched else None)
    with pytest.raises(RuntimeError, match="this thread has no job in flight"):
        worker.busy_until(1)
    job = worker.job("job")
    with pytest.raises(RuntimeError, match="not in flight"):
        job.busy_until(1)
    with job:
        for wrong in (-1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="no number of seconds from now"):
                worker.busy_until(wrong)
        with pytest.raises(ValueError, match="no deadline"):
            job.busy_until(Context.background())
        worker.busy_until(0)
    with pytest.raises(RuntimeError, match="not in flight"):
        job.busy_until(1)


def test_names_are_cut_off_and_hold_no_passwords(board: int, worker: Worker) -> None:
    """Also where the cut would leave half of one."""
    long = "x" * 20 + " postgresql://app:hunter2@db/orders"
    with worker.job("ä" * 100), worker.job(long):
        cut, secret = names(board)
    assert cut.startswith("ä" * 20)
    assert secret.startswith("x" * 20 + " postgresql://app:")
    assert "hunter" not in secret


def test_more_jobs_than_places_take_turns(board: int, worker: Worker) -> None:
    """Who finds none gets the next that is free, if it is still there; none is left behind."""
    jobs = [worker.job(f"job {n}") for n in range(ENTRIES + 3)]
    for job in jobs:
        job.__enter__()
    assert len(names(board)) == ENTRIES
    jobs[ENTRIES].__exit__(None, None, None)  # it never had one
    jobs[0].__exit__(None, None, None)
    assert f"job {ENTRIES + 1}" in names(board)
    assert "job 0" not in names(board)
    for job in (*jobs[1:ENTRIES], *jobs[ENTRIES + 1 :]):
        job.__exit__(None, None, None)
    assert names(board) == []


@pytest.mark.parametrize("places", [ENTRIES, 3])
def test_jobs_of_many_threads_leave_nothing_behind(board: int, worker: Worker, places: int) -> None:
    """An entry that stays would be a hang that nobody can end. Also where they wait for places."""
    held = [worker.job("held") for _ in range(ENTRIES - places)]
    for job in held:
        job.__enter__()

    def work() -> None:
        for n in range(300):
            with worker.job(f"job {n % 3}") as job:
                if n % 2:
                    job.busy_until(5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(scoreboard.read(board)) <= len(held) + min(len(threads), places)
    for thread in threads:
        thread.join()
    assert [job.until for job in scoreboard.read(board)] == [0.0] * len(held)
    assert worker.jobs.tally()[:2] == (len(held), 300 * len(threads))
    for job in held:
        job.__exit__(None, None, None)
    assert scoreboard.read(board) == ()


def test_a_place_keeps_nothing_of_the_job_before(board: int, worker: Worker) -> None:
    """Neither more time, which would hide a hang, nor a name or a thread, which would misname it."""
    with worker.job("long") as job:
        job.busy_until(600)
    for name in ("long", "other"):
        with worker.job(name):
            (seen,) = scoreboard.read(board)
        assert (seen.name, seen.until, seen.thread) == (name, 0.0, threading.get_ident())
    job = worker.job("other")

    def hold() -> None:
        with job:
            found.extend(scoreboard.read(board))

    found: list[JobSeen] = []
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert [(seen.name, seen.thread) for seen in found] == [("other", thread.ident)]


def test_jobs_beyond_the_places_leave_none_unused(board: int, worker: Worker) -> None:
    """Whoever comes after a crowd is seen, and what the crowd has done is counted."""
    jobs = [worker.job("crowd") for _ in range(2 * ENTRIES)]
    for job in jobs:
        job.__enter__()
    with worker.job("short"):
        pass  # where many come and go, nothing is left of those who got no place
    jobs[ENTRIES].busy_until(600)  # it has no place yet
    for job in jobs[:ENTRIES]:
        job.__exit__(None, None, None)  # each hands its place on
    assert len(names(board)) == ENTRIES
    assert sum(job.until > 0.0 for job in scoreboard.read(board)) == 1
    for job in reversed(jobs[ENTRIES:]):
        job.__exit__(None, None, None)
    assert names(board) == []
    for _ in range(ENTRIES):
        with worker.job("after"), worker.job("within"):
            assert sorted(names(board)) == ["after", "within"]
    assert worker.jobs.tally()[:2] == (0, 4 * ENTRIES + 1)
    assert sum(worker.jobs.tally().counts) == 4 * ENTRIES + 1


def test_only_what_two_looks_show_alike_is_a_job() -> None:
    """Half of what changes while it is read may be old: with the begin of a job that is over."""
    header = BOARD_ENTRY.pack(0.0, 0.0, 3, b"")

    def page(*entries: tuple[float, float, int, bytes]) -> bytes:
        found = b"".join(BOARD_ENTRY.pack(*entry) for entry in entries)
        return (header + found).ljust(BOARD_BYTES, b"\0")

    steady = (7.0, float("nan"), 2, b"steady")
    before = page((5.0, 600.0, 1, b"long"), steady, (0.0, 0.0, 1, b"over"))
    torn = page((5.0, 0.0, 1, b"next"), steady, (8.0, 0.0, 1, b"new"))
    assert scoreboard.in_both(before, torn) == (JobSeen("steady", 7.0, 0.0, 2),)
    assert scoreboard.in_both(torn, before[:-1]) == ()


def test_a_board_that_its_worker_has_spoilt_harms_nobody(board: int) -> None:
    """It is read with `pread`: cut off it is empty; nonsense on it is no job, or a strange name."""
    os.pwrite(board, BOARD_ENTRY.pack(0.0, 0.0, 2**64 - 1, b""), 0)
    os.pwrite(board, BOARD_ENTRY.pack(float("nan"), 1.0, 1, b"x"), BOARD_ENTRY.size)
    os.pwrite(
        board, BOARD_ENTRY.pack(5.0, float("inf"), 1, b"\x1b[2J\xff\nx"), 2 * BOARD_ENTRY.size
    )
    (seen,) = scoreboard.read(board)
    assert (seen.name, seen.since, seen.until) == ("�[2J��x", 5.0, 0.0)
    os.ftruncate(board, 100)
    assert scoreboard.read(board) == ()


def test_a_ledger_without_a_board_knows_the_same(worker: Worker) -> None:
    """What `dump` asks a worker for does not depend on hang_timeout."""
    plain = alone()
    for each in (plain, worker):
        with each.job("a") as job:
            job.busy_until(60)
            (found,) = each.jobs.in_flight()
            assert isinstance(found, Job)
            assert (found.name, found.until > time.monotonic()) == ("a", True)
            assert found.thread == threading.current_thread().name
        assert each.jobs.tally().done == 1
