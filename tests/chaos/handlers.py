"""The handlers that the chaos tests' workers run."""

from __future__ import annotations

__all__ = ["EATING", "HUNGRY", "hash_and_record"]

import os
import random
import sqlite3
from pathlib import Path
from typing import Any

from workers.jobs import Job, sha256

HUNGRY = "hungry"  # a file beside the folder of files: the next job eats memory …
EATING = "eating"  # … and renames it to this with its pid as suffix, as soon as it begins
EATEN_AT_MOST = 1 << 30  # bytes, should nobody stop it
PIECE = 1 << 20


def hash_and_record(job: Job, conn: Any) -> str:
    """Hash the file and record an effect, with pauses in which a kill may come: before, after."""
    pauses = random.Random(f"{job.id} {job.attempts}")
    digest = sha256(job, conn)
    job.ctx.wait(pauses.uniform(0.0, 0.06))
    job.ctx.check()
    mark = "?" if isinstance(conn, sqlite3.Connection) else "%s"
    conn.execute(
        "INSERT INTO effects (job, attempt) VALUES (?, ?)".replace("?", mark),
        (job.id, job.attempts),
    )
    # SQLite has one write lock for all, and this holds it.
    job.ctx.wait(pauses.uniform(0.0, 0.004 if isinstance(conn, sqlite3.Connection) else 0.06))
    job.ctx.check()
    _eat_if_hungry(Path(job.payload).parent.with_name(HUNGRY))
    return digest


def _eat_if_hungry(flag: Path) -> None:
    """Eat memory until the kernel ends this process: whoever gets the flag, nobody else."""
    mine = flag.with_name(f"{EATING}.{os.getpid()}")
    try:
        flag.rename(mine.with_suffix(".soon"))
    except FileNotFoundError:
        return
    # The victim is to be this process, whatever else is in its cgroup.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    mine.with_suffix(".soon").rename(mine)
    hoard = [b"x" * PIECE for _ in range(EATEN_AT_MOST // PIECE)]
    raise MemoryError(f"{len(hoard) * PIECE} bytes eaten, and nobody minds")
