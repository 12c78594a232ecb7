"""Workers in asyncio: their pools are awaited, and kept, seen and closed as those of all others."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.test_budget import Budgeted, Sampler
from tests.integration.test_monitoring import LISTEN, Scraped
from tests.integration.test_sockets import FREE, socket_table, where
from tests.integration.test_web import get
from tests.servers import postgresql  # noqa: F401
from tests.servers_mysql_redis import redis_server  # noqa: F401
from tests.supervised import Supervised, group, wait_until

SQLITE_ENDLESS = (
    "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
)

# One that finishes what it has in hand, one that would never end, one that gives nothing back.
STOPS = """
import asyncio
from workers import AsyncPool

async def finishes(worker, pool, started):
    with worker.job("finishes") as job:
        async with pool.acquire(job.ctx) as conn:
            started.set()
            await worker.accepting
            await asyncio.sleep(0.1)
            {query}
    worker.log.info("app.finished")

async def never_ends(worker, pool, started):
    try:
        with worker.job("never ends") as job:
            async with pool.acquire(job.ctx) as conn:
                started.set()
                {endless}
    except BaseException as exc:
        worker.log.info("app.ended", kind=type(exc).__name__, cause=str(getattr(exc, "cause", "")),
                        behind=type(exc.__cause__).__name__)
        raise

async def leaks(worker, pool, started):
    worker.kept = await pool.get(leak_threshold=0.05)
    started.set()
    await asyncio.Event().wait()

async def run(worker):
    pool = worker.pools["main"]
    assert isinstance(pool, AsyncPool), pool
    for work in (finishes, never_ends, leaks):
        started = asyncio.Event()
        if work is leaks:
            worker.leaks = asyncio.create_task(leaks(worker, pool, started), name="leaker")
        else:
            worker.wg.go_async(work, worker, pool, started)
        await started.wait()
    worker.ready()
    await worker.accepting
"""


def sqlite(folder: Path) -> dict[str, str]:
    return {
        "url": f"sqlite:///{folder}/app.db",
        "query": 'await conn.execute("select 1")',
        "endless": f'await conn.execute_fetchall("{SQLITE_ENDLESS}")',
        "behind": "OperationalError",
    }


def on_postgresql(url: str) -> dict[str, str]:
    return {
        "url": url,
        "query": 'await conn.execute("select 1")',
        "endless": 'await conn.execute("select pg_sleep(3600)")',
        "behind": "QueryCanceled",
    }


def on_redis(url: str) -> dict[str, str]:
    return {
        "url": url,
        "query": "await conn.ping()",
        # Again and again: an answer that takes longer than 5 s is none, for the driver.
        "endless": 'while True: await conn.blpop("nothing", 1)',
        "behind": "ResponseError",
    }


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "redis"])
def database(request, tmp_path_factory):
    """What a worker does with a database, in its words."""
    if request.param == "sqlite":
        return sqlite(tmp_path_factory.mktemp("database"))
    if request.param == "postgresql":
        return on_postgresql(request.getfixturevalue("postgresql").url())
    return on_redis(request.getfixturevalue("redis_server").url(tcp=True))


def test_a_stop_lets_finish_cancels_and_reports(tmp_path, database):
    """Work in flight goes on; what has no end is cancelled; who gives nothing back is named."""
    config = f'[pools.main]\nurl = "{database["url"]}"\nmax_open = 4\n' + group("web", "app:run")
    code = STOPS.format(**database)
    with Scraped(
        tmp_path,
        config,
        supervisor=f'grace = "2500ms"\nabort_margin = "1200ms"\n{LISTEN}',
        modules={"app": code},
    ) as supervised:
        supervised.ready()
        leak = supervised.event("pool.leak", worker="web-1")
        assert (leak["pool"], leak["group"]) == ("main", "web")
        assert "in leaks" in leak["stack"]

        (shown,) = supervised.status()["workers"]
        assert (shown["pools"]["main"]["in_use"], shown["in_flight"]) == (3, 2)
        assert shown["pools"]["main"]["leaks"] == 1
        assert supervised.value("db_client_connection_count", "web", "main", "used") == 3
        assert (
            supervised.value("db_client_connection_create_time_seconds_count", "web", "main") == 3
        )
        assert supervised.value("supervisor_pool_leaks_total", "web", "main") == 1

        dump = supervised.command("dump", "web-1", "--json")
        loans = {loan["thread"]: loan for loan in json.loads(dump.stdout)["loans"]}
        assert len(loans) == 3
        assert "in leaks" in loans["leaker"]["stack"]
        assert "Event.wait" in loans["leaker"]["now"]

        assert supervised.stop() == 0
        assert supervised.life("web-1")[-4:] == ["cancelled", "acknowledged", "drained", "exited"]
        (drained,) = supervised.events("worker.drained")
        report = drained["reports"]["main"]
        (leaked,) = report["leaked"]
        assert leaked["thread"] == "leaker"
        assert "in leaks" in leaked["stack"]
        assert report["closed"] >= 2
        (ended,) = supervised.events("app.ended")
        assert (ended["kind"], ended["cause"]) == ("Cancelled", "stop")
        assert ended["behind"] == database["behind"]
        order = [
            line["event"]
            for line in supervised.events()
            if line["event"] in ("app.finished", "app.ended", "worker.drained")
        ]
        assert order == ["app.finished", "app.ended", "worker.drained"]


# --- the budget ----------------------------------------------------------------------------------

# Ten tasks with short transactions; how the pool is set is told by a file.
HAMMER = """
import asyncio, json, os, time
from workers.pool import PoolTimeout

async def hammer(worker, counts, index):
    while not worker.accepting.done:
        try:
            async with worker.pools["main"].acquire() as conn:
                await conn.execute("select pg_sleep(0.005)")
        except PoolTimeout:
            worker.log.warning("hammer.starved")
            continue
        counts[index] += 1

async def run(worker):
    counts = [0] * 10
    for index in range(10):
        worker.wg.go_async(hammer, worker, counts, index)
    worker.ready()
    path = os.path.join(worker.options["folder"], worker.id)
    while not worker.accepting.done:
        settings = worker.pools["main"]._state.settings
        with open(path + ".new", "w") as file:
            file.write(f"{time.monotonic()} {sum(counts)}")
        os.replace(path + ".new", path)
        with open(path + ".acquire_timeout", "w") as file:
            file.write(str(settings.acquire_timeout))
        await asyncio.sleep(0.02)
"""


def test_the_server_never_counts_more_than_the_budget(tmp_path, postgresql):  # noqa: F811
    """Two workers that want more than there is, a kill, a change of the pool's size and of a time."""
    with (
        Sampler(postgresql) as sampler,
        Budgeted(
            tmp_path, HAMMER, postgresql.url(), count=2, max_open=8, budget=10, acquire_timeout=4.0
        ) as budgeted,
    ):
        budgeted.ready()
        wait_until(lambda: max(sampler.samples) >= 9, "the budget is used")
        budgeted.rates(0.3)

        worker, pid = next(iter(budgeted.worker_pids().items()))
        os.kill(pid, signal.SIGKILL)
        budgeted.event("worker.exited", worker=worker)
        wait_until(lambda: budgeted.status()["groups"]["web"]["ready"] == 2, "it is replaced")
        budgeted.rates(0.3)
        assert max(sampler.samples) <= 10, sampler.most

        text = budgeted.config.read_text(encoding="utf-8")
        text = text.replace("max_open = 8", "max_open = 2").replace("= 4.0", "= 5.5")
        budgeted.config.write_text(text, encoding="utf-8")
        done = budgeted.command("reload", "--wait")
        assert "nobody replaced" in done.stdout, done.stderr
        told = [budgeted.counts / f"{each}.acquire_timeout" for each in budgeted.worker_pids()]
        wait_until(
            lambda: {path.read_text() for path in told} == {"5.5"}, "they have the other time-out"
        )
        wait_until(
            lambda: all(
                w["pools"]["main"]["max_open"] == w["pools"]["main"]["open"] == 2
                for w in budgeted.status()["workers"]
            ),
            "each has two",
        )
        wait_until(lambda: sampler.samples[-1] <= 4, "the server counts no more")
        budgeted.rates(0.3)
        assert budgeted.stop() == 0
        assert not budgeted.events("worker.failed")
        for drained in budgeted.events("worker.drained"):
            assert drained["reports"]["main"]["leaked"] == []
    assert max(sampler.samples) <= 10, sampler.most


# --- what goes with which entry point ------------------------------------------------------------

KINDS = """
import asyncio, sys

async def run(worker):
    told = {name: type(pool).__name__ for name, pool in worker.pools.items()}
    worker.log.info("app.pools", **told)

    def in_a_thread():
        with worker.pools["threads"].acquire(worker.ctx) as conn:
            return conn.execute("select 6 * 7").fetchone()[0]

    async with worker.pools["main"].acquire(worker.ctx) as conn:
        cursor = await conn.execute("select ?", (await asyncio.to_thread(in_a_thread),))
        (answer,) = await cursor.fetchone()
    worker.log.info("app.answer", answer=answer)
    worker.ready()
    await worker.accepting

def plain(worker):
    with worker.pools["main"].acquire() as conn:
        conn.execute("select 1")
    ours = {"workers.aio", "workers.pool.aio", "workers.pool.drivers.aio", "aiosqlite"}
    worker.log.info("app.loaded", loaded=sorted(ours & set(sys.modules)))
    worker.ready()
    worker.accepting.wait()

class Called:
    async def __call__(self, worker):
        await run(worker)

called = Called()

async def app(scope, receive, send):
    if scope["type"] == "http":
        worker, job = scope["state"]["worker"], scope["state"]["job"]
        async with worker.pools["main"].acquire(job.ctx) as conn:
            cursor = await conn.execute("select 6 * 7")
            (answer,) = await cursor.fetchone()
        text = f"{answer} {type(worker.pools['threads']).__name__}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text})
"""


def two_pools(folder: Path, url: str = "", more: str = "") -> str:
    return (
        f'[pools.main]\nurl = "{url or f"sqlite:///{folder}/main.db"}"\n{more}'
        f'[pools.threads]\nurl = "sqlite:///{folder}/threads.db"\nblocking = true\n'
    )


def test_pools_are_awaited_but_for_those_that_are_to_block(tmp_path):
    """In an `async def`, in an object that is called as one, in an ASGI application; nowhere else."""
    config = two_pools(tmp_path) + group("run", "kinds:run") + group("called", "kinds:called")
    # Of another template: what others need is not loaded for who does not await.
    config += group("plain", "kinds:plain").replace("run =", 'env = { APART = "1" }\nrun =')
    config += group("web", "kinds:app", sockets=["web"]).replace("run =", "app =")
    config += socket_table(FREE)
    with Supervised(tmp_path, config, modules={"kinds": KINDS}) as supervised:
        supervised.ready()
        for worker in ("run-1", "called-1"):
            told = supervised.event("app.pools", worker=worker)
            assert (told["main"], told["threads"]) == ("AsyncPool", "Pool")
            assert supervised.event("app.answer", worker=worker)["answer"] == 42
        assert get(where(supervised)) == (200, "42 Pool")
        assert supervised.event("app.loaded")["loaded"] == []
        assert supervised.stop() == 0
        for drained in supervised.events("worker.drained"):
            assert set(drained["reports"]) == {"main", "threads"}


def test_a_database_without_a_driver_for_asyncio_is_told_with_the_remedy(tmp_path):
    """By `check --import`, and by the worker."""
    config = two_pools(tmp_path, "mysql://app@localhost/orders") + group(
        "jobs", "kinds:run", max_restarts=0
    )
    remedy = (
        'pool "main": there is no driver of mysql for asyncio: set blocking = true in '
        "[pools.main], and use it in threads (asyncio.to_thread)"
    )
    supervised = Supervised(tmp_path, config, modules={"kinds": KINDS})
    done = supervised.command("check", "--import")
    assert done.returncode == 78
    assert f"workers.jobs.run: {remedy}" in done.stderr
    with supervised:
        failed = supervised.event("worker.failed")
        assert failed["error"].endswith(remedy)
        supervised.event("group.failed")
        assert supervised.stop() == 1
    text = supervised.config.read_text(encoding="utf-8")
    supervised.config.write_text(text.replace('orders"\n', 'orders"\nblocking = true\n', 1))
    assert supervised.command("check", "--import").returncode == 0


# --- the end of the loop --------------------------------------------------------------------------

STUBBORN = """
import asyncio, sys, time

async def stubborn(worker):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            worker.log.info("app.will_not")

async def in_a_task():
    sys.exit(7)

async def at_the_end():
    try:
        await asyncio.Event().wait()
    finally:
        sys.exit(8)

async def run(worker):
    worker.tasks = [asyncio.create_task(work) for work in (stubborn(worker), at_the_end())]
    async with worker.pools["main"].acquire() as conn:
        await conn.execute("select 1")
    worker.ready()
    if worker.options.get("exits"):
        worker.tasks.append(asyncio.create_task(in_a_task()))
        await asyncio.Event().wait()
    await worker.accepting
"""


@pytest.mark.parametrize("exits", [False, True])
def test_a_task_that_cannot_be_cancelled_costs_no_report(tmp_path, exits):
    """Nobody waits for it for ever; it is said, the pools are closed, and the exit code is kept."""
    config = two_pools(tmp_path) + group(
        "web", "stubborn:run", {"exits": exits}, restart="never" if exits else "always"
    )
    with Supervised(
        tmp_path, config, supervisor='grace = "1s"', modules={"stubborn": STUBBORN}
    ) as supervised:
        supervised.ready()
        if exits:
            assert supervised.event("worker.exited")["code"] == 7
        supervised.stop()
        assert not supervised.events("worker.killed")
        assert supervised.event("worker.tasks_left")["count"] == 1
        (drained,) = supervised.events("worker.drained")
        assert drained["reports"]["main"] == {"closed": 1, "waited": 0, "leaked": []}
