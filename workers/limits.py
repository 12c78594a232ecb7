"""How many connections a server allows: a process of its own that asks it once, for `check`.

It opens one connection, by the same driver and with the same environment as a worker would, and
says what it has found as JSON. The question comes by standard input, because a URL may hold a
password; the answer goes out by what was standard output, which nobody else can write to.
"""

from __future__ import annotations

__all__ = ["main"]

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from workers.pool import drivers

# A limit: what it bounds (the same words mean the same thing, for whichever pool), how it is
# explained, and the number.
Limit = tuple[str, str, int]


def main() -> NoReturn:
    """Answer one question and end."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a driver prints is no answer
    question = json.load(sys.stdin)
    os.environ.update(question["env"])
    try:
        answer = _ask(question["url"], question["timeout"], question["application_name"])
    except Exception as exc:  # the driver's own, of any kind
        answer = {"error": str(exc).strip() or type(exc).__name__}
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(answers, data) :]
    os._exit(0)


def _ask(url: str, timeout: float, application_name: str) -> dict[str, Any]:
    connect, _ = drivers.from_url(url, application_name)
    kind = drivers.kind_of(url)
    if kind == "sqlite" and not os.path.exists(_file_of(url)):
        note = "its file is made when it is first used"
        return {"server": "SQLite", "allowed": "no limit", "note": note}
    conn = connect(timeout)
    try:
        return _ASK[kind](conn)
    finally:
        with suppress(Exception):
            conn.close()


def _file_of(url: str) -> str:
    return url.removeprefix("sqlite:///").partition("?")[0]


def _sqlite(conn: Any) -> dict[str, Any]:
    version = conn.execute("select sqlite_version()").fetchone()[0]
    return {"server": f"SQLite {version}", "allowed": "no limit"}


def _postgresql(conn: Any) -> dict[str, Any]:
    (version, server, most, superusers, reserved, role, is_super, may_reserved, of_role, database,
     of_database, connected) = conn.execute(
        """
        select split_part(current_setting('server_version'), ' ', 1),
               extract(epoch from pg_postmaster_start_time())::text
                   || '/' || current_setting('port'),
               current_setting('max_connections')::int,
               current_setting('superuser_reserved_connections')::int,
               coalesce(current_setting('reserved_connections', true)::int, 0),
               r.rolname, r.rolsuper,
               exists (select from pg_roles p where p.rolname = 'pg_use_reserved_connections'
                                                and pg_has_role(r.oid, p.oid, 'usage')),
               r.rolconnlimit, d.datname, d.datconnlimit,
               (select count(*) from pg_stat_activity
                where datid is not null and pid <> pg_backend_pid())
        from pg_roles r, pg_database d
        where r.rolname = session_user and d.datname = current_database()
        """
    ).fetchone()  # fmt: skip
    why = f"max_connections {most}"
    if not is_super:
        most -= superusers
        why += f" - {superusers} superuser_reserved_connections"
        if reserved and not may_reserved:
            most -= reserved
            why += f" - {reserved} reserved_connections"
    limits: list[Limit] = [(f"postgresql {server}", why, most)]
    if of_role >= 0 and not is_super:
        limits.append(
            (f"postgresql {server} role {role}", f"CONNECTION LIMIT of role {role}", of_role)
        )
    if of_database >= 0 and not is_super:
        where = f"database {database}"
        limits.append((f"postgresql {server} {where}", f"CONNECTION LIMIT of {where}", of_database))
    return {"server": f"PostgreSQL {version}", "limits": limits, "connected": connected}


def _mysql(conn: Any) -> dict[str, Any]:
    with conn.cursor() as cursor:
        # The session's value is that of the account, where it has one of its own.
        cursor.execute(
            "select version(), concat(@@hostname, ':', @@port, '/', @@server_id),"
            " @@global.max_connections, @@session.max_user_connections, current_user()"
        )
        version, server, most, of_user, user = cursor.fetchone()
        cursor.execute("show global status like 'Threads_connected'")
        connected = int(cursor.fetchone()[1]) - 1
    limits: list[Limit] = [(f"mysql {server}", f"max_connections {most}", int(most))]
    if of_user:
        why = f"max_user_connections of {user}"
        limits.append((f"mysql {server} user {user}", why, int(of_user)))
    what = "MariaDB" if "MariaDB" in version else "MySQL"
    return {
        "server": f"{what} {version.partition('-')[0]}",
        "limits": limits,
        "connected": connected,
    }


def _redis(conn: Any) -> dict[str, Any]:
    info = conn.info()
    most = info.get("maxclients")  # of Redis 7
    if most is None:
        with suppress(Exception):  # CONFIG is forbidden in many a managed one
            most = conn.config_get("maxclients")["maxclients"]
    limits: list[Limit] = []
    if most is not None:
        limits.append((f"redis {info['run_id']}", f"maxclients {most}", int(most)))
    return {
        "server": f"Redis {info['redis_version']}",
        "limits": limits,
        "allowed": "unknown",
        "note": "it does not tell its maxclients",
        "connected": info["connected_clients"] - 1,
    }


_ASK: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sqlite": _sqlite,
    "postgresql": _postgresql,
    "mysql": _mysql,
    "redis": _redis,
}
