"""`supervisor check --connect`: what real servers allow, and whether the file fits."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import PostgreSQLServer, postgresql  # noqa: F401
from tests.servers_mysql_redis import mariadb, redis_server  # noqa: F401
from tests.supervised import REPO, SUPERVISOR, group

pytestmark = pytest.mark.usefixtures("no_proxy_of_the_machine")


@pytest.fixture
def no_proxy_of_the_machine(monkeypatch) -> None:
    for name in ("PGPASSWORD", "PGHOST", "PGPORT", "PGUSER", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)


def check(folder: Path, *groups: str, **pools: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run it on a file with these pools."""
    text = '[supervisor]\nname = "checked"\nruntime_dir = "run"\n'
    for name, keys in pools.items():
        text += f"[pools.{name}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    config = folder / "checked.toml"
    config.write_text(text + "".join(groups))
    config.chmod(0o600)
    return subprocess.run(
        [*SUPERVISOR, "check", "--connect", "-c", str(config)],
        capture_output=True, text=True, timeout=60.0, check=False, cwd=REPO,
    )  # fmt: skip


WEB = group("web", "idle", count=4, surge=2)


@pytest.fixture
def limited(postgresql: PostgreSQLServer) -> Iterator[PostgreSQLServer]:  # noqa: F811
    """Give a role `worker` that may have 40 connections."""
    with contextlib.closing(postgresql.connect()) as conn:
        conn.execute("create role worker login connection limit 40")
        conn.execute("alter database postgres connection limit 60")
        yield postgresql
        conn.execute("alter database postgres connection limit -1")
        conn.execute("drop role worker")


def test_what_fits_is_shown_with_the_arithmetic(tmp_path, limited):
    """A budget is what is needed; without one it is every worker's most, those of a roll too."""
    url = limited.url(user="worker")
    done = check(tmp_path, WEB, main={"url": url, "budget": 40}, lite={"url": "sqlite:///a.db"})
    assert (done.returncode, done.stderr) == (0, "")
    main, lite = (line.split() for line in done.stdout.splitlines()[1:3])
    assert main[0:2] == ["main", "PostgreSQL"]
    assert " ".join(main[3:]).startswith("budget 40 40 CONNECTION LIMIT of role worker")
    assert " ".join(lite).startswith("lite SQLite")
    assert "(4 workers + 2 in a rolling restart) x 10 = 60" in done.stdout
    assert not (tmp_path / "a.db").exists()  # a check makes nothing
    assert "good. 1 group, 4 workers, 2 pools." in done.stdout


def test_pools_of_one_role_are_counted_together(tmp_path, limited):
    """Each alone would fit; what exceeds the role's limit is named with both parts, and is 78."""
    url = limited.url(user="worker")
    done = check(tmp_path, WEB, main={"url": url, "budget": 30}, more={"url": url, "max_open": 2})
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "line 6: pools.main.budget: up to 42 connections may be open" in done.stderr
    assert (
        "(main: budget 30 and more: (4 workers + 2 in a rolling restart) x 2 = 12)" in done.stderr
    )
    assert "the server allows 40 (CONNECTION LIMIT of role worker)" in done.stderr


def test_what_the_server_keeps_for_itself_is_no_room(tmp_path, postgresql):  # noqa: F811
    """max_connections less what is reserved; a superuser may have those too."""
    with contextlib.closing(postgresql.connect()) as conn:
        conn.execute("create role plain login")
        reserved = int(conn.execute("show superuser_reserved_connections").fetchone()[0])
    assert reserved > 0
    for user, code in (("plain", 78), ("app", 0)):
        done = check(tmp_path, WEB, main={"url": postgresql.url(user=user), "budget": 100})
        assert (done.returncode, done.stdout) == (code, done.stdout), done.stderr
        left = 100 - reserved if user == "plain" else 100
        assert f" {left}  max_connections 100" in done.stdout
    with contextlib.closing(postgresql.connect()) as conn:
        conn.execute("drop role plain")


def test_mysql_and_redis_are_asked(tmp_path, mariadb, redis_server):  # noqa: F811
    """max_connections and the user's own limit; maxclients."""
    with contextlib.closing(mariadb.connect()) as conn, conn.cursor() as cursor:
        cursor.execute("create user 'few'@'localhost' with max_user_connections 7")
        cursor.execute("grant all privileges on test.* to 'few'@'localhost'")
    with contextlib.closing(redis_server.connect()) as client:
        client.config_set("maxclients", 77)
        done = check(
            tmp_path,
            WEB,
            all={"url": mariadb.url(), "budget": 90},
            few={"url": mariadb.url(user="few"), "budget": 7},
            red={"url": redis_server.url(tcp=True)},
        )
        client.config_set("maxclients", 10_000)
    with contextlib.closing(mariadb.connect()) as conn, conn.cursor() as cursor:
        cursor.execute("drop user 'few'@'localhost'")
    assert (done.returncode, done.stderr) == (0, "")
    _, everybody, few, red = (" ".join(line.split()) for line in done.stdout.splitlines()[:4])
    assert everybody.startswith("all MariaDB ")
    assert "budget 90 100 max_connections 100" in everybody
    assert "budget 7 7 max_user_connections of few@localhost" in few
    assert "77 maxclients 77" in red


def test_a_server_that_is_not_reached_is_named_without_its_password(tmp_path):
    """Nobody listens, and one that accepts and says nothing: each a sentence, code 1, in time."""
    with socket.create_server(("127.0.0.1", 0)) as mute, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        accepted: list[socket.socket] = []
        thread = threading.Thread(target=lambda: accepted.append(mute.accept()[0]))
        thread.start()
        url = "postgresql://me:s3cr%3Det@127.0.0.1:{}/db?connect_timeout=2"
        started = time.monotonic()
        done = check(
            tmp_path,
            WEB,
            away={"url": url.format(nobody.getsockname()[1])},
            deaf={"url": url.format(mute.getsockname()[1]), "connect_timeout": 2},
            lite={"url": "sqlite:///b.db"},
        )
        assert time.monotonic() - started < 40
        thread.join()
        accepted[0].close()
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any("pools.away: " in line and "refused" in line for line in lines)
    assert any("pools.deaf: " in line for line in lines)
    assert done.stdout.count("not reached") == 2
    assert "s3cr" not in done.stdout + done.stderr


def test_a_wrong_password_is_not_shown(tmp_path, mariadb):  # noqa: F811
    """Neither as it is written in the URL nor as it is meant."""
    url = mariadb.url(tcp=True).replace("app@", "app:hunter%40two@")
    done = check(tmp_path, WEB, my={"url": url, "connect_timeout": 2})
    assert done.returncode == 1
    assert "pools.my: " in done.stderr
    assert "Access denied" in done.stderr
    assert "hunter" not in done.stdout + done.stderr
