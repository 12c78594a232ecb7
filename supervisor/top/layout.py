"""Rows into columns: which of them fit a terminal's width, and what stands in each. Pure."""

from __future__ import annotations

__all__ = [
    "Cell",
    "Column",
    "bar",
    "budget_line",
    "fitting",
    "group_cells",
    "group_columns",
    "head_line",
    "quantity",
    "rate",
    "worker_cells",
    "worker_columns",
]

from collections.abc import Sequence
from dataclasses import dataclass, replace

from supervisor.plain import counted
from supervisor.top.model import (
    BudgetRow,
    GroupRow,
    Picture,
    PoolUse,
    Tone,
    WorkerRow,
    span,
)

# A cell is texts, each with its tone: a bar has two.
Cell = tuple[tuple[str, Tone], ...]

_KIB = 1024
_FULL, _EMPTY = "\u2501", "\u2500"  # ━ ─ : told apart without colour, too
MARKS = {Tone.BAD: "!", Tone.WARN: "*", Tone.NOTICE: "~"}


@dataclass(frozen=True, slots=True)
class Column:
    """One column. `rank` 0 is never left out; the highest rank is left out first."""

    key: str
    title: str
    width: int
    rank: int = 0
    right: bool = False
    grows: bool = False  # takes what is left of the line


def fitting(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """Return the columns that fit into `width` with a space between them, the last one grown."""
    kept = list(columns)
    while _total(kept) > width and any(column.rank for column in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
    spare = max(0, width - _total(kept))
    return tuple(
        replace(column, width=column.width + spare) if column.grows else column for column in kept
    )


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + max(0, len(columns) - 1)


def worker_columns(workers: Sequence[WorkerRow], width: int) -> tuple[Column, ...]:
    """Return the columns for these workers. Names and pools get what they need, if it is there."""
    name = max([6, *(len(worker.id) for worker in workers)])
    several = any(len(worker.pools) > 1 for worker in workers)
    has_pools = any(worker.pools for worker in workers)
    roomy = width >= 110  # noqa: PLR2004
    pool = (24 if roomy else 14) + (7 if several else 0)
    columns = [
        Column("mark", "", 1),
        Column("worker", "WORKER", min(name, 28 if roomy else 20)),
        Column("state", "STATE", 8),
        Column("gen", "GEN", 3, rank=6, right=True),
        Column("in flight", "FLIGHT", 6, rank=1, right=True),
        Column("jobs/s", "JOBS/S", 6, rank=2, right=True),
        Column("memory", "MEM", 5, rank=3, right=True),
        *([Column("pool", "POOL USE", pool, rank=4)] if has_pools else []),
        Column("restarts", "RST", 3, rank=5, right=True),
        Column("up", "UP", 5, rank=8, right=True),
        Column("last", "LAST EVENT", 10, rank=7, grows=True),
    ]
    fit = fitting(columns, width)
    # A pid is good to have where there is room to spare.
    if roomy and fit[-1].grows and fit[-1].width > 30:  # noqa: PLR2004
        columns.insert(3, Column("pid", "PID", 7, rank=9, right=True))
        fit = fitting(columns, width)
    return fit


def worker_cells(worker: WorkerRow, columns: Sequence[Column]) -> tuple[Cell, ...]:
    """Return what stands in each of the columns."""
    tone = worker.tone
    loud = tone if tone >= Tone.NOTICE else Tone.PLAIN
    said = worker.trouble or worker.state
    last = f"{worker.last_event} {span(worker.last_event_age)}" if worker.last_event else ""
    if worker.status:
        last = f"{last} \u00b7 {worker.status}" if last else worker.status
    cells: dict[str, Cell] = {
        "mark": ((MARKS.get(tone, ""), tone),),
        "worker": ((worker.id, min(loud, Tone.WARN)),),
        "state": ((said, tone if tone >= Tone.NOTICE else Tone.GOOD),),
        "pid": ((str(worker.pid or ""), Tone.DIM),),
        "gen": ((str(worker.generation), Tone.DIM),),
        "in flight": (_number(worker.in_flight),),
        "jobs/s": (_rate_cell(worker.rate),),
        "memory": ((quantity(worker.rss), Tone.PLAIN if worker.rss else Tone.DIM),),
        "restarts": ((str(worker.restarts), Tone.WARN if worker.restarts else Tone.DIM),),
        "up": ((span(worker.uptime), Tone.DIM),),
        "last": ((last, Tone.DIM),),
    }
    return tuple(
        _pool_cell(worker.pools, column.width) if column.key == "pool" else cells[column.key]
        for column in columns
    )


def group_columns(groups: Sequence[GroupRow], width: int) -> tuple[Column, ...]:
    """Return the columns for these groups."""
    name = max([5, *(len(group.name) for group in groups)])
    return fitting(
        [
            Column("mark", "", 1),
            Column("group", "GROUP", min(name, 28 if width >= 110 else 18)),  # noqa: PLR2004
            Column("state", "STATE", 8),
            Column("ready", "READY", 7, right=True),
            Column("in flight", "FLIGHT", 6, rank=2, right=True),
            Column("jobs/s", "JOBS/S", 6, rank=1, right=True),
            Column("memory", "MEM", 5, rank=4, right=True),
            Column("waiting", "WAIT", 4, rank=3, right=True),
            Column("restarts", "RST", 4, rank=5, right=True),
            Column("note", "", 6, rank=6, grows=True),
        ],
        width,
    )


def group_cells(group: GroupRow, columns: Sequence[Column]) -> tuple[Cell, ...]:
    """Return what stands in each of the columns."""
    loud = group.tone if group.tone >= Tone.NOTICE else Tone.PLAIN
    cells: dict[str, Cell] = {
        "mark": ((MARKS.get(group.tone, ""), group.tone),),
        "group": ((group.name, min(loud, Tone.WARN)),),
        "state": ((group.state, group.tone),),
        "ready": ((f"{group.ready}/{group.count}", min(loud, Tone.WARN)),),
        "in flight": (_number(group.in_flight),),
        "jobs/s": (_rate_cell(group.rate),),
        "memory": ((quantity(group.rss), Tone.PLAIN if group.rss else Tone.DIM),),
        "waiting": ((str(group.waiting), Tone.WARN if group.waiting else Tone.DIM),),
        "restarts": ((str(group.restarts), Tone.WARN if group.restarts else Tone.DIM),),
        "note": ((group.note, min(loud, Tone.WARN)),),
    }
    return tuple(cells[column.key] for column in columns)


def head_line(picture: Picture) -> Cell:
    """Return the one line that says whose fleet this is, and how much it does."""
    parts: list[tuple[str, Tone]] = [
        (picture.name, Tone.PLAIN),
        ("  ", Tone.DIM),
        (picture.state, picture.tone),
        (f"  gen {picture.generation}", Tone.DIM),
        (f"  up {span(picture.uptime)}", Tone.DIM),
        (f"  {counted(len(picture.workers), 'worker')}", Tone.DIM),
        (f"  {picture.in_flight} in flight", Tone.PLAIN if picture.in_flight else Tone.DIM),
    ]
    if picture.rate is not None:
        parts.append((f"  {rate(picture.rate)} jobs/s", Tone.PLAIN if picture.rate else Tone.DIM))
    if picture.progress:
        parts.append((f"  {picture.progress}", Tone.NOTICE))
    return tuple(parts)


def budget_line(budget: BudgetRow, width: int) -> Cell:
    """Return one budget: what is open in the bar, and what is granted in words."""
    waits = f", {budget.waiting} waiting" if budget.waiting else ""
    words = f" {budget.open} open, {budget.granted} granted of {budget.budget}{waits}"
    title = f"budget {budget.name} "
    size = max(0, min(40, width - len(title) - len(words)))
    loud = budget.tone if budget.tone >= Tone.WARN else Tone.PLAIN
    return ((title, Tone.DIM), *bar(budget.open, budget.budget, size, loud), (words, loud))


def bar(part: int, whole: int, width: int, tone: Tone) -> Cell:
    """Return a bar; what is not zero shows, and only what is full is full."""
    if width <= 0:
        return ()
    full = 0 if whole <= 0 else round(width * min(part, whole) / whole)
    if part > 0:
        full = max(1, full)
    if part < whole and full == width and width > 1:
        full = width - 1
    return ((_FULL * full, tone), (_EMPTY * (width - full), Tone.DIM))


def _pool_cell(pools: Sequence[PoolUse], width: int) -> Cell:
    """Return the pool that most of all wants to be seen; its name where there are several."""
    if not pools:
        return (("", Tone.DIM),)
    worst = max(pools, key=lambda use: (use.waiting, use.in_use / max(1, use.max_open)))
    waits = f"+{worst.waiting}" if worst.waiting else ""
    numbers = f" {worst.in_use}/{worst.max_open}{waits}"
    name = f"{worst.name[:6]:6} " if len(pools) > 1 else ""
    tone = Tone.PLAIN
    if worst.waiting or worst.leaks:
        tone = Tone.WARN
    elif not worst.in_use:
        tone = Tone.DIM
    # The numbers begin where those of other rows do: 10/10 needs six.
    size = max(3, width - len(name) - max(6, len(numbers)))
    filled = tone if tone is not Tone.PLAIN else Tone.GOOD
    return ((name, Tone.DIM), *bar(worst.in_use, worst.max_open, size, filled), (numbers, tone))


def _number(number: int) -> tuple[str, Tone]:
    return (str(number), Tone.PLAIN if number else Tone.DIM)


def _rate_cell(per_second: float | None) -> tuple[str, Tone]:
    if per_second is None:
        return ("\u2013", Tone.DIM)
    return (rate(per_second), Tone.PLAIN if per_second else Tone.DIM)


def rate(per_second: float) -> str:
    """Return a rate in at most six characters."""
    if per_second == 0:
        return "0"
    if per_second < 10:  # noqa: PLR2004
        return f"{per_second:.1f}"
    if per_second < 100_000:  # noqa: PLR2004
        return f"{per_second:.0f}"
    return f"{per_second / 1000:.0f}k"


def quantity(count: int) -> str:
    """Return bytes in at most five characters, "" for none."""
    if not count:
        return ""
    size = count / _KIB / _KIB
    if size < 1000:  # noqa: PLR2004
        return f"{size:.0f}M" if size >= 10 else f"{size:.1f}M"  # noqa: PLR2004
    return f"{size / _KIB:.1f}G" if size < 100 * _KIB else f"{size / _KIB:.0f}G"
