"""What workers and their supervisor stand on, made so that it can fail: a disk, a clock.

Neither is the machine's own: the disk is a small tmpfs, the clock an offset that libfaketime adds to
CLOCK_REALTIME (and to nothing else) in the programs that are started through it.
"""

from __future__ import annotations

__all__ = ["Clock", "Disk", "Unavailable"]

import contextlib
import glob
import os
import shutil
import subprocess
from pathlib import Path
from typing import Self


class Unavailable(Exception):  # noqa: N818  # no error: it says what a machine has not got
    """This machine cannot have it; says why."""


class Disk:
    """A tmpfs that can be full. Use as a `with` block; what is on it is kept when that fails.

    Args:
        folder: where it is mounted; made.
        size: in bytes.
        kept: where its files are copied to when the block fails.

    Raises:
        Unavailable: nothing can be mounted here.
    """

    def __init__(self, folder: Path, size: int, kept: Path) -> None:
        self.folder = folder
        self._kept = kept
        self._ballast = folder / "ballast"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            folder.rmdir()
            raise Unavailable(f"no tmpfs can be mounted: {done.stderr.strip()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.free()
        if kind is not None:
            unreadable = shutil.ignore_patterns("*.sock")
            shutil.copytree(self.folder, self._kept, ignore=unreadable)
        # Who still has a file open has been told of already.
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
        self.folder.rmdir()

    def fill(self) -> None:
        """Take all the room that is left."""
        with self._ballast.open("ab", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        """Give it back."""
        self._ballast.unlink(missing_ok=True)


_LIBRARIES = (
    "/usr/lib/*/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
)


class Clock:
    """A wall clock that can be set. It begins with the machine's time. Use as a `with` block.

    Attributes:
        offset: seconds by which it is ahead.
        pids: of those who were started through it, to be noted by whoever starts them.

    Args:
        file: a new file, which every program that has this clock must be able to read.

    Raises:
        Unavailable: libfaketime is not installed.
    """

    def __init__(self, file: Path) -> None:
        found = [path for pattern in _LIBRARIES for path in glob.glob(pattern)]
        if not found:
            raise Unavailable("libfaketime is not installed (Debian: faketime)")
        self.offset = 0
        self.pids: set[int] = set()
        self._file = file
        self.set(0)
        self.through = (
            "env",
            f"LD_PRELOAD={found[0]}",
            f"FAKETIME_TIMESTAMP_FILE={file}",
            "FAKETIME_NO_CACHE=1",  # a step is seen by the next look at the clock
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "NO_FAKE_STAT=1",  # no file gets another age by it
        )

    def set(self, offset: int) -> None:
        """Let it be so many seconds ahead of the machine's."""
        self.offset = offset
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset:+d}\n", encoding="ascii")
        new.chmod(0o644)
        new.replace(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what libfaketime leaves behind when its process is killed."""
        for pid in self.pids:
            for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"/dev/shm/{name}")
