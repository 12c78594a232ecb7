"""The short form of `python -m tests.fuzz.wire`."""

from __future__ import annotations

import itertools

from tests.fuzz.wire import ROUND, Fuzzer, fuzz
from tests.supervised import Supervised, group


def test_nearly_right_frames_do_nothing(tmp_path):
    """Two seconds of them on both sockets: all is as before, and the stop is an orderly one."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        supervised.ready()
        assert fuzz(supervised, seconds=2.0, seed=1) >= 2 * ROUND
        assert supervised.stop() == 0


def test_a_seed_makes_the_same_frames_again():
    """Or a failure could not be looked into."""
    first, again, other = (list(itertools.islice(Fuzzer(seed).frames(), 50)) for seed in (7, 7, 8))
    assert first == again
    assert first != other
