"""The worker that every contender runs, and as a program of its own: the one circus starts.

It imports psycopg and sqlite3, opens an SQLite connection in the benchmark's folder, reports
ready, idles until it is told to stop, then finishes what it has left (nothing, or 300 ms).
It is told all of that by the environment, so that no contender needs arguments of its own.
"""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import time

import psycopg  # noqa: F401 - imported for what an import of it costs

try:
    from release import VERSION  # the code that a roll is to load: in the benchmark's folder
except ImportError:
    VERSION = 0

READY = "BENCH_READY"
DATABASE = "BENCH_DATABASE"
FINISH_S = "BENCH_FINISH_S"
WORKERS = "BENCH_WORKERS"


def connect() -> sqlite3.Connection:
    connection = sqlite3.connect(os.environ[DATABASE], check_same_thread=False)
    connection.execute("select 1")
    return connection


def report_ready(fifo: str) -> None:
    """Write this process's pid and code to the benchmark's FIFO: one line, atomic, never blocking."""
    descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    os.write(descriptor, b"%d %d\n" % (os.getpid(), VERSION))
    os.close(descriptor)


def finish() -> None:
    """Do the work that is left when the stop signal comes: a wait, as for a query's answer."""
    left_s = float(os.environ[FINISH_S])
    if left_s:
        time.sleep(left_s)


def serve(life: int | None = None, ready: int | None = None) -> None:
    """Work from the connection to the last breath; the end of the pipe `life` is a stop too.

    That it serves is told by the pipe `ready` as well, if there is one.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    told = select.poll()
    told.register(reader, select.POLLIN)
    if life is not None:
        told.register(life, select.POLLIN)
    connection = connect()
    report_ready(os.environ[READY])
    if ready is not None:
        os.close(ready)
    told.poll()
    finish()
    connection.close()


if __name__ == "__main__":
    serve()
    os._exit(0)  # as the floor's workers do: the interpreter's farewell is not circus's to pay
