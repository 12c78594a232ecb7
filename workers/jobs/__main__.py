"""`python -m workers.jobs`: add jobs to a group's table, count them, retry the failed ones.

The one module of `workers` that reads the supervisor's configuration: it runs on a command line,
never in a worker.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import click

from supervisor.config import PoolSettings, Settings, load, redacted
from supervisor.errors import SupervisorError, UsageError
from supervisor.output import unwritable
from workers.context import Context, DeadlineExceeded
from workers.jobs.dialects import driver_errors, foreign, table_for
from workers.jobs.table import STATES, Table, storable
from workers.pool import Pool, PoolError

_T = TypeVar("_T")

_RUN = "workers.jobs:run"
_PATIENCE = 30.0  # seconds that one step may wait for a database that others have locked
_CHUNK = 1 << 16  # bytes of standard input that become one transaction: about a thousand jobs
_SHOWN = 10  # lines that could not be added and are quoted

_config = click.option(
    "-c",
    "--config",
    required=True,
    metavar="FILE",
    type=click.Path(readable=False, path_type=Path),  # reading it says why not, with 78
    help="The supervisor's configuration.",
)
_group = click.option(
    "--group",
    metavar="GROUP",
    help=f"Whose table. Default: the one group that runs {_RUN}.",
)


def run() -> int:
    """Run the command that `sys.argv` names; return the exit code."""
    try:
        main(prog_name="python -m workers.jobs", standalone_mode=False)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.Abort:  # Ctrl-C
        return 130
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except SupervisorError as exc:
        for line in str(exc).splitlines():
            click.echo(f"jobs: {line}", err=True)
        return exc.exit_code
    return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Jobs in the table of a group that runs workers.jobs:run."""


@main.command()
@_config
@_group
@click.argument("payloads", nargs=-1, metavar="[PAYLOAD]...")
def add(config: Path, group: str | None, payloads: tuple[str, ...]) -> None:
    """Add a job for each PAYLOAD, or for each line on standard input. Creates the table.

    A payload is a text. A file's name for workers.jobs:sha256 should be absolute: workers have a
    directory of their own. Empty lines are left out. A payload that begins with "-" comes after "--".
    """
    for payload in payloads:
        if unfit := _unfit(payload):
            raise UsageError(f"{unfit}, nothing was added: {payload!r}")
    if not payloads and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no PAYLOAD: give some, or lines on standard input")
    added, refused = _Added(), list[str]()
    batches = iter([list(payloads)]) if payloads else _batches(sys.stdin.buffer, refused)
    try:
        with _database(config, group) as (conn, table):
            table.create(conn, _patience())
            for batch in filter(None, batches):
                with table.writing(conn, _patience()):
                    first, last = table.add(conn, batch)
                added.note(len(batch), first, last)
    except BaseException:
        if added.count:  # it stays, whatever has gone wrong since
            _say(str(added))
        raise
    _say(str(added))
    if refused:
        more = [f"and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        raise SupervisorError("\n".join(refused[:_SHOWN] + more))


@main.command()
@_config
@_group
def counts(config: Path, group: str | None) -> None:
    """Print how many jobs are queued, running, done and failed."""
    with _database(config, group) as (conn, table):
        counted = _unless_missing(table, lambda: table.counts(conn), dict.fromkeys(STATES, 0))
    _say("\n".join(f"{state:<7} {count}" for state, count in counted.items()))


@main.command()
@_config
@_group
@click.argument("numbers", nargs=-1, type=int, metavar="[ID]...")
def retry(config: Path, group: str | None, numbers: tuple[int, ...]) -> None:
    """Queue failed jobs again: those with these IDs, or all of them."""
    with _database(config, group) as (conn, table):
        if not numbers:
            count = _unless_missing(table, lambda: _retry(conn, table), 0)
            _say(f"queued again: {count}")
            return
        others = [_retry_one(conn, table, number) for number in numbers]
    if any(others):
        raise SupervisorError("; ".join(filter(None, others)))


def _retry_one(conn: Any, table: Table, number: int) -> str:
    """Queue it again; return why not, where it can't be."""
    if _unless_missing(table, lambda: _retry(conn, table, number), 0):
        _say(f"queued again: job {number}")
        return ""
    state = _unless_missing(table, lambda: table.state(conn, number), None)
    return f"job {number} is {state}, not failed" if state else f"there is no job {number}"


def _retry(conn: Any, table: Table, number: int | None = None) -> int:
    with table.writing(conn, _patience()):
        return table.retry(conn, number)


def _say(text: str) -> None:
    """Print to standard output. A reader who has seen enough is no error."""
    try:
        click.echo(text)
    except OSError as exc:
        error = unwritable(exc)
        if not isinstance(exc, BrokenPipeError):
            raise error from exc


# --- the database ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _database(config: Path, group: str | None) -> Iterator[tuple[Any, Table]]:
    """Lend a connection to the group's first pool; turn what goes wrong into one sentence."""
    settings = load(config, env=os.environ, uid=os.getuid())
    name, pool = _first_pool(settings, group)
    try:
        with (
            Pool.from_url(pool.url, name=name, max_open=1) as opened,
            opened.acquire(leak_threshold=0) as conn,
        ):
            yield conn, table_for(conn)
    except DeadlineExceeded as exc:
        problem = f"others have held its lock for {_PATIENCE:g} s"
        raise SupervisorError(f"pools.{name} ({redacted(pool.url)}): {problem}") from exc
    except Exception as exc:
        if not isinstance(exc, (PoolError, *driver_errors())):
            raise
        problem = foreign(exc) or str(exc).strip()
        raise SupervisorError(f"pools.{name} ({redacted(pool.url)}): {problem}") from exc


def _first_pool(settings: Settings, group: str | None) -> tuple[str, PoolSettings]:
    """Return the pool that holds the jobs of `group`, or of the one group that has some."""
    if group is None:
        able = [name for name, found in settings.groups.items() if found.run == _RUN]
        if len(able) != 1:
            found = f"{len(able)} groups run" if able else "no group runs"
            known = ", ".join(able or settings.groups)
            raise UsageError(f"{settings.source}: {found} {_RUN}; name one with --group: {known}")
        [group] = able
    if group not in settings.groups:
        known = ", ".join(settings.groups)
        raise UsageError(f"{settings.source}: there is no group {group}; there are: {known}")
    pools = settings.pools_of(group)
    if not pools:
        raise UsageError(f"{settings.source}: the group {group} has no pool to keep jobs in")
    return next(iter(pools.items()))


def _patience() -> Context:
    return Context.background().with_timeout(_PATIENCE)


def _unless_missing(table: Table, query: Callable[[], _T], otherwise: _T) -> _T:
    """Return what `query` finds, `otherwise` where nobody has created the table yet."""
    try:
        return query()
    except driver_errors() as exc:
        if table.is_missing(exc):
            return otherwise
        raise


# --- what is added ---------------------------------------------------------------------------------


def _unfit(payload: str) -> str:
    """Say why a database cannot store it as a text, "" where it can."""
    if "\0" in payload:
        return "it holds a NUL, which no text in a database may"
    return "" if storable(payload) == payload else "no text in UTF-8"


def _batches(stream: IO[bytes], refused: list[str]) -> Iterator[list[str]]:
    """Yield the lines of `stream` in batches: as many as there are at the moment.

    So a million lines make a thousand transactions, and a line that comes alone is added at once.
    """
    parts: list[bytes] = []
    first = 1  # the number of the first line of a batch
    while True:
        chunk = stream.read1(_CHUNK)  # type: ignore[attr-defined]
        head, newline, tail = chunk.rpartition(b"\n")
        if chunk and not newline:
            parts.append(chunk)
            continue
        lines = b"".join([*parts, head if chunk else b""]).split(b"\n")
        batch = []
        for number, line in enumerate(lines, first):
            payload = line.decode("utf-8", "surrogateescape")
            if unfit := _unfit(payload):
                refused.append(f"line {number}: {unfit}, left out: {line!r}")
            elif payload:
                batch.append(payload)
        yield batch
        if not chunk:
            return
        parts = [tail]
        first += len(lines)


class _Added:
    """What has been added so far, for people."""

    def __init__(self) -> None:
        self.count = 0
        self._first = self._last = 0

    def note(self, count: int, first: int, last: int) -> None:
        """Count a batch that has been committed."""
        self._first = self._first or first
        self._last = last
        self.count += count

    def __str__(self) -> str:
        match self.count:
            case 0:
                return "added no jobs"
            case 1:
                return f"added 1 job, number {self._first}"
            case _:
                return f"added {self.count} jobs, numbers {self._first} to {self._last}"


if __name__ == "__main__":
    sys.exit(run())
