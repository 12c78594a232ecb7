"""gunicorn: its defaults (sync workers), and the worker's connection and end as server hooks.

The arbiter reads this file: it must not import what the worker is measured by importing.
"""

from __future__ import annotations

import os
from typing import Any

_FOLDER = os.path.dirname(os.environ["BENCH_DATABASE"])

bind = f"unix:{_FOLDER}/web"
control_socket = f"{_FOLDER}/control"  # the default place is in the user's home
workers = int(os.environ["BENCH_WORKERS"])


def post_worker_init(gunicorn_worker: Any) -> None:
    from bench.peers import worker

    gunicorn_worker.connection = worker.connect()
    worker.report_ready(os.environ[worker.READY])


def worker_exit(server: Any, gunicorn_worker: Any) -> None:
    from bench.peers import worker

    del server
    # The arbiter calls this hook too, for a worker that it found gone.
    if gunicorn_worker.pid == os.getpid() and hasattr(gunicorn_worker, "connection"):
        worker.finish()
        gunicorn_worker.connection.close()
