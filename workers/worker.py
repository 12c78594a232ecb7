"""What user code is handed: its Worker, and a Job for each unit of work in flight."""

from __future__ import annotations

__all__ = ["Job", "Ledger", "Outcome", "Place", "Tally", "Worker"]

import math
import threading
from _thread import get_ident
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from time import monotonic
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

from supervisor.protocol import DEATHS, JOB_SECONDS
from workers.context import Cancelled, Context
from workers.pool.stacks import thread_name
from workers.waitgroup import WaitGroup

if TYPE_CHECKING:
    import socket

    from supervisor.protocol import Death
    from workers.metrics import Metrics

Outcome = Literal["done", "failed", "cancelled"]

MAX_DELAY = 365 * 86400.0  # seconds


class Job:
    """One unit of work in flight. Use as a `with` block, from any thread or task.

    Its context ends with the block, or when the worker's stop runs out of time for it.
    Where the group has a `hang_timeout`, that is how long the block may take; see `busy_until`.
    """

    __slots__ = (
        "_above",
        "_ctxs",
        "_is_over",
        "_ledger",
        "ident",
        "name",
        "number",
        "place",
        "since",
        "until",
    )

    def __init__(self, ledger: Ledger, name: str, above: Context) -> None:
        self._ledger = ledger
        self._above = above
        self._ctxs: list[Context] = []  # the first element is its context, once somebody wants it
        self._is_over = False
        self.name = name
        self.since = 0.0  # monotonic; this and the ident as of its begin
        self.until = 0.0  # what busy_until has declared
        self.ident = 0  # of the thread that has it in hand
        self.number: int  # of those with lines in the log; there once it has one
        self.place = NOWHERE  # the ledger writes this

    @property
    def ctx(self) -> Context:
        """Its context. It is made when it is first asked for: many a job never does."""
        ctxs = self._ctxs
        if not ctxs:
            ctxs.append(self._above.with_cancel())  # atomic: where two race, the first one counts
            # Who ends the job says so and then looks for a context; here it is the other way round.
            # So one of the two sees the other, and no context outlives its job.
            if self._is_over:
                ctxs[0].cancel()
        return ctxs[0]

    @property
    def thread(self) -> str:
        """The name of the thread that has it in hand."""
        return thread_name(self.ident)

    @property
    def is_in_flight(self) -> bool:
        """Whether it has begun and not ended."""
        return self.place.job is self

    def busy_until(self, limit: float | Context) -> None:
        """Declare that this job is going to be busy for a while. Any thread.

        A job may take `hang_timeout` seconds from its begin. One that needs longer says so itself,
        before it does: it counts as hung when that time *and* the one declared last have passed. The
        last call counts, also where it allows less than the one before: so a job of many steps can
        allow each of them its own time, and a step that hangs is found as soon as that is over.
        Without a `hang_timeout` nothing is watched, and this changes nothing.

        Args:
            limit: seconds from now, or a context: until its deadline.

        Raises:
            ValueError: the seconds are negative or not finite, or the context has no deadline.
            RuntimeError: the job is not in flight: it has not begun, or has ended.
        """
        self._ledger.extend(self, _moment(limit))

    def __enter__(self) -> Self:
        if self.place.job is self:
            raise RuntimeError(f"job {self.name!r} is in flight already: make one for each block")
        self.since = monotonic()
        self.ident = get_ident()
        self._ledger.begin(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.place.job is not self:
            raise RuntimeError(f"job {self.name!r} is not in flight: it has ended before")
        if kind is None:
            outcome: Outcome = "done"
        else:
            outcome = "failed" if issubclass(kind, Exception) else "cancelled"
        self._is_over = True
        if self._ctxs:
            self._ctxs[0].cancel()
        self._ledger.end(self, outcome)


class Place:
    """Where one job at a time stands, and how many quick ones have stood there.

    Whoever has taken it from the ledger's idle ones owns it, and writes to it without a lock.
    """

    __slots__ = ("entry", "ident", "job", "name", "quick", "seconds")

    def __init__(self) -> None:
        self.job: Job | None = None  # who has it
        self.quick = 0  # jobs that were done within the first of JOB_SECONDS
        self.seconds = 0.0  # what these took
        # Of a scoreboard, which writes these. Where its entry is: 0 where none is wanted, below
        # that where none was free; and whose name and thread stand there.
        self.entry = 0
        self.name = ""
        self.ident = 0


NOWHERE = Place()  # of jobs that have not begun; nobody ever stands there
_QUICK = JOB_SECONDS[0]


class Tally(NamedTuple):
    """What became of the jobs. One that ends while this is made may be in flight and over, too."""

    in_flight: int
    done: int
    failed: int
    cancelled: int
    counts: tuple[int, ...]  # by how long they took: those of JOB_SECONDS, and above
    seconds: float


class Ledger:
    """The jobs in flight, and how the others came out. Every method: any thread.

    A job that is quick and goes well, as most are, needs no lock: it has a place of its own from
    begin to end, and is counted there. Which place is decided by `list.pop` and `list.append` on
    the idle ones, which are atomic. What else there is to count takes the lock.

    A place may have an entry that others can see; `workers.scoreboard` tells more. What that needs
    in every job stands here, in line: a method of its own would cost as much as all the rest of it.
    """

    _times = memoryview(bytearray()).cast("d")  # the entries, as numbers; no place has one
    _unplaced: Mapping[Job, None] = MappingProxyType({})  # who waits for an entry

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: list[Context] = []  # contexts that end when nothing is in flight
        self._places: dict[Place, None] = {}  # all, in the order in which they were made
        self._idle: list[Place] = []  # those where nobody stands; the last is the next to be used
        self._counts: dict[Outcome, list[int]] = {
            outcome: [0] * (len(JOB_SECONDS) + 1) for outcome in ("done", "failed", "cancelled")
        }
        self._seconds = 0.0

    def begin(self, job: Job) -> None:
        """Count a job as in flight."""
        try:
            place = self._idle.pop()
        except IndexError:
            place = self._new_place()
        job.place = place
        place.job = job
        entry = place.entry
        if entry:
            if place.name == job.name and place.ident == job.ident:
                self._times[entry] = job.since  # all else stands there already
            else:
                self._show(job, entry)

    def end(self, job: Job, outcome: Outcome) -> None:
        """Count a job as over."""
        seconds = monotonic() - job.since
        place = job.place
        # First off the books: from then on nobody gives it an entry, or writes to the one it has.
        place.job = None
        entry = place.entry
        if entry:
            if entry < 0 or job.until or self._unplaced:
                self._settle(job)
            else:
                self._times[entry] = 0.0
        if seconds <= _QUICK and outcome == "done":
            place.quick += 1
            place.seconds += seconds
        else:
            with self._lock:
                self._counts[outcome][bisect_left(JOB_SECONDS, seconds)] += 1
                self._seconds += seconds
        self._idle.append(place)
        if self._waiters:
            self._wake_if_idle()

    def _show(self, job: Job, entry: int) -> None:
        """Have the job stand in this entry; below 0: have it wait for one."""

    def _settle(self, job: Job) -> None:
        """Clear the entry of a job that ends, where that takes more than one step."""

    def extend(self, job: Job, until: float) -> None:
        """Remember until when a job is busy.

        Raises:
            RuntimeError: it is not in flight.
        """
        with self._lock:
            self._extend(job, until)

    def _extend(self, job: Job, until: float) -> None:
        before = job.until
        # First this, then the look: who ends the job does it the other way round, see Scoreboard.
        job.until = until
        if not job.is_in_flight:
            job.until = before
            raise RuntimeError(f"job {job.name!r} is not in flight: busy_until comes too late")

    def _new_place(self) -> Place:
        place = Place()
        with self._lock:
            self._places[place] = None
        return place

    def in_flight(self) -> list[Job]:
        """Return the jobs that have begun and not ended, in the order of their begin."""
        # Without a lock: a signal's handler may log, and a line looks for its job.
        found = [job for place in list(self._places) if (job := place.job) is not None]
        return sorted(found, key=lambda job: job.since)

    def tally(self) -> Tally:
        """Return what became of them so far."""
        with self._lock:
            in_flight = len(self._places) - len(self._idle)
            counts = {outcome: counts.copy() for outcome, counts in self._counts.items()}
            places = list(self._places)
            counts["done"][0] += sum(place.quick for place in places)
            seconds = self._seconds + sum(place.seconds for place in places)
        return Tally(
            in_flight,
            sum(counts["done"]),
            sum(counts["failed"]),
            sum(counts["cancelled"]),
            tuple(map(sum, zip(*counts.values(), strict=True))),
            seconds,
        )

    def until_idle(self, ctx: Context) -> Context:
        """Return what ends when nothing is in flight, or with the context: to wait for, or await."""
        waiter = ctx.with_cancel()
        # First this, then the look: who ends a job does it the other way round.
        self._waiters.append(waiter)
        self._wake_if_idle()
        return waiter

    def _wake_if_idle(self) -> None:
        if len(self._idle) == len(self._places):
            while self._waiters:
                with suppress(IndexError):  # another thread has woken the last one
                    self._waiters.pop().cancel()


class Tracing(Protocol):
    """What makes jobs spans: `workers.tracing` has it. Any thread."""

    def job(self, worker: Worker, name: str) -> Job:
        """Return a job of user code's."""

    def attempt(self, worker: Worker, name: str, number: int, attempt: int) -> Job:
        """Return an attempt at a job of the table."""

    def request(self, worker: Worker, name: str, scope: MutableMapping[str, Any]) -> Job:
        """Return an HTTP request, as ASGI describes it."""

    def failed(self, job: Job, error: BaseException) -> None:
        """Take what a job's failure was, where what leaves its block does not say."""

    def answered(self, job: Job, status: int) -> None:
        """Take the status of a request's response."""

    def ids(self) -> dict[str, str]:
        """Return the fields that tie a line of the log to the current span."""


class Worker:
    """This worker process, as user code sees it. Every method may be called from any thread.

    Attributes:
        id: `GROUP-NUMBER`, never used twice while the supervisor runs.
        group: the name of its group.
        generation: which generation of code and configuration it belongs to.
        accepting: ends when no new work may be taken. Wait for it, or look at it before each job.
        ctx: ends when work in flight is out of time (`abort_margin` before the stop's deadline).
        pools: its connection pools by name: each a `Pool`; where the entry point is an `async def`
            or an ASGI application an `AsyncPool`, unless the pool is configured as `blocking`.
        options: the group's `options`, as they stand in the configuration.
        sockets: the group's listening sockets by name, each made when it is first asked for. All
            workers accept from the same one; see `workers.sockets.SharedSocket`.
        wg: a WaitGroup for its threads and tasks; the worker is drained when it is empty.
        log: a structlog logger that names the worker in each line.
        status: a few words that `supervisor status` shows beside it; yours to set.
        program_pid: of a command: its program's pid, 0 before it has one.
        metrics: its own metrics, which `/metrics` shows summed over the workers of a group.
    """

    def __init__(
        self,
        *,
        id: str,  # noqa: A002  # INTERFACE's name
        group: str,
        generation: int,
        options: Mapping[str, Any],
        pools: dict[str, Any],
        log: Any,
        on_ready: Callable[[], None],
        jobs: Ledger | None = None,
        on_delay: Callable[[float], None],
        sockets: Mapping[str, socket.socket] = MappingProxyType({}),
        deaths: Iterable[Death] = (),
    ) -> None:
        self.id = id
        self.group = group
        self.generation = generation
        self.ctx = Context.background().with_cancel()
        self.accepting = self.ctx.with_cancel()
        self.options = options
        self.pools: Mapping[str, Any] = MappingProxyType(pools)
        self.sockets = sockets
        self.wg = WaitGroup()
        self.log = log
        self.status = ""
        self.program_pid = 0
        self._on_ready = on_ready
        self._on_delay = on_delay
        self._ready = threading.Lock()
        self._lock = threading.Lock()
        self._metrics: Metrics | None = None
        self.bind: Callable[[Job], object] | None = None  # of jobs to tasks, see `correlation`
        self.tracing: Tracing | None = None  # while its jobs are spans, see `workers.tracing`
        self.jobs = Ledger() if jobs is None else jobs
        # Of its group's workers, with jobs in flight: what the supervisor tells to whom it concerns.
        self.deaths = deque(deaths, maxlen=DEATHS)

    def ready(self) -> None:
        """Say that this worker serves. `run` must call it; calling it again changes nothing."""
        if self._ready.acquire(blocking=False):
            self._on_ready()

    def delay(self, seconds: float) -> None:
        """Ask for `seconds` from now on to become ready, where `ready_timeout` leaves less.

        Raises:
            ValueError: the seconds are not above 0, or more than a year.
        """
        if not 0.0 < seconds <= MAX_DELAY:
            raise ValueError(f"expected seconds above 0, at most {MAX_DELAY:g}, not {seconds}")
        self._on_delay(seconds)

    def job(self, name: str) -> Job:
        """Return a job to be used as a `with` block; it counts as in flight while that lasts."""
        if self.tracing is None:
            job = Job(self.jobs, name, self.ctx)
        else:
            job = self.tracing.job(self, name)
        if self.bind is not None:
            self.bind(job)
        return job

    def busy_until(self, limit: float | Context) -> None:
        """Declare that the work in hand is going to be busy for a while, for whoever has no Job.

        As `Job.busy_until`, for every job that the calling thread has in flight: one may lie within
        another. In asyncio those are the jobs of all tasks of the loop; a task says it of its own job.

        Args:
            limit: seconds from now, or a context: until its deadline.

        Raises:
            ValueError: as for `Job.busy_until`.
            RuntimeError: the calling thread has no job in flight.
        """
        until, ident = _moment(limit), get_ident()
        own = [job for job in self.jobs.in_flight() if job.ident == ident]
        if not own:
            raise RuntimeError(
                "this thread has no job in flight: call busy_until of the job itself"
            )
        for job in own:
            self.jobs.extend(job, until)

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


def _moment(limit: float | Context) -> float:
    """Return the moment that is meant by seconds from now, or by a context."""
    if isinstance(limit, Context):
        if limit.deadline is None:
            raise ValueError("busy_until: this context has no deadline, and for ever is no answer")
        return limit.deadline
    if not (math.isfinite(limit) and limit >= 0.0):
        raise ValueError(f"busy_until: {limit!r} is no number of seconds from now")
    return monotonic() + limit
