"""What a group is to be, as the core sees it. A value; it decides nothing."""

from __future__ import annotations

__all__ = ["GroupSpec"]

from dataclasses import dataclass, field

from supervisor.core.policy import RestartPolicy


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One group of equal workers; durations in seconds, 0 meaning off where that is possible."""

    name: str
    count: int
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    ready_timeout: float = 30.0
    exit_on_failed: bool = False
    surge: int = 1
    min_ready_time: float = 1.0
    max_age: float = 0.0
    max_rss: int = 0  # bytes
    hang_timeout: float = 0.0
    stop_signal: int = 15  # by which a worker that is told to end may do so: no failure
    is_program: bool = False  # its workers are parents of programs that know nothing of us
    # A job that ends its worker is counted by the workers themselves, and not tried for ever: such
    # ends are no failures of the group.
    answers_for_jobs: bool = False
    # It runs to its end, with success, before the others start, and that is what `ready_timeout` is
    # for; `count` is 1.
    before: bool = False
