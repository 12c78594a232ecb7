"""Where a connection was borrowed: kept as code and instruction, put into words only when shown.

A frame object would be cheaper to keep and would have every line, but it keeps the locals of the
borrower and of all its callers alive as long as the loan: a leak that leaks more. The nearest
frames tell who borrowed; where the borrower is *now* is looked up when somebody asks.
"""

from __future__ import annotations

__all__ = [
    "Stack",
    "capture",
    "capture_beyond",
    "describe",
    "is_under",
    "place",
    "thread_name",
    "where_is",
]

import contextlib
import sys
import weakref
from collections.abc import Iterator
from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import Any, TypeAlias

_ENTER = contextlib._GeneratorContextManager.__enter__.__code__  # noqa: SLF001 (it has no other name)

_getframe = sys._getframe  # noqa: SLF001 (it is documented)

# code, instruction, code, instruction, ...: the borrower first, flat because that is fastest.
Stack: TypeAlias = tuple[Any, ...]


def capture() -> Stack:
    """Keep the three frames outwards from who called our caller, or as many as there are.

    Written out, because it runs on every acquire: a loop takes twice as long.
    """
    a = _getframe(2)
    b = a.f_back
    if b is None:
        return (a.f_code, a.f_lasti)
    c = b.f_back
    if c is None:
        return (a.f_code, a.f_lasti, b.f_code, b.f_lasti)
    return (a.f_code, a.f_lasti, b.f_code, b.f_lasti, c.f_code, c.f_lasti)


def capture_beyond(package: str, frame: FrameType | None) -> Stack:
    """Keep the three frames outwards from *frame* that are next outside of this package."""
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith(f"{package}."):
        frame = frame.f_back
    stack: list[Any] = []
    while frame is not None and len(stack) < 6:  # noqa: PLR2004 (three pairs)
        stack += (frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return tuple(stack)


def describe(stack: Stack) -> str:
    """Print a captured stack as a traceback does: the most recent call last."""
    return _print((code, _line(code, instruction)) for code, instruction in _pairs(stack))


def place(stack: Stack) -> str:
    """Name the borrower of a captured stack: `handle (app/orders.py:41)`."""
    if not stack:
        return "an unknown place"
    code, instruction = stack[:2]
    return f"{code.co_qualname} ({code.co_filename}:{_line(code, instruction)})"


def where_is(ident: object) -> str:
    """Print the stack of a thread or a task as it is now; "" where it has ended."""
    if isinstance(ident, weakref.ref):
        task = ident()
        return "" if task is None else _print(reversed(list(_awaited(task.get_coro()))))
    frame = sys._current_frames().get(ident) if isinstance(ident, int) else None  # noqa: SLF001
    frames: list[tuple[CodeType, int]] = []
    while frame is not None:
        frames.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return _print(frames)


def _awaited(coroutine: Any) -> Iterator[tuple[CodeType, int]]:
    """Go from a coroutine to what it awaits, and so on: where a suspended task is."""
    while coroutine is not None:
        kind = next(
            (kind for kind in ("cr", "ag", "gi") if hasattr(coroutine, f"{kind}_frame")), ""
        )
        frame = getattr(coroutine, f"{kind}_frame", None)
        if frame is None:
            return
        yield frame.f_code, frame.f_lineno
        coroutine = getattr(coroutine, f"{kind}_{'yieldfrom' if kind == 'gi' else 'await'}")


def thread_name(ident: object) -> str:
    """Return the name of a thread or a task; its number, or none, where it has ended."""
    if isinstance(ident, weakref.ref):
        task = ident()
        return "a task (ended)" if task is None else str(task.get_name())
    import threading

    for thread in threading.enumerate():
        if thread.ident == ident:
            return thread.name
    return f"thread {ident} (ended)"


def is_under(stack: Stack, frame: FrameType | None) -> bool:
    """Whether the block that borrowed at *stack* is surely still open under *frame*.

    A `@contextmanager` is looked through, to the function whose block it is. A function that is
    on the stack at the very instruction of the borrowing is not in its block: it is borrowing once
    more. Where it is not sure, because whoever resumes a generator may end the loan, it is False.
    """
    pairs = list(_pairs(stack))
    if pairs[0][0].co_flags & CO_GENERATOR and len(pairs) > 2 and pairs[1][0] is _ENTER:  # noqa: PLR2004 (the third)
        code, instruction = pairs[2]
    else:
        code, instruction = pairs[0]
    while frame is not None:
        if frame.f_code is code and frame.f_lasti != instruction:
            return True
        frame = frame.f_back
    return False


def _pairs(stack: Stack) -> Iterator[tuple[CodeType, int]]:
    return zip(stack[::2], stack[1::2], strict=True)


def _line(code: CodeType, instruction: int) -> int:
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return line
    return code.co_firstlineno


def _print(frames: Any) -> str:
    import traceback

    summary = traceback.StackSummary.from_list(
        [(code.co_filename, line, code.co_qualname, None) for code, line in frames]
    )
    summary.reverse()
    return "".join(summary.format())
