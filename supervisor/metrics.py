"""What `/metrics` says: counters from the life-cycle events, sums of what workers have measured.

Pure: events, reports and a status in, families out; how they are written is `exposition`'s business.
Gauges are taken from the same status that `status --json` and the page show. Every family that
INTERFACE.md names is there from the start, at zero, for each group and pool of the configuration.
"""

from __future__ import annotations

__all__ = ["Buckets", "Family", "Metrics"]

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from supervisor.core.ledger import Key, Ledger, Vector, add
from supervisor.protocol import JOB_SECONDS, OTHER, POOL_SECONDS, Figures, Metric, Report, Timings

# Of one metric of the application's own, in all groups; what comes later counts as OTHER.
MAX_SERIES = 1000
MAX_OWN = 200  # declarations of the applications' own; what comes later is left out

GROUP_STATES = ("starting", "ready", "degraded", "waiting", "failed", "finished")
STATES = ("starting", "ready", "draining", "drained", "exited", "failed")
RESTART_REASONS = ("exited", "failed", "killed", "hung", "recycled", "rolled")
OUTCOMES = ("done", "failed", "cancelled")
RELOADS = ("done", "rejected", "rolled_back")
DRAIN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
_POOL = "db_client_connection_pool_name"  # OpenTelemetry's, as Prometheus spells it
_TIMES = ("wait_time", "use_time", "create_time")


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram: counts by bucket, not cumulated, one more than there are bounds."""

    bounds: tuple[float, ...]
    counts: Vector
    sum: float


@dataclass(slots=True)
class Family:
    """One metric with all its series, by the values of its labels."""

    name: str  # a counter's ends in _total
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    series: dict[Key, float | Buckets] = field(default_factory=dict)


class Metrics:
    """The figures of one supervisor since its start. Written by its own methods.

    Args:
        complain: told once the name of an application's metric that is not shown as it was
            declared, and why.
    """

    def __init__(self, complain: Callable[[str, str], object]) -> None:
        self._ledger = Ledger()
        self._restarts: Counter[Key] = Counter()
        self._kills: Counter[Key] = Counter()
        self._reloads: Counter[Key] = Counter()
        self._leaks: Counter[Key] = Counter()
        self._drains = [0] * (len(DRAIN_SECONDS) + 1)
        self._drain_seconds = 0.0
        self._group_of: dict[str, str] = {}  # living workers
        self._own = _Own(complain)

    # --- what has happened -------------------------------------------------------------------------

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Count a life-cycle event."""
        match name:
            case "worker.spawned":
                self._ledger.enter(fields["worker"])
                self._group_of[fields["worker"]] = fields["group"]
                if reason := fields.get("reason"):
                    self._restarts[fields["group"], reason] += 1
            case "worker.drained" if "seconds" in fields:
                self._drains[bisect_left(DRAIN_SECONDS, fields["seconds"])] += 1
                self._drain_seconds += fields["seconds"]
            case "worker.killed":
                self._kills[fields["group"],] += 1
            case "worker.exited":
                self._ledger.close(fields["worker"])
                self._own.forget(fields["worker"])
                self._group_of.pop(fields["worker"], None)
            case "pool.leak":
                self._leaks[fields["group"], fields["pool"]] += 1
            case "reload.done" | "reload.rejected" | "reload.rolled_back":
                self._reloads[name.removeprefix("reload."),] += 1
            case _:
                pass

    def heard(self, worker: str, report: Report) -> None:
        """Take what a living worker has measured."""
        group = self._group_of.get(worker)
        figures = report.figures
        if group is None or figures is None:
            return
        counted: dict[Key, Vector] = {
            ("jobs", group): (report.jobs_done, report.jobs_failed, figures.jobs_cancelled)
        }
        _note(counted, ("job_seconds", group), figures.job_seconds, JOB_SECONDS)
        for pool, stats in report.pools.items():
            counted["timeouts", group, pool] = (stats.timeouts,)
        for pool, timings in figures.pools.items():
            _note(counted, ("wait_time", group, pool), timings.wait, POOL_SECONDS)
            _note(counted, ("use_time", group, pool), timings.use, POOL_SECONDS)
            _note(counted, ("create_time", group, pool), timings.create, POOL_SECONDS)
        counted |= self._own.heard(worker, group, figures)
        self._ledger.heard(worker, counted)

    # --- what is shown -----------------------------------------------------------------------------

    def families(
        self, status: Mapping[str, Any], pools: Mapping[str, Mapping[str, int]]
    ) -> list[Family]:
        """Return all metrics as they are now.

        Args:
            status: what `status --json` shows.
            pools: the pools of each group and their `max_idle`, as configured.
        """
        totals = self._ledger.totals()
        groups = dict.fromkeys([*status["groups"], *(key[1] for key in totals if key[0] == "jobs")])
        places = dict.fromkeys((group, pool) for group in groups for pool in pools.get(group, ()))
        places |= dict.fromkeys((key[1], key[2]) for key in totals if key[0] == "timeouts")
        return [
            *self._of_supervisor(status, groups, places, totals),
            *_of_pools(status, pools, places, totals),
            *self._own.families(totals),
        ]

    def _of_supervisor(
        self,
        status: Mapping[str, Any],
        groups: Iterable[str],
        places: Iterable[Key],
        totals: Mapping[Key, Vector],
    ) -> Iterator[Family]:
        workers = Family(
            "supervisor_workers", "gauge", "Workers of a group by state.", ("group", "state")
        )
        workers.series.update({(g, s): 0 for g in groups for s in STATES})
        in_flight = Family(
            "supervisor_jobs_in_flight", "gauge", "Jobs that workers have in hand.", ("group",)
        )
        in_flight.series.update({(g,): 0 for g in groups})
        for worker in status["workers"]:
            _add(workers, (worker["group"], worker["state"]), 1)
            _add(in_flight, (worker["group"],), worker["in_flight"])
        yield workers
        states = Family(
            "supervisor_group_state",
            "gauge",
            "1 for the state that a group is in, 0 for every other one.",
            ("group", "state"),
        )
        for group, figures in status["groups"].items():
            states.series.update({(group, s): int(s == figures["state"]) for s in GROUP_STATES})
        yield states
        yield _counter(
            "supervisor_worker_restarts_total",
            "Workers that took the place of another one, by what had become of that.",
            ("group", "reason"),
            ((g, r) for g in groups for r in RESTART_REASONS),
            self._restarts,
        )
        yield in_flight
        jobs = Family(
            "supervisor_jobs_total", "counter", "Jobs by how they came out.", ("group", "outcome")
        )
        for group in groups:
            done = totals.get(("jobs", group), (0, 0, 0))
            jobs.series.update({(group, o): n for o, n in zip(OUTCOMES, done, strict=True)})
        yield jobs
        seconds = Family("supervisor_job_seconds", "histogram", "How long jobs took.", ("group",))
        for group in groups:
            seconds.series[group,] = _buckets(totals.get(("job_seconds", group)), JOB_SECONDS)
        yield seconds
        yield Family(
            "supervisor_drain_seconds",
            "histogram",
            "How long workers took from their cancel until they were drained.",
            (),
            {(): Buckets(DRAIN_SECONDS, tuple(self._drains), self._drain_seconds)},
        )
        yield _counter(
            "supervisor_kills_total",
            "Workers that the supervisor had to kill.",
            ("group",),
            ((g,) for g in groups),
            self._kills,
        )
        yield _counter(
            "supervisor_reloads_total",
            "Reloads by what came of them.",
            ("outcome",),
            ((outcome,) for outcome in RELOADS),
            self._reloads,
        )
        budgets = Family(
            "supervisor_budget_connections",
            "gauge",
            "Connections of all workers together: allowed, leased to workers, open.",
            ("pool", "kind"),
        )
        for pool, figures in status["budgets"].items():
            budgets.series.update({(pool, k): figures[k] for k in ("budget", "granted", "open")})
        yield budgets
        yield _counter(
            "supervisor_pool_leaks_total",
            "Loans that lasted longer than their leak threshold.",
            ("group", "pool"),
            places,
            self._leaks,
        )


def _of_pools(
    status: Mapping[str, Any],
    pools: Mapping[str, Mapping[str, int]],
    places: Iterable[Key],
    totals: Mapping[Key, Vector],
) -> Iterator[Family]:
    labels = ("group", _POOL)
    count = Family(
        "db_client_connection_count",
        "gauge",
        "Connections by whether they are lent.",
        (*labels, "db_client_connection_state"),
    )
    most = Family("db_client_connection_max", "gauge", "Connections allowed.", labels)
    idle_max = Family("db_client_connection_idle_max", "gauge", "Idle ones allowed.", labels)
    pending = Family("db_client_connection_pending_requests", "gauge", "Callers that wait.", labels)
    for place in places:
        count.series.update({(*place, "used"): 0, (*place, "idle"): 0})
        for family in (most, idle_max, pending):
            family.series[place] = 0
    for worker in status["workers"]:
        group = worker["group"]
        for pool, stats in worker["pools"].items():
            place = (group, pool)
            _add(count, (*place, "used"), stats["in_use"])
            _add(count, (*place, "idle"), stats["idle"])
            _add(most, place, stats["max_open"])
            allowed = pools.get(group, {}).get(pool, stats["max_open"])
            _add(idle_max, place, min(allowed, stats["max_open"]))
            _add(pending, place, stats["waiting"])
    yield from (count, most, idle_max, pending)
    timeouts = {key[1:]: int(n) for key, (n, *_) in totals.items() if key[0] == "timeouts"}
    yield _counter(
        "db_client_connection_timeouts_total", "Acquires that timed out.", labels, places, timeouts
    )
    helps = ("How long callers waited.", "How long loans lasted.", "How long connecting took.")
    for what, help_ in zip(_TIMES, helps, strict=True):
        family = Family(f"db_client_connection_{what}_seconds", "histogram", help_, labels)
        for place in places:
            family.series[place] = _buckets(totals.get((what, *place)), POOL_SECONDS)
        yield family


class _Own:
    """The applications' own metrics: in which words they were declared, and their gauges.

    A metric that is declared in other words than before (by new code after a reload, or by another
    group) is another one of the same name; the newest of a name is shown.
    """

    def __init__(self, complain: Callable[[str, str], object]) -> None:
        self._complain = complain
        self._declared: list[Metric] = []
        self._number_of: dict[Key, int] = {}  # of a declaration, in _declared
        self._refused: set[str] = set()
        self._known: defaultdict[int, set[Key]] = defaultdict(set)  # series, by declaration
        self._gauges: dict[str, dict[Key, float]] = {}  # by living worker

    def heard(self, worker: str, group: str, figures: Figures) -> dict[Key, Vector]:
        """Take note of the gauges; return what is counted."""
        found: dict[Key, Vector] = {}
        gauges: dict[Key, float] = {}
        for metric in figures.own:
            number = self._number(metric)
            size = len(metric.bounds) + 2 if metric.kind == "histogram" else 1
            for labels, values in metric.series:
                if number < 0 or len(labels) != len(metric.labels) or len(values) != size:
                    continue
                key = ("own", str(number), *self._bounded(number, (group, *labels)))
                if metric.kind == "gauge":
                    gauges[key] = gauges.get(key, 0.0) + values[0]
                else:
                    found[key] = add(found.get(key), values)
        self._gauges[worker] = gauges
        return found

    def _number(self, metric: Metric) -> int:
        words = (metric.name, metric.kind, *metric.labels, *map(str, metric.bounds))
        number = self._number_of.get(words)
        if number is None:
            if len(self._number_of) >= MAX_OWN or not _is_fit(metric):
                if metric.name not in self._refused and len(self._refused) < MAX_OWN:
                    self._refused.add(metric.name)
                    self._complain(metric.name, f"left out: unfit, or after {MAX_OWN} others")
                return -1
            number = self._number_of[words] = len(self._declared)
            if any(metric.name == other.name for other in self._declared):
                self._complain(metric.name, "declared in other words: the newest are shown")
            self._declared.append(metric)
        return number

    def _bounded(self, number: int, key: Key) -> Key:
        known = self._known[number]
        if key not in known:
            if len(known) >= MAX_SERIES:
                return (key[0], *(OTHER for _ in key[1:]))
            known.add(key)
        return key

    def forget(self, worker: str) -> None:
        """A worker has ended: its gauges say nothing any more."""
        self._gauges.pop(worker, None)

    def families(self, totals: Mapping[Key, Vector]) -> Iterator[Family]:
        """Return them with their figures; a name that is declared but has none is left out."""
        found: defaultdict[str, dict[Key, Vector]] = defaultdict(dict)
        for key, vector in totals.items():
            if key[0] == "own":
                found[key[1]][key[2:]] = vector
        for gauges in self._gauges.values():
            for key, value in gauges.items():
                found[key[1]][key[2:]] = add(found[key[1]].get(key[2:]), (value,))
        shown = {metric.name: number for number, metric in enumerate(self._declared)}
        for name, number in shown.items():
            metric, series = self._declared[number], found.get(str(number))
            if series:
                is_histogram = metric.kind == "histogram"
                yield Family(
                    f"{name}_total" if metric.kind == "counter" else name,
                    metric.kind,
                    metric.help,
                    ("group", *metric.labels),
                    {
                        k: _buckets(v, metric.bounds) if is_histogram else v[0]
                        for k, v in series.items()
                    },
                )


def _is_fit(metric: Metric) -> bool:
    """Tell whether a scrape would parse with it. Workers see to that, but one may be broken."""
    names = (metric.name, *metric.labels)
    return (
        all(_NAME.fullmatch(name) for name in names)
        and not metric.name.startswith(("supervisor_", "db_client_", "process_"))
        and len({"group", "le", *metric.labels}) == len(metric.labels) + 2
        and list(metric.bounds) == sorted(set(metric.bounds))
    )


def _note(
    counted: dict[Key, Vector], key: Key, timings: Timings, bounds: tuple[float, ...]
) -> None:
    if len(timings.counts) == len(bounds) + 1:  # else it comes from other code than this
        counted[key] = (*timings.counts, timings.sum)


def _add(family: Family, key: Key, amount: float) -> None:
    before = family.series.get(key, 0)
    assert not isinstance(before, Buckets)
    family.series[key] = before + amount


def _counter(
    name: str, help_: str, labels: Key, places: Iterable[Key], counts: Mapping[Key, int]
) -> Family:
    zeros: dict[Key, float | Buckets] = dict.fromkeys(places, 0)
    return Family(name, "counter", help_, labels, zeros | dict(counts))


def _buckets(vector: Vector | None, bounds: tuple[float, ...]) -> Buckets:
    *counts, total = vector or (0.0,) * (len(bounds) + 2)
    return Buckets(bounds, tuple(counts), total)
