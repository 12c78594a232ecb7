"""The supervision figures: ours beside its peers and beside a bare loop of fork and waitpid.

All contenders run the same worker and take turns (A B C, then B C A, ...), so that a noisy minute
hits all of them. The bounds are those that the project has set itself. It measures; what is made
of the samples is in `bench.results`.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.contenders import FLOOR, OURS, Contender, Task, bare_router
from bench.fleet import ContenderError, Fleet, LateError, become_subreaper, run_to_end
from bench.results import Figure, Results

_MANY = 32
_FEW = 8
_LEFT_S = 0.3  # the work that a busy worker has left when the stop signal comes
_SETTLE_S = 0.3  # after the last ready: what a supervisor still does then is no part of a stop
_CALM_S = 2.0  # before the idle window: everything that happens once has happened
_IDLE_S = 10.0
_ORPHANS_DEADLINE_S = 3.0
_ROUTER_DEADLINE_S = 30.0

START = Figure("start", f"start to\n{_MANY} ready", "ms", 1e3, 1.5)
STOP = Figure("stop", f"stop {_MANY} idle, to the\nlast process gone", "ms", 1e3, 1.5)
CANCEL = Figure("cancel", f"cancel to the last\nacknowledgement of {_MANY}", "ms", 1e3, 3.0)
BUSY = Figure("busy", f"stop {_MANY} busy,\n{_LEFT_S * 1e3:.0f} ms left each", "ms", 1e3, 1.1)
RESTART = Figure("restart", "SIGKILL of a worker to\nits replacement's ready", "ms", 1e3, 2.0)
WAKE_UPS = Figure(
    "wake-ups", f"wake-ups of the idle\nsupervisor, {_FEW} workers", "/s", 1.0, 1.0, of_floor=False
)
WORKER_WAKE_UPS = Figure(
    "worker-wake-ups", "wake-ups of an\nidle worker", "/s", 1.0, 0.2, of_floor=False
)
FEW_PSS = Figure("pss-8", f"PSS of everything,\n{_FEW} workers", "MB", 1e-6, 57, of_floor=False)
MANY_PSS = Figure("pss-32", f"PSS of everything,\n{_MANY} workers", "MB", 1e-6, 134, of_floor=False)
ORPHANS = Figure(
    "orphans", f"SIGKILL of the parent to\nthe last of {_MANY} gone", "ms", 1e3, 150, of_floor=False
)

ROLL = Figure(
    "roll", f"roll of {_FEW}, new code\non disk, one by one", "ms", 1e3, 550, of_floor=False
)
ROLL_MISSING = Figure(
    "roll-missing", f"of these {_FEW} not there,\nin its worst moment", "", 1.0, 0, of_floor=False
)
ROLL_OLD_CODE = Figure(
    "roll-old-code", f"of these {_FEW} with the\nold code after it", "", 1.0, 0, of_floor=False
)

FIGURES = (
    START,
    STOP,
    CANCEL,
    BUSY,
    RESTART,
    WAKE_UPS,
    WORKER_WAKE_UPS,
    FEW_PSS,
    MANY_PSS,
    ORPHANS,
    ROLL,
    ROLL_MISSING,
    ROLL_OLD_CODE,
)

Sample = tuple[Figure, float]


def measure(
    contenders: Sequence[Contender],
    figures: Sequence[Figure],
    rounds: int,
    budget_s: float,
    progress: Callable[[str], None],
) -> Results:
    """Measure `figures` of `contenders`: minutes, after which no process and no file is left.

    Everything is done once; a repetition that might end later than `budget_s` after the call is
    left out. A contender that fails is named in the results' failures, and the others are measured.
    """
    budget = _Budget(budget_s)
    become_subreaper()
    results = Results([contender.name for contender in contenders], figures)
    fit = []
    for contender in contenders:
        progress(f"warming up {contender.name}")
        if results.collect(contender.name, _warm_up(contender)):
            fit.append(contender)
    if WAKE_UPS in figures or WORKER_WAKE_UPS in figures:
        progress(f"all of them idle for {_IDLE_S:.0f} s")
        _measure_wake_ups(fit, results)
    for turn in range(rounds):
        for scene, shows in _SCENES.items():
            for contender in _in_turn(fit, turn):
                if (
                    turn % contender.every == 0
                    and _is_wanted(shows, contender, results)
                    and budget.allows((scene, contender.name))
                ):
                    progress(f"round {turn + 1} of {rounds}: {contender.name}")
                    with budget.spend((scene, contender.name)):
                        results.collect(contender.name, scene(contender))
        if CANCEL in figures and FLOOR in results.contenders and budget.allows(_bare_router):
            progress(f"round {turn + 1} of {rounds}: a bare ROUTER")
            with budget.spend(_bare_router):
                results.collect(FLOOR, _bare_router())
    return results


class _Budget:
    """Time for repetitions: what took as long the last time as is left now is not done again."""

    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s
        self._took_s: dict[Hashable, float] = {}

    def allows(self, what: Hashable) -> bool:
        return what not in self._took_s or time.monotonic() + self._took_s[what] <= self._end

    @contextmanager
    def spend(self, what: Hashable) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._took_s[what] = time.monotonic() - begun


def _in_turn(contenders: Sequence[Contender], turn: int) -> Iterator[Contender]:
    """Yield all, another one first each time: what a place in the order does evens out."""
    for place in range(len(contenders)):
        yield contenders[(turn + place) % len(contenders)]


def _is_wanted(shows: set[Figure], contender: Contender, results: Results) -> bool:
    wanted = shows & set(results.figures)
    if contender.name != OURS:
        wanted.discard(CANCEL)  # nobody else acknowledges
    if not contender.rolls:
        wanted -= {ROLL, ROLL_MISSING, ROLL_OLD_CODE}
    # Who has left orphans once does so always, and every time the whole deadline is waited for.
    if results.median(ORPHANS, contender.name) == math.inf:
        wanted.discard(ORPHANS)
    return bool(wanted)


def _warm_up(contender: Contender) -> Iterator[Sample]:
    """Start and stop once: the bytecode is cached, the files are in memory, it works at all."""
    with Fleet(contender, workers=1) as fleet:
        time.sleep(_SETTLE_S)
        fleet.stop()
    yield from ()


def _idle(contender: Contender) -> Iterator[Sample]:
    with Fleet(contender, workers=_MANY) as fleet:
        yield START, fleet.start_s
        time.sleep(_SETTLE_S)
        yield MANY_PSS, fleet.pss_bytes()
        yield STOP, fleet.stop()
        if contender.name == OURS:
            yield CANCEL, cancel_to_last_acknowledgement_s(fleet.log(), _MANY)


def _busy(contender: Contender) -> Iterator[Sample]:
    with Fleet(contender, workers=_MANY, finish_s=_LEFT_S) as fleet:
        yield START, fleet.start_s
        time.sleep(_SETTLE_S)
        yield BUSY, fleet.stop()


def _killed_worker(contender: Contender) -> Iterator[Sample]:
    with Fleet(contender, workers=_FEW) as fleet:
        time.sleep(_SETTLE_S)
        yield FEW_PSS, fleet.pss_bytes()
        for _ in range(contender.kills):
            yield RESTART, fleet.replace_one()
            time.sleep(_SETTLE_S)


def _killed_parent(contender: Contender) -> Iterator[Sample]:
    with Fleet(contender, workers=_MANY) as fleet:
        yield START, fleet.start_s
        time.sleep(_SETTLE_S)
        try:
            yield ORPHANS, fleet.orphan(_ORPHANS_DEADLINE_S)
        except LateError:
            yield ORPHANS, math.inf


def _roll(contender: Contender) -> Iterator[Sample]:
    with Fleet(contender, workers=_FEW) as fleet:
        time.sleep(_SETTLE_S)
        roll = fleet.roll()
        yield ROLL, roll.seconds
        yield ROLL_MISSING, roll.missing
        yield ROLL_OLD_CODE, roll.old_code
        time.sleep(_SETTLE_S)
        fleet.stop()


# What each scene is played for; starts are measured in passing as well.
_SCENES: dict[Callable[[Contender], Iterator[Sample]], set[Figure]] = {
    _idle: {START, MANY_PSS, STOP, CANCEL},
    _busy: {BUSY},
    _killed_worker: {FEW_PSS, RESTART},
    _killed_parent: {ORPHANS},
    _roll: {ROLL, ROLL_MISSING, ROLL_OLD_CODE},
}


def _bare_router() -> Iterator[Sample]:
    with tempfile.TemporaryDirectory(prefix="ackvisor-bench-") as folder:
        task = Task(Path(folder), _MANY)
        yield CANCEL, float(run_to_end(bare_router(task), task, _ROUTER_DEADLINE_S))


def _measure_wake_ups(contenders: Sequence[Contender], results: Results) -> None:
    """Count context switches while all fleets idle side by side, each as if it were alone."""
    with ExitStack() as stack:
        fleets: dict[str, Fleet] = {}
        for contender in contenders:
            try:
                fleets[contender.name] = stack.enter_context(Fleet(contender, workers=_FEW))
            except ContenderError as error:
                results.failures.append(str(error))
        time.sleep(_CALM_S)
        before = {name: (fleet.switches(), time.monotonic()) for name, fleet in fleets.items()}
        time.sleep(_IDLE_S)
        for name, fleet in fleets.items():
            (then, begun), now = before[name], fleet.switches()
            elapsed_s = time.monotonic() - begun
            per_second: dict[int, float] = dict.fromkeys(fleet.workers, 0.0)
            supervisor = 0.0
            for (pid, thread), count in now.items():
                switches = (count - then.get((pid, thread), 0)) / elapsed_s
                if pid in per_second:
                    per_second[pid] += switches
                else:
                    supervisor += switches
            results.add(WAKE_UPS, name, supervisor)
            for switches in per_second.values():
                results.add(WORKER_WAKE_UPS, name, switches)


def cancel_to_last_acknowledgement_s(log: str, workers: int) -> float:
    """Seconds from the first `worker.cancelled` to the last `worker.acknowledged` of a JSON log.

    Raises:
        ContenderError: there is not one of each for every worker.
    """
    times: dict[str, list[dt.datetime]] = defaultdict(list)
    for line in log.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            times[entry["event"]].append(dt.datetime.fromisoformat(entry["time"]))
    cancelled, acknowledged = times["worker.cancelled"], times["worker.acknowledged"]
    if not len(cancelled) == len(acknowledged) == workers:
        raise ContenderError(
            f"{OURS} logged {len(cancelled)} worker.cancelled and "
            f"{len(acknowledged)} worker.acknowledged for {workers} workers"
        )
    return (max(acknowledged) - min(cancelled)).total_seconds()
