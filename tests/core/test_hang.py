"""A worker whose job takes too long, and one that only looks like it: who is judged, and when."""

from __future__ import annotations

from dataclasses import replace

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.jobs import JobSeen, told
from supervisor.core.policy import Restart
from tests.core.script import Script, brief, cancels, fields_of, group

STOPPED = "it is stopped (SIGSTOP)"


def watched(hang_timeout: float = 60.0, **settings: float) -> Script:
    """Return a script in which jobs-1 serves at time 10, and its jobs may take so long."""
    script = Script(group(hang_timeout=hang_timeout), **settings)  # type: ignore[arg-type]
    script.ready(10, "jobs-1")
    return script


def seen(script: Script, now: float, *jobs: JobSeen, halted: str = "") -> list[ac.Action]:
    """Let time pass until a look is due, and let these jobs be seen."""
    assert brief(script.tick(now)) == ["Look jobs-1"]
    return script.at(now, ev.WorkerSeen("jobs-1", jobs, halted))


def test_without_a_hang_timeout_nobody_looks() -> None:
    """No timer, no look: an idle fleet sleeps for ever."""
    script = watched(0.0)

    assert script.fleet.next_deadline() is None
    assert script.tick(1e6) == []


def test_an_idle_worker_is_looked_at_once_in_each_hang_timeout() -> None:
    """Not before it, since nothing can be overdue sooner; and nothing is said."""
    script = watched()

    assert script.tick_just_before(70) == []
    assert seen(script, 70) == []
    assert script.fleet.next_deadline() == 130


def test_a_job_is_looked_at_again_when_it_would_be_overdue_and_not_before() -> None:
    """A look in between is no judgement."""
    script = watched()

    assert seen(script, 70, JobSeen("a", 69.0), JobSeen("b", 50.0)) == []
    assert script.fleet.next_deadline() == 110
    assert seen(script, 110, JobSeen("a", 69.0)) == []
    assert script.fleet.next_deadline() == 129


def test_an_overdue_job_is_told_with_its_stacks_and_then_the_worker_is_cancelled() -> None:
    """First the stacks, then `worker.hung`, then the way down with the usual grace."""
    script = watched()
    seen(script, 70, JobSeen("slow", 50.0))
    found = seen(script, 110, JobSeen("young", 100.0), JobSeen("slow", 50.0, thread=0xAB))
    assert brief(found) == ["TakeStacks jobs-1"]
    hung = script.at(110.1, ev.StacksTaken("jobs-1", "File app.py, line 3, in loop"))

    assert brief(hung) == ["worker.hung jobs-1", "worker.cancelled jobs-1", "SendCancel jobs-1"]
    assert fields_of("worker.hung", hung) == {
        "worker": "jobs-1",
        "group": "jobs",
        "pid": 1001,
        "generation": 1,
        "why": "it hung: its job 'slow' is in flight for 60 s, and 60 s are allowed",
        "jobs": [
            {"name": "slow", "seconds": 60.1, "thread": "0x00000000000000ab"},
            {"name": "young", "seconds": 10.1},
        ],
        "stacks": "File app.py, line 3, in loop",
    }
    (cancel,) = cancels(hung)
    assert (cancel.deadline, cancel.abort_at, cancel.cause) == (140.1, 135.1, "hang")


def test_stacks_that_do_not_come_hold_nobody_up() -> None:
    """After a moment it is told without them, and why; late ones change nothing."""
    script = watched()
    seen(script, 70, JobSeen("slow", 10.0))
    hung = script.tick(71.25)

    assert brief(hung)[:2] == ["worker.hung jobs-1", "worker.cancelled jobs-1"]
    assert fields_of("worker.hung", hung)["stacks_missing"] == "it wrote none in time"
    assert script.at(71.3, ev.StacksTaken("jobs-1", "late")) == []


def test_who_hangs_and_does_not_end_is_killed_for_it_and_replaced() -> None:
    """cancel, SIGTERM, stacks, SIGKILL: the reason, the ladder and the jobs are told; it failed."""
    script = watched()
    seen(script, 70, JobSeen("slow", 10.0))
    script.at(70, ev.StacksTaken("jobs-1", ""))
    assert brief(script.tick(71)) == ["Terminate jobs-1"]
    assert script.tick_just_before(100) == []
    assert brief(script.tick(100)) == ["TakeStacks jobs-1"]
    killed = script.at(100, ev.StacksTaken("jobs-1", "stacks", "", (JobSeen("slow", 10.0),)))
    exited = script.at(100.1, ev.WorkerExited("jobs-1", signal=9))

    told_of = fields_of("worker.killed", killed)
    assert told_of["why"] == (
        "it hung: its job 'slow' is in flight for 60 s, and 60 s are allowed; "
        "it did not acknowledge the cancel and did not end by its deadline: 30 s after hung"
    )
    assert [step for step, _ in told_of["ladder"]] == [
        "hung",
        "cancel",
        "SIGTERM",
        "stacks",
        "SIGKILL",
    ]
    assert told_of["jobs"] == [{"name": "slow", "seconds": 90.0}]
    assert fields_of("worker.exited", exited)["reason"].startswith("hung: its job 'slow'")
    due = script.fleet.next_deadline()
    assert due is not None
    assert brief(script.tick(due)) == ["Spawn jobs-2"]


def test_a_hang_is_a_failure_also_when_the_worker_then_ends_as_it_should() -> None:
    """With `on-failure` it is replaced; one failure more in its window."""
    script = Script(group(hang_timeout=60.0, restart=Restart.ON_FAILURE, max_restarts=0))
    script.ready(10, "jobs-1")
    seen(script, 70, JobSeen("slow", 10.0))
    script.at(70, ev.StacksTaken("jobs-1", ""), ev.WorkerAcknowledged("jobs-1"))

    assert "group.failed jobs-1" in brief(script.left(71, "jobs-1"))


def test_busy_until_puts_the_judgement_off_and_its_end_is_the_end() -> None:
    """It counts when it is later than the hang_timeout; past it the worker hangs."""
    script = watched()

    assert seen(script, 70, JobSeen("long", 15.0, 500.0)) == []
    assert script.fleet.next_deadline() == 130
    assert seen(script, 130, JobSeen("long", 15.0, 140.0)) == []
    assert script.fleet.next_deadline() == 140
    assert brief(seen(script, 140, JobSeen("long", 15.0, 140.0))) == ["TakeStacks jobs-1"]
    hung = script.at(140, ev.StacksTaken("jobs-1", ""))
    assert "for 125 s, and it was to be busy until 0 s ago" in fields_of("worker.hung", hung)["why"]


def test_busy_until_never_takes_away_what_every_job_has() -> None:
    """A short one changes nothing before the hang_timeout."""
    script = watched()
    seen(script, 70, JobSeen("job", 65.0, 66.0))

    assert script.fleet.next_deadline() == 125


def test_until_it_is_ready_the_ready_timeout_counts_alone() -> None:
    """A job that began in a long start has its whole time from `ready` on."""
    script = Script(group(hang_timeout=5.0, ready_timeout=100.0))
    script.registered(1, "jobs-1")

    assert script.tick(99) == []
    script.at(99, ev.WorkerReady("jobs-1"))
    assert script.fleet.next_deadline() == 104
    assert brief(seen(script, 104, JobSeen("warm up", 2.0))) == ["TakeStacks jobs-1"]


def test_who_is_stopped_is_told_once_and_not_judged() -> None:
    """However long it lasts."""
    script = watched()
    job = JobSeen("slow", 10.0)
    first = seen(script, 70, job, halted=STOPPED)

    assert fields_of("worker.stopped", first)["why"] == STOPPED
    assert fields_of("worker.stopped", first)["jobs"] == [{"name": "slow", "seconds": 60.0}]
    assert [seen(script, now, job, halted=STOPPED) for now in (130, 190)] == [[], []]


def test_who_is_continued_has_its_whole_time_again() -> None:
    """From when it is seen to run: it could do nothing before."""
    script = watched()
    job = JobSeen("slow", 10.0)
    seen(script, 70, job, halted=STOPPED)

    assert brief(seen(script, 130, job)) == ["worker.continued jobs-1"]
    assert brief(seen(script, 190, job)) == ["TakeStacks jobs-1"]


def test_at_a_stops_deadline_a_stopped_worker_is_killed_as_ever() -> None:
    """That it is stopped excuses it from hanging only."""
    script = watched()
    seen(script, 70, JobSeen("slow", 10.0), halted=STOPPED)
    script.at(100, ev.StopRequested("SIGTERM"))
    script.tick(101)

    assert brief(script.tick(130)) == ["TakeStacks jobs-1"]


def test_a_supervisor_that_stood_still_judges_nobody_and_lets_all_clocks_begin_anew() -> None:
    """Whoever was frozen with it had no chance; a second time within the same while it judges."""
    script = watched()
    job = JobSeen("slow", 60.0)

    assert script.tick(1000) == []  # 930 s late
    assert seen(script, 1001, job) == []
    assert script.fleet.next_deadline() == 1060
    assert script.tick(1062) == []  # late once more, and not again forgiven
    assert brief(seen(script, 1063, job)) == ["TakeStacks jobs-1"]


def test_a_stop_that_comes_before_the_stacks_tells_the_hang_all_the_same() -> None:
    """Then the cancel is that of the stop, and the worker is on its way down already."""
    script = watched()
    seen(script, 70, JobSeen("slow", 10.0))
    stopping = script.at(70.1, ev.StopRequested("SIGTERM"))

    assert brief(stopping) == [
        "supervisor.stopping",
        "worker.hung jobs-1",
        "worker.cancelled jobs-1",
        "SendCancel jobs-1",
    ]
    assert "before they had come" in fields_of("worker.hung", stopping)["stacks_missing"]


def test_a_hung_worker_whose_code_raises_in_that_moment_is_told_first() -> None:
    """Whatever a suspect does next, that it hung comes before it, and it is why it ends."""
    script = watched()
    seen(script, 70, JobSeen("slow", 10.0))
    failed = script.at(70.1, ev.WorkerFailed("jobs-1", "ValueError", "Traceback"))

    assert brief(failed) == ["worker.hung jobs-1", "worker.failed jobs-1"]
    exited = script.left(71, "jobs-1")
    assert fields_of("worker.exited", exited)["reason"].startswith("hung:")


def test_a_successor_that_hangs_turns_the_roll_back() -> None:
    """New code that hangs before it has proved itself is no better than code that raises."""
    spec = replace(group(hang_timeout=1.0), min_ready_time=5.0)
    script = Script(spec)
    script.ready(0, "jobs-1")
    script.at(0.5, ev.ReloadRequested(2, (spec,), 30.0, 5.0))
    script.ready(0.5, "jobs-2")
    script.tick(1.0)
    script.at(1.0, ev.WorkerSeen("jobs-1"))
    assert "Look jobs-2" in brief(script.tick(1.5))
    actions = script.at(1.5, ev.WorkerSeen("jobs-2", (JobSeen("slow", 0.5),)))
    actions += script.at(1.5, ev.StacksTaken("jobs-2", "File app.py"))

    assert "worker.hung jobs-2" in brief(actions)
    assert fields_of("worker.hung", actions)["stacks"] == "File app.py"
    assert "it hung: its job 'slow'" in str(
        fields_of("reload.rolled_back", script.left(2, "jobs-2"))
    )


def test_jobs_are_told_oldest_first_and_never_with_a_negative_age() -> None:
    """A clock that is read a moment too early is no reason to be strange."""
    jobs = [JobSeen("b", 5.0), JobSeen("a", 2.0, thread=16)]

    assert told(jobs, 4.0) == [
        {"name": "a", "seconds": 2.0, "thread": "0x0000000000000010"},
        {"name": "b", "seconds": 0.0},
    ]
