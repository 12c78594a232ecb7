"""How many processes the kernel has killed for want of memory: to be told from a kill by somebody.

The count of our own cgroup, which workers share with us: `oom_kill` of memory.events (version 2) or of
memory.oom_control (version 1). Where there is neither, the whole machine's, in /proc/vmstat.
"""

from __future__ import annotations

__all__ = ["OomCounter"]

from collections.abc import Iterator
from pathlib import Path


class OomCounter:
    """Reads the kernel's count of OOM kills. Cheap to make: it looks for its file when first asked.

    Args:
        root: where /proc and /sys are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._file: Path | None = None

    def read(self) -> int | None:
        """Return the count, None where the kernel tells none."""
        if self._file is not None and (count := _oom_kills(self._file)) is not None:
            return count
        for file in self._candidates():
            if (count := _oom_kills(file)) is not None:
                self._file = file
                return count
        return None

    def _candidates(self) -> Iterator[Path]:
        sys, proc = self._root / "sys/fs/cgroup", self._root / "proc"
        try:
            lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        for line in lines:
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            path = path.lstrip("/")
            if not controllers:
                yield sys / path / "memory.events"
                yield sys / "unified" / path / "memory.events"
            elif "memory" in controllers.split(","):
                yield sys / "memory" / path / "memory.oom_control"
                # In a container the path may be the host's, and what is mounted be the container's own.
                yield sys / "memory/memory.oom_control"
        yield sys / "memory.events"
        yield proc / "vmstat"


def _oom_kills(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.strip().isdecimal():
            return int(value)
    return None
