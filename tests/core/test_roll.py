"""A roll's promises, one test each: events with their times go in, what is to be done comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import GroupSpec, Phase
from supervisor.core.policy import Restart
from supervisor.core.roll import RETRY
from tests.core.script import ABORT_MARGIN, GRACE, Script, brief, cancels, fields_of, group

RAISED = ("ValueError: no", "Traceback: no")


def reload(generation: int, *groups: GroupSpec) -> ev.ReloadRequested:
    """Return a reload to this generation."""
    return ev.ReloadRequested(generation, groups, GRACE, ABORT_MARGIN)


def web(count: int = 2, **settings: Any) -> GroupSpec:
    """Return a group `web`; settings that a roll looks at, then those of its restart policy."""
    mine = {"surge", "min_ready_time", "max_age"} & set(settings)
    spec = group("web", count, **{k: v for k, v in settings.items() if k not in mine})
    return replace(spec, **{key: settings[key] for key in mine})


def serving(*groups: GroupSpec) -> Script:
    """Return a script in which every worker of these groups serves at time 10."""
    script = Script(*groups)
    script.ready(10, *workers_of(script))
    return script


def workers_of(script: Script, generation: int | None = None) -> list[str]:
    """Return who lives, of one generation or of all."""
    workers = script.snapshot().workers
    return [w.id for w in workers if generation in (None, w.generation)]


def raised(worker: str) -> ev.WorkerFailed:
    """Return that the code of this worker has raised."""
    return ev.WorkerFailed(worker, *RAISED)


def gone(script: Script, now: float, worker: str) -> list[str]:
    """Let a worker that was told to end do so."""
    script.at(now, ev.WorkerAcknowledged(worker))
    return brief(script.left(now, worker))


# --- one after the other, the replacement first -------------------------------------------------


def test_an_old_worker_is_cancelled_only_when_its_successor_has_proved_itself() -> None:
    """The successor is spawned, ready, and good for `min_ready_time`; the next one comes after it."""
    script = serving(web(2))

    assert brief(script.at(20, reload(2, web(2)))) == ["reload.started", "Spawn web-3"]
    assert cancels(script.ready(21, "web-3")) == []
    assert script.fleet.next_deadline() == 22.0
    assert script.tick_just_before(22) == []
    replaced = script.tick(22)
    assert brief(replaced) == ["worker.cancelled web-1", "SendCancel web-1"]
    assert fields_of("worker.cancelled", replaced)["cause"] == "replaced"
    assert gone(script, 23, "web-1") == [
        "worker.drained web-1",
        "worker.exited web-1",
        "Spawn web-4",
    ]


def test_a_reload_ends_when_the_last_old_worker_has_gone() -> None:
    """Only then is it done, and what the old ones ran is let go."""
    script = serving(web(1))
    script.at(20, reload(2, web(1)))
    script.ready(21, "web-2")
    script.tick(22)

    assert script.snapshot().state == "reloading"
    assert gone(script, 23, "web-1")[-2:] == ["reload.done", "Retire 1"]
    assert script.snapshot().state == "ready"
    assert script.snapshot().generation == 2


def test_with_no_proving_time_the_old_one_goes_as_soon_as_the_new_one_is_ready() -> None:
    """`min_ready_time = 0` is taken at its word."""
    script = serving(web(1))
    script.at(20, reload(2, web(1, min_ready_time=0.0)))

    assert "SendCancel web-1" in brief(script.ready(21, "web-2"))


def test_surge_says_how_many_are_replaced_at_a_time() -> None:
    """The rest waits."""
    script = serving(web(4))

    actions = script.at(20, reload(2, web(4, surge=3)))
    assert [a.worker for a in actions if isinstance(a, ac.Spawn)] == ["web-5", "web-6", "web-7"]


def test_a_surge_above_the_count_replaces_all_at_once() -> None:
    """And no more than there are."""
    script = serving(web(2))

    actions = script.at(20, reload(2, web(2, surge=10)))
    assert [a.worker for a in actions if isinstance(a, ac.Spawn)] == ["web-3", "web-4"]


def test_groups_are_rolled_one_after_the_other() -> None:
    """The second one is not touched before the first is through."""
    script = serving(web(1), group("jobs", 1))
    script.at(20, reload(2, web(1), group("jobs", 1)))
    script.ready(21, "web-2")
    script.tick(22)

    assert gone(script, 23, "web-1")[-1] == "Spawn jobs-2"


def test_a_group_of_nobody_is_rolled_at_once() -> None:
    """`count = 0`, before and after."""
    script = Script(web(0))

    assert brief(script.at(1, reload(2, web(0)))) == ["reload.started", "reload.done", "Retire 1"]


def test_a_ready_successor_counts_as_ready() -> None:
    """`ready` is every worker that serves, a roll's extra ones too."""
    script = serving(web(1))
    script.at(20, reload(2, web(1)))
    script.ready(21, "web-2")

    assert script.group("web").ready == 2


def test_progress_tells_who_is_moving_and_how_far() -> None:
    """What `status` shows of a roll."""
    script = serving(web(2))
    script.at(20, reload(2, web(2)))
    seen = []
    for now, step in [(21, script.ready), (22, lambda at, _: script.tick(at))]:
        step(now, "web-3")
        roll = script.snapshot().roll
        assert roll is not None
        seen.append((roll.replaced, roll.total, roll.moving))
    gone(script, 23, "web-1")
    last = script.snapshot().roll
    assert last is not None

    assert seen == [(0, 2, (("web-3", "proving"),)), (0, 2, (("web-3", "retiring"),))]
    assert (last.kind, last.generation, last.replaced) == ("reload", 2, 1)


# --- what fails, and the way back ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ([raised("web-3")], RAISED[0]),
        ([ev.WorkerExited("web-3", signal=9)], "it ended with signal 9"),
        ([ev.WorkerExited("web-3", code=0)], "it ended with code 0"),
        ([ev.WorkerDrained("web-3")], "it returned before it had proved itself"),
        ([ev.WorkerLeaving("web-3", "SIGTERM")], "it was sent away by somebody else"),
    ],
    ids=["raises", "dies", "ends", "returns", "is sent away"],
)
def test_whatever_ends_before_it_has_proved_itself_ends_the_roll(
    failure: list[ev.Event], error: str
) -> None:
    """At once, not when its process has gone: the old ones are left alone."""
    script = serving(web(2))
    script.at(20, reload(2, web(2)))
    script.ready(21, "web-3")
    actions = script.at(21.5, *failure) + script.tick(22) + script.tick(22.5)
    if "web-3" in workers_of(script):
        actions += script.at(23, ev.WorkerExited("web-3", code=0))
    rolled_back = fields_of("reload.rolled_back", actions)

    assert not {"SendCancel web-1", "SendCancel web-2", "Spawn web-4"} & set(brief(actions))
    assert (rolled_back["worker"], rolled_back["generation"]) == ("web-3", 1)
    assert rolled_back["failed_generation"] == 2
    assert error in rolled_back["error"]
    assert brief(actions)[-1] == "Retire 2"
    assert script.snapshot().generation == 1


def test_who_is_not_ready_in_time_ends_the_roll() -> None:
    """By the new rules, and without waiting for its end."""
    script = serving(web(2))
    script.at(20, reload(2, web(2, surge=2, ready_timeout=5.0)))
    script.registered(21, "web-3", "web-4")
    script.at(24.9, ev.WorkerReady("web-4"))
    late = script.tick(25)

    assert {"SendCancel web-3", "SendCancel web-4"} <= set(brief(late))
    assert script.tick(26) == [ac.Terminate("web-3"), ac.Terminate("web-4")]
    script.at(27, ev.WorkerExited("web-4", code=0))
    back = fields_of("reload.rolled_back", script.at(27, ev.WorkerExited("web-3", code=0)))
    assert (back["worker"], back["error"]) == ("web-3", "it was not ready within 5 s")


@pytest.mark.parametrize("by_application", [True, False])
def test_a_successor_that_cannot_be_spawned_ends_the_roll(by_application: bool) -> None:
    """Whether the application is to blame or the system: what serves is left alone."""
    script = serving(web(2))
    script.at(20, reload(2, web(2)))
    actions = script.at(21, ev.WorkerNotBorn("web-3", "EAGAIN", by_application))

    assert fields_of("reload.rolled_back", actions)["error"] == "EAGAIN"
    assert brief(script.tick(100)) == []


def test_a_successor_that_is_not_spawned_in_time_says_what_kept_it() -> None:
    """That is known when it has been given up, a moment later."""
    script = serving(web(1, ready_timeout=5.0))
    script.at(20, reload(2, web(1, ready_timeout=5.0)))
    assert brief(script.tick(25)) == ["Kill web-2"]
    end = script.at(25, ev.WorkerNotBorn("web-2", "it was importing"))
    assert fields_of("reload.rolled_back", end)["error"] == (
        "it was not spawned within 5 s: it was importing"
    )


def third_fails() -> Script:
    """Return a script in which two of three have been replaced at 30, and the third has failed."""
    script = serving(web(3, min_ready_time=0.0))
    script.at(20, reload(2, web(3, min_ready_time=0.0)))
    for now, old, new in [(21, "web-1", "web-4"), (22, "web-2", "web-5")]:
        script.ready(now, new)
        gone(script, now, old)
    script.registered(23, "web-6")
    script.at(30, raised("web-6"))
    return script


def test_what_was_replaced_goes_back_the_replacement_first() -> None:
    """By workers of the generation in force; the third old one serves throughout."""
    script = third_fails()

    assert brief(script.left(31, "web-6"))[-1] == "Spawn web-7"
    assert "SendCancel web-4" in brief(script.ready(32, "web-7"))
    assert gone(script, 33, "web-4")[-1] == "Spawn web-8"
    assert "SendCancel web-5" in brief(script.ready(34, "web-8"))
    assert gone(script, 35, "web-5")[-2:] == ["reload.rolled_back web-6", "Retire 2"]
    assert sorted(workers_of(script, 1)) == ["web-3", "web-7", "web-8"]
    assert workers_of(script, 2) == []


def test_what_fails_on_the_way_back_is_tried_again() -> None:
    """With a back-off; the one that was to be replaced serves meanwhile."""
    script = third_fails()
    script.left(31, "web-6")
    script.at(32, ev.WorkerNotBorn("web-7", "EAGAIN"))

    roll = script.snapshot().roll
    assert roll is not None
    assert roll.is_going_back
    assert script.tick_just_before(32 + RETRY) == []
    assert brief(script.tick(32 + RETRY)) == ["Spawn web-8"]
    assert {"web-3", "web-4", "web-5"} <= {w.id for w in script.snapshot().workers if w.ready}


def test_who_dies_on_the_way_back_is_restarted_from_the_generation_in_force() -> None:
    """And is not replaced once more for that."""
    script = third_fails()
    script.left(31, "web-6")
    script.crashed(32, "web-5")

    assert script.tick(33) == [ac.Spawn("web-8", "web", 1)]
    script.ready(34, "web-7")
    assert gone(script, 35, "web-4")[-2:] == ["reload.rolled_back web-6", "Retire 2"]


def test_a_worker_that_was_replaced_restarts_from_the_new_code_until_the_roll_fails() -> None:
    """That dies after it has proved itself is no failure of the roll."""
    script = serving(web(2, min_ready_time=0.0))
    script.at(20, reload(2, web(2, min_ready_time=0.0)))
    script.ready(21, "web-3")
    script.crashed(21.5, "web-3")  # while web-1 still drains
    restarted = script.tick(21.7)

    assert restarted == [ac.Spawn("web-4", "web", 2)]
    assert brief(script.left(22, "web-1"))[-1] == "Spawn web-5"


def test_new_code_that_uses_up_the_restarts_of_its_group_is_rolled_back() -> None:
    """It holds for `min_ready_time` and no longer: the old workers that are left are not replaced."""
    spec = web(3, min_ready_time=0.0, max_restarts=0)
    script = serving(spec)
    script.at(20, reload(2, spec))
    script.ready(21, "web-4")
    gone(script, 22, "web-1")
    actions = script.crashed(23, "web-4")

    assert "group.failed web-4" not in brief(actions)
    assert ac.Spawn("web-6", "web", 1) in actions
    end = script.at(24, ev.WorkerNotBorn("web-5", "given up"))
    assert fields_of("reload.rolled_back", end)["worker"] == "web-4"
    assert {w.generation for w in script.snapshot().workers} == {1}
    assert script.group("web").failure == ""


def test_who_proves_itself_is_not_believed_to_have_done_so_before_its_news_are_heard() -> None:
    """A supervisor that stood still hears of a death after another one's readiness: both count."""
    script = serving(web(4))
    script.at(20, reload(2, web(4, surge=2)))
    script.ready(21, "web-5")
    script.registered(21, "web-6")
    actions = script.at(24, ev.WorkerReady("web-6")) + script.crashed(24, "web-5") + script.tick(24)

    assert [cancel.worker for cancel in cancels(actions)] == ["web-6"]


# --- slots without a worker ---------------------------------------------------------------------


def test_an_old_worker_that_dies_while_its_successor_starts_is_replaced_by_that_one() -> None:
    """Its death counts by the ordinary rules, but nobody is spawned beside the successor."""
    script = serving(web(1))
    script.at(20, reload(2, web(1)))
    script.crashed(21, "web-1")

    assert brief(script.tick(22)) == []
    script.ready(23, "web-2")
    assert brief(script.tick(24)) == ["reload.done", "Retire 1"]


def test_when_the_old_one_has_died_and_the_successor_fails_the_ordinary_restart_comes() -> None:
    """The slot does not stay empty."""
    script = serving(web(1))
    script.at(20, reload(2, web(1)))
    script.crashed(21, "web-1")
    actions = script.at(22, ev.WorkerNotBorn("web-2", "EAGAIN"))

    assert ac.Spawn("web-3", "web", 1) in actions


def test_a_job_that_ends_well_while_its_successor_starts_is_done() -> None:
    """It is not run a second time: neither by the successor, nor when its turn comes."""
    once = web(2, restart=Restart.NEVER)
    script = serving(once)
    script.at(20, reload(2, once))
    actions = script.left(21, "web-1", "web-2")

    assert "Kill web-3" in brief(actions + script.tick(22))
    end = script.at(23, ev.WorkerNotBorn("web-3", "given up"))
    assert brief(end) == ["reload.done", "Retire 1"]
    assert workers_of(script) == []


def test_jobs_that_have_done_what_they_were_for_are_not_run_again_by_a_reload() -> None:
    """Unless the new rules ask for it."""
    script = serving(web(1, restart=Restart.NEVER))
    script.left(11, "web-1")

    again = script.at(20, reload(2, web(1, restart=Restart.NEVER)))
    assert brief(again) == ["reload.started", "reload.done", "Retire 1"]
    assert "Spawn web-2" in brief(script.at(21, reload(3, web(1))))


def finished() -> Script:
    """Return a script in which both workers of a group have ended well at 11."""
    script = serving(web(2, restart=Restart.NEVER))
    script.left(11, "web-1", "web-2")
    assert script.group("web").state == "finished"
    return script


def test_a_restart_runs_again_what_has_finished() -> None:
    """All at once, and it is done when they have proved themselves."""
    script = finished()
    assert brief(script.at(20, ev.RestartRequested("web"))) == ["Spawn web-3", "Spawn web-4"]
    assert script.group("web").state == "starting"
    script.ready(21, "web-3", "web-4")
    assert brief(script.tick(22)) == ["restart.done"]
    assert script.group("web").state == "ready"
    script.left(30, "web-3", "web-4")
    assert (script.group("web").state, script.fleet.next_deadline()) == ("finished", None)


def test_a_restart_of_what_ends_at_once_is_done_when_it_has_ended_well() -> None:
    """Ready or not: it has done what it was for, and nobody is to follow."""
    script = finished()
    script.at(20, ev.RestartRequested("web"))
    script.ready(21, "web-3")
    script.registered(21, "web-4")
    script.at(21.1, ev.WorkerDrained("web-4"))
    assert "restart.done" not in brief(script.left(21.2, "web-3"))
    done = script.at(21.3, ev.WorkerExited("web-4", code=0))
    assert brief(done)[-1] == "restart.done"
    assert script.group("web").state == "finished"
    assert script.tick(100) == []


@pytest.mark.parametrize("drained", [True, False])
def test_a_restart_of_what_has_finished_that_fails_leaves_it_finished(drained: bool) -> None:
    """It is said why; nobody tries it again, since nobody has asked for that."""
    script = finished()
    script.at(20, ev.RestartRequested("web"))
    script.registered(21, "web-3", "web-4")
    if drained:
        script.at(21, ev.WorkerDrained("web-3"))
    script.at(22, ev.WorkerExited("web-3", code=3))
    done = script.left(23, "web-4")
    assert fields_of("restart.failed", done)["error"] == "it ended with code 3"
    assert script.group("web").state == "finished"
    assert script.tick(100) == []


def test_a_restart_of_a_group_of_which_some_have_finished_is_one_of_all() -> None:
    """Who serves is replaced first; the place that was done is filled again afterwards."""
    script = serving(web(2, restart=Restart.NEVER, min_ready_time=0.0))
    script.left(11, "web-1")
    assert script.group("web").state == "ready"
    assert brief(script.at(20, ev.RestartRequested("web"))) == ["Spawn web-3"]
    assert "worker.cancelled web-2" in brief(script.ready(21, "web-3"))
    assert brief(script.left(22, "web-2"))[-1] == "Spawn web-4"
    assert brief(script.ready(23, "web-4"))[-1] == "restart.done"


def test_new_code_that_ends_well_where_somebody_serves_does_not_take_the_place() -> None:
    """It may be a mistake, and then all who serve would be replaced by nobody."""
    spec = web(1, restart=Restart.ON_FAILURE)
    script = serving(spec)
    script.at(20, reload(2, spec))
    script.registered(21, "web-2")
    end = script.left(22, "web-2")
    assert fields_of("reload.rolled_back", end)["error"] == (
        "it returned before it had proved itself"
    )


def test_a_job_that_a_reload_brings_may_end_at_once() -> None:
    """As it may at a start."""
    once = group("once", 1, restart=Restart.NEVER)
    script = serving(web(1, min_ready_time=0.0))
    script.at(20, reload(2, web(1, min_ready_time=0.0), once))
    script.ready(21, "web-2")
    script.left(22, "web-1")
    script.registered(23, "once-1")
    assert brief(script.left(24, "once-1"))[-2:] == ["reload.done", "Retire 1"]
    assert script.group("once").state == "finished"


def test_a_first_start_of_broken_code_is_mended_by_a_reload() -> None:
    """The fleet is ready with the new code, and says so once."""
    script = Script(web(1))
    script.registered(1, "web-1")
    script.crashed(2, "web-1")
    script.at(2.05, reload(2, web(1)))
    script.ready(3, "web-2")
    end = script.tick(4)

    assert brief(end) == ["reload.done", "Retire 1", "supervisor.ready"]
    assert script.fleet.phase is Phase.READY


def test_a_failed_group_gets_another_chance_by_a_reload() -> None:
    """When its turn comes."""
    script = serving(web(1, max_restarts=0))
    script.crashed(11, "web-1")
    assert script.group("web").state == "failed"
    script.at(20, reload(2, web(1)))
    script.ready(21, "web-2")

    assert brief(script.tick(22))[0] == "reload.done"
    assert script.group("web").state == "ready"


def test_a_group_that_had_failed_stays_so_when_a_reload_fails_before_its_turn() -> None:
    """A roll-back leaves what it has not touched."""
    once = group("once", 1, restart=Restart.NEVER)
    script = serving(web(1), once)
    script.crashed(11, "once-1")
    script.at(20, reload(2, web(1), once))
    actions = script.at(21, ev.WorkerNotBorn("web-2", "EAGAIN"))

    assert "reload.rolled_back web-2" in brief(actions)
    assert script.group("once").state == "failed"
    assert brief(script.tick(100)) == []


def test_places_that_a_failed_roll_has_not_come_to_are_filled_again() -> None:
    """A group that was given another chance does not keep empty slots."""
    script = serving(web(2, max_restarts=0))
    script.crashed(11, "web-1", "web-2")
    script.at(20, reload(2, web(2)))
    for worker in ("web-3", "web-4"):
        script.born(21, worker)
        script.at(21, ev.WorkerExited(worker, code=1))
    script.tick(21)

    assert [(w.id, w.generation) for w in script.snapshot().workers] == [("web-5", 1), ("web-6", 1)]


def test_a_group_that_fails_while_it_is_being_replaced_is_whole_after_the_commit() -> None:
    """The old code has failed, not the new: what it has used up is not held against that one."""
    script = serving(web(2, min_ready_time=0.0, max_restarts=1, backoff=60.0))
    script.at(20, reload(2, web(2, min_ready_time=0.0)))
    script.ready(21, "web-3")
    gone(script, 22, "web-1")
    script.crashed(23, "web-3")
    assert "group.failed web-2" in brief(script.crashed(24, "web-2"))
    end = script.ready(25, "web-4") + script.tick(25)

    assert "reload.done" in brief(end)
    assert ac.Spawn("web-5", "web", 2) in end
    assert script.group("web").failure == ""


def test_empty_places_are_filled_after_those_that_replace_somebody() -> None:
    """They have nobody to lose, but prove nothing either."""
    script = serving(web(2, min_ready_time=0.0, backoff=1000.0, backoff_max=1000.0))
    script.crashed(19, "web-2")
    begun = script.at(20, reload(2, web(2, min_ready_time=0.0))) + script.ready(21, "web-3")

    assert [a.worker for a in begun if isinstance(a, ac.Spawn)] == ["web-3"]
    assert gone(script, 22, "web-1")[-1] == "Spawn web-4"


# --- groups and slots that come and go ----------------------------------------------------------


def test_what_the_new_file_has_no_place_for_goes_last() -> None:
    """A group that is gone, and a smaller count: dismissed when all others have been replaced."""
    script = serving(web(2, min_ready_time=0.0), group("old", 1))
    script.at(20, reload(2, web(1, min_ready_time=0.0)))
    script.ready(21, "web-3")
    committed = gone(script, 22, "web-1")

    assert committed[-4:] == [
        "worker.cancelled web-2",
        "SendCancel web-2",
        "worker.cancelled old-1",
        "SendCancel old-1",
    ]
    gone(script, 23, "web-2")
    assert gone(script, 24, "old-1")[-2:] == ["reload.done", "Retire 1"]
    assert [found.name for found in script.snapshot().groups] == ["web"]


def test_what_was_added_is_taken_away_by_a_roll_back() -> None:
    """New groups and new slots: their workers go, and nobody is spawned for them from the old code."""
    script = serving(web(1, min_ready_time=0.0))
    script.at(
        20,
        reload(2, web(2, min_ready_time=0.0), replace(group("new", 2), surge=2, min_ready_time=0)),
    )
    script.ready(21, "web-2")
    gone(script, 22, "web-1")
    script.ready(23, "web-3")
    script.ready(24, "new-1")
    actions = script.at(25, ev.WorkerNotBorn("new-2", "EAGAIN"))

    assert {"SendCancel web-3", "SendCancel new-1"} <= set(brief(actions))
    assert gone(script, 26, "web-3")[-1] == "Spawn web-4"
    assert gone(script, 26, "new-1")[-1] == "worker.exited new-1"
    script.ready(27, "web-4")
    assert gone(script, 28, "web-2")[-2:] == ["reload.rolled_back new-2", "Retire 2"]
    assert [found.name for found in script.snapshot().groups] == ["web"]
    assert workers_of(script) == ["web-4"]


def test_names_are_not_used_again_when_a_group_comes_back() -> None:
    """`web-1` is for ever the first one, also after a file without the group."""
    script = serving(web(1))
    script.at(20, reload(2))
    gone(script, 21, "web-1")

    assert "Spawn web-2" in brief(script.at(22, reload(3, web(1))))


# --- one at a time ------------------------------------------------------------------------------


def test_a_reload_supersedes_one_that_is_under_way() -> None:
    """What has not proved itself is given up; the newest begins when it has gone."""
    script = serving(web(2, min_ready_time=0.0))
    script.at(20, reload(2, web(2, min_ready_time=0.0)))
    script.ready(21, "web-3")
    gone(script, 22, "web-1")
    script.registered(23, "web-4")
    assert brief(script.at(24, reload(3, web(2)))) == ["worker.cancelled web-4", "SendCancel web-4"]
    begun = gone(script, 25, "web-4")

    assert begun[-3:] == ["reload.superseded", "reload.started", "Spawn web-5"]


def test_of_many_reloads_only_the_newest_is_carried_out() -> None:
    """Those in between never begin, and are retired at once."""
    script = serving(web(1))
    script.at(20, reload(2, web(1)))
    actions = script.at(20.01, *(reload(number, web(1)) for number in range(3, 13)))

    assert brief(actions).count("reload.started") == 0
    assert [a.generation for a in actions if isinstance(a, ac.Retire)] == list(range(3, 12))
    end = script.at(21, ev.WorkerNotBorn("web-2", "given up"))
    assert brief(end) == ["reload.superseded", "reload.started", "Spawn web-3", "Retire 2"]


def test_a_superseded_generation_is_retired_when_its_last_worker_has_gone() -> None:
    """It may still be restarted from until then."""
    script = serving(web(2, min_ready_time=0.0))
    script.at(20, reload(2, web(2, min_ready_time=0.0)))
    script.ready(21, "web-3")
    gone(script, 22, "web-1")
    script.at(23, reload(3, web(2, min_ready_time=0.0)))
    begun = script.at(24, ev.WorkerNotBorn("web-4", "given up")) + script.crashed(25, "web-3")

    assert "Retire 2" not in brief(begun)
    assert "Retire 2" in brief(script.ready(26, "web-5"))


def test_after_a_superseded_roll_the_way_back_takes_all_along() -> None:
    """Who runs the superseded code goes back too, also in a group that the newest file lacks."""
    script = serving(web(1, min_ready_time=0.0), group("jobs", 1))
    script.at(20, reload(2, web(1, min_ready_time=0.0), group("jobs", 1)))
    script.ready(21, "web-2")
    gone(script, 22, "web-1")
    script.at(23, reload(3, group("jobs", 1)))
    script.at(24, ev.WorkerNotBorn("jobs-2", "given up"))
    actions = script.at(25, ev.WorkerNotBorn("jobs-3", "EAGAIN"))

    assert ac.Spawn("web-3", "web", 1) in actions
    script.ready(26, "web-3")
    assert gone(script, 27, "web-2")[-1] == "Retire 3"
    assert sorted(workers_of(script, 1)) == ["jobs-1", "web-3"]


def test_a_reload_supersedes_the_way_back_too() -> None:
    """The old code may not come up any more: better code is the way out."""
    script = third_fails()
    script.left(31, "web-6")
    script.at(33, ev.WorkerNotBorn("web-7", "EAGAIN"))
    actions = script.at(33.5, reload(3, web(3)))

    assert brief(actions)[:2] == ["reload.superseded web-6", "reload.started"]
    assert fields_of("reload.superseded", actions)["generation"] == 2
    assert [w.generation for w in script.snapshot().workers] == [1, 2, 2, 3]


def test_what_has_been_committed_is_not_superseded() -> None:
    """While those who are too many go, the new configuration is in force, and a reload waits."""
    script = serving(web(1, min_ready_time=0.0), group("old", 1))
    script.at(20, reload(2, web(1, min_ready_time=0.0)))
    script.ready(21, "web-2")
    gone(script, 22, "web-1")
    assert script.at(23, reload(3, web(1))) == []

    assert gone(script, 24, "old-1")[2:4] == ["reload.done", "reload.started"]
    assert script.snapshot().generation == 2


@pytest.mark.parametrize("moment", [20.0, 21.0, 22.0, 23.0])
def test_a_stop_wins_at_once_at_any_point_of_a_roll(moment: float) -> None:
    """Nobody is spawned any more, everybody is told, and it ends when all have gone."""
    script = serving(web(1))
    script.at(20, reload(2, web(1)))
    if moment > 20:
        script.ready(21, "web-2")
    if moment > 21:
        script.tick(22)
    actions = script.at(moment, ev.StopRequested("SIGTERM"))
    actions += script.tick(24) if moment <= 20 else []
    for worker in workers_of(script):
        actions += script.at(25, ev.WorkerBorn(worker, 7), ev.WorkerExited(worker, code=0))

    assert not any(isinstance(action, ac.Spawn) for action in actions)
    assert isinstance(actions[-1], ac.Finish)
    assert script.snapshot().roll is None


# --- restart, scale, age ------------------------------------------------------------------------


def test_a_restart_replaces_by_the_generation_in_force() -> None:
    """A worker or a whole group; it is done when they have gone."""
    script = serving(web(2, min_ready_time=0.0))

    assert script.at(20, ev.RestartRequested("web-2")) == [ac.Spawn("web-3", "web", 1)]
    script.ready(21, "web-3")
    assert gone(script, 22, "web-2")[-1] == "restart.done"
    assert workers_of(script) == ["web-1", "web-3"]


def test_a_restart_gives_a_failed_group_another_chance() -> None:
    """All of its places are filled again."""
    script = serving(web(2, max_restarts=0, min_ready_time=0.0))
    script.crashed(11, "web-1", "web-2")
    assert script.group("web").state == "failed"
    script.at(20, ev.RestartRequested("web"))

    assert brief(script.ready(21, "web-3", "web-4"))[-1] == "restart.done"
    assert script.group("web").state == "ready"


def test_a_restart_that_fails_just_ends() -> None:
    """What it has replaced runs the same code."""
    script = serving(web(2))
    script.at(20, ev.RestartRequested("web"))
    actions = script.at(21, ev.WorkerNotBorn("web-3", "EAGAIN"))

    assert fields_of("restart.failed", actions) == {
        "target": "web",
        "worker": "web-3",
        "error": "EAGAIN",
        "traceback": "",
    }
    assert workers_of(script) == ["web-1", "web-2"]


def test_restarts_wait_for_a_reload_and_who_is_gone_by_then_has_been_replaced() -> None:
    """They queue, and answer all the same."""
    script = serving(web(1, min_ready_time=0.0))
    script.at(20, reload(2, web(1, min_ready_time=0.0)))
    assert script.at(20, ev.RestartRequested("web-1")) == []
    script.ready(21, "web-2")

    assert gone(script, 22, "web-1")[-3:] == ["reload.done", "restart.done", "Retire 1"]


def test_a_scale_of_a_group_that_is_gone_by_then_fails() -> None:
    """Whoever waits for it hears of it."""
    script = serving(web(1))
    script.at(20, reload(2), ev.ScaleRequested("web", 3))
    gone(script, 21, "web-1")

    assert script.snapshot().groups == ()
    script = serving(web(1))
    script.at(20, ev.RestartRequested("web-1"), ev.ScaleRequested("nobody", 3))
    actions = script.at(21, ev.WorkerNotBorn("web-2", "EAGAIN"))
    assert fields_of("scale.failed", actions)["target"] == "nobody"


def test_a_scale_to_nobody_and_back() -> None:
    """All go, nobody is replaced; then all come again under new names."""
    script = serving(web(2, min_ready_time=0.0))
    script.at(20, ev.ScaleRequested("web", 0))
    gone(script, 21, "web-1")
    assert gone(script, 22, "web-2")[-1] == "scale.done"
    assert script.group("web").count == 0

    up = brief(script.at(23, ev.ScaleRequested("web", 2)))
    assert up == ["group.scaled", "Spawn web-3", "Spawn web-4"]
    assert brief(script.ready(24, "web-3", "web-4"))[-1] == "scale.done"


def test_a_scale_that_fails_keeps_its_count_and_leaves_the_rest_to_ordinary_restarts() -> None:
    """It runs the same code as those who serve: there is nothing to go back to."""
    script = serving(web(1))
    script.at(20, ev.ScaleRequested("web", 2))
    actions = script.at(21, ev.WorkerNotBorn("web-2", "EAGAIN"))

    assert fields_of("scale.failed", actions)["worker"] == "web-2"
    assert ac.Spawn("web-3", "web", 1) in actions
    assert script.group("web").count == 2


def test_a_file_that_is_read_later_wins_over_a_scale_that_waits() -> None:
    """The scale is dropped, and whoever waits for it hears of it."""
    script = serving(web(1, min_ready_time=0.0))
    script.at(20, reload(2, web(1, min_ready_time=0.0)), ev.ScaleRequested("web", 4))
    actions = script.at(21, reload(3, web(1)))

    assert fields_of("scale.failed", actions)["error"] == "superseded by a reload"
    assert "group.scaled" not in brief(script.at(22, ev.WorkerNotBorn("web-2", "given up")))


def test_a_file_wins_over_an_earlier_scale() -> None:
    """Its count is what there is after the reload."""
    script = serving(web(1, min_ready_time=0.0))
    script.at(20, ev.ScaleRequested("web", 2))
    script.ready(21, "web-2")
    script.at(22, reload(2, web(1, min_ready_time=0.0)))
    script.ready(23, "web-3")
    gone(script, 24, "web-1")
    gone(script, 25, "web-2")

    assert workers_of(script) == ["web-3"]


def test_a_worker_is_replaced_for_its_age_and_tried_again_when_that_fails() -> None:
    """At `max_age` less half the jitter here; its age is that of its readiness."""
    script = serving(web(1, max_age=100.0, min_ready_time=0.0))
    assert script.fleet.next_deadline() == 10 + 95
    assert brief(script.tick(105)) == ["Spawn web-2"]
    assert "recycle.failed web-2" in brief(script.at(106, ev.WorkerNotBorn("web-2", "EAGAIN")))

    assert script.fleet.next_deadline() == pytest.approx(106 + 10)
    assert brief(script.tick(116)) == ["Spawn web-3"]
    script.ready(117, "web-3")
    assert gone(script, 118, "web-1")[-1] == "recycle.done"
    assert script.fleet.next_deadline() == 117 + 95


def test_nobody_is_recycled_who_has_gone_meanwhile() -> None:
    """What was due during a reload has been done by it."""
    script = serving(web(1, max_age=100.0, min_ready_time=0.0))
    script.at(104, reload(2, web(1, min_ready_time=0.0)))
    script.tick(105)
    script.ready(106, "web-2")

    assert gone(script, 107, "web-1")[2:] == ["reload.done", "Retire 1"]
    assert script.fleet.next_deadline() is None


def test_changed_rules_hold_at_once_for_the_same_workers() -> None:
    """Nobody is replaced; a count that differs is scaled to."""
    script = serving(web(1))
    actions = script.at(20, ev.SettingsChanged((web(2, max_age=100.0),), 3.0, 1.0))

    assert brief(actions) == ["group.scaled", "Spawn web-2"]
    script.at(21, ev.StopRequested("SIGTERM"))
    assert script.snapshot().deadline == 24.0


def test_the_ends_of_two_scalings_of_one_group_can_be_told_apart():
    """Each end has the number of its request: who waits for the second does not end with the first."""
    script = Script(group("jobs", 1))
    script.ready(0.0, "jobs-1")
    script.at(1.0, ev.ScaleRequested("jobs", 2, 1), ev.ScaleRequested("jobs", 3, 2))
    ends = []
    for at, worker in ((2.0, "jobs-2"), (5.0, "jobs-3")):
        done = script.ready(at, worker) + script.tick(at + 2.0)
        ends.append(fields_of("scale.done", done))
    assert ends == [{"target": "jobs", "request": 1}, {"target": "jobs", "request": 2}]
