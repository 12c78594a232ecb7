"""What a pool raises. A leaf: it imports nothing of ours but what a holder looks like.

No message ever holds a connect argument: a password has no way into an error.
"""

from __future__ import annotations

__all__ = [
    "ConnectError",
    "ForkedPoolError",
    "MissingDriverError",
    "PoolClosed",
    "PoolDeadlock",
    "PoolError",
    "PoolTimeout",
    "WrongPoolError",
]

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.pool.reports import Holder


class PoolError(Exception):
    """The common base of what a pool itself raises; a driver's own errors pass as they are."""


class PoolTimeout(PoolError, TimeoutError):  # noqa: N818 (the name is a promise of INTERFACE.md)
    """No connection within the acquire time-out. Says who has them, and why no more came.

    `pool` is its name; `waited` is in seconds; `place` is this caller's place in the queue when it gave up (1 is
    first); `holders` are the three longest loans, longest first; `last_dial_error` is the driver's
    error of the last failed dial since the last good one, also the `__cause__`.
    """

    pool: str = ""
    waited: float = 0.0
    place: int = 0
    waiting: int = 0
    max_open: int = 0
    open: int = 0
    idle: int = 0
    in_use: int = 0
    holders: tuple[Holder, ...] = ()
    last_dial_error: BaseException | None = None


class PoolDeadlock(PoolTimeout):
    """Every holder of a connection waits for this same pool: none of them could ever go on.

    Raised in the youngest of them at once, instead of in all of them after the time-out. The
    message has both of its stacks: where it got the connection it holds, where it wants another.
    """


class PoolClosed(PoolError):  # noqa: N818 (the name is a promise of INTERFACE.md)
    """The pool lends nothing any more. The message says who closed it and how long ago."""


class ForkedPoolError(PoolError):
    """The pool was made in another process: a fork's child has to make its own."""


class ConnectError(PoolError):
    """The server refused for a reason that waiting does not change. The cause is the driver's."""


class WrongPoolError(PoolError, ValueError):
    """What was given back is not lent by this pool, or was given back before."""


class MissingDriverError(PoolError, ImportError):
    """The driver for a URL is not installed. The message names the extra that brings it."""
