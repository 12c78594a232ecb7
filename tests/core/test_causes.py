"""Crash loops by cause: each has its own back-off, a dependency blames nobody, the failed are tried."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.breaker import LONGEST_PAUSE
from supervisor.core.causes import Cause, OomKills, cause_of
from supervisor.core.policy import Restart
from tests.core.script import Script, brief, fields_of, group

UNREACHABLE = "PoolTimeout: connection refused"


def spawned(actions: list[ac.Action]) -> list[str]:
    """Return who is to be spawned."""
    return [action.worker for action in actions if isinstance(action, ac.Spawn)]


def next_due(script: Script) -> float:
    """Return when something is due; there has to be something."""
    due = script.fleet.next_deadline()
    assert due is not None
    return due


def test_who_is_told_to_end_for_being_late_is_not_killed_by_somebody_else() -> None:
    """A program dies of the stop signal then: its start has failed, and that is its back-off."""
    script = Script(group(ready_timeout=5.0, max_restarts=0))
    script.registered(1, "jobs-1")
    script.tick(5)
    done = script.at(6, ev.WorkerExited("jobs-1", signal=15))
    assert fields_of("worker.exited", done)["cause"] == "startup"
    assert script.group().cause == "startup"


def gave_up(script: Script, now: float, *workers: str, pool: str = "main") -> list[ac.Action]:
    """Let these workers end because this pool cannot connect."""
    return script.at(
        now,
        *(
            event
            for worker in workers
            for event in (
                ev.WorkerFailed(worker, UNREACHABLE, "Traceback", pool),
                ev.WorkerExited(worker, code=1),
            )
        ),
    )


def spawns_of_a_loop(script: Script, seconds: float, *, for_database: bool = False) -> list[float]:
    """Let every worker die at its start; return when each was spawned, within so many seconds."""
    times = [0.0] * len(spawned(script.started))
    living = spawned(script.started)
    while True:
        for worker in living:
            script.registered(script.now, worker)
            if for_database:
                gave_up(script, script.now, worker)
            else:
                script.at(script.now, ev.WorkerExited(worker, code=1))
        due = script.fleet.next_deadline()
        if due is None or due >= seconds:
            return times
        living = spawned(script.tick(due))
        times += [script.now] * len(living)


# --- why a worker ended ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        ({"failed": False, "was_ready": True}, Cause.RETURNED),
        ({"failed": True, "was_ready": False}, Cause.STARTUP),
        ({"failed": True, "was_ready": True}, Cause.CRASHED),
        ({"failed": True, "was_ready": True, "signal": 11}, Cause.CRASHED),
        ({"failed": True, "was_ready": False, "signal": 9}, Cause.KILLED),
        ({"failed": True, "was_ready": True, "signal": 15}, Cause.KILLED),
        ({"failed": True, "was_ready": True, "signal": 9, "is_ours": True}, Cause.CRASHED),
        ({"failed": True, "was_ready": True, "signal": 9, "by_memory": True}, Cause.MEMORY),
        ({"failed": True, "was_ready": False, "for_dependency": True}, Cause.DEPENDENCY),
        ({"failed": False, "was_ready": True, "for_dependency": True}, Cause.DEPENDENCY),
        (
            {"failed": True, "was_ready": True, "signal": 9, "for_dependency": True},
            Cause.KILLED,
        ),
        (
            {"failed": True, "was_ready": True, "signal": 9, "is_ours": True, "hung": True},
            Cause.HANG,
        ),
    ],
)
def test_the_kernel_comes_before_what_the_worker_claims(evidence, cause):
    """And that before the stage that it had reached."""
    assert cause_of(**evidence) is cause


def test_an_oom_kill_explains_one_end():
    """Two that were killed together are both explained, a third by somebody is not."""
    kills = OomKills(3)

    assert [kills.explains(count) for count in (3, 5, 5, 5, None, 6)] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]


def test_who_is_killed_for_memory_is_told_from_who_is_killed():
    """By the count beside its end, and only then."""
    script = Script(group(count=2))
    script.ready(1, "jobs-1", "jobs-2")
    first = script.at(2, ev.WorkerExited("jobs-1", signal=9, oom_kills=4))
    second = script.at(3, ev.WorkerExited("jobs-2", signal=9, oom_kills=5))

    assert fields_of("worker.exited", first)["cause"] == "killed"
    assert fields_of("worker.exited", second)["cause"] == "memory"


def test_who_is_killed_while_it_drains_is_told_as_that():
    """They were told to end, but not so: else somebody else's SIGKILL had no reason at all."""
    script = Script(group(count=3))
    script.ready(1, "jobs-1", "jobs-2", "jobs-3")
    script.at(2, ev.StopRequested("SIGTERM"))
    ends = [
        script.at(3, ev.WorkerExited("jobs-1", signal=9, oom_kills=4)),
        script.at(3, ev.WorkerExited("jobs-2", signal=9, oom_kills=5)),
        script.at(3, ev.WorkerExited("jobs-3", signal=15)),
    ]

    causes = [fields_of("worker.exited", ended).get("cause") for ended in ends]
    assert causes == ["killed", "memory", None]


# --- starts that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_always_dies_at_its_start_is_spawned_five_times_in_twelve_seconds(
    draw, count
):
    """At most, by the default settings, wherever the twelve seconds begin; then the group fails."""
    script = Script(group(count=count), draw=lambda: draw)
    times = spawns_of_a_loop(script, 20.0)

    for begin in times:
        assert sum(begin <= at < begin + 12.0 for at in times) <= 5, times
    assert script.group().state == "failed"
    assert script.group().cause == "startup"


def test_one_tries_for_all_whose_start_fails():
    """Not each of them: the code is the same. When one proves itself, the others follow in a ramp."""
    script = Script(group(count=6, max_restarts=100))
    script.born(0, *(f"jobs-{n}" for n in range(1, 7)))
    for n in range(1, 7):
        script.at(0, ev.WorkerExited(f"jobs-{n}", code=1))
    began = next_due(script)
    assert spawned(script.tick(began)) == ["jobs-7"]
    assert script.ready(began + 1, "jobs-7")
    assert spawned(script.tick(began + 1.999)) == []
    assert spawned(script.tick(began + 2)) == ["jobs-8", "jobs-9"]
    script.ready(began + 2, "jobs-8", "jobs-9")
    assert spawned(script.tick(began + 3)) == ["jobs-10", "jobs-11", "jobs-12"]


# --- a dependency that is down ----------------------------------------------------------------------


def test_a_dependency_that_is_down_never_fails_a_group():
    """Not in an hour, with no failure allowed; one worker at a time tries, ever more seldom."""
    script = Script(group(count=3, max_restarts=0))
    times = spawns_of_a_loop(script, 3600.0, for_database=True)

    assert (script.group().state, script.group().failure) == ("waiting", "")
    pauses = [round(b - a, 3) for a, b in itertools.pairwise(times[3:])]
    assert pauses[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert set(pauses[6:]) == {27.0}
    assert brief(script.at(script.now, ev.StopRequested("SIGTERM")))[-1] == "Finish 0"


def test_a_group_that_waits_says_for_what_and_when_it_is_over():
    """Once each: which pool, with which error; and when all of it serves again."""
    script = Script(group(count=2))
    script.registered(0, "jobs-1", "jobs-2")
    actions = gave_up(script, 1, "jobs-1")
    assert fields_of("worker.exited", actions)["cause"] == "dependency"
    assert fields_of("group.waiting", actions) == {
        "group": "jobs",
        "pool": "main",
        "error": UNREACHABLE,
    }
    assert "group.waiting" not in brief(gave_up(script, 1, "jobs-2"))
    assert script.snapshot().state == "starting"

    assert spawned(script.tick(1.5)) == ["jobs-3"]
    assert "group.recovered" not in brief(script.ready(2, "jobs-3"))
    assert spawned(script.tick(3)) == ["jobs-4"]
    back = script.ready(4, "jobs-4")
    assert fields_of("group.recovered", back) == {
        "group": "jobs",
        "was": "waiting",
        "seconds": 3.0,
        "pool": "main",
    }
    assert script.snapshot().state == "ready"


def test_who_waits_patiently_makes_its_group_wait_too():
    """It has not ended, and says that its pool cannot connect; late for that, it is not to blame."""
    script = Script(group(max_restarts=0, ready_timeout=30.0))
    script.registered(0, "jobs-1")
    waiting = script.at(1, ev.WorkerUnreachable("jobs-1", "main", "refused"))
    assert brief(waiting) == ["group.waiting"]
    assert script.group().state == "waiting"

    script.tick(30)
    script.at(31, ev.WorkerAcknowledged("jobs-1"))
    ended = script.left(31, "jobs-1")
    assert fields_of("worker.exited", ended)["cause"] == "dependency"
    assert script.group().failure == ""


def test_who_finds_its_database_again_and_fails_has_failed():
    """The outage that is over is no excuse."""
    script = Script(group(max_restarts=0))
    script.registered(0, "jobs-1")
    script.at(1, ev.WorkerUnreachable("jobs-1", "main", "refused"))
    assert brief(script.at(2, ev.WorkerReachable("jobs-1", "main"))) == ["group.recovered"]
    script.at(3, ev.WorkerExited("jobs-1", code=1))

    assert (script.group().state, script.group().cause) == ("failed", "startup")


def test_all_groups_share_the_one_who_tries():
    """A hundred workers of two groups: one at a time until one proves that it helps."""
    script = Script(group("a", count=50), group("b", count=50))
    everybody = [f"{name}-{n}" for name in "ab" for n in range(1, 51)]
    script.registered(0, *everybody)
    gave_up(script, 0, *everybody)
    tried = []
    for _ in range(6):
        (probe,) = spawned(script.tick(next_due(script)))
        tried.append(probe[0])
        script.registered(script.now, probe)
        gave_up(script, script.now + 0.1, probe)
    assert tried == ["a"] * 6  # those of `b` have waited for as long, but stand behind

    (probe,) = spawned(script.tick(next_due(script)))
    script.ready(script.now, probe)
    waves, on_their_way = [], [probe]
    while on_their_way:
        script.now += 1.0
        on_their_way = spawned(script.tick(script.now))
        waves.append(len(on_their_way))
        script.ready(script.now, *on_their_way)
    assert waves == [2, 4, 8, 16, 32, 37, 0]


def test_to_be_ready_is_no_proof_while_its_pool_cannot_connect():
    """Who serves before it has looked at its database lets nobody follow it into the outage."""
    script = Script(group(count=2, max_restarts=0))
    script.registered(0, "jobs-1", "jobs-2")
    gave_up(script, 0, "jobs-1", "jobs-2")
    (probe,) = spawned(script.tick(next_due(script)))
    script.ready(1, probe)
    script.at(1.5, ev.WorkerUnreachable(probe, "main", "refused"))
    assert spawned(script.tick(20)) == []
    script.at(21, ev.WorkerReachable(probe, "main"))
    assert spawned(script.tick(21.9)) == []
    assert len(spawned(script.tick(22))) == 1


def test_those_who_die_together_count_once():
    """The server restarts under fifty workers: the first try comes after the shortest back-off."""
    script = Script(group(count=50))
    everybody = [f"jobs-{n}" for n in range(1, 51)]
    script.ready(0, *everybody)
    gave_up(script, 100, *everybody)

    assert next_due(script) == pytest.approx(100.5)


def test_never_is_taken_at_its_word():
    """A worker that is never to be restarted is not, whatever it has failed of."""
    script = Script(group(restart=Restart.NEVER))
    script.registered(0, "jobs-1")
    gave_up(script, 1, "jobs-1")

    assert (script.group().state, script.fleet.next_deadline()) == ("failed", None)


# --- groups that have failed are tried ----------------------------------------------------------------


def failed() -> Script:
    """Return a script in which a group of three has failed at time 0."""
    script = Script(group(count=3, max_restarts=0))
    script.ready(0, "jobs-1", "jobs-2", "jobs-3")
    script.crashed(0, "jobs-1", "jobs-2", "jobs-3")
    assert script.group().state == "failed"
    return script


def test_a_failed_group_is_tried_ever_more_seldom_for_ever():
    """One worker, after the longest back-off, then twice as long, ten minutes at most."""
    script = failed()
    pauses = []
    for number in range(8):
        died = script.now
        actions = script.tick(next_due(script))
        (probe,) = spawned(actions)
        pauses.append(round((script.now - died) / 0.9))
        assert fields_of("group.probing", actions)["probe"] == number + 1
        script.ready(script.now, probe)
        script.crashed(script.now, probe)

    assert pauses == [30, 60, 120, 240, 480, 600, 600, LONGEST_PAUSE]
    assert script.group().state == "failed"
    assert brief(script.at(script.now, ev.StopRequested("SIGTERM")))[-1] == "Finish 1"


def test_a_probe_that_serves_for_a_whole_window_takes_its_group_back():
    """Not sooner; the others follow in a ramp, and the supervisor ends with 0."""
    script = failed()
    (probe,) = spawned(script.tick(next_due(script)))
    script.ready(script.now, probe)
    proved = script.now + 60.0
    assert script.tick_just_before(proved) == []
    actions = script.tick(proved)
    assert fields_of("group.recovered", actions) == {
        "group": "jobs",
        "was": "failed",
        "seconds": proved,
    }
    assert len(spawned(actions)) == 1
    assert script.group().failure == ""
    stopped = script.at(script.now, ev.StopRequested("SIGTERM"))
    assert "supervisor.stopping" in brief(stopped)


def test_a_probe_that_has_done_what_it_was_for_takes_its_group_back():
    """`on-failure`: who ends well will not be ready for a window."""
    script = Script(group(count=2, restart=Restart.ON_FAILURE, max_restarts=0))
    script.ready(0, "jobs-1", "jobs-2")
    script.crashed(0, "jobs-1", "jobs-2")
    (probe,) = spawned(script.tick(next_due(script)))
    script.ready(script.now, probe)
    script.left(script.now, probe)

    assert "group.recovered" in brief(script.tick(script.now))
    assert script.group().failure == ""


def test_a_restart_takes_a_failed_group_back_at_once():
    """With all of its workers; nothing of the failure is left."""
    script = failed()
    assert len(spawned(script.at(1, ev.RestartRequested("jobs")))) == 3
    script.ready(1, "jobs-4", "jobs-5", "jobs-6")
    script.tick(2)
    assert (script.group().state, script.group().ready) == ("ready", 3)


def test_a_probe_of_a_reload_that_comes_meanwhile_is_forgotten():
    """The group has its other chance by the new code, and no second one at the same time."""
    script = failed()
    (probe,) = spawned(script.tick(next_due(script)))
    script.at(script.now, ev.RestartRequested("jobs"))
    script.ready(script.now, probe)
    assert script.group().failure == ""
    script.crashed(script.now, probe)
    assert script.group().state == "failed"


def test_a_stop_probes_nobody():
    """Neither later, nor at the same moment."""
    script = failed()
    script.at(1, ev.StopRequested("SIGTERM"))

    assert (script.tick(1000), script.fleet.next_deadline()) == ([], None)


# --- programs that go into the background ---------------------------------------------------------


def daemonized(script: Script, worker: str) -> list[ac.Action]:
    """Let its program fork, leave the child running, and end well."""
    script.ready(script.now, worker)
    left = ev.WorkerExited(worker, code=0, leftovers=("nginx (pid 7)",))
    return script.at(script.now + 0.1, ev.WorkerDrained(worker), left)


def test_a_program_that_goes_into_the_background_is_told_so_and_fails_its_group():
    """It would come up for ever and never stay; the reason names the remedy."""
    script = Script(replace(group("web"), is_program=True))
    worker, *_ = spawned(script.started)
    for _ in range(5):
        fields = fields_of("worker.exited", daemonized(script, worker))
        assert fields["reason"] == "went into the background"
        assert fields["cause"] == "crashed"
        assert "left running: nginx (pid 7)" in fields["error"]
        assert "let it run in the foreground, as with -F" in fields["error"]
        [worker] = spawned(script.tick(next_due(script)))
    failed = fields_of("group.failed", daemonized(script, worker))
    assert "it went into the background (left running: nginx (pid 7))" in failed["reason"]


@pytest.mark.parametrize("restart", [Restart.NEVER, Restart.ON_FAILURE])
def test_a_program_that_is_to_end_may_leave_something_behind(restart):
    """It has done what it was for; what it left is killed, and that is said."""
    script = Script(replace(group("web", restart=restart), is_program=True))
    fields = fields_of("worker.exited", daemonized(script, "web-1"))
    assert "it went into the background" in fields["error"]
    assert "cause" not in fields
    assert script.group("web").state != "failed"


@pytest.mark.parametrize("is_program", [True, False])
def test_who_is_told_to_end_or_is_no_program_goes_nowhere(is_program):
    """Python's workers may leave children behind, and whatever ends in a stop has been told to."""
    script = Script(replace(group("web"), is_program=is_program))
    if is_program:
        script.ready(0.0, "web-1")
        script.at(1.0, ev.StopRequested("stop"))
    fields = fields_of("worker.exited", daemonized(script, "web-1"))
    assert "error" not in fields
