"""What top shows, without a terminal: rates, rows, what is wrong, order, filter, columns."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.plain import harmless
from supervisor.top.layout import (
    bar,
    fitting,
    group_cells,
    group_columns,
    quantity,
    rate,
    worker_cells,
    worker_columns,
)
from supervisor.top.model import (
    SORTS,
    Fleet,
    Rates,
    Tone,
    matches,
    ordered,
    span,
)

WALL = dt.datetime(2026, 11, 24, 18, 0, 0, tzinfo=dt.UTC).timestamp()
STARTED = "2026-11-24T17:00:00.000000Z"
POOL = {"in_use": 0, "open": 2, "max_open": 4, "waiting": 0, "leaks": 0}


def pool(**fields):
    """Return a pool's figures."""
    return {"main": {**POOL, **fields}}


def worker(name, **fields):
    """Return a worker as a status has it."""
    return {
        "id": name,
        "group": name.rpartition("-")[0],
        "pid": 7,
        "generation": 1,
        "state": "ready",
        "ready": True,
        "stopped": False,
        "in_flight": 0,
        "jobs_done": 0,
        "jobs_failed": 0,
        "restarts": 0,
        "uptime_seconds": 100.0,
        "rss_bytes": 10 << 20,
        "pools": {},
        "status": "",
        **fields,
    }


def group(**fields):
    """Return a group as a status has it."""
    return {
        "count": 2,
        "ready": 2,
        "state": "ready",
        "restarts": 0,
        "failure": "",
        "cause": None,
        "waiting_for": None,
        "next_restart_in_seconds": None,
        **fields,
    }


def status(*workers, groups=None, **fields):
    """Return a status."""
    return {
        "name": "orders",
        "pid": 1,
        "state": "ready",
        "generation": 1,
        "started": STARTED,
        "deadline_in_seconds": None,
        "outstanding": [],
        "groups": groups or {name: group() for name in dict.fromkeys(w["group"] for w in workers)},
        "workers": list(workers),
        "roll": None,
        "budgets": {},
        **fields,
    }


def event(name, who="jobs-1", second=0, **fields):
    """Return an event of a worker, so many seconds before WALL."""
    when = dt.datetime.fromtimestamp(WALL - second, dt.UTC)
    return {
        "time": when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "event": name,
        "worker": who,
        "group": who.rpartition("-")[0],
        "pid": 7,
        "generation": 1,
        **fields,
    }


def pictured(*workers, events=(), now=10.0, **fields):
    """Return the picture of a fleet that has been seen once."""
    fleet = Fleet()
    fleet.take_events(events)
    fleet.take_status(status(*workers, **fields), now)
    return fleet.picture(now, WALL)


# --- rates -----------------------------------------------------------------------------------------


def test_a_first_look_knows_no_rate():
    """A counter that has been seen once says how many, not how fast."""
    rates = Rates()
    rates.look({"jobs-1": 5000}, 1.0)

    assert rates.of("jobs-1") is None
    assert rates.of_all({}) is None


def test_a_rate_is_the_mean_of_the_window():
    """What lies further back than the window has no part in it."""
    rates = Rates(window=2.0)
    for now, done in ((0.0, 0), (1.0, 100), (2.0, 110), (3.0, 130)):
        rates.look({"jobs-1": done}, now)

    assert rates.of("jobs-1") == pytest.approx(15.0)


def test_a_replacement_takes_nothing_away():
    """The rate of a group keeps what a worker did that has gone, and its successor begins at 0."""
    rates = Rates()
    rates.look({"jobs-1": 1000}, 0.0)
    rates.look({"jobs-1": 1010}, 1.0)
    rates.look({"jobs-2": 4}, 2.0, born=["jobs-2"])
    groups = {"jobs-1": "jobs", "jobs-2": "jobs"}

    assert rates.of_all(groups, "jobs") == pytest.approx(7.0)
    assert rates.of("jobs-2") == pytest.approx(4.0)


def test_who_was_there_before_is_not_news():
    """A worker that is seen late for another reason than its birth brings no burst."""
    rates = Rates()
    rates.look({}, 0.0)
    rates.look({"jobs-1": 100_000}, 1.0)
    rates.look({"jobs-1": 100_002}, 2.0)

    assert rates.of("jobs-1") == pytest.approx(2.0)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["a-1", "a-2", "b-1", "b-2"]), st.integers(0, 1000)),
        max_size=12,
    )
)
def test_no_rate_is_ever_negative(looks):
    """Whatever counters come, go and begin anew."""
    rates = Rates()
    groups = {"a-1": "a", "a-2": "a", "b-1": "b", "b-2": "b"}
    for second, look in enumerate(looks):
        rates.look(look, float(second), born=list(look)[::2])
        for seen in (rates.of_all(groups), rates.of_all(groups, "a"), *map(rates.of, groups)):
            assert seen is None or seen >= 0
    total, parts = rates.of_all(groups), [rates.of_all(groups, name) for name in ("a", "b")]
    if total is not None:
        assert total == pytest.approx(sum(part or 0.0 for part in parts))


# --- what is wrong ---------------------------------------------------------------------------------


def test_a_fleet_that_is_well_has_no_problem():
    """Nothing is said where nothing is wrong."""
    picture = pictured(worker("jobs-1"), worker("jobs-2", pools=pool(in_use=4, waiting=3)))

    assert picture.problems == ()


def test_what_is_wrong_now_comes_before_what_is_over():
    """Red is for what is wrong now; a failure that was made good is told, after it."""
    failed = group(state="failed", ready=0, failure="4 failures", cause="crashed")
    picture = pictured(
        worker("jobs-9"),
        groups={"jobs": group(), "mail": failed},
        events=[event("worker.failed", "jobs-3", 20, error="Boom")] * 2,
    )

    assert [(problem.tone, problem.text) for problem in picture.problems] == [
        (Tone.BAD, "group mail has failed, 0 of 2 ready: crashed: 4 failures"),
        (Tone.WARN, "jobs-3: its code raised Boom (20s ago, 2 such in 5 min)"),
    ]


def test_an_end_that_has_been_explained_is_no_second_problem():
    """A worker that raised and then exited is one mishap; one that was killed by somebody another."""
    exited = {"uptime_seconds": 1.0, "code": 1}
    picture = pictured(
        worker("jobs-9"),
        events=[
            event("worker.failed", "jobs-1", error="Boom"),
            event("worker.exited", "jobs-1", cause="crashed", **exited),
            event("worker.exited", "jobs-2", cause="killed", signal=9, uptime_seconds=1.0),
        ],
    )

    assert [problem.text.partition(" ")[0] for problem in picture.problems] == [
        "jobs-1:",
        "jobs-2:",
    ]


def test_a_mishap_is_forgotten():
    """What happened long ago is history, not a problem."""
    old = event("worker.failed", second=400, error="Boom")

    assert pictured(worker("jobs-2"), events=[old]).problems == ()


@pytest.mark.parametrize(
    ("fields", "events", "trouble", "tone"),
    [
        ({"stopped": True}, [], "stopped", Tone.BAD),
        ({"state": "failed"}, [], "failed", Tone.BAD),
        ({"state": "draining"}, [event("worker.hung", why="it hangs")], "hung", Tone.BAD),
        ({"pools": pool(leaks=1)}, [], "leak", Tone.WARN),
        ({"state": "draining"}, [], "", Tone.NOTICE),
        ({}, [], "", Tone.PLAIN),
    ],
)
def test_trouble_has_a_word(fields, events, trouble, tone):
    """What is wrong with a worker stands in its line, as a word, a mark and a colour."""
    (row,) = pictured(worker("jobs-1", **fields), events=events).workers

    assert (row.trouble, row.tone) == (trouble, tone)


def test_waiting_for_long_is_trouble():
    """A worker that waits for connections at every look is starved; a break begins anew."""
    fleet = Fleet()
    waits, flows = (worker("jobs-1", pools=pool(in_use=4, waiting=n)) for n in (2, 0))
    seen = []
    for now, each in enumerate([waits] * 4 + [flows] + [waits] * 6):
        fleet.take_status(status(each), float(now))
        seen.append(fleet.picture(float(now), WALL).workers[0].trouble)

    assert seen == [""] * 10 + ["waiting"]


def test_a_used_up_budget_is_a_problem_when_somebody_waits():
    """A budget that is all granted is well used; with a waiter it is too small."""
    budgets = {"main": {"budget": 4, "granted": 4, "open": 4}}
    well, bad = (
        pictured(worker("jobs-1", pools=pool(waiting=n)), budgets=budgets).problems for n in (0, 2)
    )

    assert well == ()
    assert [problem.text for problem in bad] == ["budget main is used up, and 2 wait"]


# --- order and filter ------------------------------------------------------------------------------


def rows():
    """Return three workers that differ in everything."""
    return pictured(
        worker("jobs-10", in_flight=3, rss_bytes=1 << 20, uptime_seconds=1.0),
        worker("jobs-9", restarts=2, pools=pool(in_use=3)),
        worker("mail-1", stopped=True, rss_bytes=1 << 30, uptime_seconds=900.0),
    ).workers


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("trouble", ["mail-1", "jobs-9", "jobs-10"]),
        ("worker", ["jobs-9", "jobs-10", "mail-1"]),
        ("in flight", ["jobs-10", "jobs-9", "mail-1"]),
        ("memory", ["mail-1", "jobs-9", "jobs-10"]),
        ("pool", ["jobs-9", "jobs-10", "mail-1"]),
        ("restarts", ["jobs-9", "jobs-10", "mail-1"]),
        ("up", ["jobs-10", "jobs-9", "mail-1"]),
    ],
)
def test_sorting(by, names):
    """Each order begins with what one looks for, and equal ones stand in the order of numbers."""
    assert [row.id for row in ordered(rows(), by)] == names


def test_every_sort_can_be_reversed():
    """Reversed, the same workers are there."""
    for by in SORTS:
        assert set(ordered(rows(), by, reverse=True)) == set(rows())
    assert next(row.id for row in ordered(rows(), "worker", reverse=True)) == "mail-1"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", ["jobs-10", "jobs-9", "mail-1"]),
        ("JOBS ready", ["jobs-10", "jobs-9"]),
        ("group:job", []),
        ("group:jobs", ["jobs-10", "jobs-9"]),
        ("stopped", ["mail-1"]),
    ],
)
def test_a_filter_wants_every_word(words, names):
    """Words are looked for in what a line says; `group:` is a whole name."""
    assert [row.id for row in rows() if matches(row, words)] == names


def test_only_what_is_wrong():
    """The rest is hidden."""
    assert [row.id for row in rows() if matches(row, "", only_trouble=True)] == ["mail-1"]


# --- columns and texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 60, 77, 80, 110, 137, 300])
def test_columns_fit_the_width(width):
    """However wide the terminal is, a line is not longer, and who and what state always stand."""
    listed = [*rows(), *pictured(worker("a-group-with-a-name-1", pools=pool())).workers]
    for columns in (
        worker_columns(listed, width),
        group_columns(pictured(worker("a-1")).groups, width),
    ):
        assert sum(column.width + 1 for column in columns) - 1 <= max(width, 32)
        assert {"state", "mark"} <= {column.key for column in columns}
    cells = worker_cells(listed[0], worker_columns(listed, width))
    assert len(cells) == len(worker_columns(listed, width))


def test_eighty_columns_have_what_matters():
    """In 80 columns nothing is missing that is wanted at night."""
    keys = {column.key for column in worker_columns(rows(), 77)}

    assert keys >= {"state", "gen", "in flight", "jobs/s", "memory", "pool", "restarts", "last"}
    assert fitting([], 10) == ()


def test_a_group_says_why():
    """The reason stands in the group's line."""
    (row,) = pictured(
        groups={"jobs": group(state="waiting", waiting_for={"pool": "main", "error": "refused"})}
    ).groups
    columns = group_columns([row], 120)

    assert group_cells(row, columns)[-1] == (("pool main: refused", Tone.WARN),)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 40))
def test_a_bar_is_as_wide_as_it_should_be(part, whole, width):
    """Something shows as something, and only what is full is full."""
    filled, rest = (
        ("", "") if width == 0 else (text for text, _ in bar(part, whole, width, Tone.GOOD))
    )

    assert len(filled) + len(rest) == width
    if width > 1 and 0 < part < whole:
        assert filled
        assert rest


@given(st.floats(0, 5e6), st.integers(0, 1 << 50), st.floats(0, 86400 * 9999.0))
def test_figures_fit_their_columns(per_second, count, seconds):
    """A figure is never wider than its column."""
    assert len(rate(per_second)) <= 6
    assert len(quantity(min(count, 99999 << 30))) <= 6
    assert len(span(seconds)) <= 5


def test_nothing_steers_the_terminal():
    """Escape sequences and other controls in a worker's words are made harmless."""
    (row,) = pictured(worker("jobs-1", status="\x1b[2J\x9bfine\u202e\r\n")).workers

    assert row.status.strip() == "[2J fine"
    assert harmless("a\tb\n\x1b]0;x\x07", lines=True) == "a   b\n\ufffd]0;x\ufffd"
