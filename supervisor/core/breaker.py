"""A group's circuit breaker: open when it has failed, half-open while one worker tries for it.

    CLOSED  -- more failures than its window allows -->  OPEN  -- the pause is over -->  HALF-OPEN
    HALF-OPEN  -- the probe ends before it has proved itself -->  OPEN, for twice as long
    HALF-OPEN  -- ready for a whole window, or done with what it was for -->  CLOSED
    any of them  -- `restart`, or a reload -->  CLOSED

The first pause is the policy's longest back-off. A failure that is not to be made good, of a worker
that is never restarted, is final: there is no probe.

Invariant: an open breaker that is not final has either a time for its next probe, or a probe.
"""

from __future__ import annotations

__all__ = ["LONGEST_PAUSE", "Breaker"]

from collections.abc import Callable

from supervisor.core.causes import Cause
from supervisor.core.policy import JITTER, RestartPolicy

# Seconds between two probes at most, where the policy's own longest back-off is not longer still:
# who has mended what was wrong, and does not say `restart`, does not wait for longer.
LONGEST_PAUSE = 600.0
_NEVER = float("inf")


class Breaker:
    """Whether a group has failed, and when it is tried again. Written by Group.

    Args:
        draw: uniform numbers from 0 to 1, for jitter.
    """

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw
        self.reset()

    def reset(self) -> None:
        """Close it."""
        self.reason = ""  # why the group has failed; empty: it has not
        self.cause = Cause.CRASHED  # of the last straw
        self.opened_at = 0.0
        self.probes = 0  # how many there were
        self.due: float | None = None  # when the next one is
        self.probe = ""  # the worker that tries
        self.proof_due = _NEVER  # when that one will have proved itself

    def open(
        self, reason: str, cause: Cause, rules: RestartPolicy, now: float, *, final: bool
    ) -> None:
        """Let the group have failed."""
        self.reset()
        self.reason = reason
        self.cause = cause
        self.opened_at = now
        if not final:
            self._put_off(rules, now)

    def start_probe(self, worker: str) -> None:
        """Let this worker try."""
        self.probe = worker
        self.probes += 1
        self.due = None

    def end_probe(self, rules: RestartPolicy, now: float) -> None:
        """Take note that it was not successful, or could not even begin."""
        self.probe = ""
        self.proof_due = _NEVER
        self._put_off(rules, now)

    def _put_off(self, rules: RestartPolicy, now: float) -> None:
        most = max(rules.backoff_max, LONGEST_PAUSE)
        pause = min(rules.backoff_max * 2.0 ** min(self.probes, 64), most)
        # Downwards only: groups that failed together are not probed together, and none too late.
        self.due = now + pause * (1.0 - JITTER * self._draw())
