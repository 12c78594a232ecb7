"""What `supervisor check --connect` says: can every server be reached, and do the pools fit?

Each pool's server is asked by a process of its own (`workers.limits`), all at the same time, with a
deadline. Nothing here is used while a supervisor runs, and no URL is ever shown.
"""

from __future__ import annotations

__all__ = ["PoolCheck", "check_connections", "misfits"]

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from supervisor.config import PoolSettings, Settings
from supervisor.errors import Problem, SpawnError

# Seconds beyond a pool's connect_timeout: for an interpreter to start, and the server's answers.
MARGIN = 10.0
MAX_ANSWER = 1 << 16  # bytes
MAX_ERROR = 500  # characters
_SECRETS = ("password", "passwd", "sslpassword")


@dataclass(slots=True)
class PoolCheck:
    """What came of one pool: what it needs, and what its server says, or why it says nothing."""

    pool: str
    needed: int
    arithmetic: str
    server: str = ""
    limits: list[tuple[str, str, int]] = field(default_factory=list)  # scope, why, most
    connected: int | None = None  # sessions of everybody else, at this moment
    allowed: str = ""  # what stands for a limit where there is none
    note: str = ""
    error: str = ""

    @property
    def tightest(self) -> tuple[str, str, int] | None:
        """The lowest limit that holds for it."""
        return min(self.limits, key=lambda limit: limit[2], default=None)


def check_connections(settings: Settings) -> list[PoolCheck]:
    """Open one connection for each pool, as its workers would, and ask what the server allows.

    It takes `connect_timeout` and MARGIN at most.

    Raises:
        SpawnError: the operating system refuses a process.
    """
    asked: list[tuple[PoolCheck, _Question]] = []
    try:
        asked.extend(
            (PoolCheck(name, *_needed(settings, name)), _Question(settings, name))
            for name in settings.pools
        )
        _collect([question for _, question in asked])
    finally:
        for _, question in asked:
            question.close()
    for check, question in asked:
        answer = question.answered()
        check.error = answer.get("error", "")
        check.server = answer.get("server", "")
        check.limits = [(scope, why, most) for scope, why, most in answer.get("limits", ())]
        check.connected = answer.get("connected")
        check.allowed = answer.get("allowed", "")
        check.note = answer.get("note", "")
    return [check for check, _ in asked]


def misfits(settings: Settings, checks: Iterable[PoolCheck]) -> list[Problem]:
    """Return a problem for each limit that the pools under it exceed together."""
    under: dict[str, list[PoolCheck]] = defaultdict(list)
    reasons: dict[str, tuple[str, int]] = {}
    for check in checks:
        for scope, why, most in check.limits:
            under[scope].append(check)
            reasons[scope] = (why, most)
    problems = []
    for scope, those in under.items():
        why, most = reasons[scope]
        needed = sum(check.needed for check in those)
        if needed > most:
            sums = " and ".join(f"{check.pool}: {check.arithmetic}" for check in those)
            total = f", together {needed}," if len(those) > 1 else ""
            name = those[0].pool
            key = "max_open" if settings.pools[name].budget is None else "budget"
            message = (
                f"up to {needed} connections may be open ({sums}){total} and the server allows "
                f"{most} ({why}); set a lower budget"
            )
            problems.append(settings.problem(("pools", name, key), message))
    return problems


def _needed(settings: Settings, name: str) -> tuple[int, str]:
    """Return how many connections a pool may come to have, and how that is worked out."""
    pool = settings.pools[name]
    if pool.budget is not None:
        return pool.budget, f"budget {pool.budget}"
    using = [group for group in settings.groups.values() if name in group.pools]
    workers = sum(group.count for group in using)
    # Groups are rolled one after the other, so only one of them has extra workers.
    surge = max((group.surge for group in using), default=0)
    needed = (workers + surge) * pool.max_open
    return (
        needed,
        f"({workers} workers + {surge} in a rolling restart) x {pool.max_open} = {needed}",
    )


class _Question:
    """One process that asks one server."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._pool: PoolSettings = settings.pools[name]
        using = [group for group in settings.groups.values() if name in group.pools]
        question = {
            "url": self._pool.url,
            "timeout": self._pool.connect_timeout,
            "application_name": f"{settings.supervisor.name}/check",
            "env": using[0].env if using else {},
        }
        self.deadline = time.monotonic() + self._pool.connect_timeout + MARGIN
        self.data = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from workers.limits import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as exc:
            raise SpawnError(f"no process to ask the server of {name}: {exc.strerror}") from exc
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdout = self._process.stdout
        try:
            # It reads before anything else: this waits for the start of an interpreter at most.
            self._process.stdin.write(json.dumps(question).encode())
            self._process.stdin.close()
        except OSError:
            pass  # it has died: there will be no answer

    def answered(self) -> dict[str, Any]:
        """Return the answer, or the error that stands for it, with nothing secret in it."""
        try:
            answer: dict[str, Any] = json.loads(self.data)
        except ValueError:
            waited = self._pool.connect_timeout + MARGIN
            late = time.monotonic() >= self.deadline
            error = f"no answer within {waited:g} s" if late else "the process that asked has died"
            return {"error": error}
        if "error" in answer:
            answer["error"] = _without_secrets(answer["error"], self._pool.url)
        return answer

    def close(self) -> None:
        """End the process, if it has not ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # not reaped: the number is its own
        self._process.wait()
        self.stdout.close()


def _collect(questions: list[_Question]) -> None:
    """Read all answers, each until its deadline."""
    with selectors.DefaultSelector() as selector:
        for question in questions:
            selector.register(question.stdout, selectors.EVENT_READ, question)
        while selector.get_map():
            now = time.monotonic()
            open_ones = [key.data for key in selector.get_map().values()]
            for late in [question for question in open_ones if question.deadline <= now]:
                selector.unregister(late.stdout)
                open_ones.remove(late)
            if not open_ones:
                return
            left = min(question.deadline for question in open_ones) - now
            for key, _ in selector.select(max(0.0, left)):
                chunk = os.read(key.fd, MAX_ANSWER)
                key.data.data += chunk
                if not chunk or len(key.data.data) > MAX_ANSWER:
                    selector.unregister(key.fileobj)


def _without_secrets(error: str, url: str) -> str:
    """Return an error as one line in which no password of the URL stands, however it is written."""
    line = " ".join(error.split())
    secrets = {word for name, word in _query(url) if name.lower() in _SECRETS}
    login = url.partition("://")[2].rpartition("@")[0]
    secrets.add(login.partition(":")[2])
    for secret in sorted(secrets | {unquote(secret) for secret in secrets}, key=len, reverse=True):
        if secret:
            line = line.replace(secret, "***")
    return line if len(line) <= MAX_ERROR else f"{line[:MAX_ERROR]}…"


def _query(url: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(urlsplit(url).query)
    except ValueError:
        return []
