"""Everything at once: a nemesis that draws from a bag of faults, while jobs have to be done once.

    python -m tests.chaos.nemesis [--seconds N] [--seed N] [--jobs N] [--pool sqlite|postgresql]

Workers, template and supervisor are killed, stopped and continued; SIGHUP comes alone, in storms and
with broken code; the supervisor is told to end in the middle of a roll; strangers write garbage to
both of its sockets; the database server is restarted. What is drawn, when, and how long each fault
lasts is the seed's; whom it hits is up to the machine. Afterwards the table of effects and the log
are read as a history.
"""

from __future__ import annotations

__all__ = ["Nemesis"]

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import zmq

from tests.chaos.jobs import BETWEEN_KILLS, Chaos, _postgresql
from tests.supervised import Supervised
from tests.workers.jobs.databases import Database, PostgreSQLDatabase, SQLiteDatabase

GRACE = 3.0  # of the configuration that Chaos writes
STOPPED = (0.05, 1.5)  # seconds: also longer than a receipt may take
STORM = 10  # SIGHUPs
CRUMBS = (b"", b"\0" * 64, b"ackvisor/1 \x81", b"ackvisor/9 \x80", os.urandom(200))


class Nemesis(Chaos):
    """One run: Chaos, with every fault that there is."""

    def __init__(
        self, *args: Any, restart_server: Callable[[], object] | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.faults: Counter[str] = Counter()
        self._restart_server = restart_server

    def _kill(self, supervised: Supervised, until: float) -> None:
        bag: list[tuple[Callable[[Supervised], None], int]] = [
            (self._kill_worker, 6),
            (self._stop_worker, 3),
            (self._kill_template, 2),
            (self._reload, 2),
            (self._storm, 1),
            (self._reload_broken_code, 1),
            (self._stop_supervisor_for_a_while, 1),
            (self._end_in_a_roll, 1),
            (self._murder_supervisor, 1),
            (self._garbage, 2),
        ]
        if self._restart_server is not None:
            bag.append((self._server_goes_away, 1))
        faults, weights = zip(*bag, strict=True)
        pending = list(faults)  # each at least once, in an order that is the seed's
        self.random.shuffle(pending)
        while time.monotonic() < until or pending:
            time.sleep(self.random.uniform(*BETWEEN_KILLS))
            fault = pending.pop() if pending else self.random.choices(faults, weights)[0]
            self.faults[fault.__name__.strip("_")] += 1
            fault(supervised)

    # --- the bag -----------------------------------------------------------------------------------

    def _kill_worker(self, supervised: Supervised) -> None:
        if pids := sorted(supervised.worker_pids().values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(pids), signal.SIGKILL)
                self.kills += 1

    def _stop_worker(self, supervised: Supervised) -> None:
        if pids := sorted(supervised.worker_pids().values()):
            self._freeze(self.random.choice(pids))

    def _kill_template(self, supervised: Supervised) -> None:
        for pid in supervised.templates()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _reload(self, supervised: Supervised) -> None:
        supervised.signal(signal.SIGHUP)

    def _storm(self, supervised: Supervised) -> None:
        for _ in range(STORM):
            supervised.signal(signal.SIGHUP)
            time.sleep(0.01)

    def _reload_broken_code(self, supervised: Supervised) -> None:
        good = supervised.config.read_text()
        supervised.config.write_text(good.replace("hash_and_record", "no_such_function"))
        supervised.signal(signal.SIGHUP)
        time.sleep(self.random.uniform(0.2, 0.6))  # it has been read by then, or is not broken
        supervised.config.write_text(good)
        supervised.signal(signal.SIGHUP)

    def _stop_supervisor_for_a_while(self, supervised: Supervised) -> None:
        self._freeze(supervised.pid)

    def _end_in_a_roll(self, supervised: Supervised) -> None:
        supervised.signal(signal.SIGHUP)
        time.sleep(self.random.uniform(0.0, 0.3))
        supervised.signal(signal.SIGTERM)
        supervised.wait()
        self._start_again(supervised)

    def _murder_supervisor(self, supervised: Supervised) -> None:
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        self.supervisor_kills += 1
        self._start_again(supervised)

    def _garbage(self, supervised: Supervised) -> None:
        context = zmq.Context()
        for path in supervised.runtime_dir.glob("*.sock"):
            with context.socket(zmq.DEALER) as stranger:
                stranger.linger = 0
                stranger.connect(f"ipc://{path}")
                for _ in range(50):
                    stranger.send(self.random.choice(CRUMBS), zmq.DONTWAIT)
        context.term()

    def _server_goes_away(self, supervised: Supervised) -> None:
        assert self._restart_server is not None
        self._restart_server()

    def _freeze(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.random.uniform(*STOPPED))
            os.kill(pid, signal.SIGCONT)

    def _start_again(self, supervised: Supervised) -> None:
        ready = len(supervised.events("supervisor.ready"))
        supervised.start()
        supervised.event("supervisor.ready", count=ready + 1, due=60.0)

    # --- the history -------------------------------------------------------------------------------

    def _read_history(self, supervised: Supervised) -> None:
        for killed in supervised.events("worker.killed"):
            assert killed["why"], killed
            assert killed["stacks"] or killed["stacks_missing"], killed
            first, last = killed["ladder"][0], killed["ladder"][-1]
            assert first[0] != "cancel" or last[1] >= GRACE - 0.1, killed
        ends = Counter(line["pid"] for line in supervised.events("worker.exited"))
        assert not [pid for pid, times in ends.items() if times > 1], "an end that came twice"


@click.command()
@click.option("--jobs", default=1500, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="How long faults go on.")
@click.option("--seed", default=None, type=int, help="Default: a random one, which is printed.")
@click.option("--pool", type=click.Choice(["sqlite", "postgresql"]), default="sqlite")
def main(jobs: int, seconds: float, seed: int | None, pool: str) -> None:
    """Carry out jobs while everything fails; check that each was done once, and the log."""
    seed = random.randrange(1 << 32) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="nemesis-"))
    click.echo(f"seed {seed}, {pool}, in {folder}")
    with contextlib.ExitStack() as stack:
        database: Database
        restart_server: Callable[[], object] | None = None
        if pool == "sqlite":
            database = SQLiteDatabase(str(folder / "jobs.db"))
        else:
            server = stack.enter_context(_postgresql())
            database = PostgreSQLDatabase(server)

            def restart_server() -> None:
                server.stop()
                server.start()

        nemesis = Nemesis(
            folder, database, jobs=jobs, seconds=seconds, seed=seed, restart_server=restart_server
        )
        click.echo(nemesis.run())
        click.echo("faults: " + ", ".join(f"{n} {name}" for name, n in nemesis.faults.items()))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
