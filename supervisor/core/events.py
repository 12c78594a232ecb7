"""What can happen, in the past tense: the only inputs of the core.

A closed set: `WorkerReport` is the union of what happens to one worker, `Event` of all. Adding a
member without handling it in `worker.Worker.report` or `fleet.Fleet.handle` is a type error.

The order in which the loop hands over what it finds in one turn matters in two places, because
what is known of one worker comes over two roads, its descriptors and its control socket:

- `WorkerBorn` before anything else of that worker. Its hello can overtake the news of its birth,
  and what an unborn worker says is not believed.
- `WorkerExited` after everything that the worker had sent. It is the truth, so it ends the
  account: what comes later, a last `drained` too, is dropped.
"""

from __future__ import annotations

__all__ = [
    "RECYCLE",
    "Event",
    "MemoryMeasured",
    "ReloadRequested",
    "Request",
    "RestartRequested",
    "ScaleRequested",
    "SettingsChanged",
    "StacksTaken",
    "StopNowRequested",
    "StopRequested",
    "TimePassed",
    "WorkerAcknowledged",
    "WorkerBorn",
    "WorkerDelayed",
    "WorkerDrained",
    "WorkerEvent",
    "WorkerExited",
    "WorkerFailed",
    "WorkerLeaving",
    "WorkerNotBorn",
    "WorkerReachable",
    "WorkerReady",
    "WorkerRegistered",
    "WorkerReport",
    "WorkerSeen",
    "WorkerUnreachable",
]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from supervisor.core.jobs import JobSeen
from supervisor.core.spec import GroupSpec

RECYCLE = "recycle"  # why a worker is replaced for its age or size


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """Something that happened to one worker, named by its id."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerBorn(WorkerEvent):
    """Its process exists and is the supervisor's own child."""

    pid: int


@dataclass(frozen=True, slots=True)
class WorkerNotBorn(WorkerEvent):
    """No process came of the spawn, and none will. It is tried again, for as long as it takes.

    `by_application` says that the application is to blame and not the system: its imports ended
    the template. That counts as a failure of the group, as if a worker had died of it.
    """

    why: str
    by_application: bool = False


@dataclass(frozen=True, slots=True)
class WorkerRegistered(WorkerEvent):
    """It said hello over its control socket and proved itself with its token."""


@dataclass(frozen=True, slots=True)
class WorkerReady(WorkerEvent):
    """It says that it serves."""


@dataclass(frozen=True, slots=True)
class WorkerDelayed(WorkerEvent):
    """It asks for so many seconds from now on to become ready; a number above 0."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerAcknowledged(WorkerEvent):
    """It has received the cancel. A claim, like all that a worker says."""


@dataclass(frozen=True, slots=True)
class WorkerDrained(WorkerEvent):
    """It says that nothing is in flight and its pools are closed; `reports` by pool.

    `life` is what it has done: its `jobs` by outcome, the use of its `pools`, and what became of the
    jobs that were in flight `in_stop`. Empty where it does not tell.
    """

    reports: Mapping[str, Any] = field(default_factory=dict)
    life: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerFailed(WorkerEvent):
    """Its user code raised; `pool` is named where that is because this pool could not connect."""

    error: str
    traceback: str
    pool: str = ""


@dataclass(frozen=True, slots=True)
class WorkerUnreachable(WorkerEvent):
    """It says that one of its pools cannot connect, for a reason that may pass."""

    pool: str
    error: str


@dataclass(frozen=True, slots=True)
class WorkerReachable(WorkerEvent):
    """It says that a pool which could not connect can again."""

    pool: str


@dataclass(frozen=True, slots=True)
class WorkerLeaving(WorkerEvent):
    """Somebody else told it to end, and its deadline is wanted."""

    why: str


@dataclass(frozen=True, slots=True)
class WorkerExited(WorkerEvent):
    """Its process and its whole process group are gone: the truth.

    Exactly one of `code` and `signal` is set. `leftovers` names processes that the worker had
    left behind in its group, and that were killed; `stacks` what it wrote when it crashed.
    `oom_kills` is the kernel's count of them by now, where it was looked at. How large it has been
    and how long it has computed is the kernel's word, too; 0 where it is not known. `jobs` were in
    flight, as its work loop has written them down; none where it was not watched.
    """

    code: int | None = None
    signal: int | None = None
    leftovers: tuple[str, ...] = ()
    stacks: str = ""
    oom_kills: int | None = None
    max_rss_bytes: int = 0
    cpu_seconds: float = 0.0
    jobs: tuple[JobSeen, ...] = ()


@dataclass(frozen=True, slots=True)
class StacksTaken(WorkerEvent):
    """What could be had of its stacks; when nothing, `missing` says why.

    `jobs` are those in flight as far as they are known; None: that could not be had either.
    """

    stacks: str
    missing: str = ""
    jobs: tuple[JobSeen, ...] | None = None


@dataclass(frozen=True, slots=True)
class WorkerSeen(WorkerEvent):
    """Somebody has looked at it from outside: the answer to `Look`.

    Attributes:
        jobs: those in flight, as its work loop has written them down.
        halted: why its process does not run at all (it is stopped), "" where it does.
    """

    jobs: tuple[JobSeen, ...] = ()
    halted: str = ""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Stop gracefully; `grace` (seconds, not negative) overrides the configured one.

    A stop that is under way can only be brought nearer, never put off.
    """

    cause: str
    grace: float | None = None


@dataclass(frozen=True, slots=True)
class StopNowRequested:
    """Stop at once: every deadline shrinks to a moment.

    Whether a second signal means this is for whoever reads the signals: a second `stop` command
    does not.
    """

    cause: str


@dataclass(frozen=True, slots=True)
class ReloadRequested:
    """Roll the fleet to another generation of code and configuration, which has been checked.

    `generation` was never used before. One that comes during a roll supersedes it.
    """

    generation: int
    groups: tuple[GroupSpec, ...]
    grace: float
    abort_margin: float
    reason: str = ""  # why nobody may keep running what it runs; for who reads the events


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    """The same groups under other rules: what their workers run has not changed.

    Only while `Fleet.takes_settings`. A file that was read while a reload is under way, for one, has
    to supersede that: it would put its own rules in force afterwards.
    """

    groups: tuple[GroupSpec, ...]
    grace: float
    abort_margin: float


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """Replace these workers, by successors of the same generation; `target` is a group or a worker.

    Who has gone by the time that it is carried out has been replaced already. `reason` names its
    events: "restart", or RECYCLE where nobody waits for them.
    """

    target: str
    reason: str = "restart"
    number: int = 0  # tells the end of one request from another's


@dataclass(frozen=True, slots=True)
class ScaleRequested:
    """Have this many workers in a group, until a file that is read later says otherwise."""

    group: str
    count: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class MemoryMeasured:
    """How many bytes workers have resident, by their ids."""

    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`next_deadline()` may have been reached. Handed over after all that has happened by then."""


WorkerReport = (
    WorkerBorn
    | WorkerNotBorn
    | WorkerRegistered
    | WorkerReady
    | WorkerDelayed
    | WorkerAcknowledged
    | WorkerDrained
    | WorkerFailed
    | WorkerUnreachable
    | WorkerReachable
    | WorkerLeaving
    | WorkerExited
    | StacksTaken
    | WorkerSeen
)
Request = RestartRequested | ScaleRequested
Event = (
    WorkerReport
    | StopRequested
    | StopNowRequested
    | ReloadRequested
    | SettingsChanged
    | Request
    | MemoryMeasured
    | TimePassed
)
