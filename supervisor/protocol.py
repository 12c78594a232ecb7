"""The wire: every message between supervisor, template, workers and command line.

Pure: frozen messages, encode, decode, a version. No socket, no clock. The one module that both
sides share. Bytes from a peer are never trusted: `decode` raises WireError for whatever is not
exactly a known message of this version, and nothing else.

Two encodings: msgpack between processes of one version, JSON where people may look (the command
line). Deadlines are absolute CLOCK_MONOTONIC seconds: one clock for all processes of a host.
"""

from __future__ import annotations

__all__ = [
    "BOARD_BYTES",
    "BOARD_ENTRY",
    "DEATHS",
    "JOB_SECONDS",
    "OTHER",
    "POOL_SECONDS",
    "VERSION",
    "Accepted",
    "Acknowledged",
    "Allowance",
    "Answer",
    "Assignment",
    "Cancel",
    "CloseReport",
    "Death",
    "Delayed",
    "Drained",
    "Dump",
    "EndSessions",
    "EventBatch",
    "Examine",
    "Examined",
    "Failed",
    "Farewell",
    "FetchEvents",
    "Figures",
    "Fork",
    "FromClient",
    "FromTemplate",
    "FromWorker",
    "GetStatus",
    "Grace",
    "Hello",
    "Identity",
    "Inquire",
    "JobInFlight",
    "Leak",
    "LeakFound",
    "Load",
    "Loaded",
    "Loan",
    "Metric",
    "PoolLimits",
    "PoolSettings",
    "PoolStats",
    "PoolTimings",
    "Reachable",
    "Ready",
    "Refused",
    "Reload",
    "Report",
    "Restart",
    "Scale",
    "SessionsEnded",
    "Stop",
    "Stopping",
    "Task",
    "Timings",
    "ToClient",
    "ToTemplate",
    "ToWorker",
    "Tune",
    "Tuned",
    "Unloadable",
    "Unreachable",
    "Usage",
    "application_name",
    "decode",
    "encode",
    "prepare",
    "to_builtins",
]

import struct
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from supervisor.errors import WireError

VERSION = 1
_MAGIC = b"ackvisor/%d " % VERSION

# A worker's largest honest message is a traceback or a set of close reports. What is larger is a
# worker gone mad, and is dropped before it is parsed.
MAX_BYTES = 1 << 20
MAX_NAME = 63  # bytes of an application name: PostgreSQL cuts off the rest

# A worker's scoreboard: shared memory, an entry a job: since (0: free), until, the thread's ident,
# the name. The first entry is the header, whose third field is how many entries have been used. One
# machine, one process image: native byte order; each number is aligned, and written at once.
BOARD_ENTRY = struct.Struct("=ddQ40s")
BOARD_BYTES = 1024 * BOARD_ENTRY.size


# What a peer may count, and how long it may have taken: no negative numbers, no NaN, no infinity.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e10)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages: immutable, told apart by a tag, strict about fields."""


# --- what both sides know of pools -------------------------------------------------------------


class PoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What of a pool's settings may change while it runs; durations in seconds, 0 meaning off."""

    max_open: int = 10
    max_idle: int = 10
    max_lifetime: float = 1800.0
    max_idle_time: float = 600.0
    acquire_timeout: float = 3.0
    leak_threshold: float = 5.0
    connect_timeout: float = 5.0
    max_connecting: int = 2
    validate_after_idle: float = 1.0
    keepalive: float = 0.0


class PoolSettings(PoolLimits, frozen=True, kw_only=True):
    """The settings of one pool as configured.

    `allowance` is the first one, told with `serial`; None: the pool has no budget. A `blocking` pool is
    one for threads also where the worker runs in asyncio.
    """

    url: str
    blocking: bool = False
    allowance: int | None = None
    serial: int = 0


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """One pool's figures at one moment, in the words of Go's `database/sql.DBStats`."""

    max_open: Count = 0
    open: Count = 0
    in_use: Count = 0
    idle: Count = 0
    waiting: Count = 0
    wait_count: Count = 0
    wait_seconds: Seconds = 0.0
    max_idle_closed: Count = 0
    max_idle_time_closed: Count = 0
    max_lifetime_closed: Count = 0
    broken_closed: Count = 0
    timeouts: Count = 0
    leaks: Count = 0


class Leak(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that was not given back: how long it was held, by whom, taken where."""

    held_seconds: Seconds
    thread: str
    stack: str


class CloseReport(msgspec.Struct, frozen=True, kw_only=True):
    """What closing a pool came to: closed physically, waited for, never given back."""

    closed: Count = 0
    waited: Count = 0
    leaked: tuple[Leak, ...] = ()


# --- what a worker has measured since its start --------------------------------------------------

# Upper bounds of the buckets, in seconds; the last bucket, above every bound, has none.
POOL_SECONDS = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
JOB_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip

OTHER = "other"  # what the labels of those series say that were too many to be told apart


class Timings(msgspec.Struct, frozen=True):
    """A histogram: how many fell into each bucket (not cumulated), and the sum of their seconds."""

    counts: tuple[int, ...]
    sum: float


class PoolTimings(msgspec.Struct, frozen=True, kw_only=True):
    """How long callers waited for a pool, how long they kept, how long it took to connect."""

    wait: Timings
    use: Timings
    create: Timings


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A metric of the application's own.

    `series` has the labels' values, in the order of `labels`, and the figures: one number, or for a
    histogram the counts of its buckets (not cumulated) and then the sum.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    series: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = ()


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What metrics need beside what a status shows; all but gauges has grown since the start."""

    jobs_cancelled: int
    job_seconds: Timings
    pools: dict[str, PoolTimings]
    own: tuple[Metric, ...] = ()


# --- supervisor to template --------------------------------------------------------------------


class Identity(msgspec.Struct, frozen=True):
    """The user that a template and its workers become, before the application is imported."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str


class Load(Message, frozen=True):
    """Import the application: put `path` on sys.path, set `env`, import what workers will need.

    `schemes` are those of the pools' URLs, whose drivers are imported too. `grace` bounds how long
    workers may live on when the supervisor has died. With an `identity` there comes a descriptor
    beside the message, of the workers' socket: its folder is not that user's.
    """

    name: str
    generation: int
    path: tuple[str, ...]
    env: dict[str, str]
    entry_points: tuple[str, ...]
    schemes: tuple[str, ...]
    grace: float
    log_format: str
    log_level: str
    identity: Identity | None = None


DEATHS = 32  # of a group that are remembered: the jobs of those before have been taken back


class Death(Message, frozen=True):
    """Another worker of the group has ended with jobs in flight; fields as in `core.actions.TellDeath`."""

    worker: str
    pid: int
    code: int | None
    signal: int | None
    by_itself: bool


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """All that a new worker is told: who it is, whom it answers, what it runs, with what.

    It runs `run`, or serves the application `app`. `sockets` names the listening sockets whose
    descriptors travel beside the message, in this order.
    `figures` asks for these with each report, and for a last report before `Drained`.
    """

    worker: str
    group: str
    generation: int
    token: str
    supervisor: str
    endpoint: str
    run: str
    grace: float
    abort_margin: float
    log_format: str
    log_level: str
    options: dict[str, Any]
    pools: dict[str, PoolSettings]
    is_watched: bool = False  # its scoreboard waits in the lifeline
    deaths: tuple[Death, ...] = ()  # of its group, before its time
    app: str = ""
    sockets: tuple[str, ...] = ()
    figures: bool = False


class Fork(Message, frozen=True):
    """Make one worker.

    Beside the message travel its lifeline (one end of a socket pair) and its listening sockets.
    """

    assignment: Assignment


class Grace(Message, frozen=True):
    """Another bound than `Load.grace`, from now on."""

    seconds: float


ToTemplate = Load | Fork | Grace

# --- template to supervisor --------------------------------------------------------------------


class Loaded(Message, frozen=True):
    """The application is imported (what failed to import, each worker will report itself).

    `folders` are those that modules came from, the standard library's apart.
    """

    folders: tuple[str, ...]


class Unloadable(Message, frozen=True):
    """Importing `entry_point` started threads or opened sockets, which a fork would not survive.

    The template is of no use any more, and ends.
    """

    entry_point: str
    found: tuple[str, ...]


FromTemplate = Loaded | Unloadable

# --- worker to supervisor ----------------------------------------------------------------------


class Hello(Message, frozen=True):
    """The first message of a worker; the token proves that it is the one that was spawned."""

    worker: str
    token: str
    pid: int


class Ready(Message, frozen=True):
    """The worker serves."""


class Delayed(Message, frozen=True):
    """The worker is not ready yet, and asks for so many seconds from now on to become so."""

    seconds: float


class Acknowledged(Message, frozen=True):
    """Receipt of the cancel with this deadline; draining has begun."""

    deadline: float


class Report(Message, frozen=True, kw_only=True):
    """What a worker has in hand at this moment; the answer to `Inquire`.

    `status` is what it says of itself; `program_pid` is that of a command's program, else 0.
    One with number 0 was not asked for: it is sent before `Drained` where figures are wanted.
    """

    number: Count
    in_flight: Count
    jobs_done: Count
    jobs_failed: Count
    pools: dict[str, PoolStats]
    status: str = ""
    program_pid: int = 0
    figures: Figures | None = None


class JobInFlight(msgspec.Struct, frozen=True, kw_only=True):
    """A job in flight; times as in `core.jobs.JobSeen`."""

    name: str
    since: float
    until: float
    thread: int


class Loan(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that is lent: by whom, for how long, borrowed where, and where he is now."""

    pool: str
    connection: int
    held_seconds: float
    thread: str
    stack: str
    now: str


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """An asyncio task that has not ended, and what it awaits."""

    name: str
    coroutine: str
    stack: str


class Examined(Message, frozen=True, kw_only=True):
    """What a worker knows of its own state; the answer to `Examine`.

    `stacks` are those of all its threads, as faulthandler writes them; `threads` are the names of its threads by ident; `missing` says of each part that could not be
    had, or not completely, why.
    """

    number: int
    stacks: str = ""
    jobs: tuple[JobInFlight, ...] = ()
    loans: tuple[Loan, ...] = ()
    tasks: tuple[Task, ...] = ()
    threads: dict[int, str] = {}
    missing: dict[str, str] = {}


class Failed(Message, frozen=True):
    """User code raised. The worker drains itself and ends.

    `pool` is named where that is because this pool could not connect, for a reason that may pass.
    """

    error: str
    traceback: str
    pool: str = ""


class Unreachable(Message, frozen=True):
    """A pool cannot connect, for a reason that may pass; `error` is what its driver says."""

    pool: str
    error: str


class Reachable(Message, frozen=True):
    """A pool that could not connect can again."""

    pool: str


class LeakFound(Message, frozen=True):
    """A connection has been lent for longer than the pool's `leak_threshold`."""

    pool: str
    held_seconds: Seconds
    thread: str
    stack: str


class PoolUse(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one pool in a worker's life: who got a connection, who had to wait, who did not."""

    acquires: Count = 0
    waited: Count = 0
    wait_seconds: Seconds = 0.0
    timeouts: Count = 0
    leaks: Count = 0


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has done, told when it ends.

    `abandoned` are the jobs that were still in flight then. Of those that were in flight when it was
    told to end, or began after that, `finished` came to their end and `aborted` did not.
    """

    done: Count
    failed: Count
    cancelled: Count
    abandoned: Count
    finished: Count
    aborted: Count
    pools: dict[str, PoolUse]


class Drained(Message, frozen=True):
    """The pools are closed and nothing is waited for any more: the last message of a worker."""

    reports: dict[str, CloseReport]
    life: Life | None = None


class Usage(Message, frozen=True):
    """What became of an allowance, or that it is not enough.

    The tell of this `serial` has been carried out: the pool has no more connections than
    `accepted`, and will not. `wanted` are those in use and those that are waited for.
    """

    pool: str
    serial: Count
    accepted: Count
    wanted: Count


class Tuned(Message, frozen=True):
    """The `Tune` of this number, or a later one, is in force."""

    number: int


class SessionsEnded(Message, frozen=True):
    """The answer to `EndSessions`: its server has none of them any more."""

    pool: str
    application_name: str


FromWorker = (
    Hello
    | Ready
    | Delayed
    | Acknowledged
    | Report
    | Examined
    | LeakFound
    | Usage
    | Tuned
    | SessionsEnded
    | Unreachable
    | Reachable
    | Failed
    | Drained
)

# --- supervisor to worker ----------------------------------------------------------------------


class Cancel(Message, frozen=True):
    """Take no new work; what is in flight is cancelled at `abort_at`; be gone by `deadline`."""

    deadline: float
    abort_at: float
    cause: str


class Inquire(Message, frozen=True):
    """Send a `Report` with this number."""

    number: int


class Examine(Message, frozen=True):
    """Send an `Examined` with this number."""

    number: int


class Farewell(Message, frozen=True):
    """Receipt of `Drained`: the worker may exit. So its last words never come after its end."""


class Allowance(Message, frozen=True):
    """Have at most so many connections in this pool from now on.

    One that takes away is answered by a `Usage` with its serial, once it has come true. With
    `unused_only` the worker keeps what is in use at this moment, and says how many those are.
    """

    pool: str
    allowance: int
    serial: int
    unused_only: bool = False


class Tune(Message, frozen=True, kw_only=True):
    """Have these settings instead of those of the assignment. Answered by `Tuned`.

    A pool under a budget keeps to its allowance.
    """

    number: int
    grace: float
    abort_margin: float
    log_format: str
    log_level: str
    pools: dict[str, PoolLimits]


class EndSessions(Message, frozen=True):
    """End what another worker, which was killed, has left behind at this pool's server.

    The name is that of one process and of no other, on whatever host. No answer comes when it
    cannot be done.
    """

    pool: str
    application_name: str


ToWorker = Cancel | Inquire | Examine | Allowance | Tune | EndSessions | Death | Farewell

# --- command line to supervisor ----------------------------------------------------------------


class GetStatus(Message, frozen=True):
    """Ask for the fleet at a glance."""


class FetchEvents(Message, frozen=True):
    """Ask for events after `after`; with `follow` the answer waits until there is one.

    Pulled, not pushed: a client that reads slowly costs the supervisor nothing, and learns from
    the numbers how many it has missed.
    """

    after: int
    follow: bool = False
    limit: int = 500


class Stop(Message, frozen=True):
    """As SIGTERM, or with `now` as SIGQUIT; `grace` in seconds overrides the configured one."""

    grace: float | None = None
    now: bool = False


class Reload(Message, frozen=True):
    """As SIGHUP. Answered by `Accepted`, or `Refused` when the configuration is wrong."""


class Restart(Message, frozen=True):
    """Replace these workers, the replacement first; `target` is a group or a worker."""

    target: str


class Scale(Message, frozen=True):
    """Have this many workers in a group."""

    group: str
    count: int


class Dump(Message, frozen=True):
    """Ask for stacks, tasks, jobs and loans of one worker."""

    worker: str


FromClient = GetStatus | FetchEvents | Stop | Reload | Restart | Scale | Dump

# --- supervisor to command line ----------------------------------------------------------------


class Answer(Message, frozen=True):
    """What was asked for, as plain data."""

    data: dict[str, Any]


class EventBatch(Message, frozen=True):
    """Events, oldest first; `last` is the number of the newest one, `missed` fell off the ring.

    `ended` says that `supervisor.stopped` has been delivered: nothing will follow.
    """

    events: list[dict[str, Any]]
    last: int
    missed: int = 0
    ended: bool = False


class Stopping(Message, frozen=True):
    """The stop has begun; `pid` is the process whose end completes it."""

    pid: int
    deadline: float


class Refused(Message, frozen=True):
    """The command cannot be done: one sentence, and the exit code that goes with it."""

    error: str
    exit_code: int = 1


class Accepted(Message, frozen=True):
    """It will be done; what comes of it is in the events after number `after`.

    `is_live`: a reload that is applied without replacing anybody. `request` is the number of a restart
    or a scaling, which the event of its end has, too.
    """

    after: int
    generation: int = 0
    is_live: bool = False
    request: int = 0


ToClient = Answer | EventBatch | Stopping | Accepted | Refused

# -----------------------------------------------------------------------------------------------

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def application_name(supervisor: str, worker: str, token: str) -> str:
    """Return what servers show of a worker's connections: supervisor, group, worker.

    The end of its token tells it from workers of the same name, before it and on other hosts. Where
    that is more than servers take (63 bytes), the supervisor's name is the one that is cut.
    """
    rest = f"/{worker}#{token[-8:]}"
    return f"{supervisor[: max(0, MAX_NAME - len(rest))]}{rest}"[-MAX_NAME:]


def encode(message: Message) -> bytes:
    """Return the bytes of one message, its version first."""
    return _MAGIC + _encoder.encode(message)


def to_builtins(value: Any) -> Any:
    """Return a struct, or a container of structs, as plain dicts, lists and numbers."""
    return msgspec.to_builtins(value)


def prepare(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Make the decoder for a union of messages: a millisecond, which a fork need not spend again."""
    decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    return decoder


def decode(frame: bytes, kind: type[_M], max_bytes: int = MAX_BYTES) -> _M:
    """Return the message in `frame`, which must be one of `kind` (a union of messages).

    Raises:
        WireError: the frame is too large, of another version, or not exactly such a message.
    """
    if len(frame) > max_bytes:
        raise WireError(f"a message of {len(frame)} bytes; at most {max_bytes} are read")
    if not frame.startswith(_MAGIC):
        seen = frame[: len(_MAGIC)]
        raise WireError(f"not a message of version {VERSION}: it begins with {seen!r}")
    decoder = _decoders.get(kind) or prepare(kind)
    try:
        message: _M = decoder.decode(memoryview(frame)[len(_MAGIC) :])
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise WireError(f"a message that does not parse: {exc}") from exc
    return message
