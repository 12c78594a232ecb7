"""A control group of a test's own, to give a supervisor less than the machine has."""

from __future__ import annotations

__all__ = ["Cgroup", "memory_limit"]

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from tests.supervised import DUE, wait_until

_ROOT = Path("/sys/fs/cgroup")
_IS_UNIFIED = (_ROOT / "cgroup.controllers").exists()
_numbers = itertools.count(1)


class Cgroup:
    """A new cgroup with these limits. Use as a `with` block, which waits until it is empty.

    Args:
        controller: whose hierarchy it is in, where each controller has its own (version 1).
        limits: file -> value; none at first, where nothing is said.

    Raises:
        OSError: none can be made here, or not with these limits.
    """

    def __init__(self, controller: str, limits: Mapping[str, int] | None = None) -> None:
        parent = _ROOT if _IS_UNIFIED else _ROOT / controller
        self.folder = parent / f"ackvisor-test-{os.getpid()}-{next(_numbers)}"
        self.folder.mkdir()
        try:
            for name, value in (limits or {}).items():
                (self.folder / name).write_text(str(value), encoding="ascii")
        except OSError:
            self.folder.rmdir()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        wait_until(self._is_removed, "the cgroup is empty")

    @property
    def through(self) -> tuple[str, ...]:
        """The words that start a program in it."""
        return ("sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh")

    @contextlib.contextmanager
    def memory_left(self, size: int) -> Iterator[None]:
        """Leave so many bytes of memory to all in it together, in this block."""
        usage = "memory.current" if _IS_UNIFIED else "memory.usage_in_bytes"
        limit, none = ("memory.max", "max") if _IS_UNIFIED else ("memory.limit_in_bytes", "-1")
        deadline = time.monotonic() + DUE
        while True:
            used = int((self.folder / usage).read_text(encoding="ascii"))
            try:
                (self.folder / limit).write_text(str(used + size), encoding="ascii")
            except OSError as exc:  # more has been taken meanwhile
                if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            else:
                break
        try:
            yield
        finally:
            (self.folder / limit).write_text(none, encoding="ascii")

    def _is_removed(self) -> bool:
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()


def memory_limit(size: int) -> dict[str, int]:
    """Return the limits for so many bytes of memory, in the words of this machine's version."""
    if _IS_UNIFIED:
        return {"memory.max": size, "memory.swap.max": 0}
    return {"memory.limit_in_bytes": size}
