"""Jobs as user code sees them: their contexts, what is counted of them, who waits for their end."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.workers.alone import alone
from workers.context import Context
from workers.worker import Job, Worker


@pytest.fixture
def worker() -> Worker:
    """A worker without a supervisor."""
    return alone()


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Have threads give way as often as the interpreter allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_a_jobs_context_is_one_and_ends_with_its_block(worker: Worker) -> None:
    """Whenever it is asked for: before the block, in it, or when all is over."""
    early, late = worker.job("early"), worker.job("late")
    before = early.ctx
    with early, late:
        assert early.ctx is before
        assert not before.done
    assert before.done
    assert late.ctx is late.ctx
    assert late.ctx.done


def test_a_jobs_context_ends_with_the_workers(worker: Worker) -> None:
    """Also where the job has asked for it too late, and with the same cause."""
    with worker.job("job") as job:
        worker.ctx.cancel("stop")
        assert job.ctx.done
        assert job.ctx.cause == "stop"


@pytest.mark.usefixtures("many_switches")
def test_threads_that_ask_at_once_get_the_same_context(worker: Worker) -> None:
    """It ends, even if the job has ended while it was being made."""
    for _ in range(100):
        found: list[Context] = []
        gate = threading.Barrier(3)

        def ask(job: Job, gate: threading.Barrier, found: list[Context]) -> None:
            gate.wait(30)
            found.append(job.ctx)

        with worker.job("job") as job:
            threads = [threading.Thread(target=ask, args=(job, gate, found)) for _ in range(2)]
            for thread in threads:
                thread.start()
            gate.wait(30)
        for thread in threads:
            thread.join()
        assert found == [job.ctx] * 2
        assert job.ctx.done


@pytest.mark.usefixtures("many_switches")
def test_every_job_is_counted_once(worker: Worker) -> None:
    """Quick or slow, done, failed or cancelled, of however many threads."""

    def work() -> None:
        for n in range(300):
            with suppress(KeyError, KeyboardInterrupt), worker.job("job") as job:
                if n % 3 == 0:
                    job.since -= 7.0  # it takes longer
                if n % 3 == 1:
                    raise KeyError if n % 2 else KeyboardInterrupt

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = [worker.jobs.tally() for _ in range(50)]
    for thread in threads:
        thread.join()
    seen.append(worker.jobs.tally())
    for earlier, later in itertools.pairwise(seen):
        assert sum(earlier.counts) == earlier.done + earlier.failed + earlier.cancelled
        assert all(a <= b for a, b in zip(earlier[1:4], later[1:4], strict=True))
        assert earlier.in_flight <= len(threads)
    last = seen[-1]
    assert last[:4] == (0, 800, 200, 200)
    assert sum(last.counts) == 1200
    assert last.seconds >= 400 * 7.0


def test_to_wait_for_jobs_is_to_wait_for_the_last_one(worker: Worker) -> None:
    """Whoever waits returns when nothing is in flight, or when its context has ended."""
    worker.jobs.until_idle(Context.background()).wait()  # nothing has begun
    first, second = worker.job("first").__enter__(), worker.job("second").__enter__()
    patience = Context.background().with_timeout(0.01)
    worker.jobs.until_idle(patience).wait()
    assert patience.done
    waiters = [
        threading.Thread(target=worker.jobs.until_idle(Context.background()).wait) for _ in range(3)
    ]
    for waiter in waiters:
        waiter.start()
    first.__exit__(None, None, None)
    assert all(waiter.is_alive() for waiter in waiters)
    second.__exit__(None, None, None)
    for waiter in waiters:
        waiter.join(30)
    assert not any(waiter.is_alive() for waiter in waiters)


def test_a_block_in_itself_is_refused(worker: Worker) -> None:
    """Nor does an end count twice: a place that nobody leaves would be a hang."""
    with worker.job("job") as job, pytest.raises(RuntimeError, match="in flight already"):
        job.__enter__()
    with pytest.raises(RuntimeError, match="ended before"):
        job.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="not in flight"):
        worker.job("another").__exit__(None, None, None)
    assert worker.jobs.tally()[:4] == (0, 1, 0, 0)
