"""What workers and their supervisor stand on, made so that it can fail: disk, clock, memory, server.

None is the machine's own: the disk is a small tmpfs, the clock an offset that libfaketime adds to
CLOCK_REALTIME (and to nothing else) in the programs that are started through it.
"""

from __future__ import annotations

__all__ = ["BUDGET", "Clock", "Disk", "Surroundings", "Unavailable"]

import contextlib
import glob
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.cgroups import Cgroup
from tests.servers import PostgreSQLServer
from tests.workers.jobs.databases import Database, PostgreSQLDatabase, SQLiteDatabase
from tests.workers.pool.proxy import Proxy

DISK = 256 << 20  # bytes, of which the log of ten minutes is a part
BUDGET = 8  # below what the workers would like to have


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


@dataclass
class Surroundings:
    """What can fail beside the processes. Use as a `with` block.

    Attributes:
        database: where the jobs are.
        server: that of the database, None for SQLite.
        proxy: what lies between it and the workers.
        disk: where the log, the sockets and a SQLite database are; None: the machine's own.
        clock: None: the machine's own.
        cage: the memory of them all; None: all that the machine has.
        missing: why one of them is None.
    """

    folder: Path
    database: Database
    server: PostgreSQLServer | None = None
    proxy: Proxy | None = None
    disk: Disk | None = None
    clock: Clock | None = None
    cage: Cgroup | None = None
    missing: list[str] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def around(cls, folder: Path, server: PostgreSQLServer | None) -> Iterator[Self]:
        """Make them, as far as this machine can; undo them at the end.

        Args:
            folder: for what they leave behind.
            server: a PostgreSQL that does not run yet; None: SQLite.
        """
        missing: list[str] = []
        with contextlib.ExitStack() as stack:
            disk = clock = cage = proxy = None
            with _noted(missing):
                disk = stack.enter_context(Disk(folder / "disk", DISK, folder / "kept"))
            with _noted(missing):
                at = folder if server is None else Path(server.folder)
                clock = stack.enter_context(Clock(at / "clock"))
            with _noted(missing):
                cage = stack.enter_context(Cgroup("memory"))
            database: Database
            if server is None:
                place = folder if disk is None else disk.folder
                database = SQLiteDatabase(str(place / "jobs.db"))
            else:
                stack.callback(server.stop)
                proxy = stack.enter_context(Proxy(server.port))
                server.through = () if clock is None else clock.through
                _start(server, clock)
                database = PostgreSQLDatabase(server)
            yield cls(folder, database, server, proxy, disk, clock, cage, missing)

    def restart_server(self) -> None:
        """Stop and start it; all sessions end."""
        assert self.server is not None
        self.server.stop()
        _start(self.server, self.clock)

    @property
    def through(self) -> tuple[str, ...]:
        """The words that start a supervisor in them."""
        cage = () if self.cage is None else self.cage.through
        return cage + (() if self.clock is None else self.clock.through)

    @property
    def pool(self) -> str:
        """The pool's lines of the configuration."""
        if self.proxy is None:
            return f'url = "{self.database.url}"'
        assert isinstance(self.database, PostgreSQLDatabase)
        url = f"postgresql://app@127.0.0.1:{self.proxy.port}/{self.database.name}"
        return f'url = "{url}"\nmax_open = 3\nmax_idle = 3\nbudget = {BUDGET}'


def _start(server: PostgreSQLServer, clock: Clock | None) -> None:
    server.start()
    if clock is not None and server.process is not None:
        clock.pids.add(server.process.pid)


@contextlib.contextmanager
def _noted(missing: list[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, Unavailable) as exc:
        missing.append(str(exc))
