"""Context: its laws, its callbacks and timers, and what races, forks, signals and leaks do to it."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from functools import partial
from itertools import permutations, product
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from workers import context as context_module
from workers.context import Cancelled, Context, DeadlineExceeded, _Listener, _Timers

ROUNDS = 300  # of a race; each is short
PATIENCE = 30.0  # seconds until a wait that must succeed has failed


@pytest.fixture(scope="session", autouse=True)
def _timer_thread():
    """Start the process's one timer thread before anybody counts threads: it stays for good."""
    with Context.background().with_timeout(60.0) as context:
        context.on_done(int)


@pytest.fixture
def ctx():
    """Give a context that nothing but the test ends."""
    with Context.background().with_cancel() as context:
        yield context


@pytest.fixture
def reports(monkeypatch):
    """Collect what goes to threading.excepthook."""
    collected: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: collected.append(args.exc_value))
    return collected


@pytest.fixture
def restless():
    """Have CPython switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def listeners(context: Context) -> int:
    """Count who is registered at a context: callbacks, waiters and children with such."""
    return len(context._table)


class Clock:
    """A clock that goes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0


class HandTimers(_Timers):
    """Timers without a thread: the test calls `turn`."""

    def _ring(self) -> None:
        pass


def root_with(clock: Clock) -> Context:
    """Make a tree of its own that goes by this clock, with timers turned by hand."""

    class FakedContext(Context):
        __slots__ = ()
        _now = staticmethod(lambda: clock.now)
        _timers = HandTimers()

    FakedContext._root = FakedContext(None, math.inf, None, None)
    return FakedContext.background()


# -- the laws


def test_background_never_ends():
    """The root is open, has no deadline and no values."""
    root = Context.background()

    assert (
        root.done,
        root.err,
        root.cause,
        root.deadline,
        root.remaining(),
    ) == (False, None, None, None, None)
    assert root.value("key") is None
    assert root is Context.background()
    root.check()


def test_background_cannot_be_cancelled():
    """Cancelling the root, by hand or by a block, is an error and not a quiet nothing."""
    with pytest.raises(RuntimeError, match="never ends"):
        Context.background().cancel()
    with pytest.raises(RuntimeError, match="never ends"), Context.background():
        pass


def test_cancel_ends_with_the_cause(ctx):
    """A cancelled context is done, and says why in every way that it can be asked."""
    assert ctx.cancel("stop") is True

    assert ctx.done
    assert ctx.cause == "stop"
    assert isinstance(ctx.err, Cancelled)
    assert ctx.err.cause == "stop"
    assert ctx.wait() is True
    assert ctx.remaining() == 0.0
    with pytest.raises(Cancelled, match=r"^cancelled 0\.\d{3} s ago: stop$"):
        ctx.check()


def test_first_cancel_wins(ctx):
    """A second cancel changes nothing and says so."""
    ctx.cancel("first")

    assert ctx.cancel("second") is False
    assert ctx.cause == "first"


def test_cancel_goes_down_and_not_up(ctx):
    """Children end with their parent and its cause; parent and siblings stay."""
    parent = ctx.with_cancel()
    child, sibling = parent.with_timeout(60.0), ctx.with_value("a", 1)

    assert parent.cancel("stop")

    assert isinstance(child.err, Cancelled)
    assert child.cause == "stop"
    assert child.cancel("late") is False
    assert not ctx.done
    assert not sibling.done


def test_child_made_after_the_end_has_ended(ctx):
    """Of an ended context only ended ones can be made, with its reason, whatever they ask for."""
    ctx.cancel("stop")

    for child in (
        ctx.with_cancel(),
        ctx.with_timeout(60.0),
        ctx.with_timeout(-60.0),
        ctx.with_deadline(0.0),
        ctx.with_value("a", 1),
    ):
        assert child.done
        assert child.cause == "stop"


def test_block_cancels_on_the_way_out(ctx):
    """A with block ends its context, with and without an exception, and swallows none."""
    with ctx.with_cancel() as child:
        assert not child.done
    assert child.done
    assert child.cause == "its with block was left"
    with pytest.raises(KeyError), ctx.with_timeout(60.0) as child:
        raise KeyError
    assert child.done


def test_block_keeps_an_earlier_end(ctx):
    """Leaving the block of a context that has ended changes nothing."""
    with ctx.with_cancel() as child:
        child.cancel("stop")

    assert child.cause == "stop"


@pytest.mark.parametrize("seconds", [0.0, -1.0, -math.inf])
def test_a_timeout_without_time_ends_at_once(ctx, seconds):
    """A time-out of zero or less has passed when it is made."""
    child = ctx.with_timeout(seconds)

    assert child.done
    assert isinstance(child.err, DeadlineExceeded)
    assert child.remaining() == 0.0
    assert child.cancel() is False
    with pytest.raises(TimeoutError):
        child.check()


def test_deadline_is_the_earliest_of_the_chain(ctx):
    """A child can shorten the deadline of its parent and not lengthen it."""
    soon = monotonic() + 50.0
    parent = ctx.with_deadline(soon)

    assert soon == parent.deadline
    assert soon == parent.with_timeout(1000.0).deadline
    assert soon == parent.with_deadline(math.inf).deadline
    assert soon == parent.with_cancel().with_value("a", 1).deadline
    assert soon - 10.0 == parent.with_deadline(soon - 10.0).deadline
    assert 40.0 < (parent.remaining() or 0.0) <= 50.0


def test_endless_deadline_is_none(ctx):
    """An infinite time-out is no deadline."""
    child = ctx.with_timeout(math.inf)

    assert child.deadline is None
    assert child.remaining() is None
    assert not child.done


@pytest.mark.parametrize("make", ["with_timeout", "with_deadline"])
def test_nan_is_refused(ctx, make):
    """NaN compares with nothing: as a deadline it would never pass, so it is an error."""
    with pytest.raises(ValueError, match="NaN"):
        getattr(ctx, make)(math.nan)


def test_value_is_the_nearest(ctx):
    """A value is looked up from here to the root, by equality, and None is what nobody set."""
    parent = ctx.with_value("a", 1).with_value("b", 2)
    child = parent.with_cancel().with_value("a", 3)

    assert (parent.value("a"), parent.value("b")) == (1, 2)
    assert (child.value("a"), child.value("b"), child.value("c")) == (3, 2, None)
    assert ctx.with_value(("tuple",), 4).value(("tuple",)) == 4
    assert ctx.with_value(["unhashable"], 5).value(["unhashable"]) == 5


def test_err_is_a_new_exception_each_time(ctx):
    """Raising it in one place leaves no traceback in what another place gets."""
    ctx.cancel("stop")

    with pytest.raises(Cancelled) as caught:
        ctx.check()

    assert caught.value.__traceback__ is not None
    assert ctx.err is not caught.value
    assert ctx.err.__traceback__ is None


def test_deadline_exceeded_says_which_when_and_where(ctx):
    """The message names the time-out, the function and line that set it, and how late it is."""
    child = ctx.with_timeout(-2.0)
    line = sys._getframe().f_lineno - 1
    grandchild = child.with_cancel()

    err = grandchild.err

    assert isinstance(err, DeadlineExceeded)
    assert child.deadline == err.deadline
    where = f"{test_deadline_exceeded_says_which_when_and_where.__name__} ({__file__}:{line})"
    assert f"timeout of -2 s set in {where}" == err.cause == grandchild.cause
    assert f"{err.cause} passed {err.ago:.3f} s ago" == str(err)
    assert err.ago is not None
    assert err.ago >= 2.0


def test_absolute_deadline_is_described_as_one(ctx):
    """A deadline that came from elsewhere is not called a time-out."""
    assert str(ctx.with_deadline(0.0).cause).startswith("deadline set in test_absolute_deadline")


@pytest.mark.parametrize(
    ("err", "text"),
    [
        (Cancelled(), "cancelled: no cause given"),
        (Cancelled("stop"), "cancelled: stop"),
        (Cancelled(0, ago=1.5), "cancelled 1.500 s ago: 0"),
        (Cancelled(KeyError("x")), "cancelled: KeyError: 'x'"),
        (DeadlineExceeded(), "deadline passed"),
        (DeadlineExceeded("time", deadline=7.0, ago=0.25), "time passed 0.250 s ago"),
    ],
)
def test_errors_speak_and_travel(err, text):
    """An error reads well, and arrives in another process as it was."""
    twin = pickle.loads(pickle.dumps(err))

    assert text == str(err) == str(twin)
    assert type(err) is type(twin)
    assert err.ago == twin.ago
    assert getattr(err, "deadline", None) == getattr(twin, "deadline", None)


def test_kinds_of_errors():
    """`except Exception` lets a stop through; `except TimeoutError` catches a deadline."""
    assert not issubclass(Cancelled, Exception)
    assert issubclass(DeadlineExceeded, TimeoutError)


def test_repr_tells_the_state(ctx):
    """The repr says whether it is open, how long still, or why not."""
    assert repr(Context.background()) == "<Context background>"
    assert repr(ctx) == "<Context open>"
    assert repr(ctx.with_timeout(60.0)).startswith("<Context open, ")
    ctx.cancel("stop")
    assert repr(ctx).startswith("<Context cancelled 0.0")


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_no_copies(ctx, copy_it):
    """A copy would be cut off from its parent, so there is none."""
    with pytest.raises(TypeError, match="belongs to its process"):
        copy_it(ctx)


def test_a_very_deep_tree_ends(ctx):
    """Depth is no matter of the interpreter's stack."""
    called: list[str] = []
    node = ctx
    for number in range(5000):
        node = node.with_value(number, number)
    stop = node.on_done(lambda: called.append("unwanted"))
    assert stop()
    node.on_done(lambda: called.append("told"))
    assert not node.done
    assert node.value(0) == 0

    ctx.cancel("stop")

    assert called == ["told"]
    assert node.cause == "stop"


# -- with a clock of the test's own


def test_the_earlier_end_wins_whenever_it_is_asked_for():
    """A child whose deadline came after its parent's cancel was cancelled, and the reverse."""
    clock = Clock()
    parent = root_with(clock).with_cancel()
    before, after = parent.with_timeout(4.0), parent.with_timeout(6.0)
    clock.now = 5.0
    parent.cancel("stop")

    clock.now = 100.0

    assert isinstance(before.err, DeadlineExceeded)
    assert before.err.ago == 96.0
    assert isinstance(after.err, Cancelled)
    assert after.err.ago == 95.0


def test_an_end_once_seen_stays():
    """What a child has answered does not change with what happens above it later."""
    clock = Clock()
    parent = root_with(clock).with_cancel()
    child = parent.with_timeout(4.0)
    clock.now = 4.0
    assert isinstance(child.err, DeadlineExceeded)

    parent.cancel("stop")

    assert isinstance(child.err, DeadlineExceeded)
    assert isinstance(parent.err, Cancelled)


class ModelNode:
    """What a context must be: ends are pushed down eagerly, in the order of their times."""

    def __init__(self, parent: ModelNode | None, deadline: float) -> None:
        self.parent = parent
        self.deadline = deadline
        self.children: list[ModelNode] = []
        self.end: tuple[str, object] | None = None
        self.active: set[int] = set()

    def subtree(self):
        """Yield this node and all below it."""
        yield self
        for child in self.children:
            yield from child.subtree()

    def finish(self, end: tuple[str, object]) -> None:
        """End all of the subtree that has not ended."""
        for node in self.subtree():
            if node.end is None:
                node.end = end


class ContextMachine(RuleBasedStateMachine):
    """Any operations on a tree, in any order, asked at any time: compared with the model."""

    nodes = Bundle("nodes")
    stops = Bundle("stops")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.root = root_with(self.clock)
        self.pairs: list[tuple[Context, ModelNode]] = []
        self.tops: list[ModelNode] = []
        self.called: Counter[int] = Counter()
        self.expected: set[int] = set()
        self.number = 0

    def _grow(self, context: Context, parent: ModelNode | None, deadline: float):
        inherited = math.inf if parent is None else parent.deadline
        node = ModelNode(parent, min(deadline, inherited))
        (self.tops if parent is None else parent.children).append(node)
        if parent is not None and parent.end is not None:
            node.end = parent.end
        elif deadline <= self.clock.now:
            node.end = ("deadline", deadline)
        pair = context, node
        self.pairs.append(pair)
        return pair

    @initialize(target=nodes)
    def start(self):
        """Begin with a child of the root."""
        return self._grow(self.root.with_cancel(), None, math.inf)

    @rule(target=nodes, parent=nodes, how=st.sampled_from(["cancel", "value"]))
    def child(self, parent, how):
        """Make a child without a deadline of its own."""
        context, node = parent
        made = context.with_cancel() if how == "cancel" else context.with_value("key", how)
        return self._grow(made, node, math.inf)

    @rule(target=nodes, parent=nodes, seconds=st.integers(-2, 12))
    def child_with_timeout(self, parent, seconds):
        """Make a child with a time-out."""
        context, node = parent
        return self._grow(context.with_timeout(seconds), node, self.clock.now + seconds)

    @rule(target=nodes, parent=nodes, deadline=st.integers(0, 30))
    def child_with_deadline(self, parent, deadline):
        """Make a child with an absolute deadline."""
        context, node = parent
        return self._grow(context.with_deadline(deadline), node, deadline)

    @rule(pair=nodes)
    def cancel(self, pair):
        """Cancel: true exactly when the node had not ended."""
        context, node = pair
        self.number += 1
        assert (node.end is None) == context.cancel(self.number)
        if node.end is None:
            node.finish(("cancel", self.number))
            for below in node.subtree():
                self.expected |= below.active
                below.active.clear()

    @rule(seconds=st.integers(1, 5))
    def advance(self, seconds):
        """Let time pass; nobody looks."""
        self.clock.now += seconds
        due = sorted(
            (node for _, node in self.pairs if node.deadline <= self.clock.now),
            key=lambda node: node.deadline,
        )
        for node in due:
            node.finish(("deadline", node.deadline))

    @rule(pair=nodes)
    def ask(self, pair):
        """Ask why: the answer is the first end, in time and not in the order of asking."""
        context, node = pair
        err = context.err
        match node.end:
            case None:
                assert err is None
                assert context.cause is None
            case ("cancel", cause):
                assert isinstance(err, Cancelled)
                assert cause == err.cause == context.cause
            case (_, deadline):
                assert isinstance(err, DeadlineExceeded)
                assert deadline == err.deadline

    @rule(target=stops, pair=nodes)
    def listen(self, pair):
        """Add a callback; too late, it has been called on return."""
        context, node = pair
        self.number += 1
        number = self.number
        stop = context.on_done(lambda: self.called.update([number]))
        if node.end is None:
            node.active.add(number)
        else:
            self.expected.add(number)
        return stop, node, number

    @rule(stopped=stops)
    def stop(self, stopped):
        """Stop: true exactly when the call has neither been made nor been prevented."""
        stop, node, number = stopped
        assert (number in node.active) == stop()
        node.active.discard(number)

    @rule()
    def turn(self):
        """Let the timer thread have its turn: it tells everybody whose context has ended."""
        upcoming = self.root._timers.turn(self.clock.now)
        for _, node in self.pairs:
            if node.end is not None:
                self.expected |= node.active
                node.active.clear()
        assert upcoming > self.clock.now

    @invariant()
    def done_is_right_at_once(self):
        """`done` needs neither a thread nor a look at `err` before."""
        for context, node in self.pairs:
            assert (node.end is not None) == context.done

    @invariant()
    def each_is_called_once(self):
        """Exactly those are called that had to be, each once."""
        assert dict.fromkeys(self.expected, 1) == self.called

    @invariant()
    def registered_is_who_listens(self):
        """Tables hold the active callbacks and the paths to them, and nothing else."""
        for context, node in self.pairs:
            below = [child for child in node.children if any(n.active for n in child.subtree())]
            assert len(node.active) + len(below) == listeners(context)

    @invariant()
    def timers_hold_only_the_living(self):
        """One timer for each active callback with a deadline; the dead are not the majority."""
        timers = self.root._timers
        living = sum(len(node.active) for _, node in self.pairs if node.deadline != math.inf)
        in_heap = [entry for entry in timers._heap if entry[2].node is not None]
        assert living == len(timers._inbox) + len(in_heap)
        assert len(timers._heap) - len(in_heap) == timers._dead


ContextMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_any_history = ContextMachine.TestCase


# -- interleaved by hand


class Turns:
    """Runs functions in threads of which one runs at a time, and switches where a schedule says.

    The schedule is a list of (function, number of steps). A step is a bytecode or a line of
    workers/context.py, in the functions named. So every race can be had, and had again.
    """

    def __init__(self, functions, schedule, unit="opcode", names=None) -> None:
        self.functions = functions
        self.schedule = iter(schedule)
        self.unit = unit
        self.names = names
        self.gates = [threading.Semaphore(0) for _ in functions]
        self.unfinished = set(range(len(functions)))
        self.taken = [0] * len(functions)
        self.left = 0
        self.raised: list[BaseException] = []

    def run(self) -> None:
        """Run all to their ends; raise what one of them raised."""
        threads = [threading.Thread(target=self._run, args=(me,)) for me in self.unfinished]
        for thread in threads:
            thread.start()
        self.gates[self._next()].release()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        if self.raised:
            raise self.raised[0]

    def _run(self, me: int) -> None:
        self.gates[me].acquire()
        sys.settrace(lambda frame, *_: self._enter(me, frame))
        try:
            self.functions[me]()
        except BaseException as exc:
            self.raised.append(exc)
        finally:
            sys.settrace(None)
        self.unfinished.discard(me)
        if self.unfinished:
            self.gates[self._next()].release()

    def _enter(self, me: int, frame):
        code = frame.f_code
        if code.co_filename != context_module.__file__:
            return None
        if self.names is not None and code.co_name not in self.names:
            return None
        frame.f_trace_opcodes = self.unit == "opcode"
        return lambda _frame, event, _arg: self._step(me, event)

    def _step(self, me: int, event: str) -> None:
        if event != self.unit:
            return
        self.taken[me] += 1
        self.left -= 1
        if self.left < 0 and (other := self._next(me)) != me:
            self.gates[other].release()
            self.gates[me].acquire()

    def _next(self, me: int | None = None) -> int:
        for turn, length in self.schedule:
            if turn in self.unfinished:
                self.left = length
                return int(turn)
        self.left = sys.maxsize  # the schedule is over: one after the other
        return me if me is not None else min(self.unfinished)


class Branch:
    """A branch of a tree on which threads operate; afterwards all must be as it should be."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.root = root_with(self.clock)
        top = self.root.with_cancel()
        middle = top.with_timeout(5.0)
        self.nodes = [top, middle, middle.with_cancel(), middle.with_timeout(3.0)]
        self.added: list[tuple[object, int]] = []
        self.called: list[object] = []
        self.stopped: list[object] = []
        self.won: list[int] = []
        self.causes: list[tuple[int, object]] = []

    def perform(self, key, operation: str, where: int) -> None:
        """Do one operation to one node."""
        node = self.nodes[where]
        match operation:
            case "cancel":
                if node.cancel(key):
                    self.won.append(where)
                self.causes.append((where, node.cause))
            case "turn":  # of the timer thread, which is one
                self.clock.now = 4.0
                self.root._timers.turn(4.0)
            case "listen" | "listen and stop":
                stop = node.on_done(lambda: self.called.append(key))
                self.added.append((key, where))
                if operation == "listen and stop" and stop():
                    self.stopped.append(key)

    def verify(self) -> None:
        """Check that nobody is lost, called twice or left registered, and that ends are one."""
        self.root._timers.turn(self.clock.now)
        for key, where in self.added:
            heard = self.called.count(key) + self.stopped.count(key)
            assert heard == (self.nodes[where].done or key in self.stopped)
        assert len(self.won) == len(set(self.won))
        for where, cause in self.causes:
            assert self.nodes[where].cause == cause
        told = {*self.called, *self.stopped}
        waiting = [where for key, where in self.added if key not in told]
        _top, middle, *leaves = self.nodes
        assert [listeners(node) for node in self.nodes] == [
            waiting.count(0) + bool(listeners(middle)),
            waiting.count(1) + sum(bool(listeners(leaf)) for leaf in leaves),
            waiting.count(2),
            waiting.count(3),
        ]


OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["listen", "listen and stop"]), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 2)),
)
PROGRAM = st.lists(OPERATIONS, min_size=1, max_size=3)
SCHEDULE = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=25)


@settings(max_examples=200, deadline=None)
@given(programs=st.tuples(PROGRAM, PROGRAM, PROGRAM), turn=st.booleans(), schedule=SCHEDULE)
def test_any_interleaving(programs, turn, schedule):
    """Three threads that do anything to one branch, interrupted at any bytecode, leave it whole."""
    branch = Branch()
    if turn:
        programs[0].append(("turn", 0))

    def work(me):
        for step, (operation, where) in enumerate(programs[me]):
            branch.perform((me, step), operation, where)

    Turns([partial(work, me) for me in range(3)], schedule).run()

    branch.verify()


DECIDES = {"_claim", "_link", "_listen", "_tell", "_unlink", "cancel", "stop"}
RIVALS = [
    ("listen", 2),
    ("listen", 3),
    ("listen and stop", 2),
    ("cancel", 2),
    ("cancel", 1),
    ("turn", 0),
]
PAIRS = [pair for pair in product(RIVALS, RIVALS) if pair != (("turn", 0), ("turn", 0))]


def interrupted(operations, schedule) -> list[int]:
    """Run operations as scheduled, by lines; check what they leave; return the steps of each."""
    branch = Branch()
    functions = [partial(branch.perform, me, *rest) for me, rest in enumerate(operations)]
    turns = Turns(functions, schedule, unit="line", names=DECIDES)
    turns.run()
    branch.verify()
    return turns.taken


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_two_interrupt_each_other_everywhere(first, second):
    """Of two operations the first is interrupted at each line, and the second at each as well."""
    lengths = interrupted([first, second], [])
    for i in range(lengths[0] + 1):
        for j in range(1, lengths[1] + 2):
            interrupted([first, second], [(0, i), (1, j), (0, sys.maxsize)])


def test_two_come_and_go_and_interrupt_each_other_twice():
    """Paths that two listeners make and take back at once are left by the last of them."""
    operations = [("listen and stop", 2), ("listen and stop", 2)]
    lengths = interrupted(operations, [])
    for i, j, k in product(range(lengths[0] + 1), range(lengths[1] + 1), (1, 2, 3)):
        interrupted(operations, [(0, i), (1, j), (0, k), (1, sys.maxsize)])


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("where", [0, 2])
def test_one_comes_and_one_goes_and_the_end_comes_between(order, where):
    """One listens, one stops, one cancels; two are interrupted at each line, in any order."""
    operations = [("listen", 2), ("listen and stop", 2), ("cancel", where)]
    lengths = interrupted(operations, [])
    a, b, c = order
    again = (0, 1) if operations[a][0] == "listen and stop" else (0,)  # he has looked once more
    for i, j, k in product(range(lengths[a] + 1), range(lengths[b] + 1), again):
        schedule = [(a, i), (b, j), (a, k), (c, sys.maxsize), (b, sys.maxsize)]
        interrupted(operations, schedule)


# -- waiting


def test_wait_returns_false_at_its_own_time(ctx):
    """A wait that runs out says False, and not before its time."""
    start = monotonic()

    assert ctx.wait(0.05) is False

    assert monotonic() - start >= 0.05
    assert listeners(ctx) == 0
    assert ctx.wait(0.0) is False
    assert ctx.wait(-1.0) is False


def test_wait_returns_at_the_deadline(ctx):
    """A wait without a time-out ends with the context's deadline, and not before."""
    child = ctx.with_timeout(0.05)

    assert child.wait() is True

    assert monotonic() >= child.deadline
    assert listeners(child) == 0


def test_wait_is_woken_by_a_cancel_above(ctx):
    """Every thread that waits anywhere below is woken, and nothing of them stays registered."""
    answers: list[bool] = []
    waiting = [ctx.with_cancel(), ctx.with_timeout(PATIENCE), ctx.with_value("a", 1)]
    threads = [
        threading.Thread(target=lambda c=context: answers.append(c.wait(PATIENCE)))
        for context in waiting
    ]
    for thread in threads:
        thread.start()
    until(lambda: listeners(ctx) == 3)

    ctx.cancel("stop")

    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [True] * 3
    assert 0 == listeners(ctx) == sum(map(listeners, waiting))


def until(condition) -> None:
    """Wait for a condition that must come true."""
    deadline = monotonic() + PATIENCE
    nobody = Context.background().with_cancel()
    while not condition():
        assert monotonic() < deadline, "it did not happen"
        nobody.wait(0.001)


# -- callbacks


def test_callbacks_run_once_in_order(ctx):
    """Callbacks run in the order in which they were added, those below after those above."""
    called: list[int] = []
    child = ctx.with_cancel()
    child.on_done(lambda: called.append(3))
    ctx.on_done(lambda: called.append(1))
    ctx.on_done(lambda: called.append(2))

    ctx.cancel()
    ctx.cancel()
    child.cancel()

    assert called == [1, 2, 3]


def test_callback_added_too_late_runs_at_once(ctx):
    """It has run when on_done returns, and there is nothing left to stop."""
    called: list[str] = []
    ctx.cancel()

    stop = ctx.on_done(lambda: called.append("late"))

    assert called == ["late"]
    assert stop() is False


def test_stop_prevents_once(ctx):
    """The first stop prevents the call; a second has nothing to prevent."""
    called: list[str] = []
    stop = ctx.on_done(lambda: called.append("unwanted"))

    assert stop() is True
    assert stop() is False
    ctx.cancel()
    assert called == []
    assert stop() is False


def test_a_callback_added_twice_is_two(ctx):
    """Each registration is its own, also of the same function."""
    called: list[int] = []

    def callback():
        called.append(1)

    first, _second = ctx.on_done(callback), ctx.on_done(callback)
    assert first() is True

    ctx.cancel()

    assert called == [1]


def test_background_calls_nobody_and_keeps_nobody():
    """A callback on the root can be stopped like any other, and a forgotten one is no leak."""

    def callback():
        raise AssertionError

    stop = Context.background().on_done(callback)
    assert stop() is True
    assert stop() is False
    forgotten = weakref.ref(callback)
    Context.background().on_done(callback)
    del callback, stop
    gc.collect()
    assert forgotten() is None
    assert listeners(Context.background()) == 0


def test_raising_callback_stops_nobody(ctx, reports):
    """What a callback raises is reported; canceller and other callbacks go on."""
    called: list[str] = []
    child = ctx.with_cancel()

    def faulty():
        called.append("faulty")
        raise KeyError("mine")

    def checks():
        ctx.check()

    ctx.on_done(faulty)
    ctx.on_done(checks)
    ctx.on_done(lambda: called.append("next"))
    child.on_done(lambda: called.append("below"))

    assert ctx.cancel("stop") is True

    assert called == ["faulty", "next", "below"]
    assert [KeyError, Cancelled] == [type(exc) for exc in reports]
    assert ctx.on_done(faulty)() is False
    assert len(reports) == 3


def test_raising_hook_stops_nobody(ctx, monkeypatch, capsys):
    """A hook that fails as well is reported on standard error, and the next callback is called."""

    def hook(args):
        raise ValueError("the hook's own")

    monkeypatch.setattr(threading, "excepthook", hook)
    called: list[str] = []
    ctx.on_done(partial(int, "not a number"))
    ctx.on_done(lambda: called.append("next"))

    ctx.cancel()

    assert called == ["next"]
    assert "the hook's own" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_comes_out_when_all_have_run(ctx, reports, kind):
    """A Ctrl-C that hits a callback is not swallowed, and takes no callback with it."""
    called: list[str] = []

    def interrupted():
        raise kind

    ctx.on_done(interrupted)
    ctx.on_done(lambda: called.append("next"))

    with pytest.raises(kind):
        ctx.cancel("stop")

    assert called == ["next"]
    assert reports == []
    assert ctx.cause == "stop"


def test_callbacks_may_use_the_tree(ctx):
    """A callback may cancel, add and stop callbacks, on its own context and on others."""
    called: list[str] = []
    other, child = Context.background().with_cancel(), ctx.with_cancel()

    def meddle():
        assert ctx.cancel("again") is False
        assert other.cancel("by callback") is True
        assert stop_next() is True
        ctx.on_done(lambda: called.append("added by callback"))
        child.on_done(lambda: called.append("added below"))

    ctx.on_done(meddle)
    stop_next = ctx.on_done(lambda: called.append("unwanted"))
    ctx.on_done(lambda: called.append("last"))
    other.on_done(lambda: called.append("other"))

    ctx.cancel()

    assert called == ["other", "added by callback", "added below", "last"]


def test_callback_without_deadline_is_called_by_the_canceller(ctx):
    """The thread that cancels makes the calls: they have been made when cancel returns."""
    threads: list[threading.Thread] = []
    ctx.on_done(lambda: threads.append(threading.current_thread()))

    ctx.cancel()

    assert [threading.current_thread()] == threads


# -- deadlines and their thread


def test_callbacks_run_at_their_deadlines_in_order(ctx):
    """At each deadline its callbacks are called, and not before it."""
    called: list[tuple[str, bool]] = []
    last = ctx.with_timeout(0.15)
    for name, seconds in (("b", 0.1), ("a", 0.05)):
        child = last.with_timeout(seconds)
        child.on_done(lambda name=name, child=child: called.append((name, child.done)))
    last.with_cancel().on_done(lambda: called.append(("c", last.done)))

    until(lambda: len(called) == 3)

    assert called == [("a", True), ("b", True), ("c", True)]
    assert monotonic() >= last.deadline
    assert 0 == listeners(ctx) == listeners(last)


def test_an_earlier_deadline_wakes_the_thread(ctx):
    """The thread does not oversleep a deadline that was armed while it slept for a later one."""
    called: list[str] = []
    ctx.with_timeout(PATIENCE * 2).on_done(lambda: called.append("late"))
    until(lambda: Context._timers._wakes_at > monotonic() + PATIENCE)

    ctx.with_timeout(0.01).on_done(lambda: called.append("soon"))

    until(lambda: called)
    assert called == ["soon"]


def test_a_callback_may_arm_the_next_deadline(ctx):
    """What a callback in the timer thread arms is not overslept, with nothing else to wake it."""
    called: list[int] = []

    def again():
        called.append(len(called))
        if len(called) < 5:
            ctx.with_timeout(0.005).on_done(again)

    ctx.with_timeout(0.005).on_done(again)

    until(lambda: len(called) == 5)


def test_a_callback_that_exits_does_not_end_the_thread(ctx, reports):
    """SystemExit and KeyboardInterrupt of one callback keep no other deadline from its call."""
    called: list[str] = []
    for kind in (SystemExit, KeyboardInterrupt, KeyError):
        child = ctx.with_timeout(0.01)

        def leave(kind=kind):
            raise kind

        child.on_done(leave)
        child.on_done(lambda: called.append("next"))

    until(lambda: len(called) == 3)
    until(lambda: len(reports) == 3)
    ctx.with_timeout(0.01).on_done(lambda: called.append("alive"))
    until(lambda: "alive" in called)
    assert {SystemExit, KeyboardInterrupt, KeyError} == {type(exc) for exc in reports}


def run_fresh(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_no_thread_until_a_callback_needs_one():
    """Deadlines alone start no thread and import no asyncio; the first callback starts one."""
    out = run_fresh(
        """
import sys, threading
from workers.context import Context
root = Context.background()
with root.with_timeout(0.02) as ctx:
    for _ in range(100):
        root.with_timeout(5).with_cancel()
    root.with_cancel().on_done(print)
    assert ctx.wait(10) and ctx.err and ctx.done
    ctx.on_done(lambda: print("called"))
print(threading.active_count(), "asyncio" in sys.modules)
far = root.with_timeout(3600)
stops = [far.with_timeout(1000 + n).on_done(print) for n in range(100)]
print([thread.name for thread in threading.enumerate()], all(t.daemon for t in threading.enumerate()[1:]))
"""
    )

    assert out == "called\n1 False\n['MainThread', 'context-deadlines'] True\n"


def test_far_deadlines_wake_nobody():
    """A thousand callbacks with far deadlines cost no wake-up: the thread is not scheduled."""
    out = run_fresh(
        """
import threading
from workers.context import Context
root = Context.background()
stops = [root.with_timeout(3600 + n).on_done(print) for n in range(1000)]
def switches():
    (thread,) = [t for t in threading.enumerate() if t.name == "context-deadlines"]
    with open(f"/proc/self/task/{thread.native_id}/status") as status:
        return [line for line in status if "ctxt_switches" in line]
nobody = root.with_cancel()
while (before := switches()) != (nobody.wait(0.1), switches())[1]:
    pass
for n in range(10000):
    with root.with_timeout(4000) as ctx:
        ctx.on_done(print)()
nobody.wait(0.3)
print(before == switches(), len(Context._timers._inbox) + len(Context._timers._heap))
"""
    )

    assert out == "True 1000\n"


def test_a_thread_that_cannot_start_is_told_to_the_caller():
    """When the timer thread cannot be had, on_done raises and registers nothing; later it may."""
    out = run_fresh(
        """
import threading
from workers.context import Context
parent = Context.background().with_cancel()
child = parent.with_timeout(0.01)
threading.stack_size(1 << 46)  # more than there is address space
try:
    child.on_done(print)
except RuntimeError as exc:
    print(exc, child._table, parent._table, child._timers._inbox)
threading.stack_size(0)
called = threading.Event()
Context.background().with_timeout(0.01).on_done(called.set)
print(called.wait(20))
"""
    )

    assert out == "can't start new thread {} {} {}\nTrue\n"


def test_there_is_one_thread_even_when_its_start_was_interrupted():
    """A start that a Ctrl-C interrupted is tried again: without a second thread or a lost call."""
    out = run_fresh(
        """
import threading
from workers.context import Context
root = Context.background()
stop = root.with_timeout(60).on_done(print)
root._timers._started.release()  # as after a KeyboardInterrupt, with the thread running
called = threading.Event()
root.with_timeout(0.01).on_done(called.set)
print(called.wait(20))
while threading.active_count() > 2:
    root.with_cancel().wait(0.001)
print([thread.name for thread in threading.enumerate()])
"""
    )

    assert out == "True\n['MainThread', 'context-deadlines']\n"


def test_stopped_timers_leave_nothing():
    """A hundred thousand contexts with a callback, made and cancelled: not one is remembered."""
    clock = Clock()
    root = root_with(clock)
    parent = root.with_timeout(1e6)
    timers = parent._timers
    parent.on_done(print)
    timers.turn(clock.now)

    for number in range(100_000):
        with parent.with_timeout(30.0) as child:
            child.on_done(int)
        if number % 1000 == 0:
            clock.now += 1.0

    assert (len(timers._heap), len(timers._inbox)) == (1, 0)
    assert listeners(parent) == 1


def test_equal_deadlines_are_told_in_order():
    """Of contexts that end at the same time those come first that were listened to first."""
    clock = Clock()
    root = root_with(clock)
    called: list[int] = []
    for number in range(20):
        root.with_deadline(5.0).on_done(partial(called.append, number))

    clock.now = 5.0
    root._timers.turn(clock.now)

    assert called == list(range(20))


def test_a_timer_that_has_fired_is_not_counted_as_dead():
    """Only what still lies in the heap is tidied up."""
    clock = Clock()
    root = root_with(clock)
    for seconds in range(1, 11):
        root.with_timeout(seconds).on_done(int)
    root._timers.turn(clock.now)

    clock.now = 2.0

    assert root._timers.turn(clock.now) == 3.0
    assert (root._timers._dead, len(root._timers._heap)) == (0, 8)


def test_the_dead_do_not_fill_the_heap():
    """Timers the thread has seen and that were stopped since are dropped long before their time."""
    rung: list[int] = []

    class Rung(HandTimers):
        def _ring(self):
            rung.append(1)

    timers = Rung()
    node = Context.background().with_cancel()
    made = [_Listener(node, print, 1e9 + number) for number in range(10_000)]
    for listener in made:
        timers.arm(listener)
    assert timers.turn(0.0) == 1e9
    timers._wakes_at = 1e9
    rung.clear()

    for listener in made[:9_000]:
        listener.node = None
        timers.disarm(listener)

    assert rung
    assert timers.turn(1.0) == 1e9 + 9_000
    assert len(timers._heap) == 1_000


# -- leaks


def test_a_dropped_context_goes_at_once(ctx):
    """Nothing holds a context that is dropped without a cancel: no parent, cycle or timer."""
    gc.disable()
    try:
        for make in (
            ctx.with_cancel,
            lambda: ctx.with_timeout(60.0),
            lambda: ctx.with_timeout(60.0).with_value("a", 1).with_cancel(),
        ):
            gone = weakref.ref(make())
            assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["stop", "cancel", "cancel above", "wait", "deadline"])
def test_a_context_goes_when_nobody_listens_any_more(ctx, how):
    """After the end, or once stopped, neither callback nor context is held by anybody."""
    parent = ctx.with_cancel()
    child = parent.with_timeout(0.02 if how == "deadline" else 60.0)
    called = threading.Event()

    class Callback:
        def __call__(self):
            called.set()

    callback = Callback()
    stop = child.on_done(callback)
    match how:
        case "stop":
            assert stop()
        case "cancel":
            child.cancel()
        case "cancel above":
            parent.cancel()
        case "wait":
            stop()
            assert child.wait(0.01) is False
        case "deadline":
            assert called.wait(PATIENCE)
    references = weakref.ref(child), weakref.ref(callback)

    del child, callback, Callback

    until(lambda: [reference() for reference in references] == [None, None])
    assert 0 == listeners(parent) == listeners(ctx)
    assert stop() is False


def test_who_listens_keeps_the_context(ctx):
    """A context that is dropped while somebody listens is kept, and its callback is called."""
    called: list[str] = []
    ctx.with_cancel().with_cancel().on_done(lambda: called.append("told"))
    gc.collect()

    ctx.cancel()

    assert called == ["told"]


def test_a_hundred_thousand_contexts_leave_no_memory(ctx):
    """Objects do not grow with contexts that were made, listened to and ended."""
    parent = ctx.with_timeout(3600.0)

    def churn(times):
        for _ in range(times):
            with parent.with_timeout(30.0) as child:
                child.on_done(int)
                child.with_cancel().on_done(int)()
            parent.with_timeout(30.0)
        gc.collect()
        return len(gc.get_objects())

    before = churn(100)

    after = churn(20_000)

    assert abs(after - before) < 100


# -- races


def race(*functions) -> None:
    """Run functions at once in threads of their own; what one raises fails the test."""
    barrier = threading.Barrier(len(functions))
    raised: list[BaseException] = []

    def run(function):
        barrier.wait(PATIENCE)
        try:
            function()
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def test_race_of_cancels(restless):
    """Of many cancels exactly one wins, and everybody sees its cause at any time after."""
    for _ in range(ROUNDS):
        parent = Context.background().with_cancel()
        child = parent.with_timeout(60.0)
        won: list[object] = []
        seen: list[object] = []

        def cancel(name, context, won=won, seen=seen, child=child):
            if context.cancel(name):
                won.append(name)
            seen.append(child.cause)

        race(*(partial(cancel, number, child) for number in range(4)))

        assert len(won) == 1
        assert won * 4 == seen


def test_race_of_parent_and_child(restless):
    """Cancelled from above and at once itself, a child has one cause, and it never changes."""
    for _ in range(ROUNDS):
        parent = Context.background().with_cancel()
        child = parent.with_cancel()
        seen: list[object] = []

        def look(child=child, seen=seen):
            while not child.done:
                pass
            seen.append(child.cause)

        race(lambda p=parent: p.cancel("parent"), lambda c=child: c.cancel("child"), look, look)

        seen.append(child.cause)
        assert len(set(seen)) == 1
        assert seen[0] in {"parent", "child"}
        assert parent.cause == "parent"


def test_race_of_deadline_and_cancel(restless):
    """At its deadline a context is either cancelled or exceeded, for everybody the same."""
    for _ in range(ROUNDS):
        context = Context.background().with_timeout(0.0005)
        kinds: list[type] = []
        calls: list[int] = []
        context.on_done(partial(calls.append, 1))

        def ask(context=context, kinds=kinds):
            context.wait(PATIENCE)
            kinds.append(type(context.err))

        def cancel(context=context, kinds=kinds):
            won = context.cancel()
            assert won == isinstance(context.err, Cancelled)
            kinds.append(type(context.err))

        race(ask, cancel, ask)

        assert len(set(kinds)) == 1
        until(partial(bool, calls))
        assert calls == [1]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_race_of_listeners_and_the_end(restless, depth):
    """Callbacks added and stopped while the context ends: each is called once or was stopped."""
    for number in range(ROUNDS):
        top = Context.background().with_cancel()
        node = top if number % 2 else top.with_timeout(60.0)
        for _ in range(depth):
            node = node.with_cancel()
        called: Counter[object] = Counter()
        stopped: Counter[object] = Counter()
        added: list[object] = []

        def work(name, node=node, called=called, stopped=stopped, added=added):
            for turn in range(6):
                key = name, turn
                stop = node.on_done(lambda key=key: called.update([key]))
                added.append(key)
                if turn % 3 and stop():
                    stopped[key] += 1

        race(lambda: work("a"), lambda: work("b"), lambda: work("c"), lambda t=top: t.cancel())

        assert Counter(added) == called + stopped
        path: Context | None = node
        while path is not None:
            assert listeners(path) == 0
            path = path._up


def test_race_of_stops(restless, ctx):
    """Of many stops and one end exactly one gets the callback."""
    for _ in range(ROUNDS):
        child = ctx.with_timeout(60.0)
        called: list[int] = []
        answers: list[bool] = []
        stop = child.on_done(lambda called=called: called.append(1))

        def stopping(stop=stop, answers=answers):
            answers.append(stop())

        race(stopping, stopping, lambda c=child: c.cancel())

        assert len(called) + sum(answers) == 1
    assert listeners(ctx) == 0


def test_race_of_waiters_and_listeners_that_go(restless, ctx):
    """Paths that come and go do not lose the one who stays: he is told in the end."""
    for _ in range(ROUNDS // 3):
        middle = ctx.with_cancel()
        leaf = middle.with_cancel()
        finished: list[bool] = []

        def come_and_go(leaf=leaf):
            for _ in range(20):
                leaf.on_done(int)()

        def stay(leaf=leaf, finished=finished):
            finished.append(leaf.wait(PATIENCE))

        def end(middle=middle):
            for _ in range(20):
                middle.on_done(int)()
            middle.cancel()

        race(come_and_go, stay, come_and_go, stay, end)

        assert finished == [True, True]
    assert listeners(ctx) == 0


def test_race_to_start_the_thread():
    """Many first callbacks at once start one thread, and all are called."""
    out = run_fresh(
        """
import sys, threading
from workers.context import Context
sys.setswitchinterval(1e-6)
called = []
done = threading.Semaphore(0)
def add(barrier):
    barrier.wait()
    for _ in range(50):
        Context.background().with_timeout(0.01).on_done(lambda: (called.append(1), done.release()))
barrier = threading.Barrier(8)
threads = [threading.Thread(target=add, args=(barrier,)) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for _ in range(400): assert done.acquire(timeout=20)
print(len(called), sum(t.name == "context-deadlines" for t in threading.enumerate()))
"""
    )

    assert out == "400 1\n"


# -- signals and forks


def test_signal_handlers_may_use_the_tree(ctx):
    """A handler that interrupts any step of the same context neither dead-locks nor corrupts."""
    rounds: Counter[str] = Counter(contexts=1)
    current = [ctx.with_cancel()]

    def handler(number, frame):
        context = current[0]
        context.with_cancel().on_done(int)()
        if context.cancel("signal"):  # handlers interrupt each other, even in `x[y] += f()`
            rounds["cancelled by handler"] += 1
        assert context.cause in {"signal", "main"}
        rounds["signals"] += 1

    before = signal.signal(signal.SIGUSR1, handler)
    main, over = threading.get_ident(), threading.Event()

    def bombard():
        while not over.is_set():
            signal.pthread_kill(main, signal.SIGUSR1)
            over.wait(0.0002)

    thread = threading.Thread(target=bombard)
    thread.start()
    try:
        current[0].cancel("main")
        rounds["cancelled by main"] += current[0].cause == "main"
        while rounds["signals"] < 300:
            current[0] = context = ctx.with_cancel()
            called: list[int] = []
            for _ in range(5):
                context.on_done(int)()
                context.on_done(lambda called=called: called.append(1))
            if context.cancel("main"):
                rounds["cancelled by main"] += 1
            assert called == [1] * 5
            rounds["contexts"] += 1
    finally:
        over.set()
        thread.join(PATIENCE)
        signal.signal(signal.SIGUSR1, before)
    assert rounds["contexts"] == rounds["cancelled by handler"] + rounds["cancelled by main"]
    assert rounds["cancelled by handler"]
    assert listeners(ctx) == 0


def in_child(function) -> int:
    """Fork; run a function in the child; return the child's exit code: 0 when it returned True."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = 0 if function() else 1
        finally:
            os._exit(code)
    deadline = monotonic() + PATIENCE
    nobody = Context.background().with_cancel()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        nobody.wait(0.002)


def test_a_forked_child_has_no_timer_and_may_start_its_own(ctx):
    """What the parent armed is not called in the child at a deadline; what the child arms is."""
    called: list[str] = []
    inherited = ctx.with_timeout(0.2)
    inherited.on_done(lambda: called.append("parent's"))

    def child():
        mine = threading.Event()
        ctx.with_timeout(0.01).on_done(mine.set)
        assert mine.wait(PATIENCE)
        assert inherited.wait(PATIENCE)
        ctx.with_timeout(0.01).on_done(lambda: called.append("child's"))
        until(lambda: "child's" in called)
        return called == ["child's"] and isinstance(inherited.err, DeadlineExceeded)

    assert in_child(child) == 0
    until(lambda: called == ["parent's"])


def test_a_forked_child_cancels_for_itself(ctx):
    """An end in the child runs the callbacks it inherited, there, and not in the parent."""
    called: list[str] = []
    inherited = ctx.with_timeout(60.0)
    inherited.on_done(lambda: called.append("told"))

    assert in_child(lambda: inherited.cancel("child") and called == ["told"]) == 0

    assert not inherited.done
    assert called == []


def test_fork_in_the_middle_of_everything(restless, ctx):
    """Forked at any moment of busy threads, the child holds no lock and can use every part."""
    over = threading.Event()
    shared = ctx.with_timeout(60.0)

    def busy():
        while not over.is_set():
            stop = shared.on_done(int)
            with shared.with_timeout(0.001) as child:
                child.on_done(int)
                child.wait(0.0001)
            stop()

    def child():
        told = threading.Event()
        mine = shared.with_timeout(0.005)
        mine.on_done(told.set)
        stop = shared.on_done(int)
        return stop() and told.wait(PATIENCE) and mine.wait() and shared.cancel("child")

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert [in_child(child) for _ in range(40)] == [0] * 40
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
    until(lambda: listeners(shared) == 0)  # the timer thread tells those past their deadline
