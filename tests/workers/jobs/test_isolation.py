"""Who runs beside whom: suspects alone, and room for them where others never end."""

from __future__ import annotations

import threading

from workers.context import Context
from workers.jobs.isolation import LOOK_EVERY, MAKE_ROOM_EVERY, MAKE_ROOM_FOR, Isolation
from workers.jobs.table import Claim


def claim(number, losses=0):
    """Return a claim of a job that so many attempts were lost with."""
    return Claim(number, "x", 1, 0, "jobs-1", losses)


def isolation():
    """Return one whose worker goes on for ever."""
    return Isolation(Context.background().with_cancel())


def test_nobody_begins_beside_a_suspect():
    """Whoever would ask for work waits until it is over."""
    one = isolation()
    assert one.is_alone
    suspect = claim(1, losses=1)
    one.begin(suspect)
    waiting = threading.Thread(target=one.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    one.end(suspect)
    waiting.join(20.0)
    assert not waiting.is_alive()
    one.wait()


def test_nobody_waits_in_a_stop():
    """When no new work may be taken, there is nothing to wait for."""
    accepting = Context.background().with_cancel()
    one = Isolation(accepting)
    one.begin(claim(1, losses=1))
    accepting.cancel("stop")
    one.wait()


def test_room_is_made_now_and_then_while_a_suspect_is_first():
    """A worker that is never idle stops beginning others, for a while, and not again too soon."""
    one = isolation()
    looks = []

    def first(answer):
        def look():
            looks.append(answer)
            return answer

        return look

    assert not one.makes_room(first(True), 100.0), "it is alone: the suspect can begin at once"
    one.begin(claim(1))
    assert not one.makes_room(first(False), 100.0)
    assert not one.makes_room(first(True), 100.0 + LOOK_EVERY / 2), "it does not look each time"
    assert one.makes_room(first(True), 100.0 + LOOK_EVERY)
    until = 100.0 + LOOK_EVERY + MAKE_ROOM_FOR
    assert one.makes_room(first(True), until - 0.01)
    assert not one.makes_room(first(True), until), "what is in flight takes too long"
    assert not one.makes_room(first(True), until + MAKE_ROOM_EVERY - 0.01)
    assert one.makes_room(first(True), until + MAKE_ROOM_EVERY)
    one.end(claim(1))
    assert not one.makes_room(first(True), until + MAKE_ROOM_EVERY + 0.01), "now it is alone"
    assert looks == [False, True, True]
