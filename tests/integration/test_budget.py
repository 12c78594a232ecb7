"""One budget over all workers, shown with real processes: what a server counts, and who gets what."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.servers import PostgreSQLServer, postgresql  # noqa: F401
from tests.supervised import Supervised, group, wait_until

COUNT = 4
MAX_OPEN = 10
BUDGET = 20
SAMPLE = 0.02

# Ten threads with short transactions; how many each worker has had is told by its file.
HAMMER = """
import os, threading, time
from workers.pool import PoolTimeout
def run(worker):
    folder = worker.options["folder"]
    query = worker.options.get("query", "select 1")
    pause = worker.options.get("pause", 0.005)
    counts = [0] * worker.options.get("threads", 10)
    started = time.monotonic()
    def hammer(index):
        while not worker.accepting.done:
            try:
                with worker.pools["main"].acquire() as conn:
                    conn.execute(query)
                    time.sleep(pause)
                    conn.commit()
            except PoolTimeout:
                worker.log.warning("hammer.starved")
                continue
            counts[index] += 1
    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(len(counts))]
    for thread in threads:
        thread.start()
    worker.ready()
    while not worker.accepting.wait(0.05):
        path = os.path.join(folder, worker.id)
        with open(path + ".new", "w") as file:
            file.write(f"{time.monotonic()} {sum(counts)}")
        os.replace(path + ".new", path)
    for thread in threads:
        thread.join()
"""
# Holds as many connections as a file says, and says how many it has got.
HOLDER = """
import os, time
from workers.pool import PoolTimeout
def run(worker):
    folder = worker.options["folder"]
    held = []
    worker.ready()
    while not worker.accepting.wait(0.01):
        try:
            wanted = int(open(os.path.join(folder, worker.id + ".wanted")).read() or 0)
        except FileNotFoundError:
            wanted = 0
        while len(held) > wanted:
            worker.pools["main"].put(held.pop())
        if len(held) < wanted:
            try:
                held.append(worker.pools["main"].get(timeout=0.2))
            except PoolTimeout:
                pass
        with open(os.path.join(folder, worker.id + ".new"), "w") as file:
            file.write(str(len(held)))
        os.replace(os.path.join(folder, worker.id + ".new"), os.path.join(folder, worker.id))
    for conn in held:
        worker.pools["main"].put(conn)
"""
# The same in asyncio.
HOLDER_ASYNC = (
    HOLDER.replace("def run", "import asyncio\nasync def run")
    .replace("not worker.accepting.wait(0.01)", "not worker.accepting.done")
    .replace(
        "        try:\n            wanted",
        "        await asyncio.sleep(0.01)\n        try:\n            wanted",
    )
    .replace('worker.pools["main"]', 'await worker.pools["main"]')
)


def pool(url: str, **keys: Any) -> str:
    """Return the TOML of the pool."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"url": url, **keys}.items()]
    return "\n".join(["[pools.main]", *lines, ""])


class Budgeted(Supervised):
    """A supervisor whose workers use one pool under a budget."""

    def __init__(
        self, folder: Path, code: str, url: str, *, count: int, options: dict[str, Any] | None = None,
        **keys: Any,
    ) -> None:  # fmt: skip
        self.counts = folder / "counts"
        self.counts.mkdir()
        options = {"folder": str(self.counts), **(options or {})}
        super().__init__(
            folder,
            pool(url, **keys)
            + group("web", "app:run", options, count=count, min_ready_time="100ms"),
            supervisor='name = "budgeted"\ngrace = "5s"',
            modules={"app": code},
        )

    def acquired(self, worker: str) -> tuple[float, int]:
        """When, and how many connections that worker had had by then."""
        try:
            when, count = (self.counts / worker).read_text().split()
        except FileNotFoundError:
            return 0.0, 0
        return float(when), int(count)

    def rates(self, seconds: float) -> dict[str, float]:
        """How many connections a second each worker gets, over that time."""
        workers = list(self.worker_pids())
        before = {worker: self.acquired(worker) for worker in workers}
        wait_until(
            lambda: all(self.acquired(w)[0] >= before[w][0] + seconds for w in workers),
            "every worker counts on",
        )
        rates = {}
        for worker in workers:
            when, count = self.acquired(worker)
            rates[worker] = (count - before[worker][1]) / (when - before[worker][0])
        return rates

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def ready_counts(self) -> list[int]:
        """How many workers were ready after each event of the roll."""
        ready: set[str] = set()
        counts: list[int] = []
        is_rolling = False
        for line in self.lines():
            is_rolling |= line["event"] == "reload.started"
            if line["event"] == "worker.ready":
                ready.add(line["worker"])
            elif line["event"] in ("worker.cancelled", "worker.failed", "worker.exited"):
                ready.discard(line["worker"])
            if is_rolling:
                counts.append(len(ready))
            if line["event"] == "reload.done":
                break
        return counts

    def granted(self) -> int:
        """How many leases are out."""
        return int(self.status()["budgets"]["main"]["granted"])

    def want(self, worker: str, count: int) -> None:
        """Have a holder hold that many, if it gets them."""
        path = self.counts / f"{worker}.wanted"
        path.with_suffix(".tmp").write_text(str(count))
        path.with_suffix(".tmp").replace(path)

    def holds_one(self, worker: str) -> None:
        """Have a holder hold one connection, and wait until it does."""
        self.want(worker, 1)
        wait_until(lambda: self.holds(worker) == 1, f"{worker} holds its own")

    def holds(self, worker: str) -> int:
        """How many a holder has."""
        try:
            return int((self.counts / worker).read_text())
        except FileNotFoundError:
            return 0


class Sampler:
    """What the server counts, every 20 ms, over a connection of its own."""

    def __init__(self, server: PostgreSQLServer) -> None:
        self.samples: list[int] = []
        self.most: dict[str, int] = {}
        self._conn = server.connect()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._conn.close()

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE):
            rows = self._conn.execute(
                "select application_name, count(*) from pg_stat_activity "
                "where application_name like 'budgeted/%' group by 1"
            ).fetchall()
            self.samples.append(sum(count for _, count in rows))
            if self.samples[-1] == max(self.samples):
                self.most = dict(rows)


@pytest.fixture(scope="module")
def server(postgresql: PostgreSQLServer) -> Iterator[PostgreSQLServer]:  # noqa: F811  # the fixture
    """A server that takes 40 connections of the workers, and refuses one more."""
    with contextlib.closing(postgresql.connect()) as conn:
        conn.execute("create role worker login connection limit 40")
        yield postgresql
        conn.execute("drop role worker")


@pytest.mark.slow
def test_the_server_never_counts_more_than_the_budget(tmp_path, server):
    """Kills, a rolling restart and a scale under load: never above it, and nobody starves."""
    with (
        Sampler(server) as sampler,
        Budgeted(
            tmp_path,
            HAMMER,
            server.url(user="worker"),
            count=COUNT,
            max_open=MAX_OPEN,
            budget=BUDGET,
        ) as budgeted,
    ):
        budgeted.ready()
        assert budgeted.status()["budgets"]["main"]["budget"] == BUDGET
        wait_until(lambda: max(sampler.samples) >= BUDGET - 1, "the budget is used")
        rates = budgeted.rates(3.0)
        assert max(rates.values()) <= 1.5 * min(rates.values()), rates

        for _ in range(3):
            worker, pid = next(iter(budgeted.worker_pids().items()))
            os.kill(pid, signal.SIGKILL)
            budgeted.event("worker.exited", worker=worker)
            wait_until(
                lambda: budgeted.status()["groups"]["web"]["ready"] == COUNT, "it is replaced"
            )
            budgeted.rates(0.5)

        budgeted.signal(signal.SIGHUP)
        budgeted.event("reload.done", generation=2)
        assert min(budgeted.ready_counts()) >= COUNT
        budgeted.rates(0.5)

        assert budgeted.command("scale", "web=6", "--wait").returncode == 0
        # The surplus comes to where it is wanted within moments, and then stays there.
        budgeted.rates(2.0)
        rates = budgeted.rates(3.0)
        assert len(rates) == 6
        assert max(rates.values()) <= 1.5 * min(rates.values()), rates
        assert budgeted.stop() == 0
        assert not budgeted.events("group.failed")
        assert not budgeted.events("worker.failed")
    print("most", max(sampler.samples), "samples", len(sampler.samples))
    assert max(sampler.samples) <= BUDGET, sampler.most


def holders(
    folder: Path, code: str = HOLDER, *, count: int = 2, budget: int = 7, **keys: Any
) -> Budgeted:
    """Return workers that hold what they are told to, without any server."""
    return Budgeted(
        folder,
        code,
        f"sqlite:///{folder}/held.db",
        count=count,
        max_open=MAX_OPEN,
        budget=budget,
        leak_threshold="0",
        **keys,
    )


@pytest.mark.parametrize("code", [HOLDER, HOLDER_ASYNC], ids=["threads", "asyncio"])
def test_leases_go_where_they_are_wanted_and_come_back(tmp_path, code):
    """One gets what the other leaves, gives back what is more than fair, and keeps the rest."""
    with holders(tmp_path, code) as held:
        held.ready()
        assert held.granted() == 6  # one is kept for a rolling restart
        held.want("web-1", 10)
        wait_until(lambda: held.holds("web-1") == 5, "all but the other's minimum, and the roll's")
        held.want("web-2", 10)
        wait_until(lambda: held.status()["workers"][1]["pools"]["main"]["waiting"], "it waits")
        # What is in use is not taken away; as it comes back, it goes to where it is fair.
        assert held.holds("web-1") == 5
        held.want("web-1", 2)
        wait_until(lambda: held.holds("web-2") == 4, "what the other one has given back")
        held.want("web-1", 10)
        held.want("web-2", 3)
        wait_until(lambda: (held.holds("web-1"), held.holds("web-2")) == (3, 3), "half each")
        status = held.status()
        assert status["budgets"] == {"main": {"budget": 7, "granted": 6, "open": 6}}
        assert held.stop() == 0


@pytest.mark.parametrize("code", [HOLDER, HOLDER_ASYNC], ids=["threads", "asyncio"])
def test_all_are_killed_at_once_and_all_come_back(tmp_path, code):
    """Who finds no lease at all waits for one before it begins, and then has it."""
    with holders(tmp_path, code, budget=3) as held:
        held.ready()
        for worker in ("web-1", "web-2"):
            held.holds_one(worker)
        for pid in held.worker_pids().values():
            os.kill(pid, signal.SIGKILL)
        held.event("worker.ready", count=4)
        for worker in held.worker_pids():
            held.holds_one(worker)
        assert held.stop() == 0


def test_a_supervisor_that_stands_still_takes_nothing_from_anybody(tmp_path):
    """Workers go on with what they hold; who wants more gets it when the supervisor is back."""
    with holders(tmp_path) as held:
        held.ready()
        held.signal(signal.SIGSTOP)
        held.want("web-1", 3)
        wait_until(lambda: held.holds("web-1") == 3, "what it has been granted")
        held.want("web-1", 5)
        held.want("web-2", 1)
        wait_until(lambda: held.holds("web-2") == 1, "the other one's")
        assert held.holds("web-1") == 3
        held.signal(signal.SIGCONT)
        wait_until(lambda: held.holds("web-1") == 5, "the rest")
        assert held.stop() == 0


def test_a_reload_changes_the_budget(tmp_path):
    """The new one is in force with the new generation, and is told as an event."""
    with holders(tmp_path, count=1, budget=4) as held:
        held.ready()
        text = held.config.read_text(encoding="utf-8")
        held.config.write_text(text.replace("budget = 4", "budget = 9"), encoding="utf-8")
        assert held.command("reload", "--wait").returncode == 0
        changed = held.event("budget.changed")
        assert (changed["pool"], changed["before"], changed["budget"]) == ("main", 4, 9)
        assert held.status()["budgets"]["main"]["budget"] == 9
        (worker,) = held.worker_pids()
        held.want(worker, 10)
        wait_until(lambda: held.holds(worker) == 8, "all but what is kept for a roll")
        assert held.stop() == 0


def test_a_scale_that_cannot_fit_is_refused(tmp_path):
    """With the arithmetic, and nothing happens; what just fits is done."""
    with holders(tmp_path, budget=4) as held:
        held.ready()
        done = held.command("scale", "web=4")
        assert done.returncode == 1
        assert "pools.main.budget" in done.stderr
        assert "(4 + 1) x 1 = 5 connections, and the budget is 4" in done.stderr
        assert held.command("scale", "web=3", "--wait").returncode == 0
        assert len(held.worker_pids()) == 3
        assert held.stop() == 0


# Holds all that it gets in queries that would take a minute.
SLEEPER = """
import threading
def run(worker):
    def sleep():
        with worker.pools["main"].acquire(timeout=60) as conn:
            conn.execute("select pg_sleep(60)")
    if worker.id == "web-1":
        for _ in range(3):
            threading.Thread(target=sleep, daemon=True).start()
    worker.ready()
    worker.accepting.wait()
"""
SLEEPER_ASYNC = """
import asyncio
async def run(worker):
    async def sleep():
        async with worker.pools["main"].acquire(timeout=60) as conn:
            await conn.execute("select pg_sleep(60)")
    if worker.id == "web-1":
        worker.tasks = [asyncio.create_task(sleep()) for _ in range(3)]
    worker.ready()
    await worker.accepting
"""


@pytest.mark.parametrize("code", [SLEEPER, SLEEPER_ASYNC], ids=["threads", "asyncio"])
def test_what_a_killed_worker_has_left_running_is_ended_at_the_server(tmp_path, server, code):
    """By its sibling, within the budget; a namesake on another host is left alone."""
    with (
        Sampler(server) as sampler,
        contextlib.closing(server.connect(user="worker")) as other,
        Budgeted(
            tmp_path, code, server.url(user="worker"), count=2, max_open=4, budget=6,
            leak_threshold="0",
        ) as budgeted,
    ):  # fmt: skip
        budgeted.ready()
        other.execute("set application_name = 'budgeted/web-1#00000000'")

        def sleeping() -> int:
            with contextlib.closing(server.connect()) as conn:
                query = (
                    "select count(*) from pg_stat_activity where usename = 'worker'"
                    " and application_name like 'budgeted/web-1#%' and query like '%sleep%'"
                )
                return int(conn.execute(query).fetchone()[0])

        wait_until(lambda: sleeping() == 3, "three queries run")
        os.kill(budgeted.worker_pids()["web-1"], signal.SIGKILL)
        wait_until(lambda: sleeping() == 0, "nobody runs them any more", 40.0)
        assert other.execute("select 1").fetchone() == (1,)
        wait_until(lambda: budgeted.granted() <= 5, "its leases are back")
        assert budgeted.stop() == 0
    assert max(sampler.samples) <= 6, sampler.most
