"""Spans for OpenTelemetry: jobs, acquires that had to wait, queries that were cancelled.

A worker turns it on by itself when its application has imported `opentelemetry.trace`; nobody else
loads this module, or OpenTelemetry. It speaks to the API only: which spans are kept, and where they
go, is what the application has told its provider. Without a provider there are no spans.

The trace travels in the values of contexts: `job.ctx`, and every context made from it, carries the
job's span, so whoever is handed one can go on with the trace in another thread or task:

    with tracing.attached(job.ctx):
        ...  # spans made here are the job's children

Whatever goes wrong in an exporter or a sampler is logged once, and changes nothing of the work.
"""

from __future__ import annotations

__all__ = ["attached", "context_of", "instrument", "uninstrument", "with_current"]

import os
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

try:
    from opentelemetry import context as otel_context
    from opentelemetry import trace
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f'tracing needs {exc.name}, which is not installed: pip install "ackvisor[otel]"'
    ) from exc

from workers.context import Context
from workers.pool.errors import PoolError
from workers.pool.shell import Shell
from workers.worker import Job

if TYPE_CHECKING:
    from workers.pool.protocols import ContextLike, PoolLike
    from workers.worker import Ledger, Outcome, Worker

NAME = "ackvisor"  # of the instrumentation, for whoever wants to turn it off or filter by it
DISABLED = "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS"  # names, with commas between them

# OpenTelemetry's `db.system.name`; what is not in here is `other_sql`.
_SYSTEMS = frozenset({"mysql", "postgresql", "redis", "sqlite"})
_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
_SERVER_ERROR = 500

_Attributes = dict[str, str | bool | int | float]


class _Carried:
    """What a context carries. A job's has nothing yet before the job has begun."""

    __slots__ = ("context",)

    def __init__(self, context: otel_context.Context | None) -> None:
        self.context = context


# --- for everybody --------------------------------------------------------------------------------


def instrument(
    worker: Worker | None = None, *, tracer_provider: trace.TracerProvider | None = None
) -> None:
    """Turn spans on: for every pool of this process, and for the jobs of *worker*.

    A worker does it by itself, see above; a program that uses pools without a supervisor calls it
    once. Calling it again replaces what was said before.

    Args:
        worker: whose jobs become spans, and whose id, group and generation every span carries.
        tracer_provider: who makes the spans; default OpenTelemetry's global one, also when that is
            set later.
    """
    tracing = Tracing(worker, tracer_provider)
    Shell.tracing = tracing
    if worker is not None:
        worker.tracing = tracing


def uninstrument(worker: Worker | None = None) -> None:
    """Turn spans off: those of pools, and of the jobs of *worker* that begin from now on."""
    Shell.tracing = None
    if worker is not None:
        worker.tracing = None


def context_of(ctx: ContextLike) -> otel_context.Context | None:
    """Return OpenTelemetry's context that *ctx* carries, None where it carries none.

    None means the current context wherever OpenTelemetry takes one, so the answer can be handed to
    `tracer.start_span(…, context=…)` or `propagate.inject(…, context=…)` as it is.
    """
    carried: _Carried | None = ctx.value(_Carried) if isinstance(ctx, Context) else None
    return None if carried is None else carried.context


def with_current(ctx: Context) -> Context:
    """Return a child of *ctx* that carries OpenTelemetry's context that is current here."""
    return ctx.with_value(_Carried, _Carried(otel_context.get_current()))


@contextmanager
def attached(ctx: ContextLike) -> Iterator[None]:
    """Go on with the trace that *ctx* carries, in this thread or task, as long as the block lasts.

    Where it carries none, the block changes nothing.
    """
    context = context_of(ctx)
    if context is None:
        yield
        return
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)


# --- for the worker -------------------------------------------------------------------------------


def begin(worker: Worker) -> None:
    """Instrument a worker whose application has OpenTelemetry, unless it does not want that."""
    unwanted = {name.strip() for name in os.environ.get(DISABLED, "").split(",")}
    if not unwanted & {NAME, "*"}:
        instrument(worker)


class TracedJob(Job):
    """A job that is a span: the current one in its block, and the one that its context carries."""

    __slots__ = (
        "_attributes",
        "_carried",
        "_kind",
        "_parent",
        "_span_name",
        "_token",
        "_tracing",
        "failure",
        "span",
    )

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        ctx: Context,
        tracing: Tracing,
        *,
        span_name: str = "",
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
        attributes: Mapping[str, str | bool | int | float] | None = None,
        parent: otel_context.Context | None = None,
    ) -> None:
        self._carried = _Carried(None)
        super().__init__(ledger, name, ctx.with_value(_Carried, self._carried))
        self._tracing = tracing
        self._span_name = span_name or name
        self._kind = kind
        self._attributes = attributes
        self._parent = parent
        self.span: trace.Span | None = None
        self._token: Any = None
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._begin()
        except Exception as exc:
            self._tracing.complain(exc)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._end(error)
        except Exception as exc:
            self._tracing.complain(exc)
        finally:
            super().__exit__(kind, error, traceback)  # last: a drain waits for the span, too

    def _begin(self) -> None:
        tracing = self._tracing
        own = tracing.attributes
        self.span = span = tracing.tracer.start_span(
            self._span_name,
            self._parent,
            self._kind,
            {**own, **self._attributes} if self._attributes else own,
        )
        self._carried.context = context = trace.set_span_in_context(span, self._parent)
        self._token = otel_context.attach(context)

    def _end(self, error: BaseException | None) -> None:
        span, token = self.span, self._token
        if span is None or token is None:
            return
        self._token = None
        otel_context.detach(token)
        try:
            if span.is_recording():
                outcome: Outcome = "done"
                if error is not None:
                    outcome = "failed" if isinstance(error, Exception) else "cancelled"
                    _explain(span, self.failure or error)
                span.set_attribute("ackvisor.job.outcome", outcome)
        finally:
            span.end()


class Tracing:
    """Makes the spans of one process. Every method: any thread."""

    def __init__(self, worker: Worker | None, provider: trace.TracerProvider | None) -> None:
        self.tracer = trace.get_tracer(NAME, tracer_provider=provider)
        self._has_provider = provider is not None
        self.attributes: _Attributes = {}
        self._has_complained = False
        if worker is not None:
            self.attributes = {
                "ackvisor.worker.id": worker.id,
                "ackvisor.worker.group": worker.group,
                "ackvisor.worker.generation": worker.generation,
            }

    @property
    def has_provider(self) -> bool:
        """Whether anybody wants spans: libraries import the API for those who do not, too."""
        if not self._has_provider:
            provider = trace.get_tracer_provider()
            self._has_provider = type(provider) is not trace.ProxyTracerProvider
        return self._has_provider

    # -- jobs

    def job(self, worker: Worker, name: str) -> Job:
        """Return a job of user code's."""
        if not self.has_provider:
            return Job(worker.jobs, name, worker.ctx)
        return TracedJob(worker.jobs, name, worker.ctx, self)

    def attempt(self, worker: Worker, name: str, number: int, attempt: int) -> Job:
        """Return an attempt at a job of the table."""
        if not self.has_provider:
            return self.job(worker, name)
        return TracedJob(
            worker.jobs,
            name,
            worker.ctx,
            self,
            span_name="process jobs",
            kind=trace.SpanKind.CONSUMER,
            attributes={
                "messaging.system": NAME,
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": "jobs",
                "messaging.message.id": str(number),
                "ackvisor.job.attempt": attempt,
            },
        )

    def request(self, worker: Worker, name: str, scope: MutableMapping[str, Any]) -> Job:
        """Return an HTTP request that goes on with the trace that its headers name.

        Were it not for the headers, an instrumentation of the application's own would take the job
        for the parent, and never look at them.
        """
        if not self.has_provider:
            return self.job(worker, name)
        from opentelemetry import propagate  # 10 ms, for those who have requests only

        headers = {
            key.decode("latin-1").lower(): value.decode("latin-1")
            for key, value in scope.get("headers", ())
        }
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        attributes: _Attributes = {
            "http.request.method": method,
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
            "network.protocol.version": scope.get("http_version", "1.1"),
        }
        if method == "_OTHER":
            attributes["http.request.method_original"] = scope["method"]
        if scope.get("client"):
            attributes["client.address"] = scope["client"][0]
        if "user-agent" in headers:
            attributes["user_agent.original"] = headers["user-agent"]
        return TracedJob(
            worker.jobs,
            name,
            worker.ctx,
            self,
            span_name="HTTP" if method == "_OTHER" else method,
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            parent=propagate.extract(headers),
        )

    def failed(self, job: Job, error: BaseException) -> None:
        """Take what a job's failure was, where what leaves its block does not say."""
        if isinstance(job, TracedJob):
            job.failure = error

    def answered(self, job: Job, status: int) -> None:
        """Take the status of a request's response."""
        span = job.span if isinstance(job, TracedJob) else None
        if span is not None and span.is_recording():  # a 503 may come after the end of the job
            span.set_attribute("http.response.status_code", status)
            if status >= _SERVER_ERROR:
                span.set_attribute("error.type", str(status))
                span.set_status(trace.StatusCode.ERROR)

    def ids(self) -> dict[str, str]:
        """Return the ids of the current span, under OpenTelemetry's names for logs that are not its own."""
        current = trace.get_current_span().get_span_context()
        if not current.is_valid:
            return {}
        return {
            "trace_id": trace.format_trace_id(current.trace_id),
            "span_id": trace.format_span_id(current.span_id),
        }

    # -- pools: told afterwards, since it is known then only whether there was anything to tell

    def acquired(
        self,
        pool: PoolLike,
        ctx: ContextLike | None,
        since: float,
        error: BaseException | None,
        *,
        opened: bool = False,
    ) -> None:
        """Make the span of an acquire that had to wait, or came to nothing."""
        self._tell(
            f"acquire {pool.name}",
            trace.SpanKind.INTERNAL,
            ctx,
            since,
            {**self._of_pool(pool), "ackvisor.acquire.opened": opened},
            error=error,
        )

    def cancelled(
        self, pool: PoolLike, ctx: ContextLike | None, since: float, times: int, *, cut: bool
    ) -> None:
        """Make the span of a query that was cancelled: from the first cancel to the loan's end."""
        cause = None if ctx is None else ctx.cause
        self._tell(
            f"cancel {pool.name}",
            trace.SpanKind.INTERNAL if pool.is_local else trace.SpanKind.CLIENT,
            ctx,
            since,
            {
                **self._of_pool(pool),
                "ackvisor.cancel.attempts": times,
                "ackvisor.cancel.cut": cut,
                "ackvisor.cancel.cause": "the pool was closed" if cause is None else str(cause),
            },
        )

    def _of_pool(self, pool: PoolLike) -> _Attributes:
        system = pool.system
        return {
            **self.attributes,
            "db.client.connection.pool.name": pool.name,
            "db.system.name": system if system in _SYSTEMS else "other_sql",
        }

    def _tell(
        self,
        name: str,
        kind: trace.SpanKind,
        ctx: ContextLike | None,
        since: float,
        attributes: _Attributes,
        *,
        error: BaseException | None = None,
    ) -> None:
        """Make a span that began at `since` (monotonic) and ends now."""
        if not self.has_provider:
            return
        end = time.time_ns()
        start = end - int((time.monotonic() - since) * 1e9)
        try:
            span = self.tracer.start_span(name, _parent(ctx), kind, attributes, start_time=start)
            if error is not None and span.is_recording():
                _explain(span, error)
            span.end(end)
        except Exception as exc:
            self.complain(exc)

    def complain(self, error: Exception) -> None:
        """Log the first failure of whoever makes or exports the spans."""
        if not self._has_complained:
            self._has_complained = True
            import logging

            logging.getLogger(__name__).warning("a span could not be made", exc_info=error)


def _parent(ctx: ContextLike | None) -> otel_context.Context | None:
    """Return whose child a span is: the current span's, or that of what the context carries.

    The current span is the nearer one of the two as long as it belongs to the same trace.
    """
    carried = None if ctx is None else context_of(ctx)
    if carried is None:
        return None
    current = trace.get_current_span().get_span_context()
    if current.trace_id == trace.get_current_span(carried).get_span_context().trace_id:
        return None
    return carried


def _explain(span: trace.Span, error: BaseException) -> None:
    """Say in a span why it did not go well. To be cancelled is no error."""
    if isinstance(error, Exception):
        kind = type(error)
        span.record_exception(error)
        span.set_status(trace.StatusCode.ERROR, _in_short(error))
        span.set_attribute("error.type", f"{kind.__module__}.{kind.__qualname__}")
    else:
        span.set_attribute("ackvisor.cancel.cause", str(getattr(error, "cause", None) or error))


def _in_short(error: Exception) -> str:
    """Return the first line of what it says: a pool's errors go on with who has its connections."""
    text = str(error)
    return text.partition("\n")[0] if isinstance(error, PoolError) else text
