"""The settings: one frozen class a table, one field a key, with what reads it beside its default.

A key that INTERFACE.md promises and this version cannot do stands in LATER until it can: it is
read and checked like the others and then refused, because a setting that is silently ignored is
worse than one that is missing. To support it: move it from LATER to a field.
"""

from __future__ import annotations

__all__ = [
    "APP_OPTIONS",
    "BEFORE_TIMEOUT",
    "LATER",
    "GroupSettings",
    "Later",
    "LogSettings",
    "PoolSettings",
    "Settings",
    "SocketSettings",
    "SupervisorSettings",
    "dotted",
]

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from supervisor.config import values as read
from supervisor.config.lines import KeyPath, Lines
from supervisor.core.budget import Terms
from supervisor.core.policy import Restart, RestartPolicy
from supervisor.errors import Problem

if TYPE_CHECKING:
    from supervisor.protocol import Identity

# Seconds that what runs before the others may take where nothing is said. Long enough for nearly every
# migration, and an end: a start that waits for one that hangs is not to wait for ever.
BEFORE_TIMEOUT = 3600.0
_BARE = re.compile("[A-Za-z0-9_-]+")


def _by(reader: read.Reader) -> dict[str, read.Reader]:
    return {"reader": reader}


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorSettings:
    """[supervisor]. Durations in seconds, paths absolute."""

    name: str = field(metadata=_by(read.name))  # default: the file's stem
    runtime_dir: str = field(metadata=_by(read.text))  # default: see loading.default_runtime_dir
    grace: float = field(default=30.0, metadata=_by(read.duration()))
    abort_margin: float = field(metadata=_by(read.duration(off=True)))  # min(5 s, grace / 4)
    path: tuple[str, ...] = field(default=(".",), metadata=_by(read.array(read.text)))
    listen: str = field(default="", metadata=_by(read.blank_or(read.address)))  # "": off


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """[log]. `format` is "console" or "json"; `level` is in lower case."""

    format: str = field(default="console", metadata=_by(read.choice("console", "json")))
    level: str = field(
        default="info",
        metadata=_by(read.choice("debug", "info", "warning", "error", "critical")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """[pools.NAME], for each worker. Durations in seconds, 0 meaning off.

    `url` is complete, also where it came from `url_file`: the path of a SQLite file is absolute.
    It may hold a password, so it is in no repr; show `redacted(url)`. `budget` is for all workers
    together, None being no limit; it guarantees each of them `min` connections. `blocking` has
    workers in asyncio, too, use it from threads.
    """

    url: str = field(repr=False, metadata=_by(read.text))
    url_file: str = field(default="", metadata=_by(read.text))
    max_open: int = field(default=10, metadata=_by(read.whole(1, 10_000)))
    max_idle: int = field(metadata=_by(read.whole(0, 10_000)))  # default: max_open
    max_lifetime: float = field(default=1800.0, metadata=_by(read.duration(off=True)))
    max_idle_time: float = field(default=600.0, metadata=_by(read.duration(off=True)))
    acquire_timeout: float = field(default=3.0, metadata=_by(read.duration()))
    leak_threshold: float = field(default=5.0, metadata=_by(read.duration(off=True)))
    connect_timeout: float = field(default=5.0, metadata=_by(read.duration()))
    max_connecting: int = field(default=2, metadata=_by(read.whole(1, 10_000)))
    validate_after_idle: float = field(default=1.0, metadata=_by(read.duration(off=True)))
    keepalive: float = field(default=0.0, metadata=_by(read.duration(off=True)))
    budget: int | None = field(default=None, metadata=_by(read.whole(1, 1_000_000)))
    min: int = field(default=1, metadata=_by(read.whole(1, 10_000)))
    blocking: bool = field(default=False, metadata=_by(read.flag))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """[workers.NAME]: a group of equal workers. Durations in seconds.

    With `before`, `ready_timeout` is the time to its end; where the key is absent, BEFORE_TIMEOUT.
    Exactly one of `run`, `app` and `command` is not empty. `pools` is in the order of the file, and
    complete where the key is absent; a command has none. `env` and `options` may hold secrets and
    are in no repr. They are not to be changed. The `options` of an `app` have been read: see
    APP_OPTIONS.
    """

    name: str
    run: str = field(default="", metadata=_by(read.entry_point))
    command: tuple[str, ...] = field(default=(), metadata=_by(read.command))
    notify: bool = field(default=False, metadata=_by(read.flag))
    stop_signal: str = field(default="SIGTERM", metadata=_by(read.stop_signal))
    before: bool = field(default=False, metadata=_by(read.flag))
    app: str = field(default="", metadata=_by(read.entry_point))
    count: int = field(default=1, metadata=_by(read.whole(0, read.MAX_COUNT)))
    pools: tuple[str, ...] = field(metadata=_by(read.array(read.text)))  # default: all
    restart: Restart = field(default=Restart.ALWAYS, metadata=_by(read.member(Restart)))
    max_restarts: int = field(default=5, metadata=_by(read.whole(0, 1_000_000)))
    restart_window: float = field(default=60.0, metadata=_by(read.duration()))
    backoff: float = field(default=0.1, metadata=_by(read.duration()))
    backoff_max: float = field(default=30.0, metadata=_by(read.duration()))
    on_failed: str = field(default="keep", metadata=_by(read.choice("keep", "exit")))
    ready_timeout: float = field(default=30.0, metadata=_by(read.duration()))
    min_ready_time: float = field(default=1.0, metadata=_by(read.duration(off=True)))
    surge: int = field(default=1, metadata=_by(read.whole(1, 10_000)))
    max_age: float = field(default=0.0, metadata=_by(read.duration(off=True, least=1.0)))
    max_rss: int = field(default=0, metadata=_by(read.size))  # bytes; 0: off
    hang_timeout: float = field(default=0.0, metadata=_by(read.duration(off=True)))
    sockets: tuple[str, ...] = field(default=(), metadata=_by(read.array(read.text)))
    user: str = field(default="", metadata=_by(read.blank_or(read.text)))
    identity: Identity | None = None  # whom `user` names, where that is not who we are
    env: dict[str, str] = field(default_factory=dict, repr=False, metadata=_by(read.environment))
    options: dict[str, Any] = field(default_factory=dict, repr=False, metadata=_by(read.options))

    @property
    def policy(self) -> RestartPolicy:
        """The restart policy, as the core takes it."""
        return RestartPolicy(
            restart=self.restart,
            max_restarts=self.max_restarts,
            window=self.restart_window,
            backoff=self.backoff,
            backoff_max=self.backoff_max,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketSettings:
    """[sockets.NAME]: a listening socket that the workers of a group share.

    `listen` is "HOST:PORT", "unix:PATH" with an absolute path, or "systemd:NAME"; `mode` and `owner`
    ("user:group", either may be missing) are those of a unix socket's file.
    """

    name: str
    listen: str = field(metadata=_by(read.socket_address))
    backlog: int = field(default=2048, metadata=_by(read.whole(1, 65_535)))
    mode: int = field(default=0o660, metadata=_by(read.mode))
    owner: str = field(default="", metadata=_by(read.blank_or(read.owner)))

    @property
    def is_passed(self) -> bool:
        """Whether it is systemd's."""
        return self.listen.startswith("systemd:")

    @property
    def address(self) -> str:
        """What makes it the same socket in another configuration: its address.

        Every port 0 is another port, so there the name does.
        """
        return f"{self.name} {self.listen}" if self.listen.endswith(":0") else self.listen


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A whole file that is good. Equal when it means the same: a reload compares them.

    `source` is the file's absolute path; `warnings` are things that are allowed and unwise.
    """

    source: str
    supervisor: SupervisorSettings
    log: LogSettings
    pools: dict[str, PoolSettings]
    groups: dict[str, GroupSettings]
    sockets: dict[str, SocketSettings] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = field(default=(), compare=False)
    lines: Lines = field(compare=False, repr=False)

    def pools_of(self, group: str) -> dict[str, PoolSettings]:
        """Return the pools of a group's workers, its first pool first."""
        return {name: self.pools[name] for name in self.groups[group].pools}

    @property
    def longest_step(self) -> float:
        """Seconds that one step of a start or a rolling restart may take; `before` has its own."""
        return self.supervisor.grace + max(
            (
                group.ready_timeout + group.min_ready_time
                for group in self.groups.values()
                if not group.before
            ),
            default=0.0,
        )

    def budget_terms(self, counts: Mapping[str, int] | None = None) -> dict[str, Terms]:
        """Return what each budget has to do for, by pool.

        Args:
            counts: how many workers a group has, where that is not what the file says.
        """
        counts = counts or {}
        terms = {}
        for name, pool in self.pools.items():
            using = [group for group in self.groups.values() if name in group.pools]
            if pool.budget is not None:
                terms[name] = Terms(
                    budget=pool.budget,
                    expected=sum(counts.get(group.name, group.count) for group in using),
                    surge=sum(group.surge for group in using),
                    minimum=pool.min,
                )
        return terms

    def problem(self, path: KeyPath, message: str) -> Problem:
        """Return what is wrong with a key of this file, found by whoever used its value."""
        return Problem(dotted(path), message, self.lines.of(path))


class Later(NamedTuple):
    """A key that has no effect yet: what reads it, the value that asks for nothing, what lacks."""

    reader: read.Reader
    off: Any  # None: every value asks for something
    lacks: str


# [workers.NAME.options] of an `app`: what its server takes.
APP_OPTIONS: dict[str, read.Reader] = {
    "interface": read.choice("asgi", "wsgi"),
    "root_path": read.root_path,
    "forwarded_allow_ips": read.text,
    "keep_alive": read.duration(),
    "limit_concurrency": read.whole(1, 1_000_000),
    "threads": read.whole(1, 1_000),
    "access_log": read.flag,
}

LATER: dict[type, dict[str, Later]] = {
    SupervisorSettings: {
        "region": Later(read.blank_or(read.name), "", "servers are not chosen by region yet"),
    },
    LogSettings: {},
    PoolSettings: {},
    SocketSettings: {},
    GroupSettings: {},
}


def dotted(path: KeyPath) -> str:
    """Return a key's path as it is written in TOML, an array's item as [index]."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _BARE.fullmatch(part) else repr(part))
    return text
