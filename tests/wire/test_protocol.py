"""The wire: every message comes back as it was sent, and no bytes whatever do harm."""

from __future__ import annotations

import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from supervisor import protocol
from supervisor.errors import WireError

DIRECTIONS = {
    "ToTemplate": protocol.ToTemplate,
    "FromTemplate": protocol.FromTemplate,
    "ToWorker": protocol.ToWorker,
    "FromWorker": protocol.FromWorker,
    "ToClient": protocol.ToClient,
    "FromClient": protocol.FromClient,
}
MESSAGES = [
    (direction, message)
    for direction, union in DIRECTIONS.items()
    for message in typing.get_args(union)
]
decode: Any = protocol.decode  # a type checker has no type for "one of these classes"
PREFIX = protocol.encode(protocol.Ready())[:11]

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for whatever a field of that type may hold."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, types.UnionType}:
        return st.one_of(*map(values, inner))
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return st.tuples(*map(values, inner))
    if origin is tuple:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if origin is list:
        return st.lists(values(inner[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=3)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})
    simple: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(),
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        type(None): st.none(),
        Any: PLAIN,
        protocol.Count: st.integers(0, 2**53),
        protocol.Seconds: st.floats(0.0, 1e10),
    }
    return simple[kind]


def messages() -> st.SearchStrategy[protocol.Message]:
    """Return a strategy for any message of any direction."""
    return st.one_of(*(values(message) for _, message in MESSAGES))


@pytest.mark.parametrize(
    ("direction", "kind"), MESSAGES, ids=lambda it: getattr(it, "__name__", it)
)
def test_each_message_comes_back_as_it_was_sent(direction, kind):
    """Every field, whatever it holds; numbers as exactly as they were."""

    @given(values(kind))
    def there_and_back(message: protocol.Message) -> None:
        again = decode(protocol.encode(message), DIRECTIONS[direction])
        assert again == message
        assert type(again) is type(message)

    there_and_back()


@given(messages())
def test_a_message_of_another_direction_is_refused(message):
    """What a worker may say is nothing that a client may say: the tag decides."""
    for union in DIRECTIONS.values():
        if type(message) in typing.get_args(union):
            continue
        with pytest.raises(WireError):
            decode(protocol.encode(message), union)


@given(st.sampled_from(sorted(DIRECTIONS)), st.binary(max_size=200))
@example("FromWorker", b"")
@example("FromWorker", PREFIX)
@example("FromWorker", b"ackvisor/2 \x81\xa4type\xa5Ready")
@example("FromWorker", PREFIX + b"\x91" * 5000)  # nested deeper than any parser goes
@example("FromWorker", PREFIX + b"\x81\xa4type" * 5000)
@example("FromWorker", PREFIX + b"\xdd\xff\xff\xff\xff")  # an array of 4 billion, it says
@example("FromWorker", PREFIX + b"\xdb\xff\xff\xff\xff")
@example("FromWorker", PREFIX + b"\x81\xa4type\xa5Ready\x00")  # one byte too many
@example("FromWorker", PREFIX + b"\x81\xa4type\xa4\xff\xff\xff\xff")  # no UTF-8
@example("FromWorker", PREFIX + b"\x82\xa4type\xa5Ready\xa4more\x01")  # an unknown field
def test_random_bytes_raise_a_wire_error_and_nothing_else(direction, data):
    """Also where they begin as a message does."""
    for frame in (data, PREFIX + data):
        try:
            decode(frame, DIRECTIONS[direction])
        except WireError as exc:
            assert len(str(exc)) < 1000


@given(messages(), st.data())
def test_damaged_messages_raise_a_wire_error_or_are_messages(message, data):
    """Bytes changed, cut off and put in: a known message comes of it, or a WireError."""
    frame = bytearray(protocol.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame)))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change" if at < len(frame):
                frame[at] = data.draw(st.integers(0, 255))
            case "cut":
                del frame[at : at + data.draw(st.integers(1, 10))]
            case _:
                frame[at:at] = data.draw(st.binary(max_size=10))
    for union in DIRECTIONS.values():
        try:
            found = decode(bytes(frame), union)
        except WireError:
            continue
        assert type(found) in typing.get_args(union)


def test_what_is_too_large_is_not_even_parsed():
    """The limit counts the whole frame; a larger one can be asked for."""
    message = protocol.Failed(error="", traceback="x" * protocol.MAX_BYTES)
    frame = protocol.encode(message)
    with pytest.raises(WireError, match=f"of {len(frame)} bytes"):
        decode(frame, protocol.FromWorker)
    assert decode(frame, protocol.FromWorker, len(frame)) == message


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_worker_cannot_claim_impossible_times(seconds):
    """What is no duration would be no JSON in the log either."""
    leak = protocol.LeakFound("main", seconds, "t", "s")
    with pytest.raises(WireError):
        decode(protocol.encode(leak), protocol.FromWorker)


@pytest.mark.parametrize("count", [-1, 2**63])
def test_a_worker_cannot_claim_impossible_counts(count):
    """A negative one would be taken off a sum."""
    for claim in (
        protocol.Usage("main", 1, count, 1),
        protocol.Report(number=1, in_flight=count, jobs_done=0, jobs_failed=0, pools={}),
        protocol.Drained({"main": protocol.CloseReport(closed=count)}),
    ):
        with pytest.raises(WireError):
            decode(protocol.encode(claim), protocol.FromWorker)


def test_another_version_is_named():
    """Peers of different versions can be told apart from garbage."""
    frame = protocol.encode(protocol.Ready()).replace(b"/1 ", b"/2 ")
    with pytest.raises(WireError, match=r"version 1: .*ackvisor/2"):
        decode(frame, protocol.FromWorker)


def test_deadlines_cross_the_wire_unchanged():
    """An absolute time is the same number on both sides, to the last bit."""
    for deadline in (0.1 + 0.2, 123456789.123456789, float("inf")):
        sent = protocol.Cancel(deadline, deadline, "stop")
        again = decode(protocol.encode(sent), protocol.ToWorker)
        assert again.deadline.hex() == deadline.hex()
