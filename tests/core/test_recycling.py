"""Workers that are replaced for their size, and rules that change under those who run."""

from __future__ import annotations

from dataclasses import replace

from supervisor.core import events as ev
from supervisor.core.fleet import MEASURE_EVERY, GroupSpec
from supervisor.core.group import RSS_JITTER
from supervisor.core.policy import Restart
from tests.core.script import ABORT_MARGIN, GRACE, Script, brief, fields_of, group
from tests.core.test_roll import gone, raised, reload, serving, web, workers_of

LIMIT = 1000


def limited(count: int = 2, limit: int = LIMIT) -> GroupSpec:
    """Return a group whose workers may have so many bytes."""
    return replace(web(count, min_ready_time=0.0), max_rss=limit)


def measured(**sizes: int) -> ev.MemoryMeasured:
    """Return the sizes of workers, named with an underscore."""
    return ev.MemoryMeasured({name.replace("_", "-"): size for name, size in sizes.items()})


def changed(*groups: GroupSpec, grace: float = GRACE) -> ev.SettingsChanged:
    """Return that other rules are in force."""
    return ev.SettingsChanged(groups, grace, ABORT_MARGIN)


# --- for their size --------------------------------------------------------------------------------


def test_one_that_has_outgrown_its_limit_is_replaced_the_replacement_first() -> None:
    """The event says how large it was; then it is an ordinary roll of one."""
    script = serving(limited())

    actions = script.at(20, measured(web_1=LIMIT + 1, web_2=10))
    assert brief(actions) == ["worker.outgrown web-1", "Spawn web-3"]
    fields = fields_of("worker.outgrown", actions)
    assert (fields["rss_bytes"], fields["max_rss_bytes"]) == (LIMIT + 1, LIMIT)
    assert "SendCancel web-1" in brief(script.ready(21, "web-3"))
    assert gone(script, 22, "web-1")[-1] == "recycle.done"


def test_never_two_at_once() -> None:
    """Whoever has outgrown it meanwhile waits for his turn, and is asked for once."""
    script = serving(limited())

    assert brief(script.at(20, measured(web_1=LIMIT + 1, web_2=LIMIT + 1))) == [
        "worker.outgrown web-1",
        "Spawn web-3",
        "worker.outgrown web-2",
    ]
    assert script.at(21, measured(web_1=LIMIT + 1, web_2=LIMIT + 1)) == []
    script.ready(22, "web-3")
    assert gone(script, 23, "web-1")[-2:] == ["recycle.done", "Spawn web-4"]


def test_the_limit_is_reached_earlier_by_a_drawn_part() -> None:
    """So those that grow alike are not replaced together."""
    draws = iter([0.0, 1.0])
    script = Script(limited(), draw=lambda: next(draws))
    script.ready(10, "web-1", "web-2")

    nearly = round(LIMIT * (1 - RSS_JITTER)) + 1
    assert brief(script.at(20, measured(web_1=nearly, web_2=nearly)))[0] == "worker.outgrown web-2"


def test_one_whose_replacement_fails_stays_and_is_tried_again() -> None:
    """Being too large is no reason to serve with one fewer."""
    script = serving(limited(1))
    script.at(20, measured(web_1=LIMIT + 1))
    script.registered(21, "web-2")
    script.at(21, raised("web-2"))
    assert "recycle.failed web-2" in brief(script.left(22, "web-2"))
    assert workers_of(script) == ["web-1"]
    assert brief(script.at(30, measured(web_1=LIMIT + 1)))[0] == "worker.outgrown web-1"


def test_memory_is_looked_at_now_and_then_where_a_group_asks_for_it() -> None:
    """And nobody is woken for it elsewhere, or in a stop."""
    assert serving(web(1)).fleet.next_deadline() is None

    script = serving(limited(1))
    assert script.fleet.next_deadline() == MEASURE_EVERY
    assert brief(script.tick(MEASURE_EVERY)) == ["MeasureMemory"]
    assert script.fleet.next_deadline() == 2 * MEASURE_EVERY
    script.at(11, ev.StopRequested("test"))
    assert script.at(12, measured(web_1=LIMIT + 1)) == []


def test_who_is_not_ready_is_not_judged() -> None:
    """A worker that starts is not replaced by one that has to start as well."""
    script = Script(limited(1))
    script.registered(10, "web-1")
    assert script.at(11, measured(web_1=LIMIT + 1)) == []


# --- rules that change -------------------------------------------------------------------------------


def test_a_limit_that_is_set_later_holds_for_those_who_run() -> None:
    """Without anybody being replaced for the change itself."""
    script = serving(web(1, min_ready_time=0.0))
    assert script.at(20, changed(limited(1))) == []
    assert brief(script.at(21, measured(web_1=LIMIT + 1)))[0] == "worker.outgrown web-1"


def test_another_grace_holds_for_the_next_cancel_and_for_who_ends_by_himself() -> None:
    """Deadlines that were given before stay what they are."""
    script = serving(web(2))
    assert script.at(20, changed(web(2), grace=3.0)) == []
    script.at(21, raised("web-1"))
    assert script.fleet.next_deadline() == 24.0
    stopping = script.at(22, ev.StopRequested("test"))
    assert fields_of("supervisor.stopping", stopping)["grace_seconds"] == 3.0


def test_a_count_that_changes_is_a_scaling_and_overtakes_one_that_waits() -> None:
    """What was asked for before the file was read does not come after it."""
    script = serving(web(2, min_ready_time=0.0))
    script.at(20, ev.RestartRequested("web-1"), ev.ScaleRequested("web", 9))
    actions = brief(script.at(21, changed(web(3, min_ready_time=0.0))))
    assert actions == ["scale.failed"]
    script.ready(22, "web-3")
    assert gone(script, 23, "web-1")[-3:] == ["restart.done", "group.scaled", "Spawn web-4"]


def test_a_finished_worker_comes_back_when_it_is_to_be_restarted_now() -> None:
    """`restart` has changed from "on-failure" to "always"."""
    script = serving(group("web", 1, restart=Restart.ON_FAILURE))
    script.left(20, "web-1")
    assert script.group("web").finished == 1
    assert brief(script.at(21, changed(group("web", 1)))) == ["Spawn web-2"]


def test_settings_are_not_taken_during_a_reload_nor_by_a_group_that_has_failed() -> None:
    """Either asks for a roll: to be superseded, and to get another chance."""
    script = serving(web(1))
    assert script.fleet.takes_settings
    script.at(20, reload(2, web(1)))
    assert not script.fleet.takes_settings

    script = serving(group("web", 1, max_restarts=0))
    script.crashed(20, "web-1")
    assert not script.fleet.takes_settings
