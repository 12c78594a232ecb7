"""Private MariaDB and Redis servers for tests: as in `tests.servers`, and used like those."""

from __future__ import annotations

__all__ = [
    "MariaDBServer",
    "RedisServer",
    "mariadb",
    "own_mariadb",
    "own_redis",
    "private_mariadb",
    "private_redis",
    "redis_server",
]

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import START_TIMEOUT, STOP_TIMEOUT, free_port, unavailable, unprivileged


def _find(program: str) -> str | None:
    """Return where a server is: servers may be in a folder that is only root's to look in."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


class _Server:
    """A server in a temporary folder: a Unix socket there, and a port of 127.0.0.1."""

    what = ""

    def __init__(self, *users: str) -> None:
        self.user = unprivileged(*users)
        # Not where the test's own temporary files are, and short: it has a Unix socket's path.
        self.folder = tempfile.mkdtemp(prefix="ackvisor-", dir="/tmp")
        self.socket = f"{self.folder}/socket"
        self.port = free_port()
        # A test's temporary folder is another user's.
        self.environment = {**os.environ, "TMPDIR": self.folder}
        self.process: subprocess.Popen[bytes] | None = None
        if self.user is not None:
            shutil.chown(self.folder, self.user)

    def command(self) -> list[str]:
        """Return what is run, in the foreground."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether a connection can be made now."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it, and return when it answers."""
        log = os.open(f"{self.folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.process = subprocess.Popen(
                self.command(), user=self.user, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd=self.folder, env=self.environment,
            )  # fmt: skip
        finally:
            os.close(log)
        deadline = time.monotonic() + START_TIMEOUT
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                with open(f"{self.folder}/log", encoding="utf-8") as lines:
                    raise RuntimeError(f"{self.what} did not start:\n{lines.read()[-3000:]}")
            time.sleep(0.005)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Stop it and wait for its end."""
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
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


class MariaDBServer(_Server):
    """MariaDB without durability; the user `app` may do everything, with no password."""

    what = "MariaDB"

    def __init__(self) -> None:
        super().__init__("mysql")

    def install(self) -> None:
        """Make the data folder."""
        install = [
            "mariadb-install-db", "--no-defaults", f"--datadir={self.folder}/data",
            "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve",
            "--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0",
        ]  # fmt: skip
        subprocess.run(
            install, check=True, user=self.user, cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def make_users(self) -> None:
        """Make the database `test` and the user `app`."""
        with contextlib.closing(self.connect(user="root", database=None)) as conn:
            conn.query("create database test")
            for user in ("'app'@'localhost'", "'app'@'127.0.0.1'"):
                conn.query(f"create user {user}")
                conn.query(f"grant all privileges on *.* to {user} with grant option")

    def command(self) -> list[str]:
        """Return what is run, in the foreground."""
        return [
            _find("mariadbd") or "", "--no-defaults", f"--datadir={self.folder}/data",
            f"--socket={self.socket}", f"--pid-file={self.folder}/pid", f"--port={self.port}",
            "--bind-address=127.0.0.1", "--skip-name-resolve", "--performance-schema=OFF",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=8M",
            "--innodb-log-file-size=4M", "--sync-binlog=0", "--max-connections=100",
        ]  # fmt: skip

    def url(self, *, tcp: bool = False, port: int | None = None, user: str = "app") -> str:
        """Return a URL for the database `test`, by the Unix socket or by TCP."""
        if tcp or port is not None:
            return f"mysql://{user}@127.0.0.1:{port or self.port}/test?ssl_disabled=1"
        return f"mysql://{user}@/test?unix_socket={self.socket}"

    def connect(self, *, user: str = "app", database: str | None = "test") -> Any:
        """Return a connection of the test's own, in autocommit; the caller closes it."""
        import pymysql

        return pymysql.connect(
            unix_socket=self.socket, user=user, database=database, autocommit=True,
            ssl_disabled=True,
        )  # fmt: skip

    def answers(self) -> bool:
        """Whether a connection can be made now."""
        import pymysql

        try:
            with socket.socket(socket.AF_UNIX) as probe:  # PyMySQL would leave its own open
                probe.connect(self.socket)
            self.connect(user="root", database=None).close()
        except (OSError, pymysql.MySQLError):
            return False
        return True


class RedisServer(_Server):
    """Redis without persistence, that looks at its clock often."""

    what = "Redis"

    def __init__(self) -> None:
        super().__init__("redis")

    def command(self) -> list[str]:
        """Return what is run, in the foreground."""
        return [
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1",
            "--unixsocket", self.socket, "--unixsocketperm", "777", "--dir", self.folder,
            "--save", "", "--appendonly", "no", "--hz", "500",
        ]  # fmt: skip

    def url(self, *, tcp: bool = False, port: int | None = None) -> str:
        """Return a URL, by the Unix socket or by TCP."""
        if tcp or port is not None:
            return f"redis://127.0.0.1:{port or self.port}/0"
        return f"unix://{self.socket}?db=0"

    def connect(self) -> Any:
        """Return a client of the test's own; the caller closes it."""
        import redis

        return redis.Redis(unix_socket_path=self.socket, max_connections=1)

    def answers(self) -> bool:
        """Whether a connection can be made now."""
        import redis

        try:
            with self.connect() as client:
                client.ping()
        except redis.RedisError:
            return False
        return True


@contextlib.contextmanager
def private_mariadb() -> Iterator[MariaDBServer]:
    """Run a MariaDB; skip the test where there is none to run."""
    try:
        import pymysql  # noqa: F401 (only whether it is there)
    except ImportError:
        unavailable("PyMySQL is not installed")
    if not _find("mariadbd") or not _find("mariadb-install-db"):
        unavailable("MariaDB is not installed")
    server = MariaDBServer()
    try:
        server.install()
        server.start()
        server.make_users()
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def private_redis() -> Iterator[RedisServer]:
    """Run a Redis; skip the test where there is none to run."""
    try:
        import redis  # noqa: F401 (only whether it is there)
    except ImportError:
        unavailable("redis-py is not installed")
    if not _find("redis-server"):
        unavailable("Redis is not installed")
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDBServer]:
    """One MariaDB for all tests of this process. Nobody stops it."""
    with private_mariadb() as server:
        yield server


@pytest.fixture
def own_mariadb() -> Iterator[MariaDBServer]:
    """Return a MariaDB of the test's own, to stop and to start."""
    with private_mariadb() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests of this process. Nobody stops it."""
    with private_redis() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Return a Redis of the test's own, to stop and to start."""
    with private_redis() as server:
        yield server
