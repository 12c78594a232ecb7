"""Entry points: found by their names, and what kind of pools go with them. No application is needed.

An entry point that is awaited gets pools that are awaited, and one that blocks gets pools that block.
"""

from __future__ import annotations

__all__ = ["check", "is_async", "lacking", "resolve"]

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from workers.pool.errors import MissingDriverError


def resolve(run: str) -> Callable[..., Any]:
    """Return what `module:name` names.

    Raises:
        TypeError: it cannot be called.
        Exception: what its import raises.
    """
    module, _, name = run.partition(":")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    if not callable(target):
        raise TypeError(f"{run} is a {type(target).__name__}, not a function")
    return target  # type: ignore[no-any-return]


def is_async(entry: Callable[..., Any]) -> bool:
    """Whether a call of it has to be awaited: an `async def`, or an object that is called as one."""
    return inspect.iscoroutinefunction(entry) or inspect.iscoroutinefunction(type(entry).__call__)


def lacking(pool: str, url: str) -> str:
    """Return why a worker in asyncio cannot have this pool, and the remedy; "" where it can."""
    from workers.pool.drivers import aio, kind_of

    try:
        aio.module_of(url)
    except MissingDriverError as exc:
        return (
            f'pool "{pool}": {exc}; or set blocking = true in [pools.{pool}], and use it in threads'
        )
    except ValueError:
        kind = kind_of(url)
        return (
            f'pool "{pool}": there is no driver of {kind} for asyncio: set blocking = true in '
            f"[pools.{pool}], and use it in threads (asyncio.to_thread)"
        )
    return ""


def check(target: Callable[..., Any], interface: str | None, pools: Mapping[str, str]) -> str:
    """Return why an entry point cannot have these pools; "" where it can.

    Args:
        target: the entry point.
        interface: None for a `run`; of an application, what it is said to be, or "".
        pools: those that are not to block: the schemes of their URLs, by name.
    """
    if interface is None:
        awaits = is_async(target)
    else:
        from workers.web import interface_of

        awaits = (interface or interface_of(target)) == "asgi"
    faults = [lacking(name, f"{scheme}://") for name, scheme in pools.items()] if awaits else []
    return next((fault for fault in faults if fault), "")
