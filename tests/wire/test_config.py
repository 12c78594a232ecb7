"""The configuration: every key, good and bad; every problem at once, with its key and line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from supervisor.config import (
    GroupSettings,
    LogSettings,
    PoolSettings,
    Settings,
    SocketSettings,
    SupervisorSettings,
    load,
    redacted,
)
from supervisor.config.settings import APP_OPTIONS, BEFORE_TIMEOUT, LATER
from supervisor.core.policy import Restart
from supervisor.errors import ConfigError, Problem

CONF = Path(__file__).parents[2] / "conf"
GROUP = '[workers.jobs]\nrun = "workers.jobs:run"\n'
LISTEN = 'listen = "127.0.0.1:8000"\n'
SOCKET = f"[sockets.web]\n{LISTEN}"
POOL = '[pools.main]\nurl = "postgresql://app@/orders"\n'


Read = Callable[..., Settings]
Refused = Callable[..., list[Problem]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A path for the configuration, in a folder of its own."""
    return tmp_path / "orders.toml"


@pytest.fixture
def read(file: Path) -> Read:
    """Load a text as a file, with an environment and a user that are given."""

    def read(text: str, **env: str) -> Settings:
        file.write_text(text)
        return load(file, env=env, uid=1000)

    return read


@pytest.fixture
def refused(read: Read) -> Refused:
    """Return the problems of a text that must be refused."""

    def refused(text: str, **env: str) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            read(text, **env)
        assert caught.value.exit_code == 78
        return caught.value.problems

    return refused


def places(problems: list[Problem]) -> list[tuple[int | None, str]]:
    return [(each.line, each.key) for each in problems]


# --- every key ---------------------------------------------------------------------------------

# Key -> (TOML of a good value, what the settings hold).
GOOD: dict[str, list[tuple[str, object]]] = {
    "supervisor.name": [('"orders-2.eu_1"', "orders-2.eu_1"), ('"7"', "7")],
    "supervisor.runtime_dir": [('"/run/orders"', "/run/orders"), ('"/run/../srv/"', "/srv")],
    "supervisor.grace": [('"30s"', 30.0), ("1", 1.0), ("0.5", 0.5), ('"1h30m"', 5400.0)],
    "supervisor.abort_margin": [('"250ms"', 0.25), ('"0"', 0.0), ("0", 0.0)],
    "supervisor.path": [('["/srv/a", "/srv/b"]', ("/srv/a", "/srv/b")), ("[]", ())],
    "supervisor.listen": [
        ('"127.0.0.1:9464"', "127.0.0.1:9464"),
        ('"[::1]:80"', "[::1]:80"),
        ('""', ""),
    ],
    "log.format": [('"console"', "console"), ('"json"', "json")],
    "log.level": [(f'"{each}"', each) for each in ("debug", "info", "warning", "error")],
    "pools.main.url": [
        ('"postgresql://app:pw@db:5432/orders"', "postgresql://app:pw@db:5432/orders"),
        ('"postgres://app@/orders"', "postgresql://app@/orders"),
        ('"mysql://app@db/orders"', "mysql://app@db/orders"),
        ('"redis://db:6379/1"', "redis://db:6379/1"),
        ('"sqlite:////srv/jobs.db"', "sqlite:////srv/jobs.db"),
        ('"sqlite:////srv/x/../jobs.db?mode=ro"', "sqlite:////srv/jobs.db?mode=ro"),
    ],
    "pools.main.max_open": [("1", 1), ("10_000", 10_000)],
    "pools.main.max_idle": [("0", 0), ("10", 10)],
    "pools.main.max_lifetime": [('"30m"', 1800.0), ('"0"', 0.0)],
    "pools.main.max_idle_time": [('"10m"', 600.0), ("0.0", 0.0)],
    "pools.main.acquire_timeout": [('"3s"', 3.0), ('"1ms"', 0.001)],
    "pools.main.leak_threshold": [('"5s"', 5.0), ('"0s"', 0.0)],
    "pools.main.connect_timeout": [('"750ms"', 0.75)],
    "pools.main.max_connecting": [("1", 1), ("8", 8)],
    "pools.main.validate_after_idle": [('"30s"', 30.0), ('"0"', 0.0)],
    "pools.main.keepalive": [('"2m"', 120.0), ("0", 0.0)],
    "pools.main.budget": [("80", 80), ("2", 2)],
    "pools.main.min": [("1", 1), ("10", 10)],
    "pools.main.blocking": [("true", True), ("false", False)],
    "workers.jobs.run": [('"a.b:c.d"', "a.b:c.d"), ('"über:läufer"', "über:läufer")],
    "workers.jobs.command": [
        ('["prog"]', ("prog",)),
        ('["./bin/prog", "", "$HOME"]', ("./bin/prog", "", "$HOME")),
    ],
    "workers.jobs.notify": [("true", True), ("false", False)],
    "workers.jobs.stop_signal": [('"SIGTERM"', "SIGTERM"), ('"SIGQUIT"', "SIGQUIT")],
    "workers.jobs.before": [("true", True), ("false", False)],
    "workers.jobs.count": [("0", 0), ("4", 4), ("10_000", 10_000), ("0x10", 16)],
    "workers.jobs.pools": [('["main"]', ("main",)), ("[]", ())],
    "workers.jobs.restart": [(f'"{each.value}"', each) for each in Restart],
    "workers.jobs.max_restarts": [("0", 0), ("5", 5)],
    "workers.jobs.restart_window": [('"60s"', 60.0)],
    "workers.jobs.backoff": [('"1ms"', 0.001)],
    "workers.jobs.backoff_max": [('"30s"', 30.0), ('"8784h"', 366 * 86400.0)],
    "workers.jobs.on_failed": [('"keep"', "keep"), ('"exit"', "exit")],
    "workers.jobs.ready_timeout": [('"1m0.5s"', 60.5)],
    "workers.jobs.min_ready_time": [('"1s"', 1.0), ('"0"', 0.0)],
    "workers.jobs.surge": [("1", 1), ("3", 3)],
    "workers.jobs.max_age": [('"24h"', 86400.0), ("0", 0.0)],
    "workers.jobs.max_rss": [('"1GiB"', 1 << 30), ('"0"', 0), ("16777216", 16777216)],
    "workers.jobs.hang_timeout": [('"60s"', 60.0), ("0", 0.0)],
    "workers.jobs.user": [('""', "")],  # more in tests/integration/test_users.py
    "workers.jobs.env": [('{ A = "1", _b2 = "" }', {"A": "1", "_b2": ""})],
    "workers.jobs.sockets": [('["web"]', ("web",)), ("[]", ())],
    "workers.jobs.app": [('"mysite.web:app"', "mysite.web:app")],
    "sockets.web.listen": [
        ('"127.0.0.1:8000"', "127.0.0.1:8000"),
        ('"localhost:0"', "localhost:0"),
        ('"[::1]:8000"', "[::1]:8000"),
        ('"unix:/run/orders/web.sock"', "unix:/run/orders/web.sock"),
        ('"systemd:web.socket"', "systemd:web.socket"),
    ],
    "sockets.web.backlog": [("1", 1), ("65535", 65535)],
    "sockets.web.mode": [('"0660"', 0o660), ('"606"', 0o606)],
    "sockets.web.owner": [('"app"', "app"), ('":www-data"', ":www-data"), ('"0:33"', "0:33")],
    "workers.jobs.options": [
        ('{ a = [1, 2.5, true, "x"], b = { c = -1 } }', {"a": [1, 2.5, True, "x"], "b": {"c": -1}}),
    ],
}

NO_DURATION = ['"fast"', '""', "true", "[]", "{}", "-1", '"-1s"', "nan", "inf", '"1s30m"', '"5 s"']
NO_DURATION += [
    '"1d"',
    '"5S"',
    '"1e3"',
    '"8785h"',
    "31622401",
    '"0.1ms"',
    "1e-9",
    "0x" + "f" * 5000,
]
NO_DURATION += ["2024-01-01", '"' + "9" * 400 + 'h"', '"٣s"']
NO_WAIT = [*NO_DURATION, '"0"', "0", "0.0"]  # where there must be one
NO_COUNT = ["-1", "1.0", '"4"', "true", "[]", "nan", "0x" + "f" * 5000, "1979-05-27"]
NO_NAME = ['""', '"has space"', '"ä"', '"-a"', '".a"', '"a/b"', f'"{"a" * 65}"', "3", '"a\\n"']
NO_TEXT = ['""', "3", "true", '["a"]', '"a\\u0000b"']
NO_ENTRY = [*NO_TEXT, '"workers.jobs.run"', '"app.py:run"', '"a:"', '":b"', '"a:b:c"', '"a b:c"']

BAD: dict[str, list[str]] = {
    "supervisor.name": NO_NAME,
    "supervisor.runtime_dir": [*NO_TEXT, f'"/{"r" * 83}"'],
    "supervisor.grace": NO_WAIT,
    "supervisor.abort_margin": [*NO_DURATION, '"31s"'],
    "supervisor.path": ['"."', "[3]", '[""]'],
    "supervisor.listen": ['"9464"', '"::1:80"', '"a:70000"', "9464"],
    "log.format": ['"xml"', '"JSON"', "true", "1"],
    "log.level": ['"INFO"', '"warn"', "20"],
    "pools.main.url": [
        *NO_TEXT,
        '"jobs.db"',
        '"oracle://db"',
        '"postgresql+psycopg://app@/orders"',
        '"sqlite://"',
        '"sqlite:///"',
        '"sqlite://jobs.db"',
        '"sqlite:////srv/\\tjobs.db"',
    ],
    "pools.main.max_open": [*NO_COUNT, "0", "10_001"],
    "pools.main.max_idle": [*NO_COUNT, "11"],
    "pools.main.max_lifetime": NO_DURATION,
    "pools.main.max_idle_time": NO_DURATION,
    "pools.main.acquire_timeout": NO_WAIT,
    "pools.main.leak_threshold": NO_DURATION,
    "pools.main.connect_timeout": NO_WAIT,
    "pools.main.max_connecting": [*NO_COUNT, "0"],
    "pools.main.validate_after_idle": NO_DURATION,
    "pools.main.keepalive": NO_DURATION,
    "pools.main.budget": [*NO_COUNT, "0", "1"],
    "pools.main.min": [*NO_COUNT, "0", "11"],
    "pools.main.blocking": ["1", '"yes"', "[]"],
    "workers.jobs.run": NO_ENTRY,
    "workers.jobs.count": [*NO_COUNT, "10_001"],
    "workers.jobs.pools": ['"main"', "[1]", '["mian"]', '["main", "main"]'],
    "workers.jobs.command": ["[]", '"prog"', "[1]", '[""]', '["prog", 1]', '["a\\u0000b"]'],
    "workers.jobs.notify": ['"yes"', "1"],
    "workers.jobs.stop_signal": ['"TERM"', '"SIGKILL"', '"SIGSTOP"', "15", "[]"],
    "workers.jobs.before": ['"yes"', "1"],
    "workers.jobs.restart": ['"sometimes"', '"on_failure"', "true"],
    "workers.jobs.max_restarts": [*NO_COUNT, "1_000_001"],
    "workers.jobs.restart_window": NO_WAIT,
    "workers.jobs.backoff": [*NO_WAIT, '"31s"'],
    "workers.jobs.backoff_max": [*NO_WAIT, '"99ms"'],
    "workers.jobs.on_failed": ['"stop"', "false"],
    "workers.jobs.ready_timeout": NO_WAIT,
    "workers.jobs.min_ready_time": NO_DURATION,
    "workers.jobs.surge": [*NO_COUNT, "0"],
    "workers.jobs.max_age": NO_DURATION,
    "workers.jobs.max_rss": ['"1GB"', "-1", "4096", "true", '"2000TiB"'],
    "workers.jobs.hang_timeout": NO_DURATION,
    "workers.jobs.user": ["0", '"no-such-user"', "[]"],
    "workers.jobs.env": ['"A=1"', "{ A = 1 }", '{ "A B" = "x" }', '{ A = "\\u0000" }'],
    "workers.jobs.sockets": ['"web"', "[1]", '["wbe"]', '["web", "web"]'],
    "workers.jobs.app": NO_ENTRY,
    "sockets.web.listen": [
        *NO_TEXT,
        '"8000"',
        '"::1:80"',
        '"a:70000"',
        '"example.org:80"',
        '"[127.0.0.1]:80"',
        '"*:80"',
        '"unix:"',
        '"unix:@abstract"',
        '"systemd:"',
        f'"unix:/{"x" * 107}"',
    ],
    "sockets.web.backlog": [*NO_COUNT, "0", "65_536"],
    "sockets.web.mode": [*NO_TEXT, '"rw-rw----"', '"8888"', '"1660"', '"66"', "432"],
    "sockets.web.owner": ["0", "true", '"a b"', '"app:"', '":"', '"a:b:c"', '"-app"'],
    "workers.jobs.options": ["3", "[]", "{ day = 1979-05-27 }", "{ big = 0x10000000000000000 }"],
}

# Read, checked and refused; and what asks for nothing, which is taken.
NOT_YET: dict[str, tuple[str, list[str], list[str]]] = {
    # key: (a good value, bad values, values that mean off)
    "supervisor.region": ('"eu-west"', ["3", '"eu west"'], ['""']),
}


def document(key: str, value: str) -> str:
    """Return a valid file but for one key, which stands in the last line."""
    table, _, name = key.rpartition(".")
    tables = {"pools.main": POOL, "workers.jobs": GROUP}
    if name in {"sockets", "app"}:
        tables["sockets.web"] = SOCKET
    head = tables.pop(table, f"[{table}]\n")
    if name in {"notify", "stop_signal"}:
        head = f'[{table}]\ncommand = ["prog"]\n'
    elif name in {"url", "run", "app", "command"}:
        head = f"[{table}]\n"
    elif key == "pools.main.min":
        head += "budget = 80\n"
    if name == "app":
        head += 'sockets = ["web"]\n'
    elif table == "sockets.web" and name != "listen":
        head += 'listen = "unix:/web.sock"\n' if name in {"mode", "owner"} else LISTEN
    return "".join(tables.values()) + f"{head}{name} = {value}"


def short(value: object) -> str:
    return str(value)[:40]


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [(key, *case) for key, given in GOOD.items() for case in given],
    ids=short,
)
def test_a_good_value_is_taken(read: Read, key: str, value: str, expected: object) -> None:
    """Each key of the configuration takes its good values, in the units that are promised."""
    settings = read(document(key, value))

    table, *names = key.split(".")
    found = getattr(settings, "groups" if table == "workers" else table)
    for name in names:
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert expected == found
    assert type(expected) is type(found)


@pytest.mark.parametrize(("key", "value"), cases(BAD), ids=short)
def test_a_bad_value_is_refused_with_its_key_and_line(
    refused: Refused, key: str, value: str
) -> None:
    """Each key refuses the wrong type and what is out of range, and says where."""
    text = document(key, value)
    found = refused(text)

    assert len(found) == 1
    assert re.fullmatch(re.escape(key) + r"(\..+|\[\d+\])?", found[0].key)
    assert found[0].line == text.count("\n") + 1
    assert "not yet supported" not in found[0].message or "://" in found[0].message


@pytest.mark.parametrize("key", NOT_YET)
def test_a_key_without_effect_is_refused(read: Read, refused: Refused, key: str) -> None:
    """A key that has no effect yet is refused as such when good, and for its value when bad."""
    good, bad, off = NOT_YET[key]

    (problem,) = refused(document(key, good))
    assert (problem.key, problem.line) == (key, document(key, good).count("\n") + 1)
    assert problem.message.startswith("not yet supported: ")
    for value in bad:
        found = refused(document(key, value))
        assert found
        assert all("not yet supported" not in each.message for each in found), value
    for value in off:
        assert read(document(key, value)).warnings == ()


def test_every_key_is_in_these_tables() -> None:
    """A key that is added without a test fails here."""
    homes = {
        "supervisor": SupervisorSettings,
        "log": LogSettings,
        "pools.main": PoolSettings,
        "workers.jobs": GroupSettings,
        "sockets.web": SocketSettings,
    }
    known = {
        f"{home}.{each.name}"
        for home, kind in homes.items()
        for each in fields(kind)
        if each.metadata
    } - {"pools.main.url_file"}
    later = {f"{home}.{name}" for home, kind in homes.items() for name in LATER[kind]}

    assert known == set(GOOD) == set(BAD)
    assert later == set(NOT_YET)


def test_defaults(read: Read, tmp_path: Path) -> None:
    """What is absent has the default that the interface promises."""
    settings = read(POOL + GROUP)

    assert settings.supervisor == SupervisorSettings(
        name="orders",
        runtime_dir="/tmp/ackvisor-1000-orders",
        grace=30.0,
        abort_margin=5.0,
        path=(str(tmp_path),),
    )
    assert settings.log == LogSettings(format="console", level="info")
    assert settings.pools["main"] == PoolSettings(
        url="postgresql://app@/orders",
        max_open=10,
        max_idle=10,
        max_lifetime=1800.0,
        max_idle_time=600.0,
        acquire_timeout=3.0,
        leak_threshold=5.0,
        connect_timeout=5.0,
        max_connecting=2,
        validate_after_idle=1.0,
        keepalive=0.0,
    )
    assert settings.groups["jobs"] == GroupSettings(
        name="jobs",
        run="workers.jobs:run",
        command=(),
        notify=False,
        stop_signal="SIGTERM",
        before=False,
        count=1,
        pools=("main",),
        restart=Restart.ALWAYS,
        max_restarts=5,
        restart_window=60.0,
        backoff=0.1,
        backoff_max=30.0,
        on_failed="keep",
        ready_timeout=30.0,
        env={},
        options={},
    )
    assert settings.warnings == ()


def test_a_command_has_no_pools_and_its_folder_is_the_files(read: Read) -> None:
    """The pools of the file are not opened for a program, which could not use them."""
    settings = read(POOL + '[workers.web]\ncommand = ["prog"]\n')

    assert settings.groups["web"].pools == ()
    assert settings.groups["web"].run == ""


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ('command = ["a"]\npools = ["main"]', "pools"),
        ('command = ["a"]\n[workers.a.options]\nx = 1', "options"),
        ('run = "a:b"\nnotify = true', "notify"),
        ('run = "a:b"\nstop_signal = "SIGINT"', "stop_signal"),
        ('run = "a:b"\ncommand = ["a"]', "command"),
        ('command = ["a"]\nbefore = true\ncount = 2', "count"),
        ('command = ["a"]\nbefore = true\nrestart = "always"', "restart"),
        ('command = ["a"]\nbefore = true\nnotify = true', "notify"),
        ('command = ["a"]\nbefore = true\nsurge = 2', "surge"),
    ],
)
def test_what_a_command_or_what_runs_before_cannot_have(
    refused: Refused, lines: str, key: str
) -> None:
    """A key that would have no effect is refused where it stands."""
    (problem,) = refused(f"{POOL}[workers.a]\n{lines}\n")

    assert problem.key == f"workers.a.{key}"


def test_what_runs_before_is_never_restarted(read: Read) -> None:
    """Its policy says so without being told."""
    (group,) = read('[workers.a]\nrun = "a:b"\nbefore = true\n').groups.values()

    assert group.policy.restart is Restart.NEVER


@pytest.mark.parametrize(
    ("line", "seconds"), [("", BEFORE_TIMEOUT), ('ready_timeout = "2h"\n', 7200.0)]
)
def test_what_runs_before_has_a_time_of_its_own_to_its_end(
    read: Read, line: str, seconds: float
) -> None:
    """Much longer than that of others by default, and no step of theirs takes as long."""
    settings = read(f'[workers.a]\nrun = "a:b"\nbefore = true\n{line}')

    assert settings.groups["a"].ready_timeout == seconds
    assert settings.longest_step == settings.supervisor.grace


def test_a_budget_that_cannot_fit_is_refused_with_the_arithmetic(
    read: Read, refused: Refused
) -> None:
    """Every worker and every extra one of a roll has its minimum within the budget, or no start."""
    group = 'run = "a:b"\ncount = 4\nsurge = 2\n'
    text = f"{POOL}min = 3\nbudget = %d\n[workers.a]\n{group}[workers.b]\n{group}pools = []\n"

    assert read(text % 18).pools["main"].budget == 18
    (problem,) = refused(text % 17)
    assert problem.key == "pools.main.budget"
    assert problem.message == (
        "4 workers and 2 more in a rolling restart need at least (4 + 2) x 3 = 18 connections, "
        "and the budget is 17"
    )


def test_a_minimum_without_a_budget_is_refused(refused: Refused) -> None:
    """Nobody would guarantee it."""
    (problem,) = refused(f"{POOL}min = 3\n{GROUP}")

    assert problem.key == "pools.main.min"
    assert "there is no budget" in problem.message


@pytest.mark.parametrize(("grace", "margin"), [("8s", 2.0), ("20s", 5.0), ("1h", 5.0)])
def test_abort_margin_follows_grace(read: Read, grace: str, margin: float) -> None:
    """Without an `abort_margin` it is a quarter of `grace`, and at most five seconds."""
    assert margin == read(f'{GROUP}[supervisor]\ngrace = "{grace}"').supervisor.abort_margin


def test_max_idle_follows_max_open(read: Read) -> None:
    """Without a `max_idle` a smaller pool keeps all its connections, and is no error."""
    assert read(POOL + "max_open = 3\n" + GROUP).pools["main"].max_idle == 3


def test_a_unix_path_is_relative_to_the_file(read: Read, tmp_path: Path) -> None:
    """And it is absolute in the settings, so that a reload finds the same socket."""
    settings = read(f'{GROUP}sockets = ["web"]\n[sockets.web]\nlisten = "unix:web.sock"\n')

    assert f"unix:{tmp_path}/web.sock" == settings.sockets["web"].listen
    assert settings.warnings == ()


def test_a_socket_that_nobody_serves_is_warned_of(read: Read) -> None:
    """It is not opened, since who connects would wait for ever."""
    (warning,) = read(GROUP + SOCKET).warnings

    assert (warning.key, warning.line) == ("sockets.web", 3)


def test_the_options_of_an_app_are_read(read: Read, refused: Refused) -> None:
    """They have their units, numbers may come from the environment, and unknown ones are told."""
    head = f"{SOCKET}[workers.web]\napp = 'a:b'\nsockets = ['web']\n[workers.web.options]\n"
    good = 'keep_alive = "2m"\nroot_path = "/api"\nthreads = "${NONE:-3}"\n'
    bad = "keep_alve = 3\nroot_path = 'api'\nlimit_concurrency = 0\naccess_log = 'yes'\n"

    assert (read(head + good).groups["web"].options) == {
        "keep_alive": 120.0,
        "root_path": "/api",
        "threads": 3,
    }
    found = refused(head + bad)
    assert [each.line for each in found] == [7, 8, 9, 10]
    assert found[0].message == 'unknown key; did you mean "keep_alive"?'


# --- all at once -------------------------------------------------------------------------------


def test_all_problems_at_once_with_their_lines(refused: Refused) -> None:
    """Every problem of a file is told in one go, in the order of the lines."""
    found = refused(
        '''# comment with [brackets] and "quotes"
[supervisor]
grace = "fast"
abort_margin = "40s"   # cannot be held against a grace that is bad
path = [
  "nowhere",           # ] "
  3,
]
log.level = "loud"     # in [supervisor], where it does not belong

[pool.main]
url = "postgre://app:hunter2@/orders"
max_open = 3
max_idle = 4

[workers.jobs]
cuont = 4
run = "workers.jobs.run"
pools = ["mian",
   "main"]
note = """
max_age = "1h"
"""
max_age = "old"
env = { A = "x", B = 3, "C d" = "${NOPE}", E = "${NOPE}" }
[workers.jobs.options]
"when" = 1979-05-27 07:32:00
deep.'er' = [ {}, { big = 0xffffffffffffffffffff } ]
say = "${A}${B:-x}${C}"

[workers."web server"]
comand = ["x"]
[sockets.web]
lisen = "foo"
'''
    )

    assert places(found) == [
        (3, "supervisor.grace"),
        (7, "supervisor.path[1]"),
        (9, "supervisor.log"),
        (11, "pool"),
        (12, "pool.main.url"),
        (14, "pool.main.max_idle"),
        (17, "workers.jobs.cuont"),
        (18, "workers.jobs.run"),
        (19, "workers.jobs.pools[0]"),
        (21, "workers.jobs.note"),
        (24, "workers.jobs.max_age"),
        (25, "workers.jobs.env.'C d'"),
        (25, "workers.jobs.env.E"),
        (25, "workers.jobs.env.B"),
        (27, "workers.jobs.options.when"),
        (28, "workers.jobs.options.deep.er[1].big"),
        (29, "workers.jobs.options.say"),
        (31, "workers.'web server'"),
        (32, "workers.'web server'.comand"),
        (34, "sockets.web.lisen"),
    ]
    words = {each.key: each.message for each in found}
    assert words["pool"] == 'unknown key; did you mean "pools"?'
    assert words["workers.jobs.cuont"] == 'unknown key; did you mean "count"?'
    assert words["workers.jobs.pools[0]"] == 'there is no [pools.mian]; did you mean "main"?'
    assert words["pool.main.url"].endswith('did you mean "postgresql"?')
    assert words["workers.jobs.options.say"].startswith("A and C are not set")
    assert "hunter2" not in "".join(words.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(None, "workers")]),
        ("[workers]\n", [(1, "workers")]),
        ("workers = 5\n", [(1, "workers")]),
        ("\n[[workers.jobs]]\nrun = 'a:b'\n", [(2, "workers.jobs")]),
        ("[workers]\nrun = 'a:b'\n", [(2, "workers.run")]),
        ("[workers.a]\ncount = 1\n", [(1, "workers.a")]),
        ("[worker.a]\nrun = 'a:b'\n", [(1, "worker")]),
        ("[workers.a.options]\nx = 1\n[workers.a]\ncount = 1\n", [(3, "workers.a")]),
        (GROUP + "[pools.p]\nurl = '${NONE}'\n", [(4, "pools.p.url")]),
        ("[workers.a]\nrnu = 'a:b'\n", [(2, "workers.a.rnu")]),
        ("[workers.a]\nrun = 'a:b'\n[pools.p]\n", [(3, "pools.p")]),
        ("[workers.a]\nrun = 'a:b'\n[pools.p]\nulr = 'x'\n", [(4, "pools.p.ulr")]),
        ("[workers.a]\nrun = 'a:b'\n[workers.a-1]\nrun = 'a:b'\n", [(3, "workers.a-1")]),
        ("[workers.a]\nrun = 'a:b'\napp = 'a:b'\n", [(3, "workers.a.app")] * 2),
        ("[workers.a]\napp = 'a:b'\n", [(2, "workers.a.app")]),
        ("[workers.a]\napp = 'a:b'\nsockets = []\n", [(3, "workers.a.sockets")]),
        (GROUP + "sockets = ['w']\n[sockets.w]\nbacklog = 1\n", [(4, "sockets.w")]),
        (
            GROUP + f"{SOCKET}mode = '0660'\nowner = 'app'\n",
            [(5, "sockets.web.mode"), (6, "sockets.web.owner")],
        ),
        (GROUP + f"{SOCKET}[sockets.b]\n{LISTEN}", [(6, "sockets.b.listen")]),
        (GROUP + "[sockets.a]\nlisten = 'systemd:a'\nbacklog = 3\n", [(5, "sockets.a.backlog")]),
        (
            "[workers.a]\nrun = 'a:b'\n[supervisor]\nabort_margin = '31s'\n",
            [(4, "supervisor.abort_margin")],
        ),
        ("grace = '3s'\n" + GROUP, [(1, "grace")]),
        ("log.format = 'xml'\nworkers.a.run = 'a.b'\n", [(1, "log.format"), (2, "workers.a.run")]),
        ("workers = { a = { run = 'a:b',  cnt = 3 } }\n", [(1, "workers.a.cnt")]),
        ("[workers.a]\r\n\r\nrun = 'a.b'\r\n", [(3, "workers.a.run")]),
        (GROUP + "[supervisor]\nname = 3\nruntime_dir = 'x'", [(4, "supervisor.name")]),
        (GROUP + "options.a." + ".".join("b" * 40) + " = 1\n", None),
    ],
)
def test_one_mistake_is_one_problem(refused: Refused, text: str, expected: object) -> None:
    """Each mistake is reported once, at its line, and what follows from it is not."""
    found = refused(text)

    assert len(found) == 1 if expected is None else expected == places(found)


def test_a_key_in_the_wrong_table_is_told_its_home(refused: Refused) -> None:
    """A key that exists elsewhere is sent there."""
    (first, second) = refused("grace = '3s'\n[workers.a]\nrun = 'a:b'\nacquire_timeout = '1s'\n")

    assert first.message == "unknown key; it belongs in [supervisor]"
    assert second.message == "unknown key; it belongs in [pools.NAME]"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a = \n", 1, "invalid value at column 5"),
        ("[supervisor]\nname = 'a'\nname = 'b'\n", 3, "overwrite"),
        ("\n[workers.a\n", 2, "column 11"),
        ("a = [1,\n2\n\n", 2, "unclosed array at the end"),
        ('a = "\n"\n', 1, "illegal character"),
        ("a = " + "[" * 100_000, None, "nested too deep"),
        ("a = " + "9" * 5000, None, "4300"),
    ],
)
def test_a_syntax_error_is_one_sentence(
    refused: Refused, text: str, line: int | None, words: str
) -> None:
    """What is not TOML is one sentence with line and column."""
    (problem,) = refused(text)

    assert problem.line == line
    assert problem.message.startswith("is not valid TOML: ")
    assert words in problem.message


# --- the file ----------------------------------------------------------------------------------


def refusal(file: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, env={}, uid=0)
    (problem,) = caught.value.problems
    assert str(caught.value) == f"{file}: {problem}"
    return problem.message


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    """Missing, a folder, a pipe, not UTF-8, with a BOM, too large: each is named, none blocks."""
    file = tmp_path / "x.toml"
    assert refusal(file) == "there is no such file"
    assert refusal(file / "y.toml") == "there is no such file"
    assert refusal(tmp_path) == "cannot be read: is a directory"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "is not a regular file"
    assert refusal("/dev/zero") == "is not a regular file"
    assert refusal("a\0b") == "cannot be read: embedded null byte"
    file.write_bytes(b"# ok\n\xff")
    assert refusal(file) == "is not UTF-8: byte 0xff in line 2"
    file.write_text("\ufeff" + GROUP)
    assert "byte order mark" in refusal(file)
    file.write_text("#" * (1 << 20) + "\n")
    assert refusal(file) == "is larger than 1024 KiB"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_sentence(file: Path) -> None:
    """A file that this user may not read is named as such."""
    file.write_text(GROUP)
    file.chmod(0)
    assert refusal(file) == "cannot be read: permission denied"


def test_the_name_is_the_stem_of_the_file(tmp_path: Path) -> None:
    """Without a `name` it is the file's stem; where that can be none, it must be given."""
    (tmp_path / "has space.toml").write_text(GROUP)
    assert refusal(tmp_path / "has space.toml").startswith("is needed")
    (tmp_path / "a.b.toml").write_text(GROUP)
    assert load(tmp_path / "a.b.toml", env={}, uid=0).supervisor.name == "a.b"


def test_relative_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runtime_dir`, `path`, `url_file` and SQLite's file do not depend on where one stands."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "secret").write_text("sqlite:///../secret.db\n")
    (tmp_path / "conf" / "x.toml").write_text(
        GROUP + '[supervisor]\nruntime_dir = "run"\npath = [".", "../lib"]\n'
        '[pools.a]\nurl = "sqlite:///../var/dev.db?x=1"\n[pools.b]\nurl_file = "../secret"\n'
    )
    monkeypatch.chdir(tmp_path)

    settings = load("conf/x.toml", env={}, uid=0)
    assert settings.source == f"{tmp_path}/conf/x.toml"
    assert settings.supervisor.runtime_dir == f"{tmp_path}/conf/run"
    assert settings.supervisor.path == (f"{tmp_path}/conf", f"{tmp_path}/lib")
    assert settings.pools["a"].url == f"sqlite:///{tmp_path}/var/dev.db?x=1"
    assert settings.pools["b"].url == f"sqlite:///{tmp_path}/secret.db"
    monkeypatch.chdir("/")
    assert settings == load(tmp_path / "conf" / "x.toml", env={}, uid=0)


def test_a_symbolic_link_to_the_file_is_not_followed(tmp_path: Path) -> None:
    """Paths are relative to where the operator put the link, as with mounted configurations."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.toml").write_text(GROUP + '[pools.a]\nurl = "sqlite:///a.db"\n')
    (tmp_path / "x.toml").symlink_to("data/x.toml")

    assert load(tmp_path / "x.toml", env={}, uid=0).pools["a"].url == f"sqlite:///{tmp_path}/a.db"


def test_url_file_is_read_at_load(tmp_path: Path, read: Read, refused: Refused) -> None:
    """A secret's file is read, its newline dropped; what is wrong with it names the key."""
    secret = tmp_path / "secret"
    secret.write_text("postgresql://app:${x}@/orders\n")
    pool = f'{GROUP}[pools.main]\nurl_file = "{secret}"\n'
    assert read(pool).pools["main"].url == "postgresql://app:${x}@/orders"
    assert read(pool).pools["main"].url_file == str(secret)

    for content in ("", "hunter2\n", "postgresql://app:hunter2@/a\nb\n", "oracle://app:hunter2@/"):
        secret.write_text(content)
        (problem,) = refused(pool)
        assert (problem.line, problem.key) == (4, "pools.main.url_file")
        assert "hunter2" not in problem.message
    secret.unlink()
    (problem,) = refused(pool)
    assert problem.message == f'"{secret}": there is no such file'
    both = refused(f'{pool}url = "sqlite:///x.db"\n')
    assert places(both) == [(4, "pools.main.url_file")]


# --- the environment ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${A}", "alpha"),
        ("<${A}${A}>", "<alphaalpha>"),
        ("${A:-x}", "alpha"),
        ("${NONE:-x y}", "x y"),
        ("${NONE:-}", ""),
        ("${EMPTY}", ""),
        ("${EMPTY:-x}", "x"),
        ("$A {A} $$ $", "$A {A} $$ $"),
        ("$${A}", "${A}"),
        ("$$${A}", "$${A}"),
        ("${TRICK}", "${A}"),
    ],
)
def test_references_to_the_environment(read: Read, written: str, expected: object) -> None:
    """`${NAME}` and `${NAME:-default}` as in a shell, `$${` for the characters, never twice."""
    env = {"A": "alpha", "EMPTY": "", "TRICK": "${A}"}
    settings = read(f"{GROUP}options = {{ x = [{{ y = '{written}' }}] }}\n", **env)

    (found,) = settings.groups["jobs"].options["x"]
    assert found == {"y": expected}
    assert type(found["y"]) is str


@pytest.mark.parametrize(
    "written",
    ["${NONE}", "${", "${}", "${A", "${A-x}", "${1}", "${A:-${B}}", "${A B}", "${BROKEN}"],
)
def test_a_bad_reference_names_key_and_line(refused: Refused, written: str) -> None:
    """A variable that is not set, or is no text, and a malformed reference are problems."""
    env = {"A": "a", "BROKEN": "\udcff"}
    (problem,) = refused(f"{GROUP}env = {{ X = '''\n{written}''' }}\n", **env)

    assert (problem.line, problem.key) == (3, "workers.jobs.env.X")


@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("RUNTIME_DIRECTORY", "RuntimeDirectory"),
        ("STATE_DIRECTORY", "StateDirectory"),
        ("CREDENTIALS_DIRECTORY", "LoadCredential"),
    ],
)
def test_what_systemd_would_have_set_is_asked_for_by_name(
    refused: Refused, variable: str, setting: str
) -> None:
    """Whoever runs the same file in a shell is told where the variable comes from."""
    (problem,) = refused(f"{GROUP}env = {{ X = '${{{variable}}}/x' }}\n")

    assert problem.message == (
        f"{variable} is not set in the environment; set it (systemd does, for a unit with "
        f"{setting}=), or write ${{{variable}:-default}}"
    )


def test_a_secret_comes_from_the_credentials_of_the_unit(read: Read, tmp_path: Path) -> None:
    """`url_file` takes a reference to the folder that systemd makes for them."""
    (tmp_path / "database").write_text("postgresql://app:secret@db/orders\n")
    text = f'{GROUP}[pools.main]\nurl_file = "${{CREDENTIALS_DIRECTORY}}/database"\n'

    pool = read(text, CREDENTIALS_DIRECTORY=str(tmp_path)).pools["main"]

    assert pool.url == "postgresql://app:secret@db/orders"


def test_numbers_come_from_the_environment_too(read: Read, refused: Refused) -> None:
    """A number may be written as a reference, though the environment holds only strings."""
    text = f'{POOL}{GROUP}count = "${{N:-4}}"\n[supervisor]\ngrace = "${{G:-10}}"\n'

    assert read(text).groups["jobs"].count == 4
    assert read(text, N="7", G="1m").groups["jobs"].count == 7
    assert read(text, N="7", G="1m").supervisor.grace == 60.0
    for wrong in ("", "x", "-1", "4.0", "٣", "9" * 5000, "4\n"):
        if wrong:
            (problem,) = refused(text, N=wrong)
            assert problem.message.endswith('not the value of "${N:-4}"')


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "/tmp/ackvisor-1000-orders"),
        ({"TMPDIR": "/var/tmp/"}, "/var/tmp/ackvisor-1000-orders"),
        ({"TMPDIR": "relative"}, "/tmp/ackvisor-1000-orders"),
        ({"XDG_RUNTIME_DIR": "/run/user/1000", "TMPDIR": "/x"}, "/run/user/1000/orders"),
        ({"RUNTIME_DIRECTORY": "/run/a", "XDG_RUNTIME_DIR": "/run/user/1000"}, "/run/a"),
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b"}, "/run/a"),
        ({"RUNTIME_DIRECTORY": "", "XDG_RUNTIME_DIR": "relative"}, "/tmp/ackvisor-1000-orders"),
    ],
)
def test_the_default_of_runtime_dir(read: Read, env: dict[str, str], expected: object) -> None:
    """systemd's folder, else the user's, else a private one; and nothing is created."""
    assert expected == read(GROUP, **env).supervisor.runtime_dir


def test_a_runtime_dir_leaves_room_for_a_socket(read: Read, refused: Refused) -> None:
    """A path that would be cut by the kernel's limit of 107 bytes is refused, counted in bytes."""
    longest = "/" + "r" * 82
    found = read(f'{GROUP}[supervisor]\nruntime_dir = "{longest}"\n')
    assert found.supervisor.runtime_dir == longest
    (problem,) = refused(f'{GROUP}[supervisor]\nruntime_dir = "/{"ü" * 42}"\n')
    assert "85 bytes" in problem.message
    (problem,) = refused(GROUP, XDG_RUNTIME_DIR="/" + "r" * 90)
    assert (problem.line, problem.key) == (None, "supervisor.runtime_dir")


# --- secrets and warnings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://app@/orders", "postgresql://app@/orders"),
        ("postgresql://app:@/orders", "postgresql://app:@/orders"),
        ("postgresql://app:pw@db:5432/orders", "postgresql://app:***@db:5432/orders"),
        ("postgresql://app:p@w/x?y#z@db/orders", "postgresql://app:***@db/orders"),
        ("postgresql://db:5432,db2:5433/orders", "postgresql://db:5432,db2:5433/orders"),
        ("postgresql://[::1]:5432/orders", "postgresql://[::1]:5432/orders"),
        ("postgresql://[::1]/orders", "postgresql://[::1]/orders"),
        ("postgresql://app:pw", "postgresql://app:***"),
        ("postgresql:///o?user=a&password=pw&x=1", "postgresql:///o?user=a&password=***&x=1"),
        ("redis://:pw@db/0", "redis://:***@db/0"),
        ("sqlite:////srv/jobs.db", "sqlite:////srv/jobs.db"),
        ("app:pw@db", "***"),
        ("app:pw://x@db", "***"),
    ],
)
def test_redacted(url: str, shown: str) -> None:
    """A URL is shown without its password, and otherwise as it is."""
    assert shown == redacted(url)


def test_a_repr_holds_no_secret(read: Read) -> None:
    """Settings can be logged: neither URLs nor `env` nor `options` are in their repr."""
    settings = read(
        '[pools.main]\nurl = "postgresql://app:hunter2@/orders"\n'
        '[workers.jobs]\nrun = "a:b"\nenv = { KEY = "hunter2" }\noptions = { key = "hunter2" }\n'
    )
    assert "hunter2" not in repr(settings)


def test_a_password_that_everybody_may_read_is_a_warning(file: Path, tmp_path: Path) -> None:
    """A password in a file that others may read is warned of; one from elsewhere is not."""

    def warnings(url: str, mode: int) -> list[tuple[int | None, str]]:
        file.write_text(f"{GROUP}[pools.main]\n{url}\n")
        file.chmod(mode)
        return places(
            list(load(file, env={"PW": "x", "DB": "postgresql://a:b@/c"}, uid=0).warnings)
        )

    secret = tmp_path / "secret"
    secret.write_text("postgresql://app:pw@/orders")
    secret.chmod(0o640)
    there = [(4, "pools.main.url")]
    assert warnings('url = "postgresql://app:pw@/orders"', 0o644) == there
    assert warnings('url = "${X:-postgresql://app:pw@/orders}"', 0o644) == there
    assert warnings('url = "postgresql://app:pw@/orders"', 0o640) == []
    assert warnings('url = "postgresql://app:${PW}@/orders"', 0o644) == []
    assert warnings('url = "${DB}"', 0o644) == []
    assert warnings('url = "postgresql://app@/orders"', 0o644) == []
    assert warnings(f'url_file = "{secret}"', 0o644) == []
    secret.chmod(0o644)
    assert warnings(f'url_file = "{secret}"', 0o600) == [(4, "pools.main.url_file")]


def test_unwise_settings_are_warnings(read: Read) -> None:
    """A database in memory and a folder of `path` that is not there are allowed, and told."""
    settings = read(
        f'{GROUP}[pools.main]\nurl = "sqlite:///:memory:"\n[supervisor]\npath = [".",\n"gone"]\n'
    )
    assert places(list(settings.warnings)) == [(7, "supervisor.path[1]"), (4, "pools.main.url")]
    assert settings.pools["main"].url == "sqlite:///:memory:"


# --- the settings ------------------------------------------------------------------------------


def test_settings_compare_by_what_they_mean(read: Read, tmp_path: Path) -> None:
    """A reload sees a change of meaning, and none in comments, order or spelling."""
    first = read(f'{POOL}{GROUP}backoff = "1s"\n')

    assert first == read(f"# moved\n{GROUP}backoff = 1\n\n{POOL}")
    assert first != read(f'{POOL}{GROUP}backoff = "2s"\n')
    gone = read(f'{POOL}{GROUP}[supervisor]\npath = ["gone"]\n')
    (tmp_path / "gone").mkdir()
    found = read(f'{POOL}{GROUP}[supervisor]\npath = ["gone"]\n')
    assert (len(gone.warnings), len(found.warnings)) == (1, 0)
    assert gone == found
    assert first.pools == read(f'{POOL}{GROUP}backoff = "2s"\n').pools
    with pytest.raises(FrozenInstanceError):
        first.log.level = "debug"  # type: ignore[misc]


def test_a_group_gets_its_pools_in_its_own_order(read: Read) -> None:
    """The first pool of a group is the first that it names, or the first of the file."""
    pools = "".join(f'[pools.{each}]\nurl = "sqlite:///{each}.db"\n' for each in "abc")
    settings = read(f'{pools}{GROUP}pools = ["c", "a"]\n[workers.all]\nrun = "a:b"\n')

    assert list(settings.pools_of("jobs")) == ["c", "a"]
    assert list(settings.pools_of("all")) == ["a", "b", "c"]
    assert settings.pools_of("jobs")["c"] is settings.pools["c"]


def test_the_policy_is_the_cores(read: Read) -> None:
    """The restart policy reaches the core with every one of its settings."""
    policy = (
        read(
            f'{GROUP}restart = "never"\nmax_restarts = 1\nrestart_window = "2s"\n'
            'backoff = "3s"\nbackoff_max = "4s"\n'
        )
        .groups["jobs"]
        .policy
    )

    assert (policy.restart, policy.max_restarts) == (Restart.NEVER, 1)
    assert (policy.window, policy.backoff, policy.backoff_max) == (2.0, 3.0, 4.0)


def test_a_later_finding_has_its_line_too(read: Read) -> None:
    """Whoever finds a value wrong later can still say where it stands."""
    problem = read(POOL + GROUP).problem(("workers", "jobs", "run"), "no such module")

    assert str(problem) == "line 4: workers.jobs.run: no such module"


# --- what ships --------------------------------------------------------------------------------


def test_the_shipped_files_are_valid() -> None:
    """Both files of conf/ load on a fresh clone, without any environment."""
    dev = load(CONF / "dev.toml", env={}, uid=0)
    prod = load(CONF / "prod.toml", env={}, uid=0)

    assert dev.warnings == prod.warnings == ()
    assert dev.pools["main"].url == f"sqlite:///{CONF.parent}/var/dev.db"
    assert dev.groups["jobs"].options["handler"] == "workers.jobs:sha256"
    assert prod.log.format == "json"


def test_prod_toml_shows_every_key() -> None:
    """Every key is in prod.toml; with all comments taken off, just the later ones are refused."""
    text = re.sub(r"(?m)^# (?=\w+ = |\[)", "", (CONF / "prod.toml").read_text())
    shown = set(re.findall(r"(?m)^(\w+) = ", text))
    kinds = (SupervisorSettings, LogSettings, PoolSettings, GroupSettings, SocketSettings)
    known = {each.name for kind in kinds for each in fields(kind) if each.metadata}
    later = {name for kind in kinds for name in LATER[kind]}

    assert known | later | set(APP_OPTIONS) <= shown | {"options"}


def test_the_later_keys_of_prod_toml_are_refused(refused: Refused) -> None:
    """What prod.toml marks as "not yet" is refused as that, and nothing else is wrong with it."""
    text = (CONF / "prod.toml").read_text()
    text = re.sub(r"(?m)^# (?=.*# not yet)", "", text)
    found = [each for each in refused(text) if "stands beside" not in each.message]

    assert len(found) == text.count("# not yet")
    assert all(each.message.startswith("not yet supported: ") for each in found)
