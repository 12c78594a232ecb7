"""What one budget over all workers costs: messages, and throughput beside one process with one pool.

    python -m bench.budget [--seconds 5]

Four workers of ten threads each, `max_open` 10. Uncontended: the budget does for all of them.
Contended: it does for half, so that it has to be shared. Beside it a single process of 40 threads,
whose pool is as large as that budget. Then the same under kills, a rolling restart and a scaling,
with the server's own count of sessions every 20 ms. PostgreSQL where it is installed, on a server of
its own; without it there are the messages only, on SQLite.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from prettytable import PrettyTable

from bench.contenders import ROOT
from workers.pool import Pool, PoolTimeout

WORKERS, THREADS, MAX_OPEN, BUDGET = 4, 10, 10, 20
AMPLE = (WORKERS + 1) * MAX_OPEN
HOLD_S = 0.005
SETTLE_S = 2.0
SAMPLE_S = 0.02
READY_DUE_S = 30.0

APP = """
import os, threading, time
from bench.budget import hammer
def run(worker):
    counts = [0] * worker.options["threads"]
    threads = [
        threading.Thread(target=hammer, args=(worker.pools["main"], counts, n, worker.accepting))
        for n in range(len(counts))
    ]
    for thread in threads:
        thread.start()
    worker.ready()
    path = os.path.join(worker.options["folder"], worker.id)
    while not worker.accepting.wait(0.05):
        with open(path + ".new", "w") as file:
            file.write(f"{time.monotonic()} {sum(counts)}")
        os.replace(path + ".new", path)
    for thread in threads:
        thread.join()
"""


def hammer(pool: Any, counts: list[int], index: int, until: Any) -> None:
    """Borrow, ask, hold for a moment, give back; until `until.done`."""
    while not until.done:
        with contextlib.suppress(PoolTimeout), pool.acquire() as conn:
            conn.execute("select 1")
            time.sleep(HOLD_S)
            conn.commit()
            counts[index] += 1


class Until:
    done = False


def single(url: str, seconds: float) -> float:
    """Connections lent per second by one process with one pool."""
    pool = Pool.from_url(url, max_open=BUDGET)
    counts = [0] * (WORKERS * THREADS)
    until = Until()
    threads = [
        threading.Thread(target=hammer, args=(pool, counts, n, until)) for n in range(len(counts))
    ]
    for thread in threads:
        thread.start()
    time.sleep(SETTLE_S)
    before, begun = sum(counts), time.monotonic()
    time.sleep(seconds)
    rate = (sum(counts) - before) / (time.monotonic() - begun)
    until.done = True
    for thread in threads:
        thread.join()
    pool.close(5.0)
    return rate


class Supervised:
    """A supervisor whose budget messages are counted. A context manager."""

    def __init__(self, url: str, budget: int, threads: int = THREADS) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="ackvisor-bench-")
        self.folder = Path(self._temporary.name)
        self.config = self.folder / "budget.toml"
        self.tally = self.folder / "tally"
        (self.folder / "counts").mkdir()
        (self.folder / "budgetapp.py").write_text(APP)
        self.config.write_text(
            f'[supervisor]\nruntime_dir = "run"\npath = [".", "{ROOT}"]\ngrace = "5s"\n'
            f'[pools.main]\nurl = "{url}"\nmax_open = {MAX_OPEN}\nbudget = {budget}\n'
            f'[workers.web]\nrun = "budgetapp:run"\ncount = {WORKERS}\nmin_ready_time = "100ms"\n'
            f'[workers.web.options]\nthreads = {threads}\nfolder = "{self.folder}/counts"\n'
        )

    def __enter__(self) -> Self:
        self._log = (self.folder / "log").open("wb")
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "bench.budget", "--count", str(self.tally), str(self.config)],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        self.await_ready(WORKERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(15.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._log.close()
        self._temporary.cleanup()

    def command(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "supervisor", words[0], "-c", str(self.config), *words[1:]],
            cwd=ROOT, capture_output=True, text=True, timeout=60.0, check=False,
        )  # fmt: skip
        return done.stdout

    def workers(self) -> dict[str, int]:
        """The workers that are ready, and their pids."""
        text = self.command("status", "--json") or '{"workers": []}'
        return {each["id"]: each["pid"] for each in json.loads(text)["workers"] if each["ready"]}

    def await_ready(self, count: int) -> None:
        deadline = time.monotonic() + READY_DUE_S
        while len(self.workers()) < count:
            if time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def messages(self) -> int:
        return int(self.tally.read_text() or 0) if self.tally.exists() else 0

    def lent(self, worker: str) -> tuple[float, int]:
        try:
            when, count = (self.folder / "counts" / worker).read_text().split()
        except FileNotFoundError:
            return time.monotonic(), 0
        return float(when), int(count)

    def total(self) -> int:
        """Connections lent so far, by whoever has lived."""
        return sum(
            int(path.read_text().split()[1])
            for path in (self.folder / "counts").iterdir()
            if not path.name.endswith(".new")
        )

    def measure(self, seconds: float) -> tuple[list[float], float]:
        """Return each worker's connections lent per second, and the messages per second."""
        workers = list(self.workers())
        before = {worker: self.lent(worker) for worker in workers}
        messages, begun = self.messages(), time.monotonic()
        time.sleep(seconds)
        said = (self.messages() - messages) / (time.monotonic() - begun)
        rates = []
        for worker in workers:
            when, count = self.lent(worker)
            rates.append((count - before[worker][1]) / (when - before[worker][0]))
        return rates, said


def supervise(tally: str, config: str) -> None:
    """Run a supervisor that counts what it says and hears of allowances."""
    from supervisor import lending
    from supervisor.__main__ import main

    count = 0
    descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT, 0o600)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            os.pwrite(descriptor, str(count).encode(), 0)
            return call(*arguments, **keywords)

        return counting

    begin = lending.Lending.__init__
    lending.Lending.__init__ = lambda self, send: begin(self, counted(send))  # type: ignore[method-assign]
    lending.Lending.heard = counted(lending.Lending.heard)  # type: ignore[method-assign]
    sys.argv = ["supervisor", "start", "-c", config]
    main()


@contextlib.contextmanager
def sampled(server: Any) -> Iterator[list[int]]:
    """Count the role's sessions every 20 ms."""
    samples: list[int] = []
    until = threading.Event()

    def sample() -> None:
        with contextlib.closing(server.connect()) as conn:
            while not until.wait(SAMPLE_S):
                row = conn.execute(
                    "select count(*) from pg_stat_activity where usename = 'worker'"
                ).fetchone()
                samples.append(row[0])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        until.set()
        thread.join()


def disturb(fleet: Supervised, seconds: float) -> tuple[float, float]:
    """Kill, roll and scale; return connections lent and messages per second meanwhile."""
    before, messages, begun = fleet.total(), fleet.messages(), time.monotonic()
    for _ in range(3):
        os.kill(next(iter(fleet.workers().values())), signal.SIGKILL)
        time.sleep(seconds / 5)
        fleet.await_ready(WORKERS)
    fleet.command("reload", "--wait")
    fleet.command("scale", "web=6", "--wait")
    time.sleep(seconds / 5)
    took = time.monotonic() - begun
    return (fleet.total() - before) / took, (fleet.messages() - messages) / took


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.budget", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.count:
        supervise(*options.count)
    with contextlib.ExitStack() as stack:
        show(options.seconds, _server(stack))
    return 0


def _server(stack: contextlib.ExitStack) -> Any:
    """Start a PostgreSQL whose role `worker` may have 40 sessions; None where there is none."""
    from tests.servers import PostgreSQLServer, postgresql_binaries

    binaries = postgresql_binaries()
    if binaries is None:
        print("without PostgreSQL, which is not installed", file=sys.stderr)
        return None
    server = PostgreSQLServer(binaries)
    stack.callback(server.remove)
    server.start()
    with contextlib.closing(server.connect()) as conn:
        conn.execute("create role worker login connection limit 40")
    return server


def show(seconds: float, server: Any) -> None:
    url = "sqlite:///budget.db" if server is None else server.url(user="worker")
    table = PrettyTable(
        ["", "lent /s", "/ one process", "most / fewest", "messages /s", "sessions"]
    )
    table.align = "r"
    table.align[""] = "l"
    alone = single(url, seconds) if server is not None else None
    if alone is not None:
        table.add_row([f"one process, a pool of {BUDGET}", f"{alone:.0f}", "1.00", "", "", ""])
    for name, budget, threads in (
        ("uncontended", AMPLE, THREADS), ("idle", AMPLE, 0), ("contended", BUDGET, THREADS),
    ):  # fmt: skip
        with contextlib.ExitStack() as stack:
            samples = [] if server is None else stack.enter_context(sampled(server))
            fleet = stack.enter_context(Supervised(url, budget, threads))
            time.sleep(SETTLE_S)
            rates, messages = fleet.measure(seconds)
            table.add_row(
                [
                    f"{name}: {WORKERS} workers, budget {budget}",
                    f"{sum(rates):.0f}",
                    f"{sum(rates) / alone:.2f}" if alone and budget == BUDGET else "",
                    f"{max(rates) / min(rates):.2f}" if min(rates) else "",
                    f"{messages:.1f}",
                    f"≤ {max(samples)}" if samples else "",
                ]
            )
            if budget == BUDGET:
                rate, messages = disturb(fleet, seconds)
                rates, _ = fleet.measure(seconds)
                ratio = f"{rate / alone:.2f}" if alone else ""
                most = f"≤ {max(samples)}" if samples else ""
                table.add_row(
                    [
                        "  kills, a roll, a scale to 6",
                        f"{rate:.0f}",
                        ratio,
                        "",
                        f"{messages:.1f}",
                        most,
                    ]
                )
                spread = f"{max(rates) / min(rates):.2f}"
                ratio = f"{sum(rates) / alone:.2f}" if alone else ""
                table.add_row(["  six workers", f"{sum(rates):.0f}", ratio, spread, "", most])
    print(table.get_string())
    print(
        f"{THREADS} threads a worker, max_open {MAX_OPEN}, each connection held for "
        f"{HOLD_S * 1e3:.0f} ms; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."
    )


if __name__ == "__main__":
    sys.exit(main())
