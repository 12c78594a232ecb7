"""What user code is handed: its Worker, and a Job for each unit of work in flight."""

from __future__ import annotations

__all__ = ["Job", "Worker"]

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from supervisor.protocol import JOB_SECONDS
from workers.context import Cancelled, Context
from workers.pool import Pool
from workers.waitgroup import WaitGroup

if TYPE_CHECKING:
    from workers.metrics import Metrics

_Outcome = Literal["done", "failed", "cancelled"]


class Job:
    """One unit of work in flight. Use as a `with` block, from any thread or task.

    Its context ends with the block, or when the worker's stop runs out of time for it.
    """

    __slots__ = ("_ledger", "ctx", "name", "since", "thread")

    def __init__(self, ledger: _Ledger, name: str, ctx: Context) -> None:
        self._ledger = ledger
        self.name = name
        self.ctx = ctx
        self.since = time.monotonic()
        self.thread = threading.current_thread().name

    def __enter__(self) -> Self:
        self._ledger.begin(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            outcome: _Outcome = "done"
        else:
            outcome = "failed" if issubclass(kind, Exception) else "cancelled"
        self.ctx.cancel()
        self._ledger.end(self, outcome)


class Tally(NamedTuple):
    """What became of the jobs, all at the same moment."""

    in_flight: int
    done: int
    failed: int
    cancelled: int
    counts: tuple[int, ...]  # by how long they took: those of JOB_SECONDS, and above
    seconds: float


class _Ledger:
    """The jobs in flight and how the others came out. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: list[Context] = []  # contexts that end when nothing is in flight
        self._jobs: dict[int, Job] = {}
        self.outcomes: dict[_Outcome, int] = {"done": 0, "failed": 0, "cancelled": 0}
        self._counts = [0] * (len(JOB_SECONDS) + 1)
        self._seconds = 0.0

    def begin(self, job: Job) -> None:
        with self._lock:
            self._jobs[id(job)] = job

    def end(self, job: Job, outcome: _Outcome) -> None:
        seconds = time.monotonic() - job.since
        bucket = bisect_left(JOB_SECONDS, seconds)
        with self._lock:
            del self._jobs[id(job)]
            self.outcomes[outcome] += 1
            self._counts[bucket] += 1
            self._seconds += seconds
            waiters = [] if self._jobs else self._waiters
            if waiters:
                self._waiters = []
        for waiter in waiters:
            waiter.cancel()

    def in_flight(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def tally(self) -> Tally:
        with self._lock:
            return Tally(
                len(self._jobs),
                self.outcomes["done"],
                self.outcomes["failed"],
                self.outcomes["cancelled"],
                tuple(self._counts),
                self._seconds,
            )

    def wait(self, ctx: Context) -> None:
        """Return when nothing is in flight, or when the context ends."""
        with self._lock:
            if not self._jobs:
                return
            waiter = ctx.with_cancel()
            self._waiters.append(waiter)
        waiter.wait()


class Worker:
    """This worker process, as user code sees it. Every method may be called from any thread.

    Attributes:
        id: `GROUP-NUMBER`, never used twice while the supervisor runs.
        group: the name of its group.
        generation: which generation of code and configuration it belongs to.
        accepting: ends when no new work may be taken. Wait for it, or look at it before each job.
        ctx: ends when work in flight is out of time (`abort_margin` before the stop's deadline).
        pools: its connection pools by name.
        options: the group's `options`, as they stand in the configuration.
        sockets: shared listening sockets by name.
        wg: a WaitGroup for its threads and tasks; the worker is drained when it is empty.
        log: a structlog logger that names the worker in each line.
        metrics: its own metrics, which `/metrics` shows summed over the workers of a group.
    """

    def __init__(
        self,
        *,
        id: str,  # noqa: A002  # INTERFACE's name
        group: str,
        generation: int,
        options: Mapping[str, Any],
        pools: dict[str, Pool],
        log: Any,
        on_ready: Callable[[], None],
    ) -> None:
        self.id = id
        self.group = group
        self.generation = generation
        self.ctx = Context.background().with_cancel()
        self.accepting = self.ctx.with_cancel()
        self.options = options
        self.pools = MappingProxyType(pools)
        self.sockets: Mapping[str, Any] = MappingProxyType({})
        self.wg = WaitGroup()
        self.log = log
        self._on_ready = on_ready
        self._ready = threading.Lock()
        self._lock = threading.Lock()
        self._metrics: Metrics | None = None
        self.jobs = _Ledger()

    def ready(self) -> None:
        """Say that this worker serves. `run` must call it; calling it again changes nothing."""
        if self._ready.acquire(blocking=False):
            self._on_ready()

    def job(self, name: str) -> Job:
        """Return a job to be used as a `with` block; it counts as in flight while that lasts."""
        return Job(self.jobs, name, self.ctx.with_cancel())

    @property
    def metrics(self) -> Metrics:
        """Where metrics of the application's own are declared; see `workers.metrics`."""
        with self._lock:
            if self._metrics is None:
                from workers.metrics import Metrics

                self._metrics = Metrics(self.log)
            return self._metrics

    @property
    def has_metrics(self) -> bool:
        """Whether anybody has asked for `metrics`."""
        return self._metrics is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether the worker has been told to end."""
        return isinstance(self.accepting.err, Cancelled)

    def __repr__(self) -> str:
        return f"<Worker {self.id} of generation {self.generation}>"
