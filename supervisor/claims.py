"""What workers claim, cut to what honest ones say. Pure.

It goes into the log, into the journal's memory and before people's eyes; a worker gone mad, or one
that means harm, may put a megabyte into any text and invent any pool.
"""

from __future__ import annotations

__all__ = ["clipped", "close_reports", "life", "report"]

from collections.abc import Collection
from typing import Any, TypeVar

import msgspec

from supervisor import protocol

_T = TypeVar("_T")

MAX_LEAKS = 50  # of a pool
MAX_STACK = 20_000  # characters
MAX_NAME = 200


def clipped(text: str, most: int) -> str:
    """Return a text of at most `most` characters and a remark; both of its ends are kept."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"


def report(claim: protocol.Report, pools: Collection[str]) -> protocol.Report:
    """Return a report of those pools only that the worker has."""
    figures = claim.figures
    if figures is not None and not figures.pools.keys() <= set(pools):
        figures = msgspec.structs.replace(figures, pools=_known(figures.pools, pools))
    if figures is claim.figures and claim.pools.keys() <= set(pools):
        return claim
    return msgspec.structs.replace(claim, pools=_known(claim.pools, pools), figures=figures)


def _known(figures: dict[str, _T], pools: Collection[str]) -> dict[str, _T]:
    return {name: each for name, each in figures.items() if name in pools}


def life(claim: protocol.Drained, pools: Collection[str]) -> dict[str, Any]:
    """Return what a worker has done in its life, as plain data; empty where it does not tell."""
    told = claim.life
    if told is None:
        return {}
    return {
        "jobs": {
            name: getattr(told, name) for name in ("done", "failed", "cancelled", "abandoned")
        },
        "in_stop": {"finished": told.finished, "aborted": told.aborted},
        "pools": protocol.to_builtins(_known(told.pools, pools)),
    }


def close_reports(claim: protocol.Drained, pools: Collection[str]) -> dict[str, Any]:
    """Return what closing the worker's pools came to, as plain data."""
    return {
        name: {
            "closed": each.closed,
            "waited": each.waited,
            "leaked": [
                {
                    "held_seconds": leak.held_seconds,
                    "thread": clipped(leak.thread, MAX_NAME),
                    "stack": clipped(leak.stack, MAX_STACK),
                }
                for leak in each.leaked[:MAX_LEAKS]
            ],
        }
        for name, each in claim.reports.items()
        if name in pools
    }
