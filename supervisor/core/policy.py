"""Restart policy as arithmetic: restart types, intensity, back-off. No clock, no randomness.

Restart types and intensity are those of OTP's supervisor (`permanent`, `transient`, `temporary`
are spelt "always", "on-failure", "never" as in systemd); the window is kept as the list of failure
times, as in `supervisor.erl`'s `add_restart/3`.
"""

from __future__ import annotations

__all__ = ["JITTER", "Intensity", "Restart", "RestartPolicy", "backoff_delay", "wants_restart"]

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

JITTER = 0.2  # ± share of a back-off, so that workers which died together do not return together
_MAX_DOUBLINGS = 64  # 2.0 ** 1024 does not exist; backoff_max has been reached long before


class Restart(Enum):
    """When a worker that ended by itself is replaced."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """One group's policy; durations in seconds."""

    restart: Restart = Restart.ALWAYS
    max_restarts: int = 5
    window: float = 60.0
    backoff: float = 0.1
    backoff_max: float = 30.0


def wants_restart(restart: Restart, *, failed: bool) -> bool:
    """Tell whether a worker that ended uninvited is replaced."""
    match restart:
        case Restart.ALWAYS:
            return True
        case Restart.ON_FAILURE:
            return failed
        case Restart.NEVER:
            return False
        case _:
            assert_never(restart)


def backoff_delay(
    policy: RestartPolicy, attempt: int, draw: Callable[[], float], first: float | None = None
) -> float:
    """Return the seconds before restart number `attempt` (0 is the first after a quiet window).

    Doubling from `first`, by default the policy's `backoff`; ± 20 %, never above `backoff_max`. There
    the jitter goes downwards only: cutting it off would let half of a fleet return at the same moment.
    `draw` gives uniform numbers from 0 to 1.
    """
    first = policy.backoff if first is None else first
    delay = min(first * 2.0 ** min(attempt, _MAX_DOUBLINGS), policy.backoff_max)
    shortest = delay * (1.0 - JITTER)
    longest = min(delay * (1.0 + JITTER), policy.backoff_max)
    return shortest + (longest - shortest) * draw()


@dataclass(slots=True)
class Intensity:
    """The failures of a group within its window."""

    times: list[float] = field(default_factory=list)  # oldest first; pruned at each failure

    def count_failure(self, policy: RestartPolicy, now: float, waited: float = 0.0) -> bool:
        """Count a failure at `now`; True when it is one more than the window allows.

        It was waited for so many seconds; the window does not go on in that time. Otherwise starts
        that fail slowly, at a `ready_timeout` of half the window, would be tried for ever.
        """
        self.times = [min(at + waited, now) for at in self.times]
        self.times = [at for at in self.times if now - at < policy.window]
        self.times.append(now)
        return len(self.times) > policy.max_restarts
