"""What to do, in the imperative: the only outputs of the core, carried out by the loop in order.

An action that fails comes back as an event; none of them returns anything.
"""

from __future__ import annotations

__all__ = [
    "Action",
    "Announce",
    "Finish",
    "Kill",
    "Look",
    "MeasureMemory",
    "Outcome",
    "Retire",
    "SendCancel",
    "Spawn",
    "TakeStacks",
    "TellDeath",
    "Terminate",
]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Spawn:
    """Make this worker's process. Answered by WorkerBorn or WorkerNotBorn."""

    worker: str
    group: str
    generation: int


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Send the worker its cancel; times are absolute. Sent again when there is less time than said.

    Nothing comes back when it cannot be sent: a receipt that is missing is what counts.
    """

    worker: str
    deadline: float
    abort_at: float
    cause: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM to the worker itself, which did not answer or cannot."""

    worker: str


@dataclass(frozen=True, slots=True)
class Look:
    """Read what the worker has written down of its jobs. Answered by WorkerSeen, at once."""

    worker: str


@dataclass(frozen=True, slots=True)
class TakeStacks:
    """Get the stack of every thread of the worker, and its jobs, whatever it is doing.

    Answered by StacksTaken, within `patience` seconds.
    """

    worker: str
    patience: float


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to the worker's whole process group. Answered by WorkerExited.

    Of a worker that is not born yet: wait for it no more, and give up whatever should have made it
    if nobody else waits for that. Answered by WorkerNotBorn, or by WorkerBorn where it came first
    after all.
    """

    worker: str


@dataclass(frozen=True, slots=True)
class TellDeath:
    """Tell the workers of a group, those to come too, that this one has ended with jobs in flight.

    Exactly one of `code` and `signal` is set. `by_itself`: it exited or crashed while it served, and
    nobody from outside did that, as far as the kernel tells.
    """

    group: str
    worker: str
    pid: int | None
    code: int | None
    signal: int | None
    by_itself: bool


@dataclass(frozen=True, slots=True)
class MeasureMemory:
    """Look how large every worker is. Answered by MemoryMeasured."""


@dataclass(frozen=True, slots=True)
class Retire:
    """No worker of this generation will be spawned any more: its templates may go."""

    generation: int


@dataclass(frozen=True, slots=True)
class Announce:
    """A life-cycle event for the log, the ring and whoever follows. Named as INTERFACE has it."""

    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one worker came through the stop; seconds count from the stop's begin.

    What it did before that is negative; None is what it never did. `killed` says in a sentence why
    it had to be killed in the stop, and is empty where it had not.
    """

    worker: str
    acknowledged: float | None
    drained: float | None
    exited: float | None
    killed: str
    reports: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """Every worker is accounted for: end with this code."""

    exit_code: int
    outcomes: tuple[Outcome, ...]


Action = (
    Spawn
    | SendCancel
    | Terminate
    | Look
    | TakeStacks
    | TellDeath
    | Kill
    | MeasureMemory
    | Retire
    | Announce
    | Finish
)
