"""What a worker knows of its own state, for whoever examines it: jobs, loans, tasks, threads.

It runs in a thread of its own, made for it: a lock that somebody holds for ever costs this answer,
and not the link. Nothing that is told holds a secret: source lines are shown where stacks are, and
a URL in one of them loses its password.
"""

from __future__ import annotations

__all__ = ["examine", "without_secrets"]

import faulthandler
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from supervisor.protocol import Examined, JobInFlight, Loan, Task
from workers.pool.shell import Shell
from workers.pool.stacks import where_is
from workers.worker import Ledger

MAX_PARTS = 100  # of each kind: what is more would not fit into a message, and is counted
MAX_THREADS, MAX_NAME = 1_000, 100
MAX_STACKS = 200_000
MAX_STACK = 2_000  # characters; its end is kept, where the innermost frames are
_LOGIN = re.compile(r"(://[^\s:/@]*):[^\s@]*@")
_FIELD = re.compile(r"(?i)(pass\w*|pwd|secret|token)(=)[^&\s'\",)]+")


def without_secrets(text: str) -> str:
    """Return a text in which no URL has a password."""
    return _FIELD.sub(r"\1\2***", _LOGIN.sub(r"\1:***@", text))


def examine(number: int, jobs: Ledger, pools: Mapping[str, Shell]) -> Examined:
    """Return what is in hand. A part that cannot be had is missing, and it says why."""
    missing: dict[str, str] = {}

    def part(name: str, found: Callable[[], Iterator[Any]]) -> tuple[Any, ...]:
        try:
            everything = list(found())
        except Exception as exc:
            missing[name] = f"{type(exc).__name__}: {without_secrets(str(exc))}"
            return ()
        if len(everything) > MAX_PARTS:
            missing[name] = f"{len(everything) - MAX_PARTS} more are not shown"
        return tuple(everything[:MAX_PARTS])

    return Examined(
        number=number,
        stacks="".join(part("stacks", lambda: iter([_stacks()]))),
        jobs=part("jobs", lambda: _jobs(jobs)),
        loans=part("loans", lambda: _loans(pools)),
        tasks=part("tasks", _tasks),
        threads={
            thread.ident or 0: _sendable(thread.name)[:MAX_NAME]
            for thread in threading.enumerate()[:MAX_THREADS]
        },
        missing=missing,
    )


def _stacks() -> str:
    """Return the stacks of all other threads. None of them runs: the caller holds the lock."""
    sink = os.memfd_create("stacks", os.MFD_CLOEXEC)
    try:
        faulthandler.dump_traceback(sink, all_threads=True)
        text = os.pread(sink, MAX_STACKS, 0).decode(errors="replace")
    finally:
        os.close(sink)
    return "\n\n".join(each for each in text.split("\n\n") if not each.startswith("Current thread"))


def _jobs(ledger: Ledger) -> Iterator[JobInFlight]:
    for job in ledger.in_flight():
        yield JobInFlight(
            name=_sendable(job.name), since=job.since, until=job.until, thread=job.ident
        )


def _loans(pools: Mapping[str, Shell]) -> Iterator[Loan]:
    for name, pool in list(pools.items()):
        for holder in pool.holders():
            yield Loan(
                pool=name,
                connection=holder.connection,
                held_seconds=holder.held_seconds,
                thread=_sendable(holder.thread),
                stack=_sendable(holder.stack),
                now=_sendable(holder.now),
            )


def _tasks() -> Iterator[Task]:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return
    for loop in _running_loops():
        for task in asyncio.all_tasks(loop):
            coroutine = task.get_coro()
            yield Task(
                name=_sendable(task.get_name()),
                coroutine=_sendable(getattr(coroutine, "__qualname__", repr(coroutine))),
                stack=_sendable(where_is(weakref.ref(task))),
            )


def _running_loops() -> list[Any]:
    """Return the event loops that run in this process, whoever started them.

    They are found on the stacks of the threads, so that nobody has to announce his own: a loop of
    asyncio's in `run_forever`, any other one (uvloop has no frames) in the Runner that runs it.
    """
    import asyncio

    by_code = {
        asyncio.BaseEventLoop.run_forever.__code__: lambda self: self,
        asyncio.Runner.run.__code__: lambda self: self.get_loop(),
    }
    loops = {}
    for frame in list(sys._current_frames().values()):  # noqa: SLF001 (it is documented)
        outer = frame
        while outer is not None:
            loop_of = by_code.get(outer.f_code)
            if loop_of is not None:
                loop = loop_of(outer.f_locals["self"])
                loops[id(loop)] = loop
            outer = outer.f_back  # type: ignore[assignment]
    return list(loops.values())


def _sendable(text: str) -> str:
    """Return text without secrets, not too long for the wire, and valid UTF-8."""
    text = without_secrets(text)
    if len(text) > MAX_STACK:
        text = f"[… {len(text) - MAX_STACK} characters …] {text[-MAX_STACK:]}"
    return text.encode(errors="backslashreplace").decode()
