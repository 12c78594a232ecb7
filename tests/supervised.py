"""A real supervisor for a test: its configuration, its events, its end. Waits with deadlines only."""

from __future__ import annotations

__all__ = ["Supervised", "wait_until"]

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DUE = 20.0  # seconds: what takes longer has failed, also on a busy machine


def wait_until(condition: Callable[[], Any], what: str, due: float = DUE) -> Any:
    """Return what `condition` returns as soon as that is true; fail after `due` seconds."""
    deadline = time.monotonic() + due
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {due:g} s: {what}"
        time.sleep(0.005)
    return result


class Supervised:
    """One supervisor with its own folder. Use as a `with` block, which leaves nothing behind.

    Args:
        folder: an empty folder for configuration, sockets and log.
        config: TOML, without `[log]`, and without `runtime_dir`.
        supervisor: more lines for `[supervisor]`.
    """

    def __init__(self, folder: Path, config: str, *, supervisor: str = "", env: Any = None) -> None:
        self.folder = folder
        self.log_path = folder / "log.jsonl"
        self.config = folder / "test.toml"
        self.config.write_text(
            f'[supervisor]\nruntime_dir = "{folder / "run"}"\npath = [".", "{REPO}"]\n{supervisor}\n'
            f'[log]\nformat = "json"\n{config}\n',
            encoding="utf-8",
        )
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.sessions: list[int] = []

    def start(self) -> Supervised:
        """Start it; `ready` waits for it."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supervisor", "start", "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPO,
                env=self._env,
                start_new_session=True,
            )
        self.sessions.append(self.process.pid)
        return self

    def __enter__(self) -> Supervised:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL):
            if self._ended_within(8.0):
                break
            self.signal(number)
        left = self.processes()
        for pid in left:  # started by this test: their session is that of our own child
            os.kill(pid, signal.SIGKILL)
        if kind is not None:
            print(self.text())
        else:
            assert not left, f"left running: {left}"

    def _ended_within(self, seconds: float) -> bool:
        assert self.process is not None
        if self.process.poll() is None and seconds:
            try:
                self.process.wait(seconds if self._asked else 0.0)
            except subprocess.TimeoutExpired:
                return False
        return self.process.poll() is not None

    _asked = False

    # --- doing -----------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send the supervisor a signal."""
        self._asked = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, due: float = DUE) -> int:
        """Return the supervisor's exit code."""
        assert self.process is not None
        return self.process.wait(due)

    def stop(self, due: float = DUE) -> int:
        """SIGTERM, and return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(due)

    def command(self, *words: str, due: float = DUE) -> subprocess.CompletedProcess[str]:
        """Run `supervisor WORDS… -c FILE`."""
        return subprocess.run(
            [sys.executable, "-m", "supervisor", words[0], "-c", str(self.config), *words[1:]],
            capture_output=True,
            text=True,
            timeout=due,
            check=False,
            cwd=REPO,
            env=self._env,
        )

    def status(self) -> dict[str, Any]:
        """Return `status --json`."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    # --- seeing ----------------------------------------------------------------------------------

    def text(self) -> str:
        """Everything that was written."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """Every complete log line."""
        found = []
        for line in self.text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue  # half written
        return found

    def events(self, name: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Log lines of that name in which all of `fields` are as given, oldest first."""
        return [
            line
            for line in self.lines()
            if (name is None or line["event"] == name)
            and all(line.get(key) == value for key, value in fields.items())
        ]

    def event(
        self, name: str, *, due: float = DUE, count: int = 1, **fields: Any
    ) -> dict[str, Any]:
        """Wait for the `count`-th such event and return it."""
        found = wait_until(
            lambda: (seen := self.events(name, **fields))[count - 1 :] and seen,
            f"{count} × {name} {fields}; the log:\n{self.text()[-3000:]}",
            due,
        )
        return found[count - 1]  # type: ignore[no-any-return]

    def ready(self, due: float = DUE) -> Supervised:
        """Wait until every group is ready."""
        wait_until(
            lambda: self.events("supervisor.ready") or self.process.poll() is not None,  # type: ignore[union-attr]
            "supervisor.ready",
            due,
        )
        assert self.events("supervisor.ready"), self.text()
        return self

    def worker_pids(self) -> dict[str, int]:
        """Worker id -> pid of the workers that have been spawned and have not exited."""
        living: dict[str, int] = {}
        for line in self.lines():
            if line["event"] == "worker.spawned":
                living[line["worker"]] = line["pid"]
            elif line["event"] == "worker.exited":
                living.pop(line["worker"], None)
        return living

    def processes(self) -> list[int]:
        """All living processes of the sessions that this test has started."""
        return [pid for pid in _pids() if _session(pid) in self.sessions]


def _pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _session(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return -1
    state, _, _, session, *_ = text.rpartition(")")[2].split(maxsplit=4)
    return -1 if state in "ZX" else int(session)
