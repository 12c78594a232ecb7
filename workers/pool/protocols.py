"""What the pool expects of others, by its shape. A leaf."""

from __future__ import annotations

__all__ = ["ContextLike"]

from collections.abc import Callable
from typing import Protocol


class ContextLike(Protocol):
    """What a pool needs of a context: `workers.Context` has it."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    @property
    def err(self) -> BaseException | None:
        """Why it has ended."""

    @property
    def cause(self) -> object:
        """What was given to its cancel."""

    @property
    def deadline(self) -> float | None:
        """When it ends by itself, on the monotonic clock."""

    def on_done(self, callback: Callable[[], object], /) -> Callable[[], bool]:
        """Call back at its end; returns what prevents that."""
