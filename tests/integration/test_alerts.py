"""The alerts and the dashboard that ship: against the metrics' own list, promtool, and a real run."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

from supervisor.metrics import Metrics
from tests.prometheus import PROMTOOL, Prometheus, require_prometheus
from tests.supervised import REPO, Supervised, group, wait_until

FOLDER = REPO / "monitoring"
RULES = (FOLDER / "alerts.yml").read_text(encoding="utf-8")
RULES_TEST = (FOLDER / "alerts_test.yml").read_text(encoding="utf-8")
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], t["expr"]) for panel in PANELS for t in panel["targets"]]
VARIABLES = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
ALERTS = re.findall(r"- alert: (\w+)", RULES)
EXPRESSIONS = "\n".join(line for line in RULES.splitlines() if "summary:" not in line)
FAMILIES = {
    family.name: family
    for family in Metrics(lambda *_: None).families(
        {
            "groups": {"jobs": {"state": "ready"}},
            "workers": [],
            "budgets": {"main": {"budget": 8, "granted": 6, "open": 2}},
        },
        {"jobs": {"main": 3}},
    )
}
SCRAPED = {"job", "instance", "le"}  # labels that others give
FREE = {"group", "pool", "db_client_connection_pool_name"}  # with values of the user's own

# --- what is written in them ---------------------------------------------------------------------


def family_of(name: str) -> str:
    """Return the family that a series belongs to."""
    return name if name in FAMILIES else re.sub("_(bucket|count|sum)$", "", name)


@pytest.mark.parametrize(
    "text", [EXPRESSIONS, *(q for _, q in QUERIES)], ids=lambda text: text.strip()[:40]
)
def test_metrics_labels_and_values_that_are_named_exist(text):
    """No expression asks for a metric, a label or a label's value that /metrics never has."""
    selectors = re.findall(r"\b((?:supervisor|db_client)_\w+)\{([^}]*)\}", text)
    for series, matchers in selectors:
        family = FAMILIES[family_of(series)]
        for label, values in re.findall(r'(\w+)\s*[!=]~?\s*"([^"]*)"', matchers):
            assert label in SCRAPED | set(family.labels), (series, label)
            if label not in SCRAPED | FREE and not values.startswith("$"):
                position = family.labels.index(label)
                known = {key[position] for key in family.series}
                assert set(values.split("|")) <= known, (series, label)


def test_every_metric_is_on_the_dashboard():
    """Whatever /metrics offers is in some panel, and panels name nothing else."""
    named = re.findall(r"\b(?:supervisor|db_client)_\w+", " ".join(q for _, q in QUERIES))
    labels = {label for family in FAMILIES.values() for label in family.labels}
    assert {family_of(name) for name in named} - labels == set(FAMILIES)


def test_the_dashboard_needs_nothing_but_grafana_and_its_variables():
    """Panels are Grafana's own, take the data source from a variable, and say what they show."""
    assert {"datasource", "job", "instance", "group"} == set(VARIABLES)
    assert {p["type"] for p in PANELS} <= {
        "stat",
        "timeseries",
        "state-timeline",
        "table",
        "bargauge",
    }
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["datasource"] == source
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert "$job" in target["expr"], panel["title"]
            assert "$instance" in target["expr"], panel["title"]


def test_no_panel_covers_another_one():
    """Each has its own number and its own place within 24 columns, below its row's title."""
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    taken = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) == 23


def test_each_alert_is_tested_both_ways():
    """For every rule there is a case in which it fires and one in which it does not."""
    cases = re.findall(r"alertname: (\w+)\n\s+exp_alerts:( \[\])?", RULES_TEST)
    assert {name for name, none in cases if not none} == set(ALERTS)
    assert {name for name, none in cases if none} == set(ALERTS)
    assert len(ALERTS) == len(set(ALERTS))


@pytest.mark.parametrize(
    "words", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_promtool_accepts_the_rules(words):
    """The rules are valid, and do what their own tests say."""
    require_prometheus()
    done = subprocess.run(
        [PROMTOOL or "promtool", *words],
        cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# --- a real run ----------------------------------------------------------------------------------

APPLICATION = """
import threading, time
from pathlib import Path

def taken(folder):
    for path in sorted(folder.iterdir()):
        try:
            path.unlink()
        except FileNotFoundError:
            continue  # another worker has it
        yield path.name

def jobs(worker):
    '''Do a job for each file of the inbox.'''
    worker.ready()
    while not worker.accepting.done:
        for name in taken(Path(worker.options["inbox"])):
            try:
                with worker.job(name) as job, worker.pools["main"].acquire(job.ctx) as conn:
                    conn.execute("select 1")
                    if name.startswith("bad"):
                        raise ValueError(name)
                    if name.startswith("long"):
                        job.ctx.wait()
                        job.ctx.check()
            except ValueError:
                pass
            if worker.accepting.done:
                return
        worker.accepting.wait(0.02)

def loaded(worker):
    '''Want more connections than there are, and keep each for longer than the threshold.'''
    def borrow(pool, seconds):
        while not worker.accepting.done:
            try:
                with worker.pools[pool].acquire():
                    worker.accepting.wait(seconds)
            except TimeoutError:
                pass
    for _ in range(6):
        worker.wg.go(borrow, "tight", 1.4)
        worker.wg.go(borrow, "shared", 3600.0)
    worker.ready()
    worker.accepting.wait()

def stubborn(worker):
    '''Do not stop, if the file says so.'''
    worker.ready()
    if not Path(worker.options["file"]).exists():
        worker.accepting.wait()
        return
    while True:
        try:
            time.sleep(3600.0)
        except BaseException:
            continue

def fragile(worker):
    '''Fail once for each file.'''
    worker.ready()
    while not worker.accepting.wait(0.02):
        for name in taken(Path(worker.options["inbox"])):
            raise RuntimeError(name)
"""
MUST_FIRE = {
    "AckvisorSupervisorDown",
    "AckvisorReloadRolledBack",
    "AckvisorReloadRejected",
    "AckvisorGroupFailed",
    "AckvisorWorkersCrashLooping",
    "AckvisorWorkersKilledFromOutside",
    "AckvisorWorkersKilled",
    "AckvisorDrainOutstanding",
    "AckvisorPoolSaturated",
    "AckvisorPoolRequestsPending",
    "AckvisorPoolWaitLong",
    "AckvisorPoolTimeouts",
    "AckvisorPoolLeak",
    "AckvisorBudgetNearLimit",
}
# With every `for` cut to a second these may: while Prometheus and groups start, or when a scrape
# comes late on a busy machine.
MAY_FIRE = {"AckvisorSupervisorAbsent", "AckvisorSupervisorDown", "AckvisorGroupNotReady"}
MUST_NOT_FIRE = set(ALERTS) - MUST_FIRE - MAY_FIRE  # what the run has no reason for
# What is told before anything has gone wrong but for the load on the pools.
OF_THE_LOAD = {name for name in ALERTS if "Pool" in name or "Budget" in name}


def shortened(rules: str, wait: str = "1s") -> str:
    """Return the rules with `wait` in place of every `for`."""
    text, count = re.subn(r"(?m)^( +for:) \w+$", rf"\1 {wait}", rules)
    assert count == rules.count(" for: ")
    return text


class Run(contextlib.ExitStack):
    """A supervisor with five kinds of workers, scraped by a Prometheus with the rules that ship."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        for name in ("inbox", "crashes"):
            (folder / name).mkdir()
        self.stubborn = folder / "stubborn"
        self.stubborn.touch()
        inbox, crashes = {"inbox": str(folder / "inbox")}, {"inbox": str(folder / "crashes")}
        keys: dict[str, Any] = {"backoff": "10ms", "min_ready_time": 0}
        config = (
            f'[pools.main]\nurl = "sqlite:///{folder}/main"\nmax_open = 3\n'
            f'[pools.tight]\nurl = "sqlite:///{folder}/tight"\nmax_open = 2\n'
            'acquire_timeout = "2s"\nleak_threshold = "1s"\n'
            f'[pools.shared]\nurl = "sqlite:///{folder}/shared"\nmax_open = 6\n'
            'budget = 7\nleak_threshold = "0"\n'
            + group("jobs", "app:jobs", inbox, count=2, pools=["main"], **keys)
            + group("loaded", "app:loaded", pools=["tight", "shared"], **keys)
            + group("stubborn", "app:stubborn", {"file": str(self.stubborn)}, pools=[], **keys)
            + group("fragile", "app:fragile", crashes, pools=[], max_restarts=4, **keys)
        )
        supervisor = 'listen = "127.0.0.1:0"\ngrace = "4s"\nabort_margin = "3s"'
        self.fleet = Supervised(folder, config, supervisor=supervisor, modules={"app": APPLICATION})

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as begun:  # which ends what has started if something does not
            begun.enter_context(self.fleet)
            self.fleet.ready()
            target = urlsplit(self.fleet.event("supervisor.listening")["url"]).netloc
            self.prometheus = begun.enter_context(
                Prometheus(self.folder / "prometheus", target, shortened(RULES))
            )
            self.push(begun.pop_all())
        return self

    def put(self, *names: str) -> None:
        for name in names:
            (self.folder / "inbox" / name).touch()

    def firing(self, alert: str = ".+") -> set[str]:
        """Return the alerts that have fired at any time."""
        query = f'ALERTS{{alertname=~"{alert}", alertstate="firing"}}'
        return {labels["alertname"] for labels, _ in self.prometheus.samples(query)}

    def wait_for(self, query: str, expected: float) -> None:
        """Wait until the sum over a query's series is this; a counter must not go beyond it."""

        def reached() -> bool:
            found = self.prometheus.query(f"sum({query})")
            assert not found or found[0][1] <= expected, (query, found)
            return bool(found) and found[0][1] == expected

        wait_until(reached, f"{query} is {expected:g}")


def test_a_real_prometheus_sees_what_happened(tmp_path):
    """Work, a kill from outside, one of our own, reloads, crashes, a stop: figures, alerts, panels."""
    require_prometheus()
    with Run(tmp_path) as run:
        work_then_violence(run)
        reload_three_ways(run)
        fail_for_good(run)
        fired_before_the_stop(run)
        counters_agree_with_the_events(run)
        every_query_of_the_dashboard_returns_data(run)
        assert run.fleet.stop() == 1  # a group has failed
        wait_until(lambda: run.firing("AckvisorSupervisorDown"), "its absence is told")
        assert not run.firing() & MUST_NOT_FIRE
        counters_never_go_back(run)


def work_then_violence(run: Run) -> None:
    done, failed = (
        f'supervisor_jobs_total{{group="jobs", outcome="{o}"}}' for o in ("done", "failed")
    )
    run.put(*(f"good-{n}" for n in range(20)), *(f"bad-{n}" for n in range(3)))
    run.wait_for(done, 20)
    run.wait_for(failed, 3)
    assert run.firing() <= OF_THE_LOAD | MAY_FIRE

    (old,) = (w for w in run.fleet.worker_pids() if w.startswith("stubborn"))
    run.stubborn.unlink()  # its successor stops when it is told to
    assert run.fleet.command("restart", "stubborn", "--wait").returncode == 0
    run.fleet.event("worker.killed", worker=old)
    run.wait_for("supervisor_kills_total", 1)

    pids = run.fleet.worker_pids()
    os.kill(next(pid for worker, pid in pids.items() if worker.startswith("jobs")), signal.SIGKILL)
    run.wait_for('supervisor_worker_restarts_total{group="jobs", reason="killed"}', 1)
    run.put(*(f"good-{n}" for n in range(10)))
    run.wait_for(done, 30)  # the first twenty are kept although who did some of them is dead


def reload_three_ways(run: Run) -> None:
    run.put("long-1")
    run.wait_for("supervisor_jobs_in_flight", 1)
    code = run.folder / "app.py"
    run.fleet.signal(signal.SIGHUP)
    run.fleet.event("reload.done")
    run.wait_for('supervisor_jobs_total{outcome="cancelled"}', 1)

    code.write_text("raise ValueError('broken')\n", encoding="utf-8")
    run.fleet.signal(signal.SIGHUP)
    run.fleet.event("reload.rolled_back")
    code.write_text(APPLICATION, encoding="utf-8")

    config = run.fleet.config.read_text(encoding="utf-8")
    run.fleet.config.write_text(config.replace("grace =", "grease ="), encoding="utf-8")
    assert run.fleet.command("reload").returncode == 1
    run.fleet.config.write_text(config, encoding="utf-8")
    for outcome in ("done", "rolled_back", "rejected"):
        run.wait_for(f'supervisor_reloads_total{{outcome="{outcome}"}}', 1)


def fail_for_good(run: Run) -> None:
    for number in range(5):
        (run.folder / "crashes" / str(number)).touch()
    run.fleet.event("group.failed", group="fragile")
    run.wait_for('supervisor_group_state{group="fragile", state="failed"}', 1)
    run.wait_for('supervisor_worker_restarts_total{group="fragile", reason="failed"}', 4)


def fired_before_the_stop(run: Run) -> None:
    expected = MUST_FIRE - {"AckvisorSupervisorDown"}
    wait_until(lambda: expected <= run.firing(), f"they fire: {sorted(expected - run.firing())}")
    for rules in run.prometheus.ask("rules")["groups"]:
        for rule in rules["rules"]:
            assert rule["health"] == "ok", rule
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert "supervisor " in rule["annotations"]["action"]
            for alert in rule["alerts"]:
                words = alert["annotations"]["summary"] + alert["annotations"]["action"]
                assert "<no value>" not in words
                for label in ("group", "pool", "db_client_connection_pool_name"):
                    assert alert["labels"].get(label, "") in words


def counters_agree_with_the_events(run: Run) -> None:
    events = run.fleet.lines()

    def counted(name: str, *labels: str) -> Counter[tuple[str, ...]]:
        keyed = [tuple(e.get(k, "") for k in labels) for e in events if e["event"] == name]
        return Counter(key for key in keyed if all(key))

    for name, event, labels in (
        ("supervisor_kills_total", "worker.killed", ("group",)),
        ("supervisor_worker_restarts_total", "worker.spawned", ("group", "reason")),
    ):
        found = {tuple(m[k] for k in labels): v for m, v in run.prometheus.query(f"{name} > 0")}
        assert found == counted(event, *labels)
    assert counted("worker.killed", "group") == {("stubborn",): 1}
    restarts = counted("worker.spawned", "group", "reason")
    assert restarts["stubborn", "rolled"] >= 2
    assert restarts["jobs", "killed"] == 1
    # Who had failed drains, too, but nobody has told him to.
    told = [e for e in events if e["event"] == "worker.drained" and "seconds" in e]
    run.wait_for("supervisor_drain_seconds_count", len(told))

    def leaks() -> float:
        ((labels, value),) = run.prometheus.query("supervisor_pool_leaks_total > 0") or [({}, 0.0)]
        assert not labels or (labels["group"], labels["pool"]) == ("loaded", "tight")
        return value

    told = run.fleet.events("pool.leak")  # there are ever more of them
    wait_until(lambda: leaks() >= len(told), "all leaks that were told are counted")
    assert leaks() <= len(run.fleet.events("pool.leak"))


def every_query_of_the_dashboard_returns_data(run: Run) -> None:
    chosen = {
        "$job": ".+",
        "$instance": ".+",
        "$group": ".+",
        "$__rate_interval": "5m",
        "$__range": "5m",
    }
    annotation = DASHBOARD["annotations"]["list"][1]["expr"].replace("1m", "5m")
    for title, expression in [*QUERIES, ("annotations", annotation)]:
        query = expression
        for variable, value in chosen.items():
            query = query.replace(variable, value)
        assert "$" not in query, title

        def has_figures(query: str = query) -> bool:
            found = run.prometheus.query(query)
            return any(not math.isnan(value) for _, value in found)

        # A scrape that was late leaves a gap of half a second.
        wait_until(has_figures, f"{title} returns data: {query}")
    for name in ("job", "instance", "group"):
        query = VARIABLES[name]["definition"].replace("$job", ".+").replace("$instance", ".+")
        parts = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert parts is not None
        values = run.prometheus.ask(f"label/{parts[2]}/values", **{"match[]": parts[1]})
        assert set(values) >= ({"jobs", "loaded"} if name == "group" else {values[0]})


def counters_never_go_back(run: Run) -> None:
    names = "(supervisor|db_client)_.+_(total|bucket|sum|count)"
    counters = run.prometheus.samples(
        f'{{__name__=~"{names}", __name__!="db_client_connection_count"}}'
    )
    assert {family_of(labels["__name__"]) for labels, _ in counters} == {
        name for name, family in FAMILIES.items() if family.kind != "gauge"
    }
    for labels, values in counters:
        assert all(a <= b for a, b in itertools.pairwise(values)), labels
