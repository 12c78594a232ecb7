"""Private servers for tests: in a folder of their own, on a free port, gone afterwards.

A test module takes the fixture by name: `from tests.servers import postgresql`. Where a server is
not installed its tests are skipped with that reason; under CI that is a failure.
"""

from __future__ import annotations

__all__ = [
    "PostgreSQLServer",
    "free_port",
    "own_postgresql",
    "postgresql",
    "postgresql_binaries",
    "private_postgresql",
    "unavailable",
    "unprivileged",
]

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

START_TIMEOUT = 30.0
STOP_TIMEOUT = 15.0


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unavailable(what: str) -> None:
    """Skip the test for want of a server; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI must run its tests")
    pytest.skip(what)


def unprivileged(*names: str) -> str | None:
    """Return whom a server runs as, the first of these users that there is: none may be root."""
    if os.getuid() != 0:
        return None
    for name in (*names, "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


class PostgreSQLServer:
    """PostgreSQL in a temporary folder: a Unix socket and a port of 127.0.0.1, fsync off.

    `through` may be given words that start it, before its first start.
    """

    def __init__(self, binaries: str) -> None:
        self.binaries = binaries
        self.through: tuple[str, ...] = ()
        self.user = unprivileged("postgres")
        self.folder = tempfile.mkdtemp(prefix="ackvisor-pg-", dir="/tmp")
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        subprocess.run(
            [f"{binaries}/initdb", "-D", self.data, "-U", "app", "-A", "trust",
             "--no-sync", "-E", "UTF8", "--locale=C"],
            check=True, user=self.user, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            cwd="/",
        )  # fmt: skip

    @property
    def data(self) -> str:
        """The data folder."""
        return f"{self.folder}/data"

    def url(self, *, tcp: bool = False, port: int | None = None, user: str = "app") -> str:
        """Return a URL for the database `postgres`, by the Unix socket or by TCP."""
        if tcp or port is not None:
            return f"postgresql://{user}@127.0.0.1:{port or self.port}/postgres"
        return f"postgresql://{user}@/postgres?host={self.folder}&port={self.port}"

    def connect(self, *, user: str = "app") -> Any:
        """Return a connection of the test's own, in autocommit; the caller closes it."""
        import psycopg

        return psycopg.connect(self.url(user=user), autocommit=True)

    def start(self) -> None:
        """Start it, and return when it answers."""
        log = os.open(f"{self.folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.process = subprocess.Popen(
                [*self.through, f"{self.binaries}/postgres", "-D", self.data, "-k", self.folder,
                 "-p", str(self.port), "-h", "127.0.0.1", "-c", "fsync=off",
                 "-c", "max_connections=100", "-c", "shared_buffers=16MB",
                 "-c", "max_wal_senders=0", "-c", "autovacuum=off"],
                user=self.user, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/",
            )  # fmt: skip
        finally:
            os.close(log)
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(f"{self.folder}/log", encoding="utf-8") as lines:
                    raise RuntimeError(f"PostgreSQL did not start:\n{lines.read()[-3000:]}")
            time.sleep(0.005)

    def answers(self) -> bool:
        """Whether a connection can be made now."""
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.Error:
            return False
        return True

    def stop(self, how: int = signal.SIGINT) -> None:
        """Stop it and wait for its end: SIGINT is `fast`, SIGQUIT `immediate`."""
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def remove(self) -> None:
        """Stop it and remove its folder."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)


def postgresql_binaries() -> str | None:
    found = shutil.which("postgres")
    if found is not None and shutil.which("initdb"):
        return os.path.dirname(os.path.realpath(found))
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    return folders[-1] if folders else None


@contextlib.contextmanager
def private_postgresql() -> Iterator[PostgreSQLServer]:
    """Run a PostgreSQL; skip the test where there is none to run."""
    try:
        import psycopg  # noqa: F401 (only whether it is there)
    except ImportError:
        unavailable("psycopg is not installed")
    binaries = postgresql_binaries()
    if binaries is None:
        unavailable("PostgreSQL is not installed")
        return
    server = PostgreSQLServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQLServer]:
    """One PostgreSQL for all tests of this process. Nobody stops it."""
    with private_postgresql() as server:
        yield server


@pytest.fixture
def own_postgresql() -> Iterator[PostgreSQLServer]:
    """Return a PostgreSQL of the test's own, to stop and to start."""
    with private_postgresql() as server:
        yield server
