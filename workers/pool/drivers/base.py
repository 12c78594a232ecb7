"""What a pool needs to know about a driver, and what any DB-API connection can do of it.

A driver's methods hold no pool lock and may block, each as long as its docstring says. The ones
marked "any thread" are called while another thread is inside a call on the same connection.
"""

# The generic driver can do little, and needs few of its arguments:
# ruff: noqa: ARG002

from __future__ import annotations

__all__ = ["Driver"]

from collections.abc import Callable
from math import inf
from operator import methodcaller
from typing import Any

from workers.pool.protocols import ContextLike


class Driver:
    """The generic driver: a DB-API `connect` of which nothing else is known.

    It rolls back what comes back, and finds a broken connection by that. What it cannot do: end a
    running query, wake a thread that is blocked in the driver, close under one, or limit a dial.
    So a context that ends is noticed between two calls only, and a close leaves what is not given
    back to its borrower.
    """

    name = "generic"
    local = False
    """Opening is a matter of this machine: the asker does it himself, and needs no thread."""
    closes_at_once = False
    """`close` waits for nobody."""
    cancels = False
    """`cancel` ends a running statement."""
    cuts = False
    """`cut` makes a blocked call fail."""
    spares = False
    """`cancel` needs another connection: the pool sets `with_spare` and `dial`."""
    glance_after = inf
    """Seconds idle after which `is_quiet` is worth asking before it is lent."""

    tidy: Callable[[Any], object]
    """Falsy: the connection is as it was when it was new, and may be lent on. Truthy: `reset` it.

    Called on every return, so it must be quick. What it raises says that the connection is broken.
    The generic one rolls back right here, since it cannot know whether there is anything to.
    """

    with_spare: Callable[[Callable[[Any], object], float], bool]
    """Call a function with a connection of the pool that nobody has, an idle one or one that there
    is room for, within so many seconds. It raises what the function raises, and then closes that
    connection. False: there is none, nothing was done."""
    dial: Callable[[float], Any]
    """Open a connection that the pool does not know, within so many seconds: in the place of one
    that was cut, and only as long as that one's slot is taken."""

    def __init__(self) -> None:
        self.tidy = methodcaller("rollback")

    def adopt(self, conn: Any) -> None:
        """Look at a new connection, after `setup`: how it is now is how it is lent each time."""
        if not hasattr(conn, "rollback"):
            self.tidy = _nothing

    def reset(self, conn: Any) -> None:
        """Make it as new: no transaction, no setting of the borrower's. Raises where it cannot."""
        self.tidy(conn)

    def is_quiet(self, conn: Any) -> bool:
        """Whether nothing has come from the server, a good-bye for one. Local, and quick."""
        return True

    def check(self, conn: Any) -> None:
        """Make a round trip. Raises where there is no answer."""
        self.tidy(conn)

    def cancel(self, conn: Any, timeout: float) -> None:
        """End the statement that runs, if one does, within *timeout* seconds. Any thread.

        When it returns, no statement that is begun later can be hit by it. Raises where it could
        not tell the server.
        """

    def bind(self, conn: Any, ctx: ContextLike | None) -> None:
        """Tell it under which context it is lent from now on; None: that loan is over."""

    def is_busy(self, conn: Any) -> bool:
        """Whether a statement runs, as far as can be told. Any thread."""
        return True

    def cut(self, conn: Any) -> None:
        """Make whoever is blocked on the connection fail now; it is not used again. Any thread."""

    def close(self, conn: Any) -> None:
        """Close it. Nobody else uses it."""
        conn.close()

    def is_broken(self, conn: Any) -> bool:
        """Whether it is known to be of no more use, without asking the server."""
        return bool(getattr(conn, "closed", False))

    def is_error(self, exc: BaseException) -> bool:
        """Whether this is the driver's own error, rather than the borrower's."""
        return False

    def is_disconnect(self, exc: BaseException) -> bool:
        """Whether this error says that the connection is gone."""
        return False

    def is_final(self, exc: BaseException) -> bool:
        """Whether a dial that failed so fails the same way a second later."""
        kinds = {cls.__name__ for cls in type(exc).__mro__}
        return not (isinstance(exc, OSError) or kinds & {"OperationalError", "InterfaceError"})

    def is_momentary(self, exc: BaseException) -> bool:
        """Whether a dial that failed so says nothing of the server: it is done again, and not told."""
        return False

    def is_outage(self, exc: BaseException) -> bool:
        """Whether this error of the driver's says that the server is not there, for now."""
        return self.is_disconnect(exc) and not self.is_final(exc)

    def disown(self, conn: Any) -> None:
        """Make an inherited connection harmless in a fork's child, saying nothing to the server."""


def _nothing(conn: Any) -> None:
    """Be the tidy of a connection that has no transactions."""
