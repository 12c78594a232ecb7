"""What has to run before the others: at a start and at a reload, done, failed, overtaken, stopped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from supervisor.core import events as ev
from supervisor.core.fleet import GroupSpec, Phase
from supervisor.core.policy import Restart
from tests.core.script import ABORT_MARGIN, GRACE, Script, brief, fields_of, group

NO_GOOD = ("sh ended with code 3", "no such table")


def errand(name: str) -> GroupSpec:
    """Return a group that runs before the others."""
    return replace(group(name, restart=Restart.NEVER), before=True)


MIGRATE, SEED, WEB = errand("migrate"), errand("seed"), group("web", 2)
FILE = (WEB, MIGRATE, SEED)


def reload(generation: int, *groups: GroupSpec) -> ev.ReloadRequested:
    """Return a reload to this generation."""
    return ev.ReloadRequested(generation, groups or FILE, GRACE, ABORT_MARGIN)


def did(script: Script, now: float, *workers: str) -> list[str]:
    """Let these workers run and end well; return what is to be done."""
    return brief(script.registered(now, *workers) + script.left(now, *workers))


def failed(script: Script, now: float, worker: str) -> list[Any]:
    """Let this worker's code fail, and end."""
    return [
        *script.registered(now, worker),
        *script.at(now, ev.WorkerFailed(worker, *NO_GOOD)),
        *script.at(now, ev.WorkerDrained(worker), ev.WorkerExited(worker, code=3)),
    ]


def serving() -> Script:
    """Return a script in which all has been run that comes before, and the others serve at 10."""
    script = Script(*FILE)
    did(script, 1, "migrate-1")
    did(script, 2, "seed-1")
    script.ready(10, "web-1", "web-2")
    assert script.fleet.phase is Phase.READY
    return script


# --- the start -----------------------------------------------------------------------------------


def test_a_start_runs_them_one_after_the_other_and_then_the_rest() -> None:
    """In the order of the file; nobody else is spawned before the last one has ended well."""
    script = Script(*FILE)
    assert brief(script.started) == ["Spawn migrate-1"]
    assert script.group("web").state == "waiting"

    assert did(script, 1, "migrate-1")[-1] == "Spawn seed-1"
    assert did(script, 2, "seed-1")[-2:] == ["Spawn web-1", "Spawn web-2"]
    assert [script.group(name).state for name in ("web", "migrate")] == [
        "starting",
        "finished",
    ]
    assert script.group("migrate").count == 0

    assert "supervisor.ready" in brief(script.ready(3, "web-1", "web-2"))


SLOW = (WEB, replace(MIGRATE, ready_timeout=60.0))
TOO_LATE = "did not end within 60 s"


def test_one_that_does_not_end_is_told_to_end_and_has_failed() -> None:
    """At `ready_timeout`, like in a stop; the start fails when it has gone, and says why."""
    script = Script(*SLOW)
    script.registered(1, "migrate-1")
    assert script.fleet.next_deadline() == 60
    assert script.group("migrate").ends_by == 60
    assert script.tick_just_before(60) == []
    assert brief(script.tick(60)) == ["worker.cancelled migrate-1", "SendCancel migrate-1"]
    done = script.at(61, ev.WorkerExited("migrate-1", signal=15))
    assert fields_of("worker.exited", done)["reason"] == TOO_LATE
    assert fields_of("group.failed", done)["reason"] == f"it {TOO_LATE}: it ended with signal 15"
    assert brief(done)[-1] == "Finish 1"


def test_one_that_does_not_end_when_it_is_told_to_is_killed() -> None:
    """SIGTERM where there is no receipt, SIGKILL after `grace`."""
    script = Script(*SLOW)
    script.registered(1, "migrate-1")
    script.tick(60)
    assert brief(script.tick(61)) == ["Terminate migrate-1"]
    assert brief(script.tick(60 + GRACE)) == ["TakeStacks migrate-1"]
    assert brief(script.tick(91)) == ["worker.killed migrate-1", "Kill migrate-1"]
    assert brief(script.at(91, ev.WorkerExited("migrate-1", signal=9)))[-1] == "Finish 1"


def test_to_be_ready_is_no_end() -> None:
    """Nor is to be looked at for a hang: its time goes on."""
    script = Script(WEB, replace(SLOW[1], hang_timeout=25.0))
    script.ready(1, "migrate-1")
    looks = []
    for due in (26, 51, 60):
        assert script.fleet.next_deadline() == due
        looks += brief(script.tick(due))
        script.at(due, ev.WorkerSeen("migrate-1"))
    assert looks == [
        "Look migrate-1",
        "Look migrate-1",
        "worker.cancelled migrate-1",
        "SendCancel migrate-1",
    ]


def test_one_that_ends_well_after_it_was_told_to_end_has_failed() -> None:
    """What it was for may be half done."""
    script = Script(*SLOW)
    script.registered(1, "migrate-1")
    script.tick(60)
    assert brief(script.left(61, "migrate-1"))[-1] == "Finish 1"


def test_one_that_asks_for_more_time_gets_it() -> None:
    """From the moment of asking."""
    script = Script(*SLOW)
    script.registered(1, "migrate-1")
    script.at(50, ev.WorkerDelayed("migrate-1", 100.0))
    script.ready(55, "migrate-1")
    assert script.tick_just_before(150) == []
    assert "SendCancel migrate-1" in brief(script.tick(150))


def test_its_time_goes_on_when_the_supervisor_stands_still() -> None:
    """But it is told to end that much later: nobody could have heard of its end."""
    script = Script(*SLOW)
    script.ready(1, "migrate-1")
    assert script.tick(160) == []
    assert script.group("migrate").ends_by == 161
    assert "SendCancel migrate-1" in brief(script.tick(161))


def test_one_that_does_not_end_rejects_the_reload() -> None:
    """When it has gone; nothing is replaced."""
    script = serving()
    script.at(20, reload(2, *SLOW))
    script.registered(21, "migrate-2")
    assert script.group("migrate").state == "starting"
    assert "SendCancel migrate-2" in brief(script.tick(80))
    done = script.at(81, ev.WorkerExited("migrate-2", signal=15))
    assert TOO_LATE in fields_of("reload.rejected", done)["reason"]
    assert [worker.id for worker in script.snapshot().workers] == ["web-1", "web-2"]
    assert script.group("migrate").state == "finished"


def test_to_serve_is_not_what_it_is_for() -> None:
    """One that says that it is ready has not ended, and is waited for."""
    script = Script(*FILE)
    assert brief(script.ready(1, "migrate-1")) == [
        "worker.spawned migrate-1",
        "worker.ready migrate-1",
    ]
    assert brief(script.tick(20)) == []
    assert brief(script.left(21, "migrate-1"))[-1] == "Spawn seed-1"


def test_one_that_fails_ends_the_start_with_1() -> None:
    """Its group has failed for good, whatever `on_failed` says, and nobody else has been spawned."""
    script = Script(*FILE)
    done = failed(script, 1, "migrate-1")

    assert (brief(done)[-4:]) == [
        "group.failed migrate-1",
        "supervisor.stopping",
        "supervisor.stopped",
        "Finish 1",
    ]
    assert not [line for line in brief(done) if line.startswith("Spawn")]
    assert NO_GOOD[0] == fields_of("group.failed", done)["reason"]


def test_one_that_was_sent_away_has_not_done_it() -> None:
    """SIGTERM from outside, and it ends with code 0: what it was for may be half done."""
    script = Script(*FILE)
    script.registered(1, "migrate-1")
    script.at(2, ev.WorkerLeaving("migrate-1", "SIGTERM from outside"))
    assert brief(script.left(3, "migrate-1"))[-1] == "Finish 1"


def test_one_that_dies_of_a_signal_has_failed() -> None:
    """Without a word, too."""
    script = Script(*FILE)
    script.registered(1, "migrate-1")
    assert brief(script.crashed(2, "migrate-1"))[-1] == "Finish 1"


def test_one_that_was_never_born_has_done_nothing() -> None:
    """The system refuses a process: that is no success."""
    done = brief(Script(*FILE).at(1, ev.WorkerNotBorn("migrate-1", "fork: EAGAIN")))
    assert done[-1] == "Finish 1"


def test_a_stop_ends_it_like_any_worker() -> None:
    """It is cancelled, and the exit code is that of a stop."""
    script = Script(*FILE)
    script.registered(1, "migrate-1")
    assert "SendCancel migrate-1" in brief(script.at(2, ev.StopRequested("SIGTERM")))
    assert brief(script.at(3, ev.WorkerExited("migrate-1", signal=15)))[-1] == "Finish 0"


def test_what_is_asked_for_meanwhile_waits() -> None:
    """A restart or scaling of the others would spawn them too early."""
    script = Script(*FILE)
    script.registered(1, "migrate-1")
    assert brief(script.at(2, ev.RestartRequested("web"), ev.ScaleRequested("web", 3))) == []
    did(script, 3, "migrate-1")
    done = did(script, 4, "seed-1")
    assert {"Spawn web-1", "Spawn web-2"} <= set(done)
    assert len([line for line in done if line.startswith("Spawn")]) <= 3


def test_a_reload_supersedes_a_start_that_hangs() -> None:
    """It is cancelled; when it has gone, the new one runs, and then the new code is started."""
    script = Script(*FILE)
    script.registered(1, "migrate-1")
    assert "SendCancel migrate-1" in brief(script.at(2, reload(2)))
    assert brief(script.at(3, ev.WorkerExited("migrate-1", signal=15)))[-1] == "Spawn migrate-2"
    did(script, 4, "migrate-2")
    assert "Spawn web-1" in did(script, 5, "seed-1")
    script.ready(6, "web-1")
    script.tick(8)
    script.ready(9, "web-2")
    script.tick(11)
    assert (script.snapshot().generation, script.fleet.phase) == (2, Phase.READY)


def test_a_reload_that_fails_before_the_fleet_has_started_ends_it() -> None:
    """There is nothing to go back to."""
    script = Script(*FILE)
    script.registered(1, "migrate-1")
    script.at(2, reload(2))
    script.at(3, ev.WorkerExited("migrate-1", signal=15))
    done = brief(failed(script, 4, "migrate-2"))
    assert done.index("reload.rejected migrate-2") < done.index("supervisor.stopping")
    assert "Finish 1" in done


# --- a reload ------------------------------------------------------------------------------------


def test_a_reload_runs_them_again_before_the_roll() -> None:
    """Nobody is replaced until the last of them has ended well."""
    script = serving()
    assert brief(script.at(20, reload(2))) == ["Spawn migrate-2"]
    assert script.group("web").state == "ready"
    assert did(script, 21, "migrate-2")[-1] == "Spawn seed-2"
    assert did(script, 22, "seed-2")[-2:] == ["reload.started", "Spawn web-3"]


def test_one_that_fails_rejects_the_reload() -> None:
    """Nothing is replaced, the old generation stays in force, and its last lines are told."""
    script = serving()
    script.at(20, reload(2))
    done = failed(script, 21, "migrate-2")

    assert brief(done)[-2:] == ["reload.rejected migrate-2", "Retire 2"]
    told = fields_of("reload.rejected", done)
    assert (2, "migrate-2: sh ended with code 3", NO_GOOD[1]) == (
        told["generation"],
        told["reason"],
        told["traceback"],
    )
    assert (script.snapshot().generation, script.fleet.phase) == (1, Phase.READY)
    assert [worker.id for worker in script.snapshot().workers] == ["web-1", "web-2"]
    assert script.group("migrate").state == "finished"

    assert brief(script.at(30, reload(3))) == ["Spawn migrate-3"]


def test_a_reload_during_a_reload_supersedes_it() -> None:
    """The one that runs is cancelled, the newest one begins when it has gone."""
    script = serving()
    script.at(20, reload(2))
    script.registered(21, "migrate-2")
    assert "SendCancel migrate-2" in brief(script.at(22, reload(3)))
    done = brief(script.at(23, ev.WorkerExited("migrate-2", signal=15)))
    assert [line for line in done if line.startswith(("reload", "Spawn"))] == [
        "reload.superseded",
        "Spawn migrate-3",
    ]


def test_who_dies_meanwhile_is_restarted_from_the_generation_in_force() -> None:
    """The new code is not let in by a back door."""
    script = serving()
    script.at(20, reload(2))
    script.registered(21, "migrate-2")
    script.crashed(22, "web-1")
    spawned = [a for a in script.tick(23) if brief([a]) == ["Spawn web-3"]]
    assert [action.generation for action in spawned] == [1]  # type: ignore[union-attr]


def test_one_that_is_new_in_a_reload_that_fails_is_forgotten() -> None:
    """The group goes with the configuration that brought it."""
    script = Script(WEB)
    script.ready(1, "web-1", "web-2")
    script.at(2, reload(2, WEB, MIGRATE))
    failed(script, 3, "migrate-1")
    assert [found.name for found in script.snapshot().groups] == ["web"]


# --- who ends as he was told ---------------------------------------------------------------------


def test_to_die_of_the_stop_signal_when_told_to_end_is_no_failure() -> None:
    """A program without a handler ends so; without a cancel the same signal is a failure."""
    spec = replace(group(restart=Restart.ON_FAILURE), stop_signal=10)
    for told, signal, is_restarted in ((True, 10, False), (True, 15, True), (False, 10, True)):
        script = Script(spec)
        script.ready(1, "jobs-1")
        if told:
            script.at(2, ev.WorkerLeaving("jobs-1", "SIGTERM from outside"))
        script.at(3, ev.WorkerExited("jobs-1", signal=signal))
        assert is_restarted == ("Spawn jobs-2" in brief(script.tick(10)))


# --- more time to start --------------------------------------------------------------------------


def test_a_worker_that_asks_for_more_time_to_start_gets_it() -> None:
    """From the moment of asking; less than it has already changes nothing, nor does asking too late."""
    script = Script(group(ready_timeout=5.0))
    script.registered(1, "jobs-1")
    script.at(4, ev.WorkerDelayed("jobs-1", 10.0), ev.WorkerDelayed("jobs-1", 1.0))
    assert brief(script.tick_just_before(14)) == []
    assert "worker.cancelled jobs-1" in brief(script.tick(14))
    assert brief(script.at(14, ev.WorkerDelayed("jobs-1", 100.0))) == []
    assert brief(script.tick(15)) == ["Terminate jobs-1"]
    assert "TakeStacks jobs-1" in brief(script.tick(14 + GRACE))
