"""The pool beside other pools and a bare fair hand-off, in one run: `python -m bench.pool`.

Connections do nothing unless the row says otherwise. Rounds of all contenders are interleaved, so
that what else the machine does hits them alike; a figure is the median of its rounds. Read ratios
within one run, never figures of two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import math
import statistics
import sys
import threading
import time
import warnings
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from prettytable import HRuleStyle, PrettyTable

from workers.pool import Pool, PoolClosed, PoolTimeout

FLOOR, OURS, PSYCOPG, SQLALCHEMY, DBUTILS = (
    "fair floor", "workers.Pool", "psycopg_pool", "SQLAlchemy", "DBUtils",
)  # fmt: skip
LOOPS = 20_000


class Idle:
    """A connection that does nothing, as much as each of the pools asks of one."""

    closed = False
    autocommit = False
    _pool: Any = None

    class pgconn:  # noqa: N801 (psycopg's name)
        transaction_status = 0
        status = 0

    @classmethod
    def connect(cls, *_args: Any, **_kwargs: Any) -> Idle:
        return cls()

    def cursor(self) -> Idle:
        return self

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass


class Floor:
    """The least that is fair: a stack, a queue, direct hand-off. Nothing else."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._idle = deque(Idle() for _ in range(size))
        self._waiting: deque[list[Any]] = deque()

    def get(self) -> Any:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            cell = [allocate_lock(), None]
            cell[0].acquire()
            self._waiting.append(cell)
        cell[0].acquire()
        return cell[1]

    def put(self, conn: Any) -> None:
        with self._lock:
            if self._waiting:
                cell = self._waiting.popleft()
                cell[1] = conn
                cell[0].release()
            else:
                self._idle.append(conn)

    def close(self) -> None:
        pass


class Contender:
    """One pool, reduced to the same three verbs. `block` is its own `with` form."""

    def __init__(
        self,
        get: Callable[[], Any],
        put: Callable[[Any], Any],
        close: Callable[[], Any],
        block: Callable[[], Any] | None = None,
    ) -> None:
        self.get, self.put, self.close, self.block = get, put, close, block


def make(name: str, size: int, url: str | None = None) -> Contender:
    """Make a pool of *size*, of idle connections or of PostgreSQL ones."""
    if name == FLOOR:
        floor = Floor(size)
        return Contender(floor.get, floor.put, floor.close)
    if name == OURS:
        pool = Pool.from_url(url, max_open=size) if url else Pool(Idle, max_open=size)
        return Contender(pool.get, pool.put, lambda: pool.close(1.0), pool.acquire)
    if name == PSYCOPG:
        return _psycopg_pool(size, url)
    if name == SQLALCHEMY:
        return _sqlalchemy(size, url)
    return _dbutils(size, url)


def _psycopg_pool(size: int, url: str | None) -> Contender:
    import psycopg
    import psycopg_pool

    connection_class: Any = psycopg.Connection if url else Idle
    pool = psycopg_pool.ConnectionPool(
        url or "",
        connection_class=connection_class,
        min_size=size,
        max_size=size,
        open=True,
        check=psycopg_pool.ConnectionPool.check_connection if url else None,
    )
    pool.wait()
    return Contender(pool.getconn, pool.putconn, pool.close, pool.connection)


def _sqlalchemy(size: int, url: str | None) -> Contender:
    from sqlalchemy.pool import QueuePool

    def connect() -> Any:
        import psycopg

        return psycopg.connect(url) if url else Idle()

    pool = QueuePool(connect, pool_size=size, max_overflow=0)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def block() -> Iterator[Any]:
        conn = pool.connect()
        try:
            yield conn
        finally:
            conn.close()

    return Contender(pool.connect, lambda conn: conn.close(), pool.dispose, block)


def _dbutils(size: int, url: str | None) -> Contender:
    from dbutils.pooled_db import PooledDB

    if url:
        import psycopg

        pool = PooledDB(psycopg, maxconnections=size, blocking=True, conninfo=url)
    else:
        pool = PooledDB(_FakeModule, maxconnections=size, blocking=True)
    return Contender(pool.connection, lambda conn: conn.close(), pool.close)


class _FakeModule:
    threadsafety = 1
    apilevel = "2.0"
    paramstyle = "pyformat"
    Error = OperationalError = InterfaceError = InternalError = Exception
    connect = Idle.connect


# -- what is measured


def pairs(pool: Contender) -> float:
    """Pairs of get and put per second of processor time, one thread.

    Not of the wall clock: it measures what the pool does, whatever else the machine has to do.
    """
    get, put = pool.get, pool.put
    put(get())
    began = time.thread_time()
    for _ in range(LOOPS):
        put(get())
    return LOOPS / (time.thread_time() - began)


def blocks(pool: Contender) -> float:
    """`with` blocks per second of processor time, one thread."""
    block = pool.block
    if block is None:
        return math.nan
    with block():
        pass
    began = time.thread_time()
    for _ in range(LOOPS):
        with block():
            pass
    return LOOPS / (time.thread_time() - began)


def crowd(
    pool: Contender, threads: int, seconds: float, work: Callable[[Any], object]
) -> tuple[float, float, float]:
    """Return acquires/s, p99 of the wait in s, and most/fewest acquires of a thread."""
    waits: list[list[float]] = [[] for _ in range(threads)]
    start = threading.Barrier(threads + 1)
    end = threading.Event()

    def run(mine: list[float]) -> None:
        start.wait()
        while not end.is_set():
            began = time.perf_counter()
            try:
                conn = pool.get()
            except Exception:
                mine.append(time.perf_counter() - began)
                continue
            mine.append(time.perf_counter() - began)
            try:
                work(conn)
            finally:
                pool.put(conn)

    crew = [threading.Thread(target=run, args=(mine,)) for mine in waits]
    for thread in crew:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    end.set()
    took = time.perf_counter() - began
    for thread in crew:
        thread.join()
    everything = sorted(wait for mine in waits for wait in mine)
    p99 = everything[int(len(everything) * 0.99)]
    counts = [len(mine) for mine in waits]
    return len(everything) / took, p99, max(counts) / max(1, min(counts))


def hold(_conn: Any) -> None:
    time.sleep(0.001)


def query(conn: Any) -> None:
    cursor = conn.cursor()
    cursor.execute("select 1")
    cursor.fetchone()
    cursor.close()
    conn.rollback()


def restart(pool: Contender, server: Any) -> tuple[float, float]:
    """Return failed operations, and the first good one after the server is up again, in s."""
    failed = 0
    end = threading.Event()
    lock = threading.Lock()
    good_at: list[float] = []

    def run() -> None:
        nonlocal failed
        while not end.is_set():
            try:
                conn = pool.get()
            except Exception:
                with lock:
                    failed += 1
                continue
            try:
                query(conn)
                good_at.append(time.perf_counter())
            except Exception:
                with lock:
                    failed += 1
            finally:
                with contextlib.suppress(Exception):
                    pool.put(conn)

    crew = [threading.Thread(target=run) for _ in range(8)]
    for thread in crew:
        thread.start()
    time.sleep(0.3)
    server.stop()
    time.sleep(0.5)
    server.start()
    up = time.perf_counter()
    deadline = up + 5.0
    while not any(at > up for at in good_at[-8:]) and time.perf_counter() < deadline:
        time.sleep(0.001)
    back = next((at for at in good_at if at > up), math.inf) - up
    time.sleep(0.2)
    end.set()
    for thread in crew:
        thread.join()
    return failed, back


def close_with_borrowed() -> str:
    """Close ours with three borrowed and a waiter."""
    pool = Pool(Idle, max_open=3)
    kept = [pool.get() for _ in range(3)]
    failed_at: list[float] = []

    def wait() -> None:
        with contextlib.suppress(PoolClosed):
            pool.get(timeout=5.0)
        failed_at.append(time.perf_counter())

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not pool.stats().waiting:
        time.sleep(0.001)
    began = time.perf_counter()
    report = pool.close(0.3)
    took = time.perf_counter() - began
    waiter.join()
    for conn in kept:
        pool.put(conn)
    return (
        f"returned after {took:.3f} s of 0.300 allowed, reports {len(report.leaked)}, "
        f"the waiter failed after {(failed_at[0] - began) * 1e3:.1f} ms"
    )


def time_out() -> tuple[float, float]:
    """Return the earliest and the p99 of 32 acquires with a time-out of 100 ms, in s late."""
    pool = Pool(Idle, max_open=1)
    kept = pool.get()
    late: list[float] = []

    def wait() -> None:
        for _ in range(4):
            began = time.perf_counter()
            with contextlib.suppress(PoolTimeout):
                pool.get(timeout=0.1)
            late.append(time.perf_counter() - began - 0.1)

    crew = [threading.Thread(target=wait) for _ in range(32)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    pool.put(kept)
    pool.close()
    late.sort()
    return late[0], late[int(len(late) * 0.99)]


# -- the table


class Table:
    """Rows of one figure each: a cell per contender, our ratio, what it must be."""

    def __init__(self, contenders: Sequence[str]) -> None:
        self._contenders = contenders
        self._table = PrettyTable(
            ["figure", *contenders, "must be", "ours"], hrules=HRuleStyle.FRAME
        )
        self._table.align = "r"
        self._table.align["figure"] = "l"

    def add(
        self,
        title: str,
        samples: dict[str, list[float]],
        show: Callable[[float], str],
        bound: str,
        verdict: Callable[[dict[str, float]], tuple[str, bool]],
    ) -> None:
        medians = {
            name: statistics.median(values)
            for name, values in samples.items()
            if values and not math.isnan(values[0])
        }
        ratio, well = verdict(medians) if OURS in medians else ("", True)
        cells = [show(medians[name]) if name in medians else "-" for name in self._contenders]
        self._table.add_row([title, *cells, bound, f"{ratio} {'ok' if well else 'MISS'}"])

    def __str__(self) -> str:
        return str(self._table)


def against(reference: str, factor: float, *, least: bool) -> Callable[..., tuple[str, bool]]:
    """Judge our figure as a multiple of one contender's."""

    def judge(medians: dict[str, float]) -> tuple[str, bool]:
        if reference not in medians:
            return "", True
        ratio = medians[OURS] / medians[reference]
        return f"{ratio:.2f} x", ratio >= factor if least else ratio <= factor

    return judge


def single_thread(medians: dict[str, float]) -> tuple[str, bool]:
    ratio, well = against(PSYCOPG, 2.0, least=True)(medians)
    ahead = medians[OURS] > medians.get(DBUTILS, 0.0)
    return ratio, well and ahead


def best_peer(medians: dict[str, float]) -> tuple[str, bool]:
    best = max(value for name, value in medians.items() if name != OURS)
    ratio = medians[OURS] / best
    return f"{ratio:.2f} x", ratio >= 1.0


def limit(most: float) -> Callable[[dict[str, float]], tuple[str, bool]]:
    return lambda medians: ("", medians[OURS] <= most)


def rate(value: float) -> str:
    return f"{value / 1e3:,.0f} k/s" if value >= 1e4 else f"{value:,.0f}/s"


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms"


def plain(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def measure_idle(table: Table, names: Sequence[str], rounds: int) -> None:
    """The rows with connections that do nothing."""
    figures: dict[str, dict[str, list[float]]] = {}

    def note(figure: str, name: str, value: float) -> None:
        figures.setdefault(figure, {other: [] for other in names})[name].append(value)

    for _ in range(rounds * 3):
        for name in names:
            pool = make(name, 4)
            note("pairs", name, pairs(pool))
            note("blocks", name, blocks(pool))
            pool.close()
    for _ in range(rounds):
        for name in names:
            for threads, size in ((32, 4), (64, 16)):
                pool = make(name, size)
                speed, p99, spread = crowd(pool, threads, 1.0, hold)
                note(f"{threads} speed", name, speed)
                note(f"{threads} p99", name, p99)
                note(f"{threads} spread", name, spread)
                pool.close()
    table.add(
        "get + put, 1 thread", figures["pairs"], rate,
        "≥ 2 x psycopg_pool, > DBUtils", single_thread,
    )  # fmt: skip
    table.add(
        "with acquire(), 1 thread", figures["blocks"], rate,
        "≥ 2 x psycopg_pool", against(PSYCOPG, 2.0, least=True),
    )  # fmt: skip
    table.add(
        "32 threads on 4, hold 1 ms: p99 wait", figures["32 p99"], milliseconds,
        "≤ 1.1 x floor", against(FLOOR, 1.1, least=False),
    )  # fmt: skip
    table.add(
        "  most/fewest per thread", figures["32 spread"], plain, "≤ 1.1", limit(1.1),
    )  # fmt: skip
    table.add(
        "64 threads on 16, hold 1 ms: acquires", figures["64 speed"], rate,
        "≥ 0.9 x floor", against(FLOOR, 0.9, least=True),
    )  # fmt: skip
    table.add(
        "  p99 wait", figures["64 p99"], milliseconds, "", lambda _: ("", True),
    )  # fmt: skip


def measure_server(table: Table, names: Sequence[str], rounds: int) -> None:
    """The rows with PostgreSQL."""
    from tests.servers import PostgreSQLServer, postgresql_binaries

    binaries = postgresql_binaries()
    if binaries is None:
        print("no PostgreSQL here: its rows are left out", file=sys.stderr)
        return
    server = PostgreSQLServer(binaries)
    names = [name for name in names if name != FLOOR]
    try:
        server.start()
        speeds: dict[str, list[float]] = {name: [] for name in names}
        spreads: dict[str, list[float]] = {name: [] for name in names}
        failed: dict[str, list[float]] = {name: [] for name in names}
        back: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                pool = make(name, 16, server.url())
                for conn in [pool.get() for _ in range(16)]:
                    pool.put(conn)  # all are open: dialling is not what this row is about
                speed, _, spread = crowd(pool, 64, 2.0, query)
                speeds[name].append(speed)
                spreads[name].append(spread)
                pool.close()
        for name in names:
            pool = make(name, 8, server.url())
            failures, seconds = restart(pool, server)
            failed[name].append(failures)
            back[name].append(seconds)
            pool.close()
    finally:
        server.remove()
    table.add(
        "64 threads on 16, select 1: operations", speeds, rate, "≥ the best", best_peer,
    )  # fmt: skip
    table.add("  most/fewest per thread", spreads, plain, "≤ 1.2", limit(1.2))
    table.add(
        "server restarted under 8 threads: failed", failed, plain, "≤ 8", limit(8),
    )  # fmt: skip
    table.add("  back after it is up", back, milliseconds, "≤ 100 ms", limit(0.1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pool", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help="only these, comma-separated")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", ResourceWarning)
    logging.disable()  # some of the peers tell every broken connection
    modules = {PSYCOPG: "psycopg_pool", SQLALCHEMY: "sqlalchemy", DBUTILS: "dbutils"}
    names = [FLOOR, OURS]
    for name, module in modules.items():
        if options.peers and module not in options.peers.split(","):
            continue
        if importlib.util.find_spec(module) is None:
            print(f"{name} is not installed, and left out", file=sys.stderr)
        else:
            names.append(name)
    table = Table(names)
    measure_idle(table, names, options.rounds)
    measure_server(table, names, options.rounds)
    print(table)
    print(f"close with 3 borrowed and a waiter: {close_with_borrowed()}")
    earliest, p99 = time_out()
    print(
        f"time-out of 100 ms, 32 waiters: earliest {earliest * 1e3:+.2f} ms, "
        f"p99 {p99 * 1e3:+.2f} ms (never early, p99 within 20 ms)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
