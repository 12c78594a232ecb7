"""A worker that dies as soon as it serves, in a different way each time."""

from __future__ import annotations

__all__ = ["run"]

import os
import signal
from pathlib import Path

from workers.worker import Worker


def run(worker: Worker) -> None:
    """Serve, and die; stay where a file `enough` lies beside the configuration."""
    worker.ready()
    if Path(worker.options["enough"]).exists():
        worker.accepting.wait()
        return
    match int(worker.id.rpartition("-")[2]) % 4:
        case 0:
            os._exit(3)
        case 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        case _:
            raise LookupError("no moon tonight")
