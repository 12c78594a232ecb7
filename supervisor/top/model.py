"""What `top` shows of a fleet: rows, rates, what is wrong. Pure: statuses and events in, rows out.

No clock, no terminal, no supervisor: `now` is passed in. Texts from outside are made harmless here
(see `harmless`), so that nothing a worker says can steer the terminal.
"""

from __future__ import annotations

__all__ = [
    "SORTS",
    "BudgetRow",
    "Fleet",
    "GroupRow",
    "Picture",
    "PoolUse",
    "Problem",
    "Rates",
    "Tone",
    "WorkerRow",
    "matches",
    "ordered",
    "span",
]

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any

from supervisor.plain import harmless
from supervisor.story import sentence

Event = Mapping[str, Any]

WINDOW = 5.0  # seconds over which jobs/s is the mean
FRESH = 300.0  # seconds for which a mishap that is over is still shown as one
STARVED = 5.0  # seconds of waiting without a break that are more than a busy moment
KEPT = 200  # events that are kept to be shown

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
# What is never a text: C0 and C1 controls, and what turns the direction of writing.


class Tone(IntEnum):
    """How much something wants to be seen."""

    DIM = 0
    PLAIN = 1
    GOOD = 2
    NOTICE = 3  # on its way, as it should be
    WARN = 4
    BAD = 5


@dataclass(frozen=True, slots=True)
class PoolUse:
    """One pool's connections, of a worker."""

    name: str
    in_use: int
    open: int
    max_open: int
    waiting: int
    leaks: int


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker. `rate` is in jobs a second, None as long as it is not known."""

    id: str
    group: str
    state: str
    tone: Tone
    trouble: str  # in a word or two what is wrong with it, "" when nothing is
    pid: int | None
    generation: int
    in_flight: int
    rate: float | None
    done: int
    failed: int
    rss: int
    pools: tuple[PoolUse, ...]
    restarts: int
    uptime: float
    status: str  # what it says of itself
    last_event: str  # "" where none has been heard
    last_event_age: float

    @property
    def number(self) -> int:
        """The number in its id, for an order that people expect: 9 before 10."""
        tail = self.id.rpartition("-")[2]
        return int(tail) if tail.isdecimal() else 0

    @property
    def waiting(self) -> int:
        """How many of it wait for a connection."""
        return sum(pool.waiting for pool in self.pools)

    @property
    def pool_share(self) -> float:
        """The fullest pool, 0 to 1."""
        return max((use.in_use / use.max_open for use in self.pools if use.max_open), default=0.0)


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group; figures are its workers' sums."""

    name: str
    state: str
    tone: Tone
    ready: int
    count: int
    in_flight: int
    rate: float | None
    rss: int
    waiting: int
    restarts: int
    note: str


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One pool's connections of all workers together."""

    name: str
    budget: int
    granted: int
    open: int
    waiting: int

    @property
    def tone(self) -> Tone:
        """A budget that is used up is well used, unless somebody waits."""
        return Tone.WARN if self.waiting and self.granted >= self.budget else Tone.PLAIN


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that somebody should look at, in a sentence."""

    tone: Tone
    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """The fleet at one moment."""

    name: str
    state: str
    tone: Tone
    generation: int
    pid: int
    uptime: float
    progress: str  # of a roll or a stop, "" when there is none
    groups: tuple[GroupRow, ...]
    workers: tuple[WorkerRow, ...]
    budgets: tuple[BudgetRow, ...]
    problems: tuple[Problem, ...]  # the gravest first
    in_flight: int
    rate: float | None


# --- jobs a second ---------------------------------------------------------------------------------


class Rates:
    """Jobs a second, from counters of workers that come and go. Never negative.

    A worker's counter is its own and ends with it, so only what it has grown by counts: a
    replacement takes nothing away, and begins at zero.
    """

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._last: dict[str, int] = {}
        self._at: float | None = None
        # (until when, how long, worker -> jobs), each the time between two looks.
        self._steps: deque[tuple[float, float, dict[str, int]]] = deque()

    def look(self, done: Mapping[str, int], now: float, born: Iterable[str] = ()) -> None:
        """Take all workers' counters. `born` were spawned since the last look: all is new."""
        if self._at is not None and now > self._at:
            new = set(born)
            grown = {}
            for worker, count in done.items():
                if worker in self._last:
                    # One that is lower than before has begun anew.
                    before = self._last[worker]
                    grown[worker] = count - before if count >= before else count
                elif worker in new:
                    grown[worker] = count
            self._steps.append((now, now - self._at, grown))
        while self._steps and self._steps[0][0] <= now - self._window:
            self._steps.popleft()
        self._last, self._at = dict(done), now

    def of(self, worker: str) -> float | None:
        """Return one worker's rate, None where it has been seen only once."""
        steps = [(long, grown[worker]) for _, long, grown in self._steps if worker in grown]
        return _per_second(steps)

    def of_all(self, is_in: Mapping[str, str], group: str | None = None) -> float | None:
        """Return the rate of a group, or of all; also of workers that have gone meanwhile.

        `is_in` says of each worker, also of one that has gone, which group it is in.
        """
        return _per_second(
            [
                (
                    long,
                    sum(n for who, n in grown.items() if group is None or is_in.get(who) == group),
                )
                for _, long, grown in self._steps
            ]
        )


def _per_second(steps: Sequence[tuple[float, int]]) -> float | None:
    seconds = sum(long for long, _ in steps)
    return sum(jobs for _, jobs in steps) / seconds if seconds else None


# --- the fleet -------------------------------------------------------------------------------------

_WORKER_TONES = {
    "ready": Tone.PLAIN,
    "failed": Tone.BAD,
}
_GROUP_TONES = {
    "ready": Tone.GOOD,
    "finished": Tone.GOOD,
    "starting": Tone.NOTICE,
    "degraded": Tone.WARN,
    "waiting": Tone.WARN,
    "failed": Tone.BAD,
}
# Mishaps that are over: whoever looks should know of them, and red is for what is wrong now.
_MISHAPS = frozenset(
    {
        "worker.killed",
        "worker.failed",
        "worker.not_spawned",
        "worker.exited",  # only those that nobody wanted
        "worker.hung",
        "reload.rolled_back",
        "reload.rejected",
        "pool.leak",
    }
)
_UNWANTED_ENDS = ("startup", "crashed", "killed", "memory")


class Fleet:
    """All that has been heard of one supervisor."""

    def __init__(self) -> None:
        self._status: Mapping[str, Any] | None = None
        self._rates = Rates()
        self._last_look: float | None = None
        self._group_of: dict[str, str] = {}
        self._last_events: dict[str, tuple[float, str]] = {}  # worker -> when, what
        self._hung: set[str] = set()
        self._waits_since: dict[str, float] = {}
        self._events: deque[tuple[float, Event]] = deque(maxlen=KEPT)
        self._mishaps: deque[tuple[float, Event]] = deque(maxlen=KEPT)

    @property
    def has_been_seen(self) -> bool:
        """Whether there is anything to show."""
        return self._status is not None

    def take_status(self, status: Mapping[str, Any], now: float) -> None:
        """Take an answer to `GetStatus`; `now` is monotonic."""
        workers = status["workers"]
        since = None if self._last_look is None else now - self._last_look
        born = [w["id"] for w in workers if since is not None and w["uptime_seconds"] <= since]
        self._rates.look({w["id"]: w["jobs_done"] for w in workers}, now, born)
        self._last_look = now
        # Those that have gone are known for as long as the window of the rates may need them.
        present = {worker["id"]: worker["group"] for worker in workers}
        if len(self._group_of) > KEPT + len(present):
            self._group_of = {}
        self._group_of |= present
        for worker in self._last_events.keys() - present.keys():
            del self._last_events[worker]
        self._hung &= present.keys()
        self._waits_since = {
            worker["id"]: self._waits_since.get(worker["id"], now)
            for worker in workers
            if any(stats["waiting"] for stats in worker["pools"].values())
        }
        self._status = status

    def take_events(self, events: Iterable[Event]) -> None:
        """Take events, oldest first."""
        for event in events:
            when = datetime.fromisoformat(event["time"]).timestamp()
            self._events.append((when, event))
            if _is_mishap(event) and not self._is_told(event):
                self._mishaps.append((when, event))
            worker = event.get("worker")
            if worker is None:
                continue
            name = event["event"].rpartition(".")[2].replace("_", " ")
            self._last_events[worker] = (when, name)
            if event["event"] == "worker.hung":
                self._hung.add(worker)

    def _is_told(self, event: Event) -> bool:
        """Tell whether an end has been explained already: by its failure, or by who killed it."""
        return event["event"] == "worker.exited" and any(
            told.get("worker") == event["worker"] and told["event"] != "pool.leak"
            for _, told in self._mishaps
        )

    def recent(self, wall: float, limit: int) -> list[tuple[str, str, Tone]]:
        """Return the last events: how long ago, what, how grave; the newest first."""
        newest = list(self._events)[-limit:] if limit > 0 else []
        return [
            (span(max(0.0, wall - when)), _told(event), _tone_of(event))
            for when, event in reversed(newest)
        ]

    def picture(self, now: float, wall: float) -> Picture:
        """Return what to show; `now` is monotonic, `wall` the time of day, as events have it."""
        status = self._status
        assert status is not None
        workers = tuple(self._worker(worker, now, wall) for worker in status["workers"])
        groups = tuple(
            self._group(name, group, [worker for worker in workers if worker.group == name])
            for name, group in status["groups"].items()
        )
        budgets = tuple(
            BudgetRow(
                name,
                budget["budget"],
                budget["granted"],
                budget["open"],
                sum(use.waiting for worker in workers for use in worker.pools if use.name == name),
            )
            for name, budget in status["budgets"].items()
        )
        problems = [
            *_group_problems(groups),
            *_worker_problems(workers),
            *(
                Problem(b.tone, f"budget {b.name} is used up, and {b.waiting} wait")
                for b in budgets
                if b.tone is Tone.WARN
            ),
            *_mishap_problems(self._mishaps, wall),
        ]
        started = datetime.fromisoformat(status["started"]).timestamp()
        return Picture(
            name=status["name"],
            state=status["state"],
            tone=Tone.GOOD if status["state"] == "ready" else Tone.NOTICE,
            generation=status["generation"],
            pid=status["pid"],
            uptime=max(0.0, wall - started),
            progress=_progress(status),
            groups=groups,
            workers=workers,
            budgets=budgets,
            problems=tuple(sorted(problems, key=lambda problem: -problem.tone)),
            in_flight=sum(worker.in_flight for worker in workers),
            rate=self._rates.of_all(self._group_of),
        )

    def _worker(self, worker: Mapping[str, Any], now: float, wall: float) -> WorkerRow:
        name = worker["id"]
        pools = tuple(
            PoolUse(
                pool,
                stats["in_use"],
                stats["open"],
                stats["max_open"],
                stats["waiting"],
                stats["leaks"],
            )
            for pool, stats in worker["pools"].items()
        )
        trouble, tone = "", _WORKER_TONES.get(worker["state"], Tone.NOTICE)
        if name in self._hung:
            trouble, tone = "hung", Tone.BAD
        elif worker["stopped"]:
            trouble, tone = "stopped", Tone.BAD
        elif worker["state"] == "failed":
            trouble = "failed"
        elif any(use.leaks for use in pools):
            trouble, tone = "leak", max(tone, Tone.WARN)
        elif self._waits_since.get(name, now) <= now - STARVED:
            trouble, tone = "waiting", max(tone, Tone.WARN)
        when, what = self._last_events.get(name, (wall, ""))
        return WorkerRow(
            id=name,
            group=worker["group"],
            state=worker["state"],
            tone=tone,
            trouble=trouble,
            pid=worker["pid"],
            generation=worker["generation"],
            in_flight=worker["in_flight"],
            rate=self._rates.of(name),
            done=worker["jobs_done"],
            failed=worker["jobs_failed"],
            rss=worker["rss_bytes"],
            pools=pools,
            restarts=worker["restarts"],
            uptime=worker["uptime_seconds"],
            status=harmless(worker["status"]),
            last_event=what,
            last_event_age=max(0.0, wall - when),
        )

    def _group(self, name: str, group: Mapping[str, Any], workers: Sequence[WorkerRow]) -> GroupRow:
        return GroupRow(
            name=name,
            state=group["state"],
            tone=_GROUP_TONES.get(group["state"], Tone.NOTICE),
            ready=group["ready"],
            count=group["count"],
            in_flight=sum(worker.in_flight for worker in workers),
            rate=self._rates.of_all(self._group_of, name),
            rss=sum(worker.rss for worker in workers),
            waiting=sum(worker.waiting for worker in workers),
            restarts=group["restarts"],
            note=harmless(_note(group)),
        )


def _note(group: Mapping[str, Any]) -> str:
    notes = []
    if group["failure"]:
        notes.append(
            f"{group['cause']}: {group['failure']}" if group["cause"] else group["failure"]
        )
    elif group["waiting_for"]:
        notes.append("pool {pool}: {error}".format(**group["waiting_for"]))
    elif group["cause"]:
        notes.append(str(group["cause"]))
    if group["next_restart_in_seconds"] is not None:
        notes.append(f"next try in {group['next_restart_in_seconds']:.0f} s")
    return "; ".join(notes)


def _progress(status: Mapping[str, Any]) -> str:
    """Say how far a stop or a roll is."""
    if status["deadline_in_seconds"] is not None:
        left = max(0.0, status["deadline_in_seconds"])
        outstanding = status["outstanding"]
        named = ", ".join(outstanding[:3]) + (", …" if len(outstanding) > 3 else "")  # noqa: PLR2004
        return f"{len(outstanding)} outstanding, {left:.0f} s left{': ' if named else ''}{named}"
    roll = status["roll"]
    if roll is None:
        return ""
    what = "going back" if roll["is_going_back"] else "rolling"
    return f"{what} {roll['replaced']}/{roll['total']} to generation {roll['generation']}"


# --- what is wrong ---------------------------------------------------------------------------------


_SAID_OF_GROUPS = {"failed": "has failed", "degraded": "is degraded", "waiting": "waits"}


def _group_problems(groups: Iterable[GroupRow]) -> Iterable[Problem]:
    for group in groups:
        if group.tone >= Tone.WARN:
            note = f": {group.note}" if group.note else ""
            yield Problem(
                group.tone,
                f"group {group.name} {_SAID_OF_GROUPS[group.state]}, "
                f"{group.ready} of {group.count} ready{note}",
            )


_TROUBLES = {
    "hung": ("hangs", "hang"),
    "stopped": ("is stopped (SIGSTOP)", "are stopped (SIGSTOP)"),
    "leak": ("has leaked a connection", "have leaked connections"),
    "waiting": ("waits for a connection", "wait for connections"),
}


def _worker_problems(workers: Sequence[WorkerRow]) -> Iterable[Problem]:
    for trouble, (one, many) in _TROUBLES.items():
        having = [worker for worker in workers if worker.trouble == trouble]
        if having:
            tone = max(worker.tone for worker in having)
            yield Problem(tone, f"{_names(having)} {one if len(having) == 1 else many}")


def _names(workers: Sequence[WorkerRow]) -> str:
    names = [worker.id for worker in workers[:3]]
    more = len(workers) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _is_mishap(event: Event) -> bool:
    name = event["event"]
    if name == "worker.exited":
        return event.get("cause") in _UNWANTED_ENDS
    return name in _MISHAPS


def _mishap_problems(mishaps: Iterable[tuple[float, Event]], wall: float) -> Iterable[Problem]:
    """Say each kind of mishap once, however often a crash loop repeats it."""
    fresh: dict[str, list[tuple[float, Event]]] = {}
    for when, event in mishaps:
        if wall - when <= FRESH:
            fresh.setdefault(event["event"], []).append((when, event))
    for listed in fresh.values():
        when, event = listed[-1]
        often = f", {len(listed)} such in {FRESH / _MINUTE:.0f} min" if len(listed) > 1 else ""
        yield Problem(Tone.WARN, f"{_told(event)} ({span(max(0.0, wall - when))} ago{often})")


def _tone_of(event: Event) -> Tone:
    is_bad = event["event"] == "group.failed" or _is_mishap(event)
    return Tone.WARN if is_bad else Tone.PLAIN


def _told(event: Event) -> str:
    who = event.get("worker") or event.get("group")
    said = sentence(event)
    if not who or said.startswith("["):
        return harmless(said.strip("[]"))
    return harmless(f"{who}{':' if said.startswith('its ') else ''} {said}")


# --- order, filter, texts --------------------------------------------------------------------------

# What workers can be sorted by, and whether that begins with the largest.
SORTS: dict[str, bool] = {
    "trouble": True,
    "worker": False,
    "in flight": True,
    "jobs/s": True,
    "memory": True,
    "pool": True,
    "restarts": True,
    "up": False,
}


def ordered(
    workers: Iterable[WorkerRow], by: str, *, reverse: bool = False
) -> tuple[WorkerRow, ...]:
    """Return the workers sorted by one of `SORTS`; equal ones in the order of their names."""
    named = sorted(workers, key=lambda worker: (worker.group, worker.number))
    keys = {
        "trouble": lambda worker: max(worker.tone, Tone.GOOD),
        "worker": lambda worker: (worker.group, worker.number),
        "in flight": lambda worker: worker.in_flight,
        "jobs/s": lambda worker: worker.rate or 0.0,
        "memory": lambda worker: worker.rss,
        "pool": lambda worker: (worker.waiting, worker.pool_share),
        "restarts": lambda worker: worker.restarts,
        "up": lambda worker: worker.uptime,
    }
    # `reverse` of a sort keeps equal ones in their order, so names go up either way.
    return tuple(sorted(named, key=keys[by], reverse=SORTS[by] != reverse))


def matches(worker: WorkerRow, words: str, *, only_trouble: bool = False) -> bool:
    """Tell whether a worker has every word in its id, state, pid, status or last event.

    `group:NAME` is the whole name of its group.
    """
    if only_trouble and worker.tone < Tone.WARN:
        return False
    text = (
        f"{worker.id} {worker.group} {worker.state} {worker.trouble} {worker.pid} "
        f"g{worker.generation} {worker.status} {worker.last_event}"
    ).casefold()
    group = f"group:{worker.group.casefold()}"
    return all(
        word == group if word.startswith("group:") else word in text
        for word in words.casefold().split()
    )


def span(seconds: float) -> str:
    """Return a duration in at most five characters."""
    whole = int(seconds)
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m"
    if whole < _DAY:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02d}"
    return f"{whole // _DAY}d"
