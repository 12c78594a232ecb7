"""What a person reads: the status table, a dump, and the summary of a stop."""

from __future__ import annotations

__all__ = ["connections_table", "dump_text", "status_table", "stop_summary"]

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prettytable import PrettyTable, TableStyle

from supervisor.connections import PoolCheck
from supervisor.core.actions import Finish, Outcome
from supervisor.plain import counted

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_KIB = 1024


def status_table(status: Mapping[str, Any]) -> str:
    """Render the answer to `status` for eyes."""
    head = (
        f"{status['name']}  {status['state']}  generation {status['generation']}  "
        f"pid {status['pid']}  since {status['started'][:19].replace('T', ' ')} UTC"
    )
    if status["outstanding"]:
        left = max(0.0, status["deadline_in_seconds"])
        head += f"\n{len(status['outstanding'])} outstanding, {left:.1f} s left"
    for name, budget in status["budgets"].items():
        head += (
            f"\nbudget {name}: {budget['open']} open, {budget['granted']} granted "
            f"of {budget['budget']}"
        )
    workers = _table(
        ["worker", "state", "pid", "gen", "in flight", "done", "restarts", "up", "memory"],
        [_worker_row(worker) for worker in status["workers"]],
        left={"worker", "state"},
    )
    pools = _pool_names(status["workers"])
    for pool in pools:
        workers.add_column(
            f"{pool} (used/open/max)",
            [_pool_cell(worker["pools"].get(pool)) for worker in status["workers"]],
            align="r",
        )
    groups = _table(
        ["group", "state", "ready", "restarts", ""],
        [
            [
                name,
                group["state"],
                f"{group['ready']}/{group['count']}",
                group["restarts"],
                _note(group),
            ]
            for name, group in status["groups"].items()
        ],
        left={"group", "state", ""},
    )
    if any(worker["status"] for worker in status["workers"]):
        workers.add_column("", [worker["status"] for worker in status["workers"]], align="l")
    return f"{head}\n\n{_lines(groups)}\n\n{_lines(workers)}"


def _worker_row(worker: Mapping[str, Any]) -> list[Any]:
    return [
        worker["id"],
        worker["state"] + (" (stopped)" if worker["stopped"] else ""),
        worker["pid"] or "",
        worker["generation"],
        worker["in_flight"],
        worker["jobs_done"],
        worker["restarts"],
        _span(worker["uptime_seconds"]),
        _bytes(worker["rss_bytes"]),
    ]


def _pool_names(workers: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for worker in workers for name in worker["pools"]))


def _pool_cell(stats: Mapping[str, Any] | None) -> str:
    if stats is None:
        return ""
    waiting = f" +{stats['waiting']} waiting" if stats["waiting"] else ""
    return f"{stats['in_use']}/{stats['open']}/{stats['max_open']}{waiting}"


def _note(group: Mapping[str, Any]) -> str:
    notes = []
    if group["failure"]:
        notes.append(f"{group['cause']}: {group['failure']}")
    elif group["waiting_for"]:
        notes.append("pool {pool}: {error}".format(**group["waiting_for"]))
    elif group["cause"]:
        notes.append(str(group["cause"]))
    elif group["state"] == "waiting":
        notes.append("for what runs before it")
    # A supervisor that was started before this command was upgraded says nothing of these two.
    ends_in, finished = group.get("ends_in_seconds"), group.get("finished")
    if ends_in is not None:
        notes.append(f"the others wait for it, {max(0.0, ends_in):.0f} s at most")
    elif finished and group["state"] == "ready" and group["count"]:
        notes.append(f"{finished} finished")
    if group["next_restart_in_seconds"] is not None:
        notes.append(f"next try in {group['next_restart_in_seconds']:.1f} s")
    return "; ".join(notes)


def connections_table(checks: Iterable[PoolCheck]) -> str:
    """Render what the servers of the pools allow, and what the file may come to need."""
    rows = [
        [
            check.pool,
            check.server or "not reached",
            check.arithmetic,
            *_limit_cells(check),
            "" if check.connected is None else check.connected,
        ]
        for check in checks
    ]
    columns = ["pool", "server", "may need", "allowed", "", "connected now"]
    return _lines(_table(columns, rows, left={"pool", "server", "may need", ""}))


def _limit_cells(check: PoolCheck) -> list[Any]:
    if check.tightest is None:
        return [check.allowed, check.note]
    _, why, most = check.tightest
    return [most, why]


def dump_text(dump: Mapping[str, Any]) -> str:
    """Render a dump for eyes: what is in hand first, then where every thread is."""
    missing, names = dump["missing"], dump["threads"]
    head = (
        f"{dump['worker']}  {dump['state']}  generation {dump['generation']}  "
        f"pid {dump['pid'] or 'none yet'}  up {_span(dump['uptime_seconds'])}"
    )
    if dump["halted"]:
        head += f"\n{dump['halted']}"
    jobs = [
        f"  {job['name']}  for {job['seconds']:.1f} s  by thread "
        + _thread(names.get(job.get("thread")), job.get("thread", "unknown"))
        for job in dump["jobs"]
    ]
    loans = [
        f"  pool {loan['pool']}, connection {loan['connection']}  for {loan['held_seconds']:.1f} s  "
        f"by {loan['thread']}\n    borrowed at\n{_indented(loan['stack'])}"
        + (f"\n    and now at\n{_indented(loan['now'])}" if loan["now"] else "")
        for loan in dump["loans"]
    ]
    tasks = [
        f"  {task['name']}  {task['coroutine']}\n{_indented(task['stack'])}"
        for task in dump["tasks"]
    ]
    stacks = [
        re.sub(
            r"(?m)^((?:Current thread|Thread) )(0x[0-9a-f]+)",
            lambda found: found[1] + _thread(names.get(found[2]), found[2]),
            dump["stacks"].strip(),
        )
    ]
    return "\n\n".join(
        [
            head,
            _part("jobs in flight", jobs, missing.get("jobs")),
            _part("borrowed connections", loans, missing.get("loans")),
            _part("asyncio tasks", tasks, missing.get("tasks")),
            _part(
                "threads", stacks if dump["stacks"] else [], missing.get("stacks"), counted=False
            ),
        ]
    )


def _part(title: str, lines: list[str], missing: str | None, *, counted: bool = True) -> str:
    title = f"{title}: {len(lines)}" if counted and (lines or not missing) else title
    if missing:
        title += f": not available: {missing}" if not lines else f" ({missing})"
    return "\n".join([title, *lines])


def _thread(name: str | None, ident: str) -> str:
    return f'{ident} "{name}"' if name else ident


def _indented(stack: str) -> str:
    return "\n".join(f"    {line}" for line in stack.rstrip().splitlines())


def stop_summary(finish: Finish) -> str:
    """Render how each worker came through the stop: who acknowledged when, what was closed."""
    outcomes = finish.outcomes
    table = _table(
        ["worker", "acknowledged", "drained", "exited", "connections closed", "leaked"],
        [
            [
                outcome.worker,
                _after(outcome.acknowledged),
                _after(outcome.drained),
                _after(outcome.exited),
                sum(report["closed"] for report in outcome.reports.values()),
                sum(len(report["leaked"]) for report in outcome.reports.values()),
            ]
            for outcome in outcomes
        ],
        left={"worker"},
    )
    killed = [outcome for outcome in outcomes if outcome.killed]
    lines = [_lines(table)] if outcomes else []
    lines += [f"killed: {outcome.worker}: {outcome.killed}" for outcome in killed]
    lines += [leak for outcome in outcomes for leak in _leaks(outcome)]
    drained = sum(outcome.drained is not None for outcome in outcomes)
    lines.append(
        f"stopped: {counted(len(outcomes), 'worker')}, {drained} drained, {len(killed)} killed; "
        f"exit code {finish.exit_code}"
    )
    return "\n".join(lines)


def _leaks(outcome: Outcome) -> Iterable[str]:
    for pool, report in outcome.reports.items():
        for leak in report["leaked"]:
            yield (
                f"leaked: {outcome.worker}, pool {pool}: held for {leak['held_seconds']:.1f} s "
                f"by thread {leak['thread']}, taken at\n{leak['stack'].rstrip()}"
            )


def _table(columns: list[str], rows: Iterable[list[Any]], left: set[str]) -> PrettyTable:
    table = PrettyTable(columns)
    table.set_style(TableStyle.PLAIN_COLUMNS)
    table.right_padding_width = 2
    for column in columns:
        table.align[column] = "l" if column in left else "r"
    for row in rows:
        table.add_row(row)
    return table


def _lines(table: PrettyTable) -> str:
    """Render it without the blanks at the ends, which one long cell would have wrap every line."""
    return "\n".join(line.rstrip() for line in str(table).splitlines())


def _after(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return "before" if seconds < 0 else f"{seconds * 1000:.1f} ms"


def _span(seconds: float) -> str:
    whole = int(seconds)
    if whole < _MINUTE:
        return f"{seconds:.1f}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02d}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02d}m"
    return f"{whole // _DAY}d{whole % _DAY // _HOUR:02d}h"


def _bytes(count: int) -> str:
    return f"{count / _KIB / _KIB:.1f} MiB" if count else ""
