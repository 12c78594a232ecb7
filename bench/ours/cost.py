"""The worker of `bench.cost`: it does what it is told over a socket, and says how long that took."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from workers import Worker


def run(worker: Worker) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(worker.options["folder"], "socket"))
        listener.listen()
        with worker.pools["main"].acquire() as database:
            # In memory: how long a disk takes differs more than what is looked for.
            database.execute("pragma temp_store = memory")
            database.execute("create temp table orders (id integer primary key, shipped integer)")
            database.execute("insert into orders (id) values (7)")
            database.commit()
        worker.ready()
        connection, _ = listener.accept()
    with connection, connection.makefile("rw", buffering=1) as orders:
        for order in orders:
            what, _, count = order.rpartition(" ")
            print(_seconds_of(worker, WORK[what], int(count)), file=orders)
    worker.accepting.wait()


def _seconds_of(worker: Worker, work: Callable[[Worker, int], None], count: int) -> float:
    """Return the processor time of all threads of this process: its link and its pools' count too."""
    begun = time.process_time()
    work(worker, count)
    return time.process_time() - begun


def _orders(worker: Worker, count: int) -> None:
    """What a worker does all day: a job, a connection, an update that is committed."""
    pool, job = worker.pools["main"], worker.job
    for number in range(count):
        with job("order") as order, pool.acquire(order.ctx) as connection:
            connection.execute("update orders set shipped = ? where id = 7", (number,))
            connection.commit()


def _empty_jobs(worker: Worker, count: int) -> None:
    job = worker.job
    for _ in range(count):
        with job("order"):
            pass


def _named_jobs(worker: Worker, count: int) -> None:
    job = worker.job
    for number in range(count):
        with job(f"order {number}"):
            pass


def _acquires(worker: Worker, count: int) -> None:
    acquire = worker.pools["main"].acquire
    for _ in range(count):
        with acquire():
            pass


def _rest(_worker: Worker, seconds: int) -> None:
    time.sleep(seconds)


WORK = {
    "seconds of rest": _rest,
    "orders": _orders,
    "empty jobs": _empty_jobs,
    "named jobs": _named_jobs,
    "acquires": _acquires,
}
