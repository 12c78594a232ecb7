"""Jobs under fire: workers are killed several times a second, the supervisor twice.

    python -m tests.chaos.jobs [--jobs N] [--seconds N] [--seed N] [--pool sqlite|postgresql]

Real files, real processes, SIGKILL. Afterwards every job has to be done, with one effect and the
right hash each, and nothing may be left running. The table of effects has no unique constraint: a
second effect would show, not be refused. The same seed gives the same files and the same pauses
between the kills; whom they hit is up to the machine. The folder is kept when something is wrong.
"""

from __future__ import annotations

__all__ = ["CONFIG", "GRACE", "Chaos", "Figures", "own_server"]

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from tests.servers import PostgreSQLServer, postgresql_binaries
from tests.supervised import REPO, Supervised, wait_until
from tests.workers.jobs.databases import Database, PostgreSQLDatabase, SQLiteDatabase

CONFIG = """
[pools.main]
{pool}
[workers.jobs]
run = "workers.jobs:run"
count = 4
min_ready_time = "200ms"
max_restarts = 1000000
backoff = "5ms"
backoff_max = "20ms"
[workers.jobs.options]
handler = "tests.chaos.handlers:hash_and_record"
threads = 2
poll = "100ms"
"""
GRACE = 3.0
BETWEEN_KILLS = (0.05, 0.25)  # seconds: several a second
CALM = 60.0  # seconds in which what is left after the last kill must be done


@dataclass(frozen=True)
class Figures:
    """What a run came to."""

    jobs: int
    seconds: float
    kills: int
    supervisor_kills: int
    attempts: int
    losses: int

    def __str__(self) -> str:
        return (
            f"{self.jobs} jobs done, one effect each, all hashes right, in {self.seconds:.1f} s: "
            f"{self.kills} workers and {self.supervisor_kills} supervisors killed; "
            f"{self.attempts} attempts, {self.losses} of them lost"
        )


class Chaos:
    """One run in a folder of its own.

    Args:
        folder: empty; holds files, configuration, log and a SQLite database.
        database: where the jobs are kept; a fresh one.
        jobs: how many.
        seconds: how long kills may go on; they end earlier when all jobs are done.
        seed: of the files and of the pauses between kills.
    """

    def __init__(
        self, folder: Path, database: Database, *, jobs: int, seconds: float, seed: int
    ) -> None:
        self.folder = folder
        self.database = database.create()
        self.jobs = jobs
        self.seconds = seconds
        self.random = random.Random(seed)
        self.kills = 0
        self.supervisor_kills = 0

    def run(self) -> Figures:
        """Add the jobs, kill, wait, stop, check."""
        self._write_files()
        supervised = self._supervised()
        self._add(supervised.config)
        began = time.monotonic()
        with supervised:
            supervised.ready()
            self._kill(supervised, began + self.seconds)
            self._wait_for_the_rest()
            seconds = time.monotonic() - began
            self._stop(supervised)
            wait_until(lambda: not supervised.processes(), "nothing is left running")
        return self._check(seconds)

    def _supervised(self) -> Supervised:
        config = CONFIG.format(pool=f'url = "{self.database.url}"')
        return Supervised(self.folder, config, supervisor=f'grace = "{GRACE:g}s"')

    def _wait_for_the_rest(self) -> None:
        wait_until(lambda: self._done() == self.jobs, f"all done; {self._counts()}", CALM)

    def _stop(self, supervised: Supervised) -> None:
        assert supervised.stop() == 0

    def _write_files(self) -> None:
        self.files = self.folder / "files"
        self.files.mkdir()
        for number in range(self.jobs):
            size = 3_000_000 if number % 100 == 0 else self.random.randrange(60_000)
            (self.files / f"Datei {number} ☃.bin").write_bytes(self.random.randbytes(size))

    def _add(self, config: Path) -> None:
        """Add them as the README says."""
        subprocess.run(
            [sys.executable, "-m", "workers.jobs", "add", "-c", str(config)],
            input="".join(f"{path}\n" for path in self.files.iterdir()),
            text=True,
            check=True,
            cwd=REPO,
            stdout=subprocess.DEVNULL,
        )
        assert self.database.counts()["queued"] == self.jobs

    def _kill(self, supervised: Supervised, until: float) -> None:
        """Kill a worker now and then, and the supervisor at one and two thirds of the work."""
        at_thirds = [self.jobs // 3, 2 * self.jobs // 3]
        while (done := self._done()) < self.jobs and time.monotonic() < until:
            time.sleep(self.random.uniform(*BETWEEN_KILLS))
            if at_thirds and done >= at_thirds[0]:
                at_thirds.pop(0)
                self._kill_supervisor(supervised)
            elif pids := sorted(supervised.worker_pids().values()):
                with contextlib.suppress(ProcessLookupError):  # its end is not in the log yet
                    os.kill(self.random.choice(pids), signal.SIGKILL)
                    self.kills += 1
        while at_thirds:
            at_thirds.pop()
            self._kill_supervisor(supervised)

    def _kill_supervisor(self, supervised: Supervised) -> None:
        """Kill it and start it again at once: its orphans are still at work, and drain."""
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        self.supervisor_kills += 1
        supervised.start()
        supervised.event("supervisor.ready", count=1 + self.supervisor_kills)

    def _done(self) -> int:
        return self._counts()["done"]

    def _counts(self) -> dict[str, int]:
        return self.database.counts()

    def _check(self, seconds: float) -> Figures:
        undone = self.database.rows(
            "SELECT id, state, attempts, losses, error FROM jobs WHERE state <> 'done'"
        )
        assert not undone, f"a job was lost: it ended as {undone}"
        numbers = {number for (number,) in self.database.rows("SELECT id FROM jobs")}
        assert len(numbers) == self.jobs, f"a job was lost: {self.jobs - len(numbers)} rows"
        effects = Counter(job for job, _ in self.database.effects())
        twice = {job: count for job, count in effects.items() if count > 1}
        assert not twice, f"an effect came twice: {twice}"
        assert set(effects) == numbers, f"a job without its effect: {numbers - set(effects)}"
        expected = dict(self._sha256sums())
        found = dict(self.database.rows("SELECT DISTINCT payload, result FROM jobs"))
        assert found == expected, "a wrong result"
        [(attempts, losses)] = self.database.rows("SELECT sum(attempts), sum(losses) FROM jobs")
        return Figures(
            self.jobs, seconds, self.kills, self.supervisor_kills, int(attempts), int(losses)
        )

    def _sha256sums(self) -> list[tuple[str, str]]:
        """Ask sha256sum, which is not of our making."""
        output = subprocess.run(
            "find . -type f -print0 | xargs -0 sha256sum",
            shell=True,
            cwd=self.files,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        lines = (line.split("  ", 1) for line in output.splitlines())
        return [(str(self.files / name.removeprefix("./")), digest) for digest, name in lines]


@contextlib.contextmanager
def own_server() -> Iterator[PostgreSQLServer]:
    """Return a PostgreSQL that has not been started; it is gone afterwards."""
    binaries = postgresql_binaries()
    assert binaries is not None, "PostgreSQL is not installed"
    server = PostgreSQLServer(binaries)
    try:
        yield server
    finally:
        server.remove()


@click.command()
@click.option("--jobs", default=2000, show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="How long kills may go on.")
@click.option("--seed", default=None, type=int, help="Default: a random one, which is printed.")
@click.option("--pool", type=click.Choice(["sqlite", "postgresql"]), default="sqlite")
def main(jobs: int, seconds: float, seed: int | None, pool: str) -> None:
    """Carry out jobs while workers and supervisors are killed; check that each was done once."""
    seed = random.randrange(1 << 32) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="jobs-chaos-"))
    click.echo(f"seed {seed}, {pool}, in {folder}")
    with contextlib.ExitStack() as stack:
        database: Database
        if pool == "sqlite":
            database = SQLiteDatabase(str(folder / "jobs.db"))
        else:
            server = stack.enter_context(own_server())
            server.start()
            database = PostgreSQLDatabase(server)
        click.echo(Chaos(folder, database, jobs=jobs, seconds=seconds, seed=seed).run())
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
