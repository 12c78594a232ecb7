"""What a forked child does with the pools it inherited: nothing, and that thoroughly."""

from __future__ import annotations

__all__ = ["keep", "register"]

import os
import weakref
from typing import Any, Protocol


class Inheritable(Protocol):
    """A pool."""

    def disinherit(self) -> None:
        """Give everything up; called in the child, where no other thread exists."""


_pools: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[Any] = []


def register(pool: Inheritable) -> None:
    """Have the pool disinherited in every child that is forked from now on."""
    _pools.add(pool)


def keep(conn: Any) -> None:
    """Never free it: not even a finaliser may say something to the parent's server."""
    _inherited.append(conn)


def _disinherit_all() -> None:
    for pool in list(_pools):
        pool.disinherit()


os.register_at_fork(after_in_child=_disinherit_all)
