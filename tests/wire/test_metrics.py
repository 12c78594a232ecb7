"""What `/metrics`, `/readyz` and the page say, from events, reports and a status; no processes."""

from __future__ import annotations

import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from supervisor import metrics as module
from supervisor import protocol
from supervisor.core.causes import Outage
from supervisor.core.snapshot import FleetSnapshot, GroupSnapshot
from supervisor.exposition import exposition
from supervisor.health import readiness
from supervisor.metrics import Metrics
from workers.pool import stats

POOL = ("group", "db_client_connection_pool_name")
# INTERFACE's list: name, type, labels.
PROMISED = {
    ("supervisor_workers", "gauge", ("group", "state")),
    ("supervisor_group_state", "gauge", ("group", "state")),
    ("supervisor_worker_restarts_total", "counter", ("group", "reason")),
    ("supervisor_jobs_in_flight", "gauge", ("group",)),
    ("supervisor_jobs_total", "counter", ("group", "outcome")),
    ("supervisor_job_seconds", "histogram", ("group",)),
    ("supervisor_drain_seconds", "histogram", ()),
    ("supervisor_kills_total", "counter", ("group",)),
    ("supervisor_reloads_total", "counter", ("outcome",)),
    ("supervisor_budget_connections", "gauge", ("pool", "kind")),
    ("supervisor_pool_leaks_total", "counter", ("group", "pool")),
    ("db_client_connection_count", "gauge", (*POOL, "db_client_connection_state")),
    ("db_client_connection_max", "gauge", POOL),
    ("db_client_connection_idle_max", "gauge", POOL),
    ("db_client_connection_pending_requests", "gauge", POOL),
    ("db_client_connection_timeouts_total", "counter", POOL),
    ("db_client_connection_wait_time_seconds", "histogram", POOL),
    ("db_client_connection_use_time_seconds", "histogram", POOL),
    ("db_client_connection_create_time_seconds", "histogram", POOL),
}
VALUES = {
    ("supervisor_workers", "state"): "starting ready draining drained exited failed",
    ("supervisor_group_state", "state"): "starting ready degraded waiting failed finished",
    ("supervisor_worker_restarts_total", "reason"): "exited failed killed hung recycled rolled",
    ("supervisor_jobs_total", "outcome"): "done failed cancelled",
    ("supervisor_reloads_total", "outcome"): "done rejected rolled_back",
    ("supervisor_budget_connections", "kind"): "budget granted open",
    ("db_client_connection_count", "db_client_connection_state"): "used idle",
}
POOLS = {"web": {"main": 3}}


@pytest.fixture
def complaints():
    return []


@pytest.fixture
def metrics(complaints):
    return Metrics(lambda *words: complaints.append(words))


POOL_BUCKETS = len(protocol.POOL_SECONDS) + 1


def timings(counts, seconds=0.0, *, size=POOL_BUCKETS):
    return protocol.Timings((*counts, *[0] * (size - len(counts))), seconds)


def report(done=0, *, failed=0, cancelled=0, pools=None, own=()):
    size = len(protocol.JOB_SECONDS) + 1
    pools = pools or {}
    return protocol.Report(
        number=1,
        in_flight=0,
        jobs_done=done,
        jobs_failed=failed,
        pools=pools,
        figures=protocol.Figures(
            jobs_cancelled=cancelled,
            job_seconds=timings([done, failed, cancelled], 0.5, size=size),
            pools={
                name: protocol.PoolTimings(
                    wait=timings([1, 2]), use=timings([3], 0.25), create=timings([0, 0, 4])
                )
                for name in pools
            },
            own=own,
        ),
    )


def worker(name="web-1", *, group="web", state="ready", in_flight=0, pools=None):
    pools = {n: protocol.to_builtins(s) for n, s in (pools or {}).items()}
    return {"id": name, "group": group, "state": state, "in_flight": in_flight, "pools": pools}


def status(*workers, groups=("web",)):
    budget = {"budget": 8, "granted": 6, "open": 2}
    return {
        "groups": {name: {"state": "ready"} for name in groups},
        "workers": list(workers),
        "budgets": {"main": budget},
    }


def spawn(metrics, name="web-1", group="web", **fields):
    metrics.event("worker.spawned", {"worker": name, "group": group, **fields})


def samples(metrics, state=None):
    """Return (name, *values by their labels' names) -> value, as a scraper reads them."""
    text, _ = exposition(metrics.families(state or status(), POOLS), "")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse_text(text.decode())
        for sample in family.samples
    }


# --- names ---------------------------------------------------------------------------------------


def test_every_promised_family_is_there_from_the_start_at_zero(metrics):
    """Names, types, labels and their values are INTERFACE's, no more and no fewer, all of them 0."""
    families = metrics.families(status(), POOLS)

    assert {(f.name, f.kind, tuple(f.labels)) for f in families} == PROMISED
    for family in families:
        assert family.series
        assert family.help
        for position, label in enumerate(family.labels):
            expected = VALUES.get((family.name, label))
            if expected:
                assert {key[position] for key in family.series} == set(expected.split())
        if family.name not in {"supervisor_budget_connections", "supervisor_group_state"}:
            for figure in family.series.values():
                assert not (sum(figure.counts) if isinstance(figure, module.Buckets) else figure)


@pytest.mark.parametrize(
    ("accept", "parse", "media_type"),
    [
        ("", parse_text, "text/plain"),
        (
            "application/openmetrics-text",
            parse_openmetrics,
            "application/openmetrics",
        ),
    ],
)
def test_both_formats_are_read_by_their_own_parser(metrics, accept, parse, media_type):
    """The same series come out of Prometheus's text and of OpenMetrics."""
    spawn(metrics)
    metrics.heard("web-1", report(3, pools={"main": protocol.PoolStats(timeouts=2)}))
    text, found = exposition(metrics.families(status(worker()), POOLS), accept)

    read = {s.name: s.value for family in parse(text.decode()) for s in family.samples}
    assert found.startswith(media_type)
    assert read["db_client_connection_timeouts_total"] == 2
    assert read["supervisor_job_seconds_count"] == 3


def test_the_pools_buckets_are_the_wires():
    """What a pool counts by is what the supervisor shows: neither may import the other."""
    assert stats.BOUNDS == protocol.POOL_SECONDS


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_the_supervisors_own_process_is_told_as_every_exporter_does(metrics, accept):
    """In Prometheus's standard names: when it began, what it takes, how many descriptors it may have."""
    text, _ = exposition(metrics.families(status(), POOLS), accept)
    parse = parse_openmetrics if accept else parse_text

    kinds = {f.name: f.type for f in parse(text.decode()) if f.name.startswith("process_")}
    assert kinds == {
        "process_cpu_seconds": "counter",
        "process_max_fds": "gauge",
        "process_open_fds": "gauge",
        "process_resident_memory_bytes": "gauge",
        "process_start_time_seconds": "gauge",
        "process_virtual_memory_bytes": "gauge",
    }
    read = {s.name: s.value for family in parse(text.decode()) for s in family.samples}
    assert -5.0 < time.time() - read["process_start_time_seconds"] < 86400.0
    assert read["process_cpu_seconds_total"] > 0.0
    assert 0 < read["process_open_fds"] <= read["process_max_fds"]


# --- figures -------------------------------------------------------------------------------------


def test_counters_are_derived_from_events(metrics):
    """Restarts, kills, reloads, leaks and drains are what was announced, and nothing else."""
    spawn(metrics)
    spawn(metrics, "web-2", reason="killed")
    spawn(metrics, "web-3", reason="rolled")
    spawn(metrics, "web-4", reason="rolled")
    who = {"worker": "web-1", "group": "web"}
    metrics.event("worker.killed", who)
    metrics.event("worker.drained", {**who, "seconds": 0.3})
    metrics.event("worker.drained", who)  # it was never cancelled
    metrics.event("pool.leak", {**who, "pool": "main"})
    metrics.event("reload.done", {})
    metrics.event("reload.rolled_back", {})
    metrics.event("reload.started", {})
    metrics.event("worker.exited", who)

    found = samples(metrics)
    assert found["supervisor_worker_restarts_total", "web", "killed"] == 1
    assert found["supervisor_worker_restarts_total", "web", "rolled"] == 2
    assert found["supervisor_worker_restarts_total", "web", "failed"] == 0
    assert found["supervisor_kills_total", "web"] == 1
    assert found["supervisor_pool_leaks_total", "web", "main"] == 1
    assert [found["supervisor_reloads_total", o] for o in module.RELOADS] == [1, 0, 1]
    assert found["supervisor_drain_seconds_count",] == 1
    assert found["supervisor_drain_seconds_bucket", "0.25"] == 0
    assert found["supervisor_drain_seconds_bucket", "0.5"] == 1
    assert found["supervisor_drain_seconds_sum",] == pytest.approx(0.3)


def test_gauges_are_a_groups_sums_of_the_status(metrics):
    """What the status says of single workers is added up, by group and pool."""
    one = protocol.PoolStats(max_open=4, open=3, in_use=2, idle=1, waiting=5)
    two = protocol.PoolStats(max_open=2, open=2, in_use=2)
    found = samples(
        metrics,
        status(
            worker(in_flight=2, pools={"main": one}),
            worker("web-2", state="draining", in_flight=1, pools={"main": two}),
        ),
    )
    assert found["supervisor_workers", "web", "ready"] == 1
    assert found["supervisor_workers", "web", "draining"] == 1
    assert found["supervisor_jobs_in_flight", "web"] == 3
    assert found["db_client_connection_count", "main", "used", "web"] == 4
    assert found["db_client_connection_count", "main", "idle", "web"] == 1
    assert found["db_client_connection_max", "main", "web"] == 6
    assert found["db_client_connection_idle_max", "main", "web"] == 3 + 2  # max_idle is 3
    assert found["db_client_connection_pending_requests", "main", "web"] == 5
    assert found["supervisor_budget_connections", "granted", "main"] == 6


def test_what_a_replaced_worker_had_counted_is_kept(metrics):
    """Jobs, histograms and time-outs of a worker that has ended stay in its group's totals."""
    for name in ("web-1", "web-2"):
        spawn(metrics, name)
        pools = {"main": protocol.PoolStats(timeouts=1)}
        metrics.heard(name, report(3, failed=2, cancelled=1, pools=pools))
        metrics.event("worker.exited", {"worker": name, "group": "web"})
    metrics.heard("web-2", report(99))  # after its end

    found = samples(metrics)
    assert [found["supervisor_jobs_total", "web", o] for o in module.OUTCOMES] == [6, 4, 2]
    assert found["supervisor_job_seconds_count", "web"] == 12
    assert found["supervisor_job_seconds_sum", "web"] == 1.0
    assert found["supervisor_job_seconds_bucket", "web", "0.001"] == 6
    assert found["supervisor_job_seconds_bucket", "web", "0.0025"] == 10
    assert found["db_client_connection_timeouts_total", "main", "web"] == 2
    assert found["db_client_connection_use_time_seconds_sum", "main", "web"] == 0.5
    assert found["db_client_connection_wait_time_seconds_count", "main", "web"] == 6
    assert found["db_client_connection_create_time_seconds_bucket", "main", "web", "0.001"] == 8


def test_a_group_that_was_taken_out_keeps_its_totals(metrics):
    """A counter does not vanish when a reload takes its group away."""
    spawn(metrics, "old-1", "old")
    metrics.heard("old-1", report(3, pools={"main": protocol.PoolStats()}))
    metrics.event("worker.exited", {"worker": "old-1", "group": "old"})
    assert samples(metrics)["supervisor_jobs_total", "old", "done"] == 3


# --- the application's own -----------------------------------------------------------------------


def own(kind="counter", name="seen", series=((("a",), (2.0,)),), *, labels=("kind",), bounds=()):
    return protocol.Metric(
        name=name, kind=kind, help="What it says.", labels=labels, bounds=bounds, series=series
    )


def test_own_metrics_are_summed_over_the_workers_of_a_group(metrics):
    """Counters and histograms keep what the dead had counted; gauges are the living ones' sum."""
    histogram = own("histogram", "size", ((("a",), (1.0, 0.0, 2.0, 9.5)),), bounds=(1.0, 2.0))
    for name, group in (("web-1", "web"), ("web-2", "web"), ("api-1", "api")):
        spawn(metrics, name, group)
        metrics.heard(name, report(own=(own(), own("gauge", "level"), histogram)))
    metrics.event("worker.exited", {"worker": "web-1", "group": "web"})

    found = samples(metrics)
    assert found["seen_total", "web", "a"] == 4
    assert found["seen_total", "api", "a"] == 2
    assert found["level", "web", "a"] == 2
    assert found["size_bucket", "web", "a", "2.0"] == 2
    assert found["size_bucket", "web", "a", "+Inf"] == 6
    assert found["size_sum", "web", "a"] == 19


def test_of_two_declarations_of_one_name_the_newest_is_shown(metrics, complaints):
    """New code may declare a metric in other words; it is said once, and nothing is mixed up."""
    spawn(metrics)
    spawn(metrics, "web-2")
    for _ in range(2):
        metrics.heard("web-1", report(own=(own(),)))
        metrics.heard("web-2", report(own=(own(labels=(), series=(((), (5.0,)),)),)))

    found = samples(metrics)
    assert found["seen_total", "web"] == 5
    assert ("seen_total", "web", "a") not in found
    assert [name for name, _ in complaints] == ["seen"]


def test_series_are_bounded_over_all_workers(metrics, monkeypatch):
    """What is above the bound is one series of a group that says "other", and none is lost."""
    monkeypatch.setattr(module, "MAX_SERIES", 3)
    for number in range(4):
        spawn(metrics, f"web-{number}")
        series = tuple(((f"{number}{letter}",), (1.0,)) for letter in "ab")
        for _ in range(2):
            metrics.heard(f"web-{number}", report(own=(own(series=series),)))

    found = {key: v for key, v in samples(metrics).items() if key[0] == "seen_total"}
    assert found["seen_total", "web", "other"] == 5
    assert len(found) == 4
    assert sum(found.values()) == 8


def test_series_that_do_not_fit_their_declaration_are_passed_over(metrics):
    """A worker that tells nonsense neither breaks the scrape nor is it counted."""
    spawn(metrics)
    nonsense = (
        own(series=(((), (1.0,)), (("a",), (1.0, 2.0)))),
        own("histogram", "size", bounds=(1.0,)),
    )
    metrics.heard("web-1", report(own=nonsense))
    assert not {key for key in samples(metrics) if key[0].startswith(("seen", "size"))}


@pytest.mark.parametrize(
    "unfit",
    [
        own(name="two words"),
        own(name='x"} 1\nsupervisor_kills_total'),
        own(name="supervisor_kills"),
        own(labels=("group",)),
        own(labels=("a-b",)),
        own("histogram", bounds=(2.0, 1.0), series=()),
    ],
    ids=lambda metric: repr(metric.name),
)
def test_a_declaration_that_would_break_the_scrape_is_left_out(metrics, complaints, unfit):
    """A worker that has gone mad costs its own metric only, and it is said once."""
    spawn(metrics)
    for _ in range(2):
        metrics.heard("web-1", report(1, own=(unfit, own(name="good"))))
    found = samples(metrics)
    assert found["good_total", "web", "a"] == 2
    assert found["supervisor_jobs_total", "web", "done"] == 1
    assert found["supervisor_kills_total", "web"] == 0
    assert [name for name, _ in complaints] == [unfit.name]


# --- health --------------------------------------------------------------------------------------


def fleet(state="ready", *groups):
    return FleetSnapshot(state, 1, groups, (), (), None)


def group(name="web", *, ready=2, state="ready", failure="", finished=0, count=2, **more):
    return GroupSnapshot(name, count, ready, state, 0, failure, None, finished, **more)


@pytest.mark.parametrize(
    ("state", "found", "reasons"),
    [
        ("ready", group(), []),
        ("reloading", group(ready=3), []),
        ("ready", group(ready=1, finished=1), []),
        ("starting", group(), ["the supervisor is starting"]),
        ("ready", group(ready=1, state="degraded"), ["group web: 1 of 2 ready"]),
        ("ready", group(state="failed", failure="too often"), ["group web has failed: too often"]),
        (
            "starting",
            group(ready=0, state="waiting", waiting_for=Outage("main", "refused")),
            ["group web waits for a dependency: pool main"],
        ),
        ("ready", group(ready=0, state="finished", finished=2), []),
        ("stopping", group(), ["the supervisor is stopping"]),
    ],
)
def test_readiness_is_every_groups_count_and_says_what_lacks(state, found, reasons):
    """Ready is who has its count in every group, in a roll too; not in a start, not in a stop."""
    is_ready, answer = readiness(fleet(state, found))
    assert is_ready is (not reasons)
    assert answer == {"state": state, "reasons": reasons}


def test_who_waits_for_a_migration_says_for_which():
    """Those that have ended are not waited for; the migration itself lacks nothing."""
    web = group(ready=0, state="waiting")
    done = group("create", ready=0, state="finished", finished=1, count=0, before=True)
    runs = group("migrate", ready=0, state="starting", count=1, before=True)
    _, answer = readiness(fleet("starting", web, done, runs))
    assert answer["reasons"] == ["group web waits for migrate"]
