"""Those who watch while everything fails: what the log says, what the database counts, what is done."""

from __future__ import annotations

__all__ = ["Census", "Feeder", "Witness"]

import contextlib
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from tests.servers import PostgreSQLServer
from tests.supervised import Supervised, is_alive, session
from tests.workers.jobs.databases import Database


class Witness(Supervised):
    """A supervisor whose log may lie on a full disk: what is missing there is asked for afterwards.

    Attributes:
        torn: lines of the log that cannot be read, because there was no room for the rest.
        untold: lines that the log says it had no room for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.torn = self.untold = 0
        self._heard_of: set[tuple[str, ...]] = set()
        self._by_name: dict[str, list[dict[str, Any]]] = {}
        self._living: set[int] = set()  # workers, the last time that somebody looked
        self._at_start = 0  # how many lines were of supervisors before this one

    def start(self, **kwargs: Any) -> Supervised:
        """Start it, or its successor."""
        if self.log_path.exists():
            self._at_start = len(self.lines())
        return super().start(**kwargs)

    def lines(self) -> list[dict[str, Any]]:
        """Return every line of the log that can be read, and what `recall` has brought."""
        for line in self._new_lines():
            try:
                self._hear(json.loads(line))
            except ValueError:
                self.torn += 1
        return self._lines

    def recall(self) -> None:
        """Ask the supervisor for the events that its log had no room for."""
        self.lines()
        done = self.command("events")
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            self._hear(json.loads(line))

    def _hear(self, line: dict[str, Any]) -> None:
        # The log has the level beside what the event is; the time is to the microsecond.
        key = tuple(str(line.get(name)) for name in ("time", "event", "worker", "pid"))
        if line["event"] == "log.lines_lost":
            self.untold += line["lines"]
        elif key not in self._heard_of:
            self._heard_of.add(key)
            self._lines.append(line)
            self._by_name.setdefault(line["event"], []).append(line)
            if line["event"] == "worker.spawned":
                self._living.add(line["pid"])

    def events(self, name: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Return what the log says of that name, without a look at everything else."""
        lines = self.lines()
        if name is not None:
            lines = self._by_name.get(name, [])
        return [line for line in lines if all(line.get(key) == fields[key] for key in fields)]

    def victims(self) -> list[int]:
        """Return the pids of the workers that live, those of a killed supervisor too."""
        self.lines()
        self._living = {pid for pid in self._living if session(pid) in self.sessions}
        return sorted(self._living)

    def is_its_worker(self, pid: int) -> bool:
        """Tell whether this supervisor has spawned it, not one before it."""
        lines = self.lines()[self._at_start :]
        return any(line["event"] == "worker.spawned" and line["pid"] == pid for line in lines)

    def unheard_ends(self) -> set[int]:
        """Return the pids of this supervisor's workers that have ended, and it has not said so."""
        lines = self.lines()[self._at_start :]
        spawned = {line["pid"] for line in lines if line["event"] == "worker.spawned"}
        exited = {line["pid"] for line in lines if line["event"] == "worker.exited"}
        return {pid for pid in spawned - exited if not is_alive(pid)}


class Feeder(threading.Thread):
    """Keeps jobs in the queue until it is told to stop, and notes when how many were done.

    Args:
        database: where the jobs are; may be away or full now and then.
        payloads: what is added, again and again.
        ahead: how many seconds the workers' clock is ahead of ours, where that is what dates jobs.
    """

    LOW = 40  # jobs
    BETWEEN_LOOKS = 0.25  # seconds

    def __init__(self, database: Database, payloads: list[str], ahead: Callable[[], int]) -> None:
        super().__init__(name="feeder")
        self.added: set[int] = set()  # whose adding was acknowledged
        self.done: list[tuple[float, int]] = []  # monotonic time, jobs done by then
        self._database = database
        self._payloads = itertools.cycle(payloads)
        self._ahead = ahead
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Add no more."""
        self._end.set()
        self.join()

    def run(self) -> None:
        """Feed."""
        while not self._end.wait(self.BETWEEN_LOOKS):
            with contextlib.suppress(*_away()):  # nothing was added then
                self._look()

    def _look(self) -> None:
        counts = self._database.counts()
        self.done.append((time.monotonic(), counts["done"]))
        if counts["queued"] < self.LOW:
            payloads = [next(self._payloads) for _ in range(self.LOW)]
            self.added |= set(self._database.add(*payloads, due_in=self._ahead()))

    def again_after(self, when: float) -> float | None:
        """Return how many seconds after a moment the next job was done; None: none was."""
        before = max((done for at, done in self.done if at <= when), default=0)
        return next((at - when for at, done in self.done if at > when and done > before), None)


class Census(threading.Thread):
    """Counts sessions at the server, and connections on the workers' side, while a budget holds.

    A session that is closed still shows for a moment, and so does its successor; only those count
    that two looks have seen. While a proxy is deaf the server does not hear of any end: then only
    the workers' side is held against the budget.

    Args:
        server: which.
        database: the name of the database that is the workers'.
        port: where their connections go.
        budget: how many there may be.
    """

    BETWEEN_LOOKS = 0.3  # seconds

    def __init__(self, server: PostgreSQLServer, database: str, port: int, budget: int) -> None:
        super().__init__(name="census")
        self.most = {"server": 0, "workers": 0}
        self.looks = 0
        self.above: list[str] = []  # what was above the budget, in words
        self._server = server
        self._database = database
        self._port = port
        self._budget = budget
        self._deaf_until = 0.0  # monotonic
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    @contextlib.contextmanager
    def not_at_the_server(self) -> Iterator[None]:
        """Do not believe the server in this block, nor until it has heard what it has missed."""
        self._deaf_until = math.inf
        try:
            yield
        finally:
            self._deaf_until = time.monotonic() + 4 * self.BETWEEN_LOOKS

    def run(self) -> None:
        """Look, again and again."""
        while not self._end.is_set():
            # The server is restarted now and then.
            with contextlib.suppress(*_away()), contextlib.closing(self._server.connect()) as conn:
                self._look_with(conn)

    def _look_with(self, conn: Any) -> None:
        seen: dict[str, set[Any]] = {"server": set(), "workers": set()}
        while not self._end.wait(self.BETWEEN_LOOKS):
            found = {"server": self._sessions(conn), "workers": set(_connections_to(self._port))}
            self.looks += 1
            if time.monotonic() < self._deaf_until:
                found["server"] = set()
            for side, now in found.items():
                lasting = len(now & seen[side])
                self.most[side] = max(self.most[side], lasting)
                if lasting > self._budget:
                    self.above.append(f"{lasting} of {self._budget} by the {side}'s count")
            seen = found

    def _sessions(self, conn: Any) -> set[Any]:
        rows = conn.execute(
            "SELECT pid, backend_start FROM pg_stat_activity WHERE datname = %s"
            " AND client_addr IS NOT NULL",  # ours come through the Unix socket
            [self._database],
        ).fetchall()
        return set(rows)


def _connections_to(port: int) -> Iterator[str]:
    """Yield the local address of each established connection to a port of this machine's."""
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, local, remote, status, *_ = line.split()
        if status == "01" and int(remote.rpartition(":")[2], 16) == port:
            yield local


def _away() -> tuple[type[Exception], ...]:
    """What is raised when a database is away, full, or locked."""
    import sqlite3

    import psycopg

    return (sqlite3.OperationalError, psycopg.OperationalError)
