"""Our worker: what `bench.peers.worker` does, through the configured pool."""

from __future__ import annotations

import time

import psycopg  # noqa: F401 - every contender's worker imports it

from bench.peers.worker import report_ready
from workers import Worker


def run(worker: Worker) -> None:
    with worker.pools["main"].acquire() as connection:
        connection.execute("select 1")
    worker.ready()
    report_ready(worker.options["ready"])
    if worker.options["busy"]:
        with worker.job("left"):
            worker.accepting.wait()
            time.sleep(worker.options["finish_s"])
    else:
        worker.accepting.wait()
