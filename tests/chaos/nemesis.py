"""Everything at once: a nemesis that draws from a bag of faults, while jobs have to be done once.

    python -m tests.chaos.nemesis [--seconds N] [--seed N] [--jobs N] [--pool sqlite|postgresql]

Workers, template and supervisor are killed, stopped and continued; SIGHUP comes alone, in storms and
with broken code; the supervisor is told to end in the middle of a roll; strangers write garbage to
both of its sockets; a job eats the memory of all; the disk is full; the clock is set by hours, the
server's too; the server is restarted; what lies between goes deaf, on one ear or on both, and
resets its connections. What is drawn, when, and how long each fault lasts is the seed's; whom it
hits is up to the machine. Afterwards the table of effects and the log are read as a history.

Disk, memory and clock are not the machine's own, and need what a machine may not have (root, a
cgroup, libfaketime): such a fault is left out then, and the run says so.
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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import zmq
from prettytable import PrettyTable

from tests.chaos import history
from tests.chaos.handlers import EATING, HUNGRY
from tests.chaos.jobs import BETWEEN_KILLS, CONFIG, GRACE, Chaos, Figures, own_server
from tests.chaos.surroundings import BUDGET, Surroundings
from tests.chaos.witness import Census, Feeder, Witness
from tests.supervised import Supervised, is_alive, title, wait_until
from tests.workers.jobs.databases import PostgreSQLDatabase

STOPPED = (0.05, 1.5)  # seconds: also longer than a receipt may take
STORM = 10  # SIGHUPs
CRUMBS = (b"", b"\0" * 64, b"ackvisor/1 \x81", b"ackvisor/9 \x80", bytes(range(200)))
LEFT = 32 << 20  # bytes of memory, while a job eats
PATIENCE = 60.0  # seconds for one thing to happen, while much else does
READY_TIMEOUT = 30.0  # the default
SPELL = (0.1, 1.5)  # seconds that disk, deafness and a strange clock last
STEP = (600, 6 * 3600)  # seconds by which the clock is set
# A job that was lost again and again is held back for a minute.
CALM = 150.0


def _name(fault: Callable[[], None]) -> str:
    return fault.__name__.strip("_")


@dataclass(frozen=True)
class Fault:
    """One that was injected.

    Attributes:
        name: of its kind.
        over_at: the monotonic time when there was no more of it.
    """

    name: str
    over_at: float


class Nemesis(Chaos):
    """One run: Chaos, with every fault that there is.

    Args:
        surroundings: what can fail.
        only: names of the faults that are in the bag; all, where nothing is said.
        kwargs: as Chaos has them.
    """

    def __init__(
        self, surroundings: Surroundings, *, only: Collection[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(surroundings.folder, surroundings.database, **kwargs)
        self.faults: list[Fault] = []
        self.kinds: Counter[str] = Counter()
        self._around = surroundings
        self._only = only
        self._eaters = 0

    def run(self) -> Figures:
        """Add the jobs, do harm, wait, stop, check."""
        with contextlib.ExitStack() as stack:
            self._census: Census | None = None
            if self._around.proxy is not None:
                assert self._around.server is not None
                assert isinstance(self.database, PostgreSQLDatabase)
                self._census = stack.enter_context(
                    Census(
                        self._around.server,
                        self.database.name,
                        self._around.proxy.port,
                        BUDGET,
                    )
                )
            try:
                return super().run()
            finally:
                if self._around.clock is not None:
                    self._around.clock.pids |= set(self._witness.sessions)

    def _supervised(self) -> Supervised:
        around = self._around
        self._witness = Witness(
            self.folder,
            CONFIG.format(pool=around.pool),
            supervisor=f'grace = "{GRACE:g}s"',
            through=around.through,
            state=None if around.disk is None else around.disk.folder,
        )
        return self._witness

    def _add(self, config: Path) -> None:
        super()._add(config)
        files = [str(path) for path in self.files.iterdir()]
        self._feeder = Feeder(self.database, files, self._ahead)

    def _ahead(self) -> int:
        # Where there is a server, its clock dates the jobs.
        clock = self._around.clock
        return 0 if clock is None or self._around.server is not None else clock.offset

    def _kill(self, supervised: Supervised, until: float) -> None:
        bag = self._bag()
        faults, weights = zip(*bag, strict=True)
        pending = list(faults)  # each at least once, in an order that is the seed's
        self.random.shuffle(pending)
        with self._feeder:
            while time.monotonic() < until or pending:
                time.sleep(self.random.uniform(*BETWEEN_KILLS))
                fault = pending.pop() if pending else self.random.choices(faults, weights)[0]
                name = _name(fault)
                self.kinds[name] += 1
                fault()
                self.faults.append(Fault(name, time.monotonic()))
            wait_until(lambda: not self.unrecovered(), "jobs are done after the last fault", CALM)

    def _bag(self) -> list[tuple[Callable[[], None], int]]:
        bag: list[tuple[Callable[[], None], int]] = [
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
        if self._around.disk is not None:
            bag.append((self._disk_full, 2))
        if self._around.clock is not None:
            bag.append((self._clock_set, 2))
        if self._around.cage is not None:
            bag.append((self._memory_eaten, 1))
        if self._around.proxy is not None:
            bag += [
                (self._server_goes_away, 1),
                (self._deaf, 1),
                (self._deaf_to_the_workers, 1),
                (self._deaf_to_the_server, 1),
                (self._connections_reset, 1),
            ]
        return [entry for entry in bag if not self._only or _name(entry[0]) in self._only]

    # --- processes and their supervisor ------------------------------------------------------------

    def _kill_worker(self) -> None:
        if pids := self._witness.victims():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(pids), signal.SIGKILL)
                self.kills += 1

    def _stop_worker(self) -> None:
        if pids := self._witness.victims():
            self._freeze(self.random.choice(pids))

    def _kill_template(self) -> None:
        for pid in self._witness.templates()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _reload(self) -> None:
        self._witness.signal(signal.SIGHUP)

    def _storm(self) -> None:
        for _ in range(STORM):
            self._witness.signal(signal.SIGHUP)
            time.sleep(0.01)

    def _reload_broken_code(self) -> None:
        good = self._witness.config.read_text()
        self._witness.config.write_text(good.replace("hash_and_record", "no_such_function"))
        self._witness.signal(signal.SIGHUP)
        time.sleep(self.random.uniform(0.2, 0.6))  # it has been read by then, or is not broken
        self._witness.config.write_text(good)
        self._witness.signal(signal.SIGHUP)

    def _stop_supervisor_for_a_while(self) -> None:
        self._freeze(self._witness.pid)

    def _end_in_a_roll(self) -> None:
        self._witness.signal(signal.SIGHUP)
        time.sleep(self.random.uniform(0.0, 0.3))
        self._witness.signal(signal.SIGTERM)
        self._witness.wait()
        self._start_again()

    def _murder_supervisor(self) -> None:
        self._witness.signal(signal.SIGKILL)
        self._witness.wait()
        self.supervisor_kills += 1
        self._start_again()

    def _garbage(self) -> None:
        context = zmq.Context()
        for path in self._witness.runtime_dir.glob("*.sock"):
            with context.socket(zmq.DEALER) as stranger:
                stranger.linger = 0
                stranger.connect(f"ipc://{path}")
                for _ in range(50):
                    stranger.send(self.random.choice(CRUMBS), zmq.DONTWAIT)
        context.term()

    def _freeze(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.random.uniform(*STOPPED))
            os.kill(pid, signal.SIGCONT)

    def _start_again(self) -> None:
        ready = len(self._witness.events("supervisor.ready"))
        self._witness.start()
        self._witness.event("supervisor.ready", count=ready + 1, due=PATIENCE)

    # --- what they stand on ------------------------------------------------------------------------

    def _disk_full(self) -> None:
        assert self._around.disk is not None
        self._witness.lines()
        self._around.disk.fill()
        self._last_a_spell()
        self._around.disk.free()
        self._witness.recall()

    def _clock_set(self) -> None:
        """Set it by hours, from where it is towards the machine's time or away from it."""
        clock = self._around.clock
        assert clock is not None
        forwards = self.random.randint(*STEP)
        clock.set(clock.offset + self.random.choice([forwards, -forwards]))
        self._last_a_spell()
        if self.random.random() < 0.5:
            clock.set(0)

    def _memory_eaten(self) -> None:
        """Let a job eat until the kernel kills its worker; its supervisor must know why."""
        assert self._around.cage is not None
        # Else the kernel's kill were told as the cause of one of ours.
        wait_until(lambda: not self._witness.unheard_ends(), "every end before this one is known")
        (self.folder / HUNGRY).touch()
        eater = wait_until(self._eater, "a job has begun to eat", PATIENCE)
        with self._around.cage.memory_left(LEFT):
            wait_until(
                lambda: not is_alive(eater), "the kernel has killed the worker that eats", PATIENCE
            )
        self._eaters += 1
        if not self._witness.is_its_worker(eater):
            return  # an orphan: nobody is there to tell
        ended = self._witness.event("worker.exited", pid=eater)
        is_ours = self._witness.events("worker.killed", pid=eater)
        assert is_ours or ended.get("cause") == "memory", f"the kernel's kill was not told: {ended}"

    def _eater(self) -> int | None:
        for path in self.folder.glob(f"{EATING}.[0-9]*"):
            path.unlink()
            return int(path.suffix[1:])
        return None

    def _last_a_spell(self) -> None:
        time.sleep(self.random.uniform(*SPELL))

    # --- the server and the way to it --------------------------------------------------------------

    def _server_goes_away(self) -> None:
        self._around.restart_server()

    def _deaf(self) -> None:
        self._deafen()

    def _deaf_to_the_workers(self) -> None:
        self._deafen("clients")

    def _deaf_to_the_server(self) -> None:
        self._deafen("server")

    def _deafen(self, *to: str) -> None:
        assert self._around.proxy is not None
        assert self._census is not None
        with self._census.not_at_the_server():
            self._around.proxy.deafen(*to)
            self._last_a_spell()
            if self.random.random() < 0.5:
                self._around.proxy.hear()
            else:
                self._around.proxy.cut()

    def _connections_reset(self) -> None:
        assert self._around.proxy is not None
        self._around.proxy.reset()

    # --- afterwards --------------------------------------------------------------------------------

    def unrecovered(self) -> list[Fault]:
        """Return the faults after which no job has been done."""
        return [fault for fault in self.faults if self._feeder.again_after(fault.over_at) is None]

    def _wait_for_the_rest(self) -> None:
        def rest() -> bool:
            counts = self._counts()
            return not counts["queued"] + counts["running"]

        wait_until(rest, f"all jobs are done; at last {self._counts()}", CALM)

    def _stop(self, supervised: Supervised) -> None:
        wait_until(self._is_complete, "the fleet is complete again", CALM)
        code = supervised.stop()
        stopped = self._witness.events("supervisor.stopped")[-1]
        # On a busy machine one may have to be killed in the stop; the history tells whether in time.
        assert code == bool(stopped["killed"]), f"it ended with {code}: {stopped}"

    def _is_complete(self) -> bool:
        groups = self._witness.status()["groups"].values()
        return all(it["ready"] >= it["count"] for it in groups)  # a roll has one more

    def _check(self, seconds: float) -> Figures:
        [(self.jobs,)] = self.database.rows("SELECT count(*) FROM jobs")
        rows = {number for (number,) in self.database.rows("SELECT id FROM jobs")}
        lost = self._feeder.added - rows
        assert not lost, f"a job was lost: {lost} were added, and are not there"
        figures = super()._check(seconds)
        self._killed = history.check(
            self._witness.lines(), grace=GRACE, ready_timeout=READY_TIMEOUT
        )
        if self._census is not None:
            assert not self._census.above, f"over budget: {self._census.above}"
            assert self._census.looks, "over budget or not: nobody has looked"
        self._nothing_is_left()
        return figures

    def _nothing_is_left(self) -> None:
        left = {pid: title(pid) for pid in self._witness.processes()}
        assert not left, f"left running: {left}"
        runtime_dir = self._witness.runtime_dir
        files = [str(path.relative_to(runtime_dir)) for path in runtime_dir.rglob("*")]
        assert not [name for name in files if name != "lock"], f"left behind: {files}"
        sockets = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace")
        assert str(runtime_dir) not in sockets, f"left open: a socket in {runtime_dir}"

    def table(self) -> str:
        """Return the faults by kind: injected, recovered, lost, and how long work was at rest."""
        table = PrettyTable(["fault", "injected", "recovered", "lost", "jobs again after, at most"])
        table.align = "r"
        table.align["fault"] = "l"
        lost = Counter(fault.name for fault in self.unrecovered())
        longest: dict[str, float] = {}
        for fault in self.faults:
            after = self._feeder.again_after(fault.over_at) or 0.0
            longest[fault.name] = max(longest.get(fault.name, 0.0), after)
        for name, count in sorted(self.kinds.items()):
            words = name.replace("_", " ")
            table.add_row([words, count, count - lost[name], lost[name], f"{longest[name]:.1f} s"])
        total = self.kinds.total()
        table.add_row(["all", total, total - lost.total(), lost.total(), ""])
        return str(table)

    def summary(self) -> str:
        """Return what else there is to say of a run that held."""
        lines = [
            f"{self._killed} kills by the supervisor, each explained and not before its time",
            f"{self._eaters} workers killed for memory",
            f"{self._witness.untold} lines had no room in the log, {self._witness.torn} were torn",
        ]
        if (census := self._census) is not None:
            lines.append(
                f"never over budget ({BUDGET}) in {census.looks} looks: at most"
                f" {census.most['server']} by the server's count, {census.most['workers']} by the"
                " workers'"
            )
        lines += [f"left out: {why}" for why in self._around.missing]
        return "\n".join(lines)


@click.command()
@click.option("--jobs", default=300, show_default=True, help="How many there are at first.")
@click.option("--seconds", default=60.0, show_default=True, help="How long faults go on.")
@click.option("--seed", default=None, type=int, help="Default: a random one, which is printed.")
@click.option("--pool", type=click.Choice(["sqlite", "postgresql"]), default="sqlite")
def main(jobs: int, seconds: float, seed: int | None, pool: str) -> None:
    """Carry out jobs while everything fails; check that each was done once, and the log."""
    seed = random.randrange(1 << 32) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="nemesis-"))
    click.echo(f"seed {seed}, {pool}, in {folder}")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(own_server()) if pool == "postgresql" else None
        around = stack.enter_context(Surroundings.around(folder, server))
        nemesis = Nemesis(around, jobs=jobs, seconds=seconds, seed=seed)
        click.echo(nemesis.run())
        click.echo(nemesis.table())
        click.echo(nemesis.summary())
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
