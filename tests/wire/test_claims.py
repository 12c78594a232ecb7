"""What workers claim: of the pools that they were given only."""

from __future__ import annotations

from supervisor import claims
from supervisor.protocol import Figures, PoolStats, PoolTimings, Report, Timings

NONE = Timings((), 0.0)
TIMINGS = PoolTimings(wait=NONE, use=NONE, create=NONE)


def reported(*pools: str) -> Report:
    """Return a report of these pools, figures included."""
    return Report(
        number=1,
        in_flight=0,
        jobs_done=0,
        jobs_failed=0,
        pools=dict.fromkeys(pools, PoolStats()),
        figures=Figures(jobs_cancelled=0, job_seconds=NONE, pools=dict.fromkeys(pools, TIMINGS)),
    )


def test_an_honest_report_is_taken_as_it_is() -> None:
    """Nothing is copied where nothing is invented."""
    report = reported("main")
    assert claims.report(report, ("main", "other")) is report


def test_invented_pools_are_left_out_of_status_and_figures() -> None:
    """Neither the status nor the metrics can be made to grow by names."""
    assert claims.report(reported("main", "x"), ("main",)) == reported("main")
    without = Report(number=1, in_flight=0, jobs_done=0, jobs_failed=0, pools={"x": PoolStats()})
    assert claims.report(without, ("main",)).pools == {}
