"""A worker's own metrics and the tally of its jobs: what is counted, what is refused, what is bounded."""

from __future__ import annotations

import math
import threading

import pytest
from structlog.testing import capture_logs

from supervisor import log, protocol
from tests.workers.alone import alone
from workers import metrics as module
from workers.metrics import Metrics


@pytest.fixture
def metrics():
    return Metrics(log.get_logger())


@pytest.fixture
def worker():
    return alone("web-1", log=log.get_logger())


def figures(metrics, name):
    """Return labels' values -> figures of one metric."""
    (found,) = [metric for metric in metrics.collect() if metric.name == name]
    return dict(found.series)


def test_each_kind_says_what_it_was_told(metrics):
    """Counters grow, gauges move, histograms count by bucket and add up."""
    metrics.counter("seen", "Seen.").inc()
    metrics.counter("seen_total", "Seen.").inc(2.5)  # the same one
    gauge = metrics.gauge("level", "Level.", ["tank"])
    gauge.labels("a").set(4)
    gauge.labels(tank="a").inc()
    gauge.labels("b").dec(2)
    size = metrics.histogram("size", "Size.", buckets=[1, 2, math.inf])
    for value in (1, 1.5, 2, 7):
        size.observe(value)

    assert figures(metrics, "seen") == {(): (3.5,)}
    assert figures(metrics, "level") == {("a",): (5,), ("b",): (-2,)}
    assert figures(metrics, "size") == {(): (1, 2, 1, 11.5)}
    assert [(m.kind, m.labels, m.bounds) for m in metrics.collect()] == [
        ("counter", (), ()),
        ("gauge", ("tank",), ()),
        ("histogram", (), (1.0, 2.0)),
    ]


@pytest.mark.parametrize(
    ("kind", "name", "labels"),
    [
        ("counter", "two words", ()),
        ("counter", "1st", ()),
        ("counter", "supervisor_jobs", ()),
        ("gauge", "db_client_x", ()),
        ("gauge", "level_total", ()),
        ("histogram", "size_bucket", ()),
        ("counter", "seen", ("group",)),
        ("counter", "seen", ("le",)),
        ("counter", "seen", ("__name__",)),
        ("counter", "seen", ("a", "a")),
        ("counter", "seen", tuple("abcdef")),
    ],
)
def test_names_that_would_break_a_scrape_are_refused(metrics, kind, name, labels):
    """What could not be shown, or would be taken for something else, fails where it is declared."""
    with pytest.raises(ValueError, match="metric"):
        getattr(metrics, kind)(name, "Help.", labels=labels)
    assert metrics.collect() == ()


def test_wrong_use_is_refused_and_changes_nothing(metrics):
    """Counters do not shrink, NaN is no figure, labels are those that were declared."""
    counter = metrics.counter("seen", "Seen.", ["kind"])
    histogram = metrics.histogram("size", "Size.", buckets=[1])
    for amount in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="grows by"):
            counter.labels("a").inc(amount)
        if amount != -1:
            with pytest.raises(ValueError, match="finite"):
                histogram.observe(amount)
    for wrong in ((), ("a", "b")):
        with pytest.raises(ValueError, match="labels"):
            counter.labels(*wrong)
    with pytest.raises(ValueError, match="labels"):
        counter.labels(colour="a")
    for buckets in ([], [2, 1], [1, 1], [math.nan]):
        with pytest.raises(ValueError, match="buckets"):
            metrics.histogram("other", "Other.", buckets=buckets)
    with pytest.raises(ValueError, match="other words"):
        metrics.gauge("seen", "Seen.")
    assert figures(metrics, "seen") == {("a",): (0,)}
    assert figures(metrics, "size") == {(): (0, 0, 0)}


def test_series_are_bounded_and_the_rest_is_one(metrics):
    """Above the bound everything counts under "other", which is said once; nothing is lost."""
    counter = metrics.counter("seen", "Seen.", ["customer"])
    with capture_logs() as lines:
        for number in range(module.MAX_SERIES + 50):
            counter.labels(number).inc()
    found = figures(metrics, "seen")
    assert len(found) == module.MAX_SERIES + 1
    assert found["other",] == (50,)
    assert found["0",] == (1,)
    assert [line["event"] for line in lines] == ["metric.crowded"]


def test_the_largest_that_may_be_declared_fits_the_wire(metrics):
    """A report with everything at its bound is still read by the supervisor."""
    long = "\N{PILE OF POO}" * 999  # four bytes each
    labels = [f"label_{'x' * 80}{number}" for number in range(module.MAX_LABELS)]
    for number in range(module.MAX_METRICS):
        metric = metrics.histogram(
            f"metric_{'x' * 80}{number}",
            "\N{PILE OF POO}" * 999,
            labels,
            range(1, module.MAX_BUCKETS + 1),
        )
        for series in range(module.MAX_SERIES):
            metric.labels(*[f"{series}{long}"] * len(labels)).observe(1.1)
    with pytest.raises(ValueError, match="at most"):
        metrics.gauge("one_more", "One more.")
    full = (0,) * 17
    report = protocol.Report(
        number=1,
        in_flight=0,
        jobs_done=0,
        jobs_failed=0,
        pools={},
        figures=protocol.Figures(
            jobs_cancelled=0,
            job_seconds=protocol.Timings(full, 0.0),
            pools={},
            own=metrics.collect(),
        ),
    )
    frame = protocol.encode(report)
    assert protocol.decode(frame, protocol.Report) == report
    assert len(frame) < protocol.MAX_BYTES * 0.95


def test_no_increment_is_lost_between_threads(metrics):
    """Any thread may count."""
    counter = metrics.counter("seen", "Seen.", ["kind"])

    def count():
        for _ in range(5000):
            counter.labels("a").inc()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures(metrics, "seen") == {("a",): (20_000,)}


def test_a_workers_metrics_are_made_once_and_only_when_wanted(worker):
    """Who declares none pays for none; whoever asks gets the same ones."""
    assert not worker.has_metrics
    assert worker.metrics is worker.metrics
    assert worker.has_metrics


def test_the_tally_counts_each_job_once_by_its_outcome_and_its_time(worker):
    """Outcomes and the histogram of the same moment agree."""
    with worker.job("done"):
        pass
    with pytest.raises(RuntimeError), worker.job("failed"):
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), worker.job("cancelled"):
        raise KeyboardInterrupt
    with worker.job("in flight"):
        tally = worker.jobs.tally()
    assert tally[:4] == (1, 1, 1, 1)
    assert sum(tally.counts) == 3
    assert len(tally.counts) == len(protocol.JOB_SECONDS) + 1
    assert tally.seconds > 0
