"""Spans of jobs, acquires and cancels, as OpenTelemetry's own SDK gets them."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.servers import PostgreSQLServer, postgresql
from tests.supervised import REPO, wait_until
from tests.workers.alone import alone
from workers import tracing
from workers.context import Cancelled, Context
from workers.pool import Pool, PoolTimeout
from workers.pool.aio import AsyncPool
from workers.worker import Worker

__all__ = ["postgresql"]  # fixtures are taken by name

OF_THE_WORKER = {
    "ackvisor.worker.id": "w-7",
    "ackvisor.worker.group": "w",
    "ackvisor.worker.generation": 3,
}


@pytest.fixture(scope="module", autouse=True)
def deadline_thread() -> None:
    """Start the one thread that contexts' deadlines share, which is there to stay."""
    Context.background().with_timeout(3600.0).on_done(lambda: None)()


class Spans:
    """A provider of a test's own, and what it has been given."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.tracer = self.provider.get_tracer("test")

    def __call__(self) -> list[ReadableSpan]:
        """Return the finished spans, and forget them."""
        found = list(self._memory.get_finished_spans())
        self._memory.clear()
        return found

    def one(self) -> ReadableSpan:
        (span,) = self()
        return span


@pytest.fixture
def worker() -> Worker:
    return alone("w-7", generation=3)


@pytest.fixture
def spans(worker: Worker) -> Iterator[Spans]:
    """Everything in this process is traced."""
    made = Spans()
    tracing.instrument(worker, tracer_provider=made.provider)
    yield made
    tracing.uninstrument(worker)
    made.provider.shutdown()


def in_memory() -> Pool:
    """Return a pool of one SQLite connection."""
    connect = partial(sqlite3.connect, ":memory:", check_same_thread=False)
    return Pool(connect, max_open=1, name="main")


@pytest.fixture
def pool() -> Iterator[Pool]:
    with in_memory() as made:
        with made.acquire():
            pass
        yield made


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent_id(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def in_thread(work: Callable[[], object]) -> None:
    """Run it in a thread, which has no trace of its own, to its end."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive()


# -- jobs


def test_a_job_is_a_span_and_the_current_one_in_its_block(worker, spans):
    with worker.job("resize") as job:
        inside = trace.get_current_span().get_span_context()
        with spans.tracer.start_as_current_span("step"):
            pass
    assert not trace.get_current_span().get_span_context().is_valid
    step, span = spans()
    assert (span.name, span.kind, span.parent) == ("resize", SpanKind.INTERNAL, None)
    assert span.context == inside
    assert attributes(span) == {**OF_THE_WORKER, "ackvisor.job.outcome": "done"}
    assert span.status.status_code is StatusCode.UNSET
    assert parent_id(step) == inside.span_id
    assert job.ctx.done
    assert worker.jobs.tally().done == 1


def test_a_job_within_a_span_or_a_job_is_its_child(worker, spans):
    with spans.tracer.start_as_current_span("poll"), worker.job("outer"), worker.job("inner"):
        pass
    inner, outer, poll = spans()
    assert parent_id(inner) == outer.context.span_id
    assert parent_id(outer) == poll.context.span_id


def test_a_failure_is_an_exception_in_the_span(worker, spans):
    with suppress(ValueError), worker.job("resize"):
        raise ValueError("no such image")
    span = spans.one()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "no such image"
    assert attributes(span)["ackvisor.job.outcome"] == "failed"
    assert attributes(span)["error.type"] == "builtins.ValueError"
    (event,) = span.events
    assert (event.attributes or {})["exception.message"] == "no such image"


def test_a_cancelled_job_is_no_error_and_has_the_cause(worker, spans):
    with suppress(Cancelled), worker.job("resize") as job:
        worker.ctx.cancel("stop")
        job.ctx.check()
    span = spans.one()
    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()
    assert attributes(span) == {
        **OF_THE_WORKER,
        "ackvisor.job.outcome": "cancelled",
        "ackvisor.cancel.cause": "stop",
    }


def test_tasks_have_their_jobs_each(worker, spans):
    """What is current in one task is nothing to another."""

    async def one(name: str, turns: int) -> None:
        with worker.job(name):
            for _ in range(turns):
                await asyncio.sleep(0)
            with spans.tracer.start_as_current_span(f"step of {name}"):
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(one("a", 1), one("b", 2))

    asyncio.run(both())
    found = {span.name: span for span in spans()}
    for name in ("a", "b"):
        assert found[name].parent is None
        assert parent_id(found[f"step of {name}"]) == found[name].context.span_id


def test_an_exporter_that_fails_costs_no_job(worker, caplog):
    """Whatever happens in there: it is logged once, and the work goes on."""

    class Broken(SimpleSpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("the collector's fault")

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Broken(SpanExporter()))
    tracing.instrument(worker, tracer_provider=provider)
    try:
        with in_memory() as pool:
            for _ in range(2):
                with worker.job("resize") as job, pool.acquire(job.ctx) as conn:
                    conn.execute("select 1")
    finally:
        tracing.uninstrument(worker)
    assert worker.jobs.tally().done == 2
    assert worker.jobs.tally().in_flight == 0
    assert [record.message for record in caplog.records] == ["a span could not be made"]


def test_without_a_provider_jobs_are_as_ever(worker):
    """A library may import the API for those who want no spans."""
    tracing.instrument(worker)
    try:
        with worker.job("resize") as job:
            assert not isinstance(job, tracing.TracedJob)
            assert not trace.get_current_span().get_span_context().is_valid
            assert tracing.context_of(job.ctx) is None
    finally:
        tracing.uninstrument(worker)
    assert worker.jobs.tally().done == 1


# -- the trace in a context's values


def test_a_thread_goes_on_with_the_trace_of_the_context_that_it_is_handed(worker, spans):
    with worker.job("resize") as job:
        ctx = job.ctx.with_timeout(60.0)  # whatever is made of it carries the same

        def step() -> None:
            assert not trace.get_current_span().get_span_context().is_valid
            with tracing.attached(ctx), spans.tracer.start_as_current_span("attached"):
                pass
            assert not trace.get_current_span().get_span_context().is_valid
            spans.tracer.start_span("by hand", context=tracing.context_of(ctx)).end()

        in_thread(step)
    attached, by_hand, span = spans()
    assert {parent_id(attached), parent_id(by_hand)} == {span.context.span_id}


def test_a_task_goes_on_with_the_trace_of_the_context_that_it_is_handed(worker, spans):
    async def step(ctx: Context) -> None:
        with tracing.attached(ctx):
            await asyncio.sleep(0)
            spans.tracer.start_span("step").end()

    with worker.job("resize") as job:
        ctx = job.ctx
        in_thread(lambda: asyncio.run(step(ctx)))
    step_span, span = spans()
    assert parent_id(step_span) == span.context.span_id


def test_a_context_that_carries_nothing_changes_nothing(spans):
    ctx = Context.background().with_cancel()
    assert tracing.context_of(ctx) is None
    with spans.tracer.start_as_current_span("outer"), tracing.attached(ctx):
        spans.tracer.start_span("inner").end()
    inner, outer = spans()
    assert parent_id(inner) == outer.context.span_id


def test_any_context_can_be_made_to_carry_the_trace(spans):
    with spans.tracer.start_as_current_span("outer"):
        ctx = tracing.with_current(Context.background())

    def step() -> None:
        with tracing.attached(ctx):
            spans.tracer.start_span("inner").end()

    in_thread(step)
    outer, inner = spans()
    assert parent_id(inner) == outer.context.span_id


# -- acquires


def waiting_acquire(pool: Pool, work: Callable[[], object]) -> None:
    """Have `work` wait in a thread of its own for the only connection, and then get it."""
    conn = pool.get()
    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: pool.stats().waiting == 1, "somebody waits")
    pool.put(conn)
    thread.join(20.0)
    assert not thread.is_alive()


def test_an_acquire_that_opens_a_connection_is_a_span(worker, spans):
    with (
        in_memory() as pool,
        worker.job("resize") as job,
        pool.acquire(job.ctx),
    ):
        pass
    acquire, span = spans()
    assert (acquire.name, acquire.kind) == ("acquire main", SpanKind.INTERNAL)
    assert parent_id(acquire) == span.context.span_id
    assert attributes(acquire) == {
        **OF_THE_WORKER,
        "db.client.connection.pool.name": "main",
        "db.system.name": "sqlite",
        "ackvisor.acquire.opened": True,
    }
    assert span.start_time <= acquire.start_time <= acquire.end_time <= span.end_time


def test_what_is_had_at_once_is_no_span(spans, pool):
    spans()
    with pool.acquire():
        pass
    with pool.acquire(Context.background().with_cancel()):
        pass
    pool.put(pool.get())
    assert spans() == []


def test_an_acquire_that_waits_is_a_span_of_the_contexts_trace(worker, spans, pool):
    spans()
    with worker.job("resize") as job:
        ctx = job.ctx

        def work() -> None:
            with pool.acquire(ctx):
                pass

        waiting_acquire(pool, work)
    acquire, span = spans()
    assert acquire.name == "acquire main"
    assert not attributes(acquire)["ackvisor.acquire.opened"]
    assert parent_id(acquire) == span.context.span_id


def test_the_nearest_span_of_the_same_trace_is_the_parent(worker, spans):
    """That of the context where there is no other, or where the current one is of another trace."""

    def parent_of(acquire: Callable[[], object]) -> int | None:
        acquire()
        (span,) = (span for span in spans() if span.name == "acquire main")
        return parent_id(span)

    def open_one(ctx: Context) -> None:
        with in_memory() as pool, pool.acquire(ctx):
            pass

    with worker.job("resize") as job:
        ctx, own = job.ctx, trace.get_current_span().get_span_context().span_id
        with spans.tracer.start_as_current_span("step") as step:
            assert parent_of(lambda: open_one(ctx)) == step.get_span_context().span_id
        elsewhere = trace.set_span_in_context(trace.INVALID_SPAN)
        with spans.tracer.start_as_current_span("other", context=elsewhere):
            assert parent_of(lambda: open_one(ctx)) == own


def test_a_time_out_is_an_error_in_the_span(spans, pool):
    spans()
    with pool.acquire(), pytest.raises(PoolTimeout):
        pool.get(timeout=0.0)
    span = spans.one()
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "workers.pool.errors.PoolTimeout"
    assert "\n" not in (span.status.description or "")


def test_a_wait_that_is_cancelled_is_no_error(spans, pool):
    spans()
    ctx = Context.background().with_cancel()

    def wait() -> None:
        with suppress(Cancelled):
            pool.get(ctx)

    with pool.acquire():
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: pool.stats().waiting == 1, "somebody waits")
        ctx.cancel("stop")
        thread.join(20.0)
    span = spans.one()
    assert span.status.status_code is StatusCode.UNSET
    assert attributes(span)["ackvisor.cancel.cause"] == "stop"


# -- queries that are cancelled

ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"


def test_a_cancelled_query_is_a_span_of_the_trace(worker, spans, pool):
    spans()
    with pytest.raises(Cancelled), worker.job("report") as job, pool.acquire(job.ctx) as conn:
        threading.Timer(0.05, lambda: worker.ctx.cancel("stop")).start()
        conn.execute(ENDLESS).fetchone()
    cancel, span = spans()
    assert (cancel.name, cancel.kind) == ("cancel main", SpanKind.INTERNAL)
    assert parent_id(cancel) == span.context.span_id
    assert attributes(cancel)["db.system.name"] == "sqlite"
    assert attributes(cancel)["ackvisor.cancel.cause"] == "stop"
    assert attributes(cancel)["ackvisor.cancel.attempts"] >= 1
    assert attributes(cancel)["ackvisor.cancel.cut"] is False
    assert cancel.end_time > cancel.start_time > span.start_time


def test_what_a_close_cancels_is_a_span_too(spans):
    pool = in_memory()
    begun = threading.Event()

    def work() -> None:
        with suppress(Exception), pool.acquire() as conn:
            begun.set()
            conn.execute(ENDLESS).fetchone()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(20.0)
    assert pool.close(0.0, last_grace=20.0).leaked
    thread.join(20.0)
    (cancel,) = (span for span in spans() if span.name == "cancel main")
    assert attributes(cancel)["ackvisor.cancel.cause"] == "the pool was closed"


def test_postgresql_cancels_are_calls_to_a_server(worker, spans, postgresql: PostgreSQLServer):
    """And where the context ends between two statements, no query was cancelled."""
    with Pool.from_url(postgresql.url(), max_open=1, name="main") as pool:
        with pool.acquire(worker.ctx) as conn:
            conn.execute("select 1")
        with suppress(Cancelled), worker.job("idle") as job, pool.acquire(job.ctx):
            job.ctx.cancel("enough")
        spans()
        with pytest.raises(Cancelled), worker.job("report") as job, pool.acquire(job.ctx) as conn:
            threading.Timer(0.05, lambda: worker.ctx.cancel("stop")).start()
            conn.execute("select pg_sleep(60)")
        cancel, span = spans()
    assert (cancel.name, cancel.kind) == ("cancel main", SpanKind.CLIENT)
    assert attributes(cancel)["db.system.name"] == "postgresql"
    assert parent_id(cancel) == span.context.span_id


def test_an_async_pool_has_the_same_spans(worker, spans, postgresql: PostgreSQLServer):
    async def work() -> None:
        async with AsyncPool.from_url(postgresql.url(), max_open=1, name="main") as pool:
            with worker.job("open") as job:
                async with pool.acquire(job.ctx) as conn:
                    await conn.execute("select 1")
            with pytest.raises(PoolTimeout):
                async with pool.acquire():
                    await pool.get(timeout=0.0)
            with pytest.raises(Cancelled), worker.job("report") as job:
                async with pool.acquire(job.ctx) as conn:
                    asyncio.get_running_loop().call_later(0.05, worker.ctx.cancel, "stop")
                    await conn.execute("select pg_sleep(60)")

    asyncio.run(work())
    opened, opening, timed_out, cancel, report = spans()
    assert [span.name for span in (opened, timed_out, cancel)] == [
        "acquire main", "acquire main", "cancel main",
    ]  # fmt: skip
    assert parent_id(opened) == opening.context.span_id
    assert attributes(opened)["ackvisor.acquire.opened"]
    assert timed_out.status.status_code is StatusCode.ERROR
    assert parent_id(cancel) == report.context.span_id
    assert attributes(cancel)["ackvisor.cancel.cause"] == "stop"
    assert attributes(report)["ackvisor.job.outcome"] == "cancelled"


# -- who does not want it


def test_who_has_no_opentelemetry_loads_nothing_of_it():
    """It is installed here, and still neither it nor what is ours for it is imported."""
    program = "import sys, workers.runtime, workers.pool.aio, workers.jobs; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "workers.runtime" in loaded
    assert [name for name in loaded if "opentelemetry" in name or "tracing" in name] == []


def test_a_missing_api_names_its_extra():
    program = "import sys; sys.modules['opentelemetry'] = None; import workers.tracing"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert 'pip install "ackvisor[otel]"' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("unwanted", ["ackvisor", "django, ackvisor", "*"])
def test_it_is_turned_off_as_any_instrumentation(worker, monkeypatch, unwanted):
    monkeypatch.setenv("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", unwanted)
    tracing.begin(worker)
    assert worker.tracing is None


def test_time_is_told_on_the_wall_clock(worker, spans):
    """What was measured on the monotonic clock, too."""
    before = time.time_ns()
    with in_memory() as pool, pool.acquire():
        pass
    span = spans.one()
    assert before - 1_000_000 <= span.start_time <= span.end_time <= time.time_ns()
