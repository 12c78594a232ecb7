"""The pool's decisions in any order, under the named invariants of a pool. No thread, no clock."""

from __future__ import annotations

from math import inf

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.pool.settings import Settings
from workers.pool.state import (
    LOOK,
    Action,
    Check,
    Close,
    Cut,
    Dial,
    Failure,
    Overdue,
    PoolState,
    Request,
    Slot,
    SlotState,
    Wake,
)


class Connection:
    """A physical connection of the simulated server."""


class PoolMachine(RuleBasedStateMachine):
    """A shell that does what the core says, in any order and as badly as the world can."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.settings = Settings(
            max_open=3, max_connecting=2, max_lifetime=50.0, max_idle_time=20.0, keepalive=7.0
        )
        self.state = PoolState(self.settings)
        self.requests: list[Request] = []  # those that wait
        self.woken: dict[Request, int] = {}
        self.dialling: list[Slot] = []
        self.trying: list[tuple[Slot, Request | None]] = []
        self.held: dict[Slot, Request] = {}
        self.closing: list[Slot] = []
        self.physical: set[Slot] = set()
        self.ceiling = self.settings.max_open
        self.arrivals = 0

    # -- the shell

    def run(self, actions: list[Action]) -> None:
        """Carry out actions, and hold each of them against the invariants."""
        for action in actions:
            match action:
                case Wake(request):
                    self.woken[request] += 1
                    assert self.woken[request] == 1, "every waiter is woken exactly once"
                    assert request.done
                    self.requests.remove(request)
                    self.answer(request)
                case Dial(slot):
                    assert slot not in self.physical
                    assert not self.state.closing, "after close nothing is opened"
                    self.physical.add(slot)
                    self.dialling.append(slot)
                    assert len(self.dialling) <= self.settings.max_connecting
                    assert len(self.physical) <= self.settings.max_open, "never above max_open"
                case Close(slot):
                    assert slot in self.physical
                    assert slot not in self.held, "nobody's connection is closed under him"
                    assert slot not in self.closing, "closed once"
                    self.closing.append(slot)
                case Check(slot):
                    self.trying.append((slot, None))
                case Cut(slot):
                    assert slot.state in (SlotState.CHECKING, SlotState.RETURNING)
                case Overdue(slot, lent_at):
                    assert slot.state is SlotState.LENT
                    assert slot.lent_at == lent_at

    def answer(self, request: Request) -> None:
        """Take what a request has been answered with."""
        if request.failure is not None:
            assert request.slot is None
            if request.failure is Failure.CLOSED:
                assert self.state.closing
            return
        slot = request.slot
        assert slot is not None
        assert not self.state.closing, "after close nothing is lent"
        older = [other for other in self.requests if other.ticket < request.ticket]
        assert not older, "nobody overtakes"
        self.receive(slot, request)

    def receive(self, slot: Slot, request: Request) -> None:
        """Become the holder, or have to try it first."""
        assert slot not in self.held, "no connection with two holders"
        assert all(slot is not other for other, _ in self.trying), "no connection with two holders"
        assert isinstance(slot.conn, Connection)
        if slot.state is SlotState.CHECKING:
            self.trying.append((slot, request))
        else:
            assert slot.state is SlotState.LENT
            assert slot.generation >= self.state.floor, "a condemned connection is not lent"
            self.held[slot] = request

    def waits(self, request: Request) -> None:
        """Note a request that was not answered at once, or take its answer."""
        if request.done:
            self.answer(request)
        else:
            self.requests.append(request)
            self.requests.sort(key=lambda other: other.ticket)
            self.woken[request] = 0

    # -- what can happen

    @rule(bound=st.booleans(), leak_after=st.sampled_from([None, 0.0, 1.0]), nested=st.booleans())
    def acquire(self, bound: bool, leak_after: float | None, nested: bool) -> None:
        self.arrivals += 1
        request = Request(self.arrivals, (), self.now + 3, leak_after=leak_after, bound=bound)
        slot = None
        if leak_after is None:
            slot = self.state.take(self.now, request.owner, ())
        if slot is None:
            actions = self.state.ask(request, self.now)
        elif slot.state is SlotState.LENT:
            assert not self.state.closing, "after close nothing is lent"
            assert not self.requests, "nobody overtakes"
            assert slot.generation >= self.state.floor
            request.slot = slot
            self.held[slot] = request
            return
        else:
            actions = self.state.second_look(slot, request, self.now)
        if request.done:
            self.answer(request)
            self.run(actions)
            return
        self.requests.append(request)
        self.woken[request] = 0
        self.run(actions)
        if nested and self.held and not request.done:
            mine = [(slot, slot.lent_at) for slot in self.held][: 1 + self.arrivals % 3]
            self.run(self.state.keeps(request, mine, self.now))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), timed_out=st.booleans())
    def give_up(self, data: st.DataObject, timed_out: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        assert self.state.withdraw(request, self.now, timed_out=timed_out)
        assert not self.state.withdraw(request, self.now), "withdrawn once"
        self.requests.remove(request)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), dirty=st.booleans(), sound=st.booleans())
    def release(self, data: st.DataObject, dirty: bool, sound: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held, key=lambda slot: slot.number)))
        del self.held[slot]
        if not dirty:
            answer = self.state.give(slot, self.now)
            if answer is None:
                assert not self.requests, "an idle connection while somebody waits"
                return
            if answer is not LOOK:
                assert isinstance(answer, Request)
                self.run([Wake(answer)])
                return
        assert self.state.begin_return(slot, self.now, guarded=dirty)
        assert not self.state.begin_return(slot, self.now), "given back once"
        self.run(self.state.returned(slot, self.now, sound=sound))

    @precondition(lambda self: self.dialling)
    @rule(data=st.data(), draw=st.floats(0, 0.999))
    def dial_succeeds(self, data: st.DataObject, draw: float) -> None:
        slot = self.dialling.pop(data.draw(st.integers(0, len(self.dialling) - 1)))
        self.run(self.state.dialled(slot, Connection(), self.now, draw))
        if self.settings.max_lifetime:
            lifetime = slot.expires_at - self.now
            assert 39.99 < lifetime < 50.01

    @precondition(lambda self: self.dialling)
    @rule(data=st.data(), draw=st.floats(0, 0.999), final=st.booleans())
    def dial_fails(self, data: st.DataObject, draw: float, final: bool) -> None:
        slot = self.dialling.pop(data.draw(st.integers(0, len(self.dialling) - 1)))
        self.physical.discard(slot)
        first = self.requests[0] if self.requests else None
        self.run(self.state.dial_failed(slot, OSError(), self.now, draw, final=final))
        if final and first is not None:
            assert first.failure is Failure.DIAL, "the cause is delivered to the first in line"

    @precondition(lambda self: self.trying)
    @rule(data=st.data(), sound=st.booleans(), deaf=st.booleans())
    def check_ends(self, data: st.DataObject, sound: bool, deaf: bool) -> None:
        slot, request = self.trying.pop(data.draw(st.integers(0, len(self.trying) - 1)))
        actions = self.state.checked(slot, request, self.now, sound=sound, deaf=deaf)
        if request is not None:
            if not request.done:
                self.requests.append(request)
                self.requests.sort(key=lambda other: other.ticket)
                self.woken[request] = 0
            elif request.failure is None and request.slot is slot:
                assert slot.state is SlotState.LENT
                self.held[slot] = request
            else:
                self.answer(request)
        self.run(actions)

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def close_ends(self, data: st.DataObject) -> None:
        slot = self.closing.pop(data.draw(st.integers(0, len(self.closing) - 1)))
        self.physical.discard(slot)
        self.run(self.state.closed(slot, self.now))
        assert slot.state is SlotState.GONE

    @rule(seconds=st.sampled_from([0.001, 0.5, 2.0, 8.0, 21.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.run(self.state.tick(self.now))
        assert self.state.due > self.now, "no spinning"

    @rule()
    def tick_when_due(self) -> None:
        if self.state.due < inf:
            self.now = max(self.now, self.state.due)
            self.tick()

    @precondition(lambda self: not self.state.closing)
    @rule(max_open=st.integers(1, 5), max_idle=st.sampled_from([None, 0, 1]), low=st.booleans())
    def resize(self, max_open: int, max_idle: int | None, low: bool) -> None:
        self.settings = Settings(
            max_open=max_open,
            max_idle=max_idle,
            min=1 if low else 0,
            max_connecting=2,
            max_lifetime=50.0,
            max_idle_time=20.0,
            keepalive=7.0,
        )
        self.run(self.state.resize(self.settings, self.now))
        standing = len(self.physical) - len(self.closing)
        if standing > max_open:
            assert not self.state.idle, "the idle surplus is closed at once"

    @precondition(lambda self: not self.state.closing)
    @rule()
    def clear(self) -> None:
        self.run(self.state.clear())
        assert not self.state.idle

    @precondition(lambda self: self.arrivals > 10)
    @rule()
    def close(self) -> None:
        self.run(self.state.close())
        assert not self.requests, "whoever waits fails at once"

    # -- what must hold

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every slot is somewhere, and in one place only."""
        places = [
            *self.state.idle,
            *self.held,
            *self.dialling,
            *self.closing,
            *(slot for slot, _ in self.trying),
        ]
        assert len(places) == len(set(places))
        assert set(places) == self.state.slots == self.physical
        assert list(self.state.waiting) == self.requests

    @invariant()
    def nobody_waits_beside_an_idle_connection(self) -> None:
        assert not (self.state.idle and self.requests)

    @invariant()
    def after_close_nothing_is_lent(self) -> None:
        if self.state.closing:
            assert not self.state.idle
            assert not self.requests

    @invariant()
    def somebody_will_come(self) -> None:
        """Who waits has a connection out, a dial or a close under way, or a retry that is due."""
        if self.requests and not (self.held or self.dialling or self.closing or self.trying):
            assert self.state.due < inf, "a waiter that nobody will ever serve"

    @invariant()
    def the_figures_agree(self) -> None:
        stats = self.state.stats()
        assert stats.open == len(self.physical)
        assert stats.idle == len(self.state.idle)
        assert stats.in_use == len(self.held) + len(self.trying)
        assert stats.waiting == len(self.requests)

    @invariant()
    def loans_are_watched(self) -> None:
        """However a loan began, the keeper looks within its leak threshold."""
        for slot, request in self.held.items():
            threshold = 5.0 if request.leak_after is None else request.leak_after
            if threshold and not slot.leaked and not self.state.closing:
                assert self.state.due <= slot.lent_at + threshold

    def teardown(self) -> None:
        """Ends always: closed, given back and closed physically, nothing is left."""
        self.run(self.state.close())
        while self.dialling:
            self.run(self.state.dialled(self.dialling.pop(), Connection(), self.now, 0.5))
        while self.trying:
            slot, request = self.trying.pop()
            self.run(self.state.checked(slot, request, self.now, sound=True))
        for slot in list(self.held):
            del self.held[slot]
            assert self.state.begin_return(slot, self.now)
            self.run(self.state.returned(slot, self.now, sound=True))
        while self.closing:
            slot = self.closing.pop()
            self.physical.discard(slot)
            self.run(self.state.closed(slot, self.now))
        assert not self.state.slots
        assert not self.state.by_conn
        assert self.state.outstanding == 0
        self.state.tick(self.now)
        assert self.state.due == inf, "a closed pool has nothing to wait for"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # explaining takes minutes
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
