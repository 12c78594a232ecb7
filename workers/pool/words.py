"""The pool's errors and leaks, put into words."""

from __future__ import annotations

__all__ = ["Borrowed", "cannot_connect", "deadlock", "leak_of", "timed_out", "was_closed"]

from dataclasses import dataclass

from workers.pool.errors import ConnectError, PoolClosed, PoolDeadlock, PoolTimeout
from workers.pool.reports import Holder, Leak
from workers.pool.stacks import Stack, describe, place, thread_name, where_is
from workers.pool.stats import PoolStats

SHOWN = 3  # holders in an error: a hundred waiters that time out must not print a thousand stacks


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A loan as it was at one moment, before anybody put it into words."""

    connection: int
    held: float
    owner: object
    stack: Stack

    def holder(self) -> Holder:
        """Put it into words."""
        return Holder(
            connection=self.connection,
            held_seconds=self.held,
            thread=thread_name(self.owner),
            stack=describe(self.stack),
            now=where_is(self.owner),
        )


def leak_of(loan: Borrowed, outcome: str) -> Leak:
    """Describe a loan as a leak."""
    holder = loan.holder()
    return Leak(
        connection=holder.connection,
        held_seconds=holder.held_seconds,
        thread=holder.thread,
        stack=holder.stack,
        now=holder.now,
        outcome=outcome,
    )


def timed_out(
    pool: str,
    stats: PoolStats,
    loans: list[Borrowed],
    *,
    waited: float,
    position: int,
    asker: object,
    dial_error: BaseException | None,
    kind: type[PoolTimeout] = PoolTimeout,
) -> PoolTimeout:
    """Make the error that explains why there was no connection. *loans*: the longest first."""
    waiting = stats.waiting + 1  # the asker has left the queue already
    text = (
        f"no connection of pool {pool!r} within {waited:.3f} s: place {position} of {waiting} in "
        f"the queue; {stats.open} of {stats.max_open} open, {stats.idle} idle, "
        f"{stats.in_use} in use"
    )
    if loans:
        text += "; longest held: " + ", ".join(
            f"{loan.held:.3f} s by {thread_name(loan.owner)} in {place(loan.stack)}"
            for loan in loans[:SHOWN]
        )
    own = sum(1 for loan in loans if loan.owner == asker)
    if own:
        text += f"; {own} of them by this {_kind(asker)} itself"
    if dial_error is not None:
        text += f"; the last dial failed: {_of(dial_error)}"
    error = kind(text)
    error.pool = pool
    error.waited, error.place, error.waiting = waited, position, waiting
    error.max_open, error.open = stats.max_open, stats.open
    error.idle, error.in_use = stats.idle, stats.in_use
    error.holders = tuple(loan.holder() for loan in loans[:SHOWN])
    error.last_dial_error = error.__cause__ = dial_error
    return error


def deadlock(error: PoolTimeout, pool: str, held: list[Stack], wanted: Stack) -> PoolDeadlock:
    """Say of a PoolDeadlock which two acquires of its thread are its two ends."""
    assert isinstance(error, PoolDeadlock)
    text = (
        f"everybody who has a connection of pool {pool!r} waits for another one of it, so none "
        f"would ever come back; this one got its own here:\n"
        f"{''.join(describe(stack) for stack in held)}and wants another one here:\n"
        f"{describe(wanted)}"
    )
    error.args = (text,)
    return error


def was_closed(pool: str, by: str, ago: float, cause: object) -> PoolClosed:
    """Say who closed it, how long ago, and why, where that is known."""
    why = "" if cause is None else f" ({cause})"
    return PoolClosed(f"pool {pool!r} was closed by {by} {ago:.3f} s ago{why}")


def cannot_connect(pool: str, cause: BaseException) -> ConnectError:
    """Pass on what the driver said."""
    error = ConnectError(f"pool {pool!r} cannot connect: {_of(cause)}")
    error.__cause__ = cause
    return error


def _kind(owner: object) -> str:
    return "thread" if isinstance(owner, int) else "task"


def _of(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"
