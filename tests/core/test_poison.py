"""A job that kills its workers: what a group that counts for itself what its jobs do is spared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.jobs import JobSeen
from tests.core.script import Script, fields_of, group, pid_of

JOB = JobSeen("job 7", 0.0)
BACK_OFF = 0.1


def jobs(count: int = 1, *, answers_for_jobs: bool = True):
    """Return a group whose workers answer for their jobs, with the default policy."""
    return replace(group("jobs", count), answers_for_jobs=answers_for_jobs)


def newest(actions: list[ac.Action]) -> str:
    """Return the only one who is to be spawned."""
    (worker,) = [action.worker for action in actions if isinstance(action, ac.Spawn)]
    return worker


def deaths(script: Script, count: int, **how) -> list[float]:
    """Let each worker serve and die this way; return how long each successor was waited for."""
    waits = []
    worker = newest(script.started)
    for _ in range(count):
        script.ready(script.now, worker)
        script.at(script.now + 0.01, ev.WorkerExited(worker, **how))
        if script.group().state == "failed":
            break
        due = script.fleet.next_deadline()
        assert due is not None
        waits.append(due - script.now)
        worker = newest(script.tick(due))
    return waits


@pytest.mark.parametrize("how", [{"signal": 11}, {"signal": 9}, {"code": 7}, {"code": 0}])
def test_deaths_with_a_job_in_flight_never_fail_the_group(how):
    """However many: each job is bounded by the table, so the rest goes on, after a short back-off."""
    script = Script(jobs())
    waits = deaths(script, 60, jobs=(JOB,), **how)
    assert len(waits) == 60
    assert max(waits) <= 8 * BACK_OFF + 1e-9
    assert script.group().state != "failed"


def test_deaths_without_a_job_fail_it_as_ever():
    """An idle worker that dies has its code to blame."""
    script = Script(jobs())
    assert len(deaths(script, 60, signal=11)) == 5
    assert script.group().state == "failed"


def test_who_does_not_answer_for_its_jobs_is_not_spared():
    """Nothing would bound a job that is taken again and again."""
    script = Script(jobs(answers_for_jobs=False))
    assert len(deaths(script, 60, signal=11, jobs=(JOB,))) == 5


def test_whose_code_raised_is_not_spared():
    """It has said what it died of, and that was no job."""
    script = Script(jobs())
    worker = newest(script.started)
    for _ in range(6):
        script.ready(script.now, worker)
        failed = ev.WorkerFailed(worker, "boom", "")
        script.at(script.now, failed, ev.WorkerExited(worker, code=1, jobs=(JOB,)))
        if script.group().state == "failed":
            return
        due = script.fleet.next_deadline()
        assert due is not None
        worker = newest(script.tick(due))
    pytest.fail("it has not failed")


def test_a_death_by_its_own_hand_is_told_to_its_group():
    """Others take its job back, and have to know that nobody from outside did it."""
    script = Script(jobs())
    script.ready(0.0, "jobs-1")
    actions = script.at(1.0, ev.WorkerExited("jobs-1", code=7, jobs=(JOB,)))
    [told] = [action for action in actions if isinstance(action, ac.TellDeath)]
    assert told == ac.TellDeath("jobs", "jobs-1", pid_of("jobs-1"), 7, None, by_itself=True)
    assert fields_of("worker.exited", actions)["in_flight"] == [{"name": "job 7", "seconds": 1.0}]


@pytest.mark.parametrize(
    "events",
    [
        [ev.WorkerExited("jobs-1", signal=9, jobs=(JOB,))],  # perhaps an operator
        [ev.WorkerExited("jobs-1", signal=15, jobs=(JOB,))],
        [ev.WorkerExited("jobs-1", signal=10, jobs=(JOB,))],
        [ev.WorkerFailed("jobs-1", "boom", ""), ev.WorkerExited("jobs-1", code=1, jobs=(JOB,))],
    ],
)
def test_what_may_have_come_from_outside_is_not_by_itself(events):
    """It must not count against a job; nor must the end of one that said what it died of."""
    script = Script(jobs())
    script.ready(0.0, "jobs-1")
    actions = script.at(1.0, *events)
    [told] = [action for action in actions if isinstance(action, ac.TellDeath)]
    assert not told.by_itself


def test_who_dies_idle_is_told_to_nobody():
    """It has left no job."""
    script = Script(jobs())
    script.ready(0.0, "jobs-1")
    actions = script.at(1.0, ev.WorkerExited("jobs-1", code=1))
    assert not [action for action in actions if isinstance(action, ac.TellDeath)]


def test_who_was_told_to_end_and_dies_did_not_do_it_by_itself():
    """In a stop, jobs that are abandoned end with their worker; that is not their doing."""
    script = Script(jobs())
    script.ready(0.0, "jobs-1")
    script.at(1.0, ev.RestartRequested("jobs-1"))
    script.ready(1.1, "jobs-2")
    script.tick(2.2)
    actions = script.at(3.0, ev.WorkerExited("jobs-1", code=1, jobs=(JOB,)))
    [told] = [action for action in actions if isinstance(action, ac.TellDeath)]
    assert not told.by_itself
