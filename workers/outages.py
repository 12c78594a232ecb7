"""Pools that cannot connect, as the supervisor is told of them: so that it waits, and blames nobody.

A pool itself retries for as long as somebody waits for a connection. The supervisor learns of it all
the same: while it lasts, by a message each time that it begins and ends; and when the worker
ends because of it, by the pool's name beside what was raised.
"""

from __future__ import annotations

__all__ = ["Outages"]

from collections.abc import Callable, Iterator, Mapping

from supervisor import log
from supervisor.protocol import Reachable, Unreachable
from workers.context import Cancelled, DeadlineExceeded
from workers.pool.shell import Shell

MAX_ERROR = 500  # characters of what a driver says
MAX_CHAIN = 100  # exceptions that are looked at: a chain may be as long as a recursion is deep


class Outages:
    """What one worker's pools cannot do at this moment.

    Args:
        pools: the worker's, also those that are opened later.
        send: sends a message, from any thread, without blocking.
    """

    def __init__(
        self, pools: Mapping[str, Shell], send: Callable[[Unreachable | Reachable], object]
    ) -> None:
        self._pools = pools
        self._send = send
        self._known: set[str] = set()

    def watch(self, name: str, pool: Shell) -> None:
        """Tell the supervisor when this pool cannot connect, and when it can again."""
        pool.on_outage = lambda error: self._changed(name, error)

    def behind(self, error: BaseException) -> str:
        """Return the name of the pool whose outage has led to this error, "" where none has."""
        for exc in _chain(error):
            for name, pool in list(self._pools.items()):
                if pool.is_outage(exc):
                    return name
            if isinstance(exc, Cancelled | DeadlineExceeded) and self._known:
                return min(self._known)
        return ""

    def blame(self, error: BaseException) -> None:
        """Say that the worker ends for want of a pool, where that is so and nothing else says it."""
        pool = self.behind(error)
        if pool and pool not in self._known:
            self._changed(
                pool, next(exc for exc in _chain(error) if self._pools[pool].is_outage(exc))
            )

    def _changed(self, pool: str, error: BaseException | None) -> None:
        if error is None:
            self._known.discard(pool)
            self._send(Reachable(pool))
        else:
            self._known.add(pool)
            words = log.redacted(" ".join(f"{type(error).__name__}: {error}".split()))
            if len(words) > MAX_ERROR:
                words = words[:MAX_ERROR] + " …"
            self._send(Unreachable(pool, words.encode(errors="backslashreplace").decode()))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, what it was raised from or during, and what its groups hold."""
    todo, seen = [error], set[int]()
    while todo and len(seen) < MAX_CHAIN:
        exc = todo.pop(0)
        if id(exc) in seen:
            continue
        seen.add(id(exc))
        yield exc
        if isinstance(exc, BaseExceptionGroup):
            todo += exc.exceptions
        if exc.__cause__ is not None:
            todo.append(exc.__cause__)
        elif exc.__context__ is not None and not exc.__suppress_context__:
            todo.append(exc.__context__)
