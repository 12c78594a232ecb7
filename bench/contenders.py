"""Who is measured, and how each is started. It measures nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = "floor"
OURS = "ackvisor"

_BENCH = ROOT / "bench"
_BIN = Path(sys.executable).parent

# What would change what is measured: no cached bytecode, settings of somebody's shell.
_NOT_INHERITED = (
    "GUNICORN_CMD_ARGS",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPATH",
    "RUNTIME_DIRECTORY",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "WEB_CONCURRENCY",
)


@dataclass(frozen=True)
class Task:
    """One start of one contender: where, with how many workers, and what they have left to do."""

    folder: Path
    workers: int
    finish_s: float = 0.0

    @property
    def ready(self) -> Path:
        return self.folder / "ready"

    def environment(self) -> dict[str, str]:
        """The environment of the command: the caller's, without what would bend the figures."""
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        return kept | {
            "PYTHONPATH": str(self.folder),  # where `release` is
            "BENCH_READY": str(self.ready),
            "BENCH_DATABASE": str(self.folder / "main.db"),
            "BENCH_FINISH_S": str(self.finish_s),
            "BENCH_WORKERS": str(self.workers),
        }

    def release(self, version: int) -> None:
        """Write the module that tells which code a worker runs."""
        # Of another length each time: bytecode is told from its source by size and second.
        (self.folder / "release.py").write_text(f"VERSION = {version}\n{'#' * version}\n")

    def configure(self, template: Path) -> str:
        """Write `template` into the folder with its `@NAMES@` filled in; return its path."""
        text = template.read_text()
        for name, value in {
            "FOLDER": str(self.folder),
            "ROOT": str(ROOT),
            "PYTHON": sys.executable,
            "READY": str(self.ready),
            "WORKERS": str(self.workers),
            "BUSY": json.dumps(self.finish_s > 0),
            "FINISH_S": str(self.finish_s),
        }.items():
            text = text.replace(f"@{name}@", value)
        written = self.folder / template.name
        written.write_text(text)
        return str(written)


@dataclass(frozen=True)
class Contender:
    """A supervisor that can be started.

    `every` says in which rounds it takes part: those that need seconds for a start are measured
    in every third. `kills` is how many workers may be killed in one life before the supervisor's
    own brake on restarts is what would be measured. `rolls`: a SIGHUP replaces its workers.
    """

    name: str
    needs: str
    command: Callable[[Task], list[str]]
    every: int = 1
    kills: int = 1
    rolls: bool = True

    def missing(self) -> str | None:
        """Why it cannot be started here, or None."""
        found = (
            importlib.util.find_spec(self.needs) is not None
            if self.needs.isidentifier()
            else (ROOT / self.needs).exists()
        )
        return None if found else f"{self.needs} is not there"


def _module(name: str) -> Callable[[Task], list[str]]:
    return lambda _: [sys.executable, "-m", name]


def _circus(task: Task) -> list[str]:
    return [str(_BIN / "circusd"), task.configure(_BENCH / "peers" / "circus.ini")]


def _gunicorn(*arguments: str) -> Callable[[Task], list[str]]:
    settings = str(_BENCH / "peers" / "gunicorn_settings.py")
    return lambda _: [
        str(_BIN / "gunicorn"),
        "--config",
        settings,
        *arguments,
        "bench.peers.gunicorn_app:app",
    ]


def _ours(task: Task) -> list[str]:
    return [str(_BIN / "supervisor"), "start", "-c", task.configure(_BENCH / "ours" / "conf.toml")]


CONTENDERS = (
    Contender(FLOOR, "bench/peers/floor.py", _module("bench.peers.floor"), kills=5),
    Contender(OURS, "supervisor/cli.py", _ours, kills=5),
    # From the second death on within as many seconds as it has workers it sleeps for 5 s.
    Contender("cotyledon", "cotyledon", _module("bench.peers.cotyledon_service")),
    Contender("gunicorn --preload", "gunicorn", _gunicorn("--preload"), every=3, kills=3),
    Contender("gunicorn", "gunicorn", _gunicorn(), every=3, kills=3),
    Contender("circus", "circus", _circus, every=3, rolls=False),
)


def bare_router(task: Task) -> list[str]:
    """The command of the broadcast's floor, which supervises nothing."""
    return [sys.executable, "-m", "bench.peers.router", f"ipc://{task.folder}/router"]
