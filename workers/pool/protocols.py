"""What the pool expects of others, by its shape. A leaf."""

from __future__ import annotations

__all__ = ["ContextLike", "PoolLike", "Tracing"]

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


class PoolLike(Protocol):
    """What is told of a pool. Any thread."""

    @property
    def name(self) -> str:
        """What its users call it."""

    @property
    def system(self) -> str:
        """What kind of database it is for."""

    @property
    def is_local(self) -> bool:
        """Whether its database is a matter of this machine."""


class Tracing(Protocol):
    """What makes spans of what a pool tells: `workers.tracing` has it. It never raises."""

    def acquired(
        self,
        pool: PoolLike,
        ctx: ContextLike | None,
        since: float,
        error: BaseException | None,
        *,
        opened: bool = False,
    ) -> None:
        """An acquire that began then (monotonic) had to wait; *error*: and came to nothing.

        *opened*: what it got was opened meanwhile.
        """

    def cancelled(
        self, pool: PoolLike, ctx: ContextLike | None, since: float, times: int, *, cut: bool
    ) -> None:
        """A loan is over whose statement was cancelled, first then and so many times.

        *cut*: that did not help, and the connection was cut off.
        """
