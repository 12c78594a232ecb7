"""A worker's states and the one transition table. It decides nothing about time or other workers.

Theory of operation. A worker is one incarnation: one process, one id, never reused. Its state is
the only record of how far it has come; no flag shadows it.

    not born     SPAWNING    asked for
                 DOOMED      asked for, and to end as soon as it is born
                 ABANDONED   given up: who should have made it is killed, its answer is missing

    starting     STARTING    a process that has not said hello
                 REGISTERED  has said hello and proved itself; does not serve yet
    serving      READY
                 SUSPECT     a job of it is overdue: its stacks are being taken, then it is cancelled
    by itself    FAILING     its user code raised; it drains itself

    told to end  CANCELLING  cancel sent, no receipt yet
                 EVICTED     SIGTERM sent instead, since it has not said hello
                 TERMINATING cancel and SIGTERM sent, no receipt yet
                 DRAINING    receipt given; its work in flight goes on
                 DRAINED     nothing in flight, pools closed; only its exit is missing

    out of time  DUMPING     its stacks are being taken
                 KILLED      SIGKILL sent
    gone         EXITED      no process, and none will come

What a worker or the world reports is looked up in `TRANSITIONS`; what the supervisor decides by
itself is in `DECISIONS`. A report that is missing from the table is stale, doubled or forged: it
changes nothing. A decision that is missing is a bug. A report that leaves the state as it is stands
in the table with the same state: it is heard, and answered or told.

Out of time, words no longer count, only the exit does: a worker that says `drained` while its stacks
are taken is not believed any more. So a killed worker has no late `drained`, and no stream of
claims can put off a kill.
"""

from __future__ import annotations

__all__ = ["DECISIONS", "TRANSITIONS", "Decision", "State", "after_decision", "after_report"]

from collections.abc import Mapping
from enum import Enum

from supervisor.core import events as ev
from supervisor.errors import InvariantError


class State(Enum):
    """How far one worker has come."""

    SPAWNING = ("spawning", "starting")
    DOOMED = ("doomed", "draining")
    ABANDONED = ("abandoned", "draining")
    STARTING = ("starting", "starting")
    REGISTERED = ("registered", "starting")
    READY = ("ready", "ready")
    SUSPECT = ("suspect", "draining")
    FAILING = ("failing", "failed")
    CANCELLING = ("cancelling", "draining")
    EVICTED = ("evicted", "draining")
    TERMINATING = ("terminating", "draining")
    DRAINING = ("draining", "draining")
    DRAINED = ("drained", "drained")
    DUMPING = ("dumping", "draining")
    KILLED = ("killed", "draining")
    EXITED = ("exited", "exited")

    @property
    def shown(self) -> str:
        """The word that `status` has for this state."""
        return self.value[1]


class Decision(Enum):
    """What the supervisor decides about a worker by itself."""

    SUSPECT = "suspect"
    CANCEL = "cancel"
    TERMINATE = "terminate"
    GIVE_UP = "give up"
    TAKE_STACKS = "take stacks"
    KILL = "kill"


_S = State
_D = Decision
_Reports = Mapping[type[ev.WorkerEvent], State]
_Decisions = Mapping[Decision, State]

_EXITS: _Reports = {ev.WorkerExited: _S.EXITED}
_DRAINS: _Reports = {ev.WorkerDrained: _S.DRAINED, **_EXITS}

TRANSITIONS: Mapping[State, _Reports] = {
    _S.SPAWNING: {ev.WorkerBorn: _S.STARTING, ev.WorkerNotBorn: _S.EXITED},
    _S.DOOMED: {ev.WorkerBorn: _S.EVICTED, ev.WorkerNotBorn: _S.EXITED},
    _S.ABANDONED: {ev.WorkerBorn: _S.EVICTED, ev.WorkerNotBorn: _S.EXITED},
    # Leaving changes nothing by itself: the supervisor answers it with a cancel.
    _S.STARTING: {
        ev.WorkerRegistered: _S.REGISTERED,
        ev.WorkerLeaving: _S.STARTING,
        **_EXITS,
    },
    _S.REGISTERED: {
        ev.WorkerReady: _S.READY,
        ev.WorkerUnreachable: _S.REGISTERED,
        ev.WorkerReachable: _S.REGISTERED,
        ev.WorkerDelayed: _S.REGISTERED,
        ev.WorkerLeaving: _S.REGISTERED,
        ev.WorkerFailed: _S.FAILING,
        **_DRAINS,
    },
    _S.READY: {
        ev.WorkerUnreachable: _S.READY,
        ev.WorkerReachable: _S.READY,
        ev.WorkerSeen: _S.READY,
        ev.WorkerLeaving: _S.READY,
        ev.WorkerFailed: _S.FAILING,
        **_DRAINS,
    },
    _S.SUSPECT: {
        ev.WorkerUnreachable: _S.SUSPECT,
        ev.WorkerReachable: _S.SUSPECT,
        ev.StacksTaken: _S.SUSPECT,
        ev.WorkerLeaving: _S.SUSPECT,
        ev.WorkerFailed: _S.FAILING,
        **_DRAINS,
    },
    _S.FAILING: {ev.WorkerLeaving: _S.FAILING, **_DRAINS},
    # Code that raises while it is told to end has failed and goes on draining.
    _S.CANCELLING: {
        ev.WorkerAcknowledged: _S.DRAINING,
        ev.WorkerFailed: _S.CANCELLING,
        **_DRAINS,
    },
    # It may be late rather than dead: it gets its cancel after all.
    _S.EVICTED: {ev.WorkerRegistered: _S.TERMINATING, **_EXITS},
    _S.TERMINATING: {
        ev.WorkerAcknowledged: _S.DRAINING,
        ev.WorkerFailed: _S.TERMINATING,
        **_DRAINS,
    },
    _S.DRAINING: {ev.WorkerFailed: _S.DRAINING, **_DRAINS},
    _S.DRAINED: _EXITS,
    _S.DUMPING: {ev.StacksTaken: _S.DUMPING, **_EXITS},
    _S.KILLED: _EXITS,
    _S.EXITED: {},
}

# Told to end again means: with less time. How far it has come stays.
DECISIONS: Mapping[State, _Decisions] = {
    _S.SPAWNING: {_D.CANCEL: _S.DOOMED, _D.GIVE_UP: _S.ABANDONED},
    _S.DOOMED: {_D.CANCEL: _S.DOOMED, _D.GIVE_UP: _S.ABANDONED},
    _S.ABANDONED: {_D.CANCEL: _S.ABANDONED},
    _S.STARTING: {_D.CANCEL: _S.EVICTED, _D.TAKE_STACKS: _S.DUMPING},
    _S.REGISTERED: {_D.CANCEL: _S.CANCELLING},
    _S.READY: {_D.SUSPECT: _S.SUSPECT, _D.CANCEL: _S.CANCELLING},
    _S.SUSPECT: {_D.CANCEL: _S.CANCELLING},
    _S.FAILING: {_D.CANCEL: _S.CANCELLING, _D.TAKE_STACKS: _S.DUMPING},
    _S.CANCELLING: {
        _D.CANCEL: _S.CANCELLING,
        _D.TERMINATE: _S.TERMINATING,
        _D.TAKE_STACKS: _S.DUMPING,
    },
    _S.EVICTED: {_D.CANCEL: _S.EVICTED, _D.TAKE_STACKS: _S.DUMPING},
    _S.TERMINATING: {_D.CANCEL: _S.TERMINATING, _D.TAKE_STACKS: _S.DUMPING},
    _S.DRAINING: {_D.CANCEL: _S.DRAINING, _D.TAKE_STACKS: _S.DUMPING},
    _S.DRAINED: {_D.CANCEL: _S.DRAINED, _D.TAKE_STACKS: _S.DUMPING},
    _S.DUMPING: {_D.CANCEL: _S.DUMPING, _D.KILL: _S.KILLED},
    _S.KILLED: {_D.CANCEL: _S.KILLED},
    _S.EXITED: {},
}


def after_report(state: State, report: ev.WorkerEvent) -> State | None:
    """Return the state after a report, or None when it is stale, doubled or forged."""
    return TRANSITIONS[state].get(type(report))


def after_decision(state: State, decision: Decision) -> State:
    """Return the state after a decision of our own.

    Raises:
        InvariantError: the decision is impossible in this state, which is a bug of ours.
    """
    try:
        return DECISIONS[state][decision]
    except KeyError:
        raise InvariantError(f"BUG: {decision.value} of a worker that is {state.name}") from None
