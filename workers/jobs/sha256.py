"""The handler that ships: the SHA-256 of a file, as sha256sum has it."""

from __future__ import annotations

__all__ = ["sha256"]

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from workers.jobs.options import Job

_CHUNK = 1 << 18  # bytes between two looks at the context: about a millisecond's work


def sha256(job: Job, _conn: Any) -> str:
    """Return the SHA-256 of the file whose path is the payload, in hexadecimal.

    A relative path is relative to the worker's directory.

    Raises:
        OSError: the file can't be read.
        ValueError: the path is not that of a regular file.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(job.payload, "rb", buffering=0, opener=_open) as file:
        while size := file.readinto(buffer):
            digest.update(view[:size])
            job.ctx.check()
    return digest.hexdigest()


def _open(path: str, flags: int) -> int:
    """Open without waiting: a FIFO would keep its reader until somebody writes."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        if not Path(path).is_absolute():
            exc.add_note(f"relative paths are looked up in the worker's directory, {Path.cwd()}")
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor
