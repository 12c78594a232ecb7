"""What a shell offers for GROUP and WORKER: groups by the file, workers by the supervisor that runs.

Whoever presses Tab waits for it, and nobody reads an error: what cannot be had at once is left out.
"""

from __future__ import annotations

__all__ = ["groups", "workers"]

import contextlib
import os
import tomllib
from pathlib import Path

ANSWER_WITHIN = 0.3  # seconds


def groups(config: Path) -> list[str]:
    """Return the names of the groups in a file, none where it can't be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError), config.open("rb") as file:
        found = tomllib.load(file).get("workers")
        return list(found) if isinstance(found, dict) else []
    return []


def workers(config: Path) -> list[str]:
    """Return the ids of the workers that there are, none where no supervisor answers at once."""
    from supervisor.client import Client
    from supervisor.config import locate
    from supervisor.errors import SupervisorError
    from supervisor.protocol import GetStatus

    with contextlib.suppress(SupervisorError, OSError):
        name, runtime_dir = locate(config, env=os.environ, uid=os.geteuid())
        with Client(Path(runtime_dir), name) as client:
            status = client.ask(GetStatus(), ANSWER_WITHIN).data
        return [worker["id"] for worker in status["workers"]]
    return []
