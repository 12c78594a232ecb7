"""What the service manager is told, decided without a socket: a script of a fleet, and the words."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.standing import STOP_SLACK, Message, Standing
from tests.core.script import Script, group

PATIENCE = 20.0
MORE = f"EXTEND_TIMEOUT_USEC={int((PATIENCE + STOP_SLACK) * 1_000_000)}"


class Told(Script):
    """A fleet and what is said of it."""

    def __init__(self, *groups: Any, watchdog: float | None = None, **keys: Any) -> None:
        super().__init__(*groups, **keys)
        self.standing = Standing(watchdog)

    def at(self, now: float, *events: ev.Event) -> list[ac.Action]:
        done = super().at(now, *events)
        for action in done:
            if isinstance(action, ac.Announce):
                self.standing.note(action)
        return done

    def turn(self) -> Message:
        """Return what is said at the end of this turn."""
        fleet = self.fleet.snapshot(with_workers=False)
        return self.standing.told(fleet, PATIENCE, self.now)

    def reload(self, now: float, generation: int, *groups: Any) -> Message:
        """Ask for a reload that is carried out; return what is said before the file is read."""
        said = self.standing.reload_begins(now)
        self.at(now, ev.ReloadRequested(generation, groups, 30.0, 5.0))
        return said


def pair(**keys: Any) -> Any:
    return group(count=2, **keys)


def served() -> Told:
    """Return a fleet of two that is ready, and has said so."""
    told = Told(pair())
    told.turn()
    told.ready(1.0, "jobs-1", "jobs-2")
    told.turn()
    return told


def test_ready_is_said_once_when_every_group_is_complete():
    """Before that it is how far the start has come, and more time for each step of it."""
    told = Told(pair())

    assert told.turn() == ("STATUS=starting: 0 of 2 workers ready, generation 1", MORE)
    assert told.turn() == ()
    told.ready(1.0, "jobs-1")
    assert told.turn() == ("STATUS=starting: 1 of 2 workers ready, generation 1", MORE)
    told.ready(2.0, "jobs-2")
    assert told.turn() == ("READY=1", "STATUS=2 of 2 workers ready, generation 1")
    told.tick(3.0)
    assert told.turn() == ()


def test_a_migration_has_its_own_time():
    """The service manager is asked for what is left of it, and for a step beside."""
    migrate = replace(group("migrate", ready_timeout=600.0), before=True)
    told = Told(pair(), migrate)

    more = f"EXTEND_TIMEOUT_USEC={int((600 + PATIENCE + STOP_SLACK) * 1_000_000)}"
    assert told.turn()[-1] == more
    told.registered(10.0, "migrate-1")
    assert told.turn() == ()
    told.left(20.0, "migrate-1")
    told.ready(30.0, "jobs-1")
    assert told.turn()[-1] == MORE


def test_a_start_that_gets_nowhere_has_no_more_time():
    """A worker that serves and crashes again and again is no step forward after the first time."""
    told = Told(pair())
    told.turn()
    said: list[Message] = []
    for attempt, worker in enumerate(("jobs-1", "jobs-3", "jobs-4"), start=1):
        told.ready(5.0 * attempt, worker)
        said.append(told.turn())
        told.crashed(5.0 * attempt + 1, worker)
        said.append(told.turn())
        told.tick(5.0 * attempt + 4)  # its back-off has passed
        said.append(told.turn())

    assert [MORE in message for message in said] == [True] + [False] * 8


def test_a_crash_shows_in_the_status_and_is_no_new_ready():
    """READY=1 is for the start and for the end of a reload."""
    told = served()
    told.crashed(2.0, "jobs-1")
    assert told.turn() == ("STATUS=1 of 2 workers ready, generation 1",)
    told.tick(3.0)
    told.ready(3.1, "jobs-3")
    assert told.turn() == ("STATUS=2 of 2 workers ready, generation 1",)


def test_reloading_is_said_before_and_ready_after_a_roll():
    """With the time at which it was asked for, by the clock that systemd compares it with."""
    told = served()

    assert told.reload(7.25, 2, pair()) == (
        "RELOADING=1",
        "MONOTONIC_USEC=7250000",
        "STATUS=reading the configuration",
    )
    assert told.turn() == ("STATUS=rolling 0/2 to generation 2", MORE)
    told.ready(8.0, "jobs-3")
    told.tick(9.0)
    told.left(9.5, "jobs-1")
    assert told.turn() == ("STATUS=rolling 1/2 to generation 2", MORE)
    told.ready(10.0, "jobs-4")
    told.tick(11.0)
    told.left(11.5, "jobs-2")
    assert told.turn() == ("READY=1", "STATUS=2 of 2 workers ready, generation 2")


def test_a_reload_that_is_refused_is_over_in_the_same_turn():
    """READY=1, and the status says that the last reload was refused, until the next one."""
    told = served()
    told.standing.reload_begins(2.0)
    told.standing.note(ac.Announce("reload.rejected", {"reason": "line 1: password: x"}))

    assert told.turn() == (
        "READY=1",
        "STATUS=2 of 2 workers ready, generation 1; the last reload was refused, see the log",
    )
    told.reload(3.0, 2, pair())
    assert told.turn() == ("STATUS=rolling 0/2 to generation 2", MORE)


def test_a_reload_that_is_rolled_back_ends_with_ready():
    """The status names the worker, and repeats nothing that its code has said."""
    told = served()
    told.reload(2.0, 2, pair())
    told.registered(2.5, "jobs-3")
    told.at(3.0, ev.WorkerFailed("jobs-3", "RuntimeError: password", "password"))
    told.at(3.1, ev.WorkerExited("jobs-3", code=1))

    said = told.turn()

    verdict = "the last reload was rolled back (jobs-3 failed), see the log"
    assert said == (
        "READY=1",
        f"STATUS=2 of 2 workers ready, generation 1; {verdict}",
    )


def test_a_second_reload_during_a_roll_is_said_again():
    """systemd waits for a RELOADING=1 that is younger than its signal."""
    told = served()
    told.reload(2.0, 2, pair())
    told.turn()

    assert told.reload(3.0, 3, pair())[:2] == ("RELOADING=1", "MONOTONIC_USEC=3000000")
    assert "READY=1" not in told.turn()


def test_a_reload_before_the_first_ready_is_a_matter_of_status():
    """There is no service yet to be reloaded; READY=1 comes when it is complete."""
    told = Told(pair())
    told.turn()
    assert told.reload(1.0, 2, pair()) == ()
    said = told.turn()
    assert said == ("STATUS=rolling 0/2 to generation 2", MORE)


def test_stopping_is_said_once_with_the_time_that_it_takes():
    """After it the status counts down, and nothing else is ever said."""
    told = served()
    told.at(10.0, ev.StopRequested("SIGTERM"))

    assert told.turn() == (
        "STOPPING=1",
        "STATUS=draining: 2 of 2 outstanding, 30 s left",
        f"EXTEND_TIMEOUT_USEC={int((30 + STOP_SLACK) * 1_000_000)}",
    )
    assert told.standing.next_deadline() == 11.0
    told.tick(11.0)
    assert told.turn() == ("STATUS=draining: 2 of 2 outstanding, 29 s left",)
    told.at(11.5, ev.WorkerDrained("jobs-1"))
    assert told.turn() == ("STATUS=draining: 1 of 2 outstanding, 29 s left",)
    assert told.standing.reload_begins(12.0) == ()
    told.left(12.0, "jobs-1", "jobs-2")
    assert told.turn() == ("STATUS=stopped: 2 workers, 2 drained, 0 killed",)
    assert told.standing.next_deadline() is None


def test_a_stop_that_is_hurried_asks_for_no_more_time():
    """Time that was asked for once cannot be given back."""
    told = served()
    told.at(10.0, ev.StopRequested("SIGTERM"))
    told.turn()
    told.at(11.0, ev.StopNowRequested("SIGQUIT"))

    assert told.turn() == ("STATUS=draining: 2 of 2 outstanding, 1 s left",)


def test_a_group_that_has_failed_for_good_is_named():
    """And does not make the service anything but active."""
    told = Told(pair(max_restarts=0), group("web"))
    told.ready(1.0, "jobs-1", "jobs-2", "web-1")
    told.turn()
    told.crashed(2.0, "jobs-1")

    assert told.turn() == ("STATUS=2 of 3 workers ready, generation 1; failed for good: jobs",)


def test_a_sign_of_life_is_due_twice_in_the_interval():
    """And at once after more time was asked for, which puts the watchdog off as well."""
    told = Told(pair(), watchdog=10.0)

    assert told.standing.sign_of_life(0.0) == ("WATCHDOG=1",)
    assert told.standing.next_deadline() == 5.0
    assert told.standing.sign_of_life(4.9) == ()
    assert told.standing.sign_of_life(5.0) == ("WATCHDOG=1",)
    told.ready(6.0, "jobs-1")
    assert MORE in told.turn()
    assert told.standing.sign_of_life(6.0) == ("WATCHDOG=1",)
    assert told.standing.next_deadline() == 11.0


def test_without_a_watchdog_nothing_is_due_while_nothing_happens():
    """A fleet that serves does not wake the loop."""
    told = served()

    assert told.standing.sign_of_life(5.0) == ()
    assert told.standing.next_deadline() is None


_STEPS = st.lists(
    st.sampled_from(["serve", "crash", "reload", "refuse", "stop", "wait", "fail", "leave"]),
    max_size=30,
)


@given(_STEPS, st.lists(st.integers(0, 3), min_size=30, max_size=30))
def test_whatever_happens_the_words_keep_their_order(steps: list[str], picks: list[int]):
    """READY only while ready, RELOADING only after READY, nothing but STATUS after STOPPING."""
    told = Told(pair(max_restarts=3))
    said = [told.turn()]
    generation = 1
    for now, (step, pick) in enumerate(zip(steps, picks, strict=False), start=1):
        workers = told.snapshot().workers
        worker = workers[pick % len(workers)].id if workers else "jobs-1"
        match step:
            case "serve":
                told.ready(now, worker)
            case "crash":
                told.crashed(now, worker)
            case "leave":
                told.left(now, worker)
            case "fail":
                told.born(now, worker)
                told.at(now, ev.WorkerFailed(worker, "no", "no"))
            case "stop":
                told.at(now, ev.StopRequested("SIGTERM"))
            case "reload" if told.fleet.phase.shown != "stopping":
                generation += 1
                said.append(told.reload(now, generation, pair(max_restarts=3)))
            case "refuse" if told.fleet.phase.shown != "stopping":
                said.append(told.standing.reload_begins(now))
                told.standing.note(ac.Announce("reload.rejected", {}))
            case _:
                told.tick(now + 0.5)
                told.now = now
        said.append(told.turn())
        assert told.turn() == ()  # the same again is not said again
        if "READY=1" in said[-1]:
            assert told.fleet.phase.shown == "ready"

    words = [
        line.partition("=")[0]
        for message in said
        for line in message
        if line.startswith(("READY", "RELOADING", "STOPPING"))
    ]
    assert words.count("STOPPING") <= 1
    assert "STOPPING" not in words[:-1]
    if words and words != ["STOPPING"]:
        assert words[0] == "READY"
    assert ("READY", "READY") not in set(pairwise(words))
    statuses = [line for message in said for line in message if line.startswith("STATUS=")]
    assert all(len(line) < 300 and line.isprintable() for line in statuses)
