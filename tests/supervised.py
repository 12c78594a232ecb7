"""A real supervisor for a test: its configuration, its events, its end. Waits with deadlines only."""

from __future__ import annotations

__all__ = [
    "DUE",
    "REPO",
    "Supervised",
    "children",
    "descriptors",
    "group",
    "is_alive",
    "kill_session",
    "session",
    "state",
    "title",
    "wait_until",
]

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

REPO = Path(__file__).resolve().parent.parent
DUE = 30.0  # seconds: what takes longer has failed, also on a busy machine
GONE = 5.0  # seconds in which what has died must be out of the process table
SUPERVISOR = (sys.executable, "-m", "supervisor")


def wait_until(condition: Callable[[], Any], what: str, due: float = DUE) -> Any:
    """Return what `condition` returns as soon as that is true; fail after `due` seconds."""
    deadline = time.monotonic() + due
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {due:g} s: {what}"
        time.sleep(0.005)
    return result


def group(name: str, run: str, options: Mapping[str, Any] | None = None, /, **keys: Any) -> str:
    """Return the TOML of a group; a `run` without a module is one of the victims."""
    run = run if ":" in run else f"tests.victims:{run}"
    lines = [f"[workers.{name}]", f'run = "{run}"']
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    if options:
        lines += [f"[workers.{name}.options]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


class Supervised:
    """One supervisor with its own folder. Use as a `with` block, which leaves nothing behind.

    Args:
        folder: an empty folder for configuration, sockets and log.
        config: TOML, without `[log]`, and without `runtime_dir`.
        supervisor: more lines for `[supervisor]`.
        env: more of the environment.
        modules: sources of the application's modules, by name.
        through: what starts it, as `["sh", "-c", 'umask 077; exec "$@"', "sh"]`.
        log_format: "json", or "console" as a person would see it.
        program: the words that run `supervisor`.
        cwd: where it is run.
        state: where its sockets and its log are; in `folder`, where nothing is said.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        supervisor: str = "",
        env: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        through: Iterable[str] = (),
        log_format: str = "json",
        program: Sequence[str] = SUPERVISOR,
        cwd: Path = REPO,
        state: Path | None = None,
    ) -> None:
        self.folder = folder
        self.runtime_dir = (state or folder) / "run"
        self.log_path = (state or folder) / "log.jsonl"
        self.config = folder / "test.toml"
        self.config.write_text(
            f'[supervisor]\nruntime_dir = "{self.runtime_dir}"\npath = [".", "{REPO}"]\n{supervisor}\n'
            f'[log]\nformat = "{log_format}"\n{config}\n',
            encoding="utf-8",
        )
        for name, source in (modules or {}).items():
            (folder / f"{name}.py").write_text(source, encoding="utf-8")
        self.env = {**os.environ, **(env or {})}
        self.through = tuple(through)
        self.program = tuple(program)
        self.cwd = cwd
        self.process: subprocess.Popen[bytes] | None = None
        self.sessions: list[int] = []
        self._lines: list[dict[str, Any]] = []
        self._read = 0  # bytes of the log that are in _lines

    def start(
        self,
        *,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        output: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Supervised:
        """Start it in a session of its own; `ready` waits for it.

        `output` is a descriptor to write to instead of the log; then `status` tells, not events.
        """
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.through, *self.program, "start", "-c", str(self.config)],
                stdin=stdin,
                stdout=log if output is None else output,
                stderr=log if output is None else output,
                cwd=self.cwd,
                env=self.env,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        self.sessions.append(self.process.pid)
        return self

    def __enter__(self) -> Self:
        if self.process is None:
            self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number in (signal.SIGQUIT, signal.SIGKILL):
            if not self._running():
                break
            self.signal(signal.SIGCONT)
            self.signal(number)
            try:
                self.wait(10.0)
            except subprocess.TimeoutExpired:
                continue
        deadline = time.monotonic() + GONE
        while (left := {pid: title(pid) for pid in self.processes()}) and (
            time.monotonic() < deadline and not all(left.values())
        ):
            time.sleep(0.01)  # one without a title is on its way out
        kill_session(*self.sessions)
        if kind is not None:
            print(self.text())
        else:
            assert not left, f"left running: {left}"

    def _running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # --- doing -----------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> float:
        """Send the supervisor a signal, if it lives; return the monotonic time before that."""
        now = time.monotonic()
        if self._running():
            os.kill(self.pid, number)
        return now

    def wait(self, due: float = DUE) -> int:
        """Return the supervisor's exit code."""
        assert self.process is not None
        return self.process.wait(due)

    def stop(self, due: float = DUE) -> int:
        """SIGTERM, and return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(due)

    def words(self, *words: str) -> list[str]:
        """Return the words of `supervisor WORDS… -c FILE`."""
        return [*self.program, words[0], "-c", str(self.config), *words[1:]]

    def command(self, *words: str, due: float = DUE) -> subprocess.CompletedProcess[str]:
        """Run `supervisor WORDS… -c FILE`."""
        return subprocess.run(
            self.words(*words),
            capture_output=True,
            text=True,
            timeout=due,
            check=False,
            cwd=self.cwd,
            env=self.env,
        )

    def status(self) -> dict[str, Any]:
        """Return `status --json`."""
        done = self.command("status", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def status_once_ready(self) -> dict[str, Any]:
        """Return `status --json` as soon as it says that every group is ready."""

        def ready() -> dict[str, Any] | None:
            assert self._running(), "it has ended"
            done = self.command("status", "--json")
            status = json.loads(done.stdout) if done.returncode == 0 else {"state": "none"}
            return status if status["state"] == "ready" else None

        return wait_until(ready, "it is ready")  # type: ignore[no-any-return]

    # --- seeing ----------------------------------------------------------------------------------

    def text(self) -> str:
        """Everything that was written."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """Every complete JSON line of the log; what else is written there is passed over."""
        for line in self._new_lines():
            if line.startswith(b"{"):
                self._lines.append(json.loads(line))
        return self._lines

    def _new_lines(self) -> list[bytes]:
        """The lines that have been completed since the last look."""
        with self.log_path.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        complete = new.rfind(b"\n") + 1
        self._read += complete
        return new[:complete].splitlines()

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
        try:
            wait_until(
                lambda: len(self.events(name, **fields)) >= count, f"{count} times {name}", due
            )
        except AssertionError as late:
            late.add_note(f"{fields}; the log ends with\n{self.text()[-3000:]}")
            raise
        return self.events(name, **fields)[count - 1]

    def life(self, worker: str) -> list[str]:
        """Names of the life-cycle events of one worker, in order, without "worker."."""
        return [
            line["event"].removeprefix("worker.")
            for line in self.events(worker=worker)
            if line["event"].startswith("worker.") and "pid" in line
        ]

    def ready(self, due: float = DUE) -> Supervised:
        """Wait until every group is ready."""
        wait_until(
            lambda: self.events("supervisor.ready") or not self._running(),
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

    def templates(self) -> list[int]:
        """The pids of the living templates."""
        return [pid for pid in children(self.pid) if title(pid).startswith("supervisor: template")]

    def processes(self) -> list[int]:
        """All living processes of the sessions that this test has started."""
        return [
            pid
            for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal())
            if session(pid) in self.sessions
        ]


# --- what the kernel says of a process -----------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """Return state, parent, process group and session, as proc(5) has them; [] when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    fields = text.rpartition(")")[2].split(maxsplit=4)[:4]
    return [] if fields[0] in "ZX" else fields


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits to be reaped does not."""
    return bool(_stat(pid))


def state(pid: int) -> str:
    """Return the letter of a process's state, "" when it is gone."""
    return _stat(pid)[0] if _stat(pid) else ""


def session(pid: int) -> int:
    """Return the session of a living process, -1 when it is gone."""
    fields = _stat(pid)
    return int(fields[3]) if fields else -1


def kill_session(*sessions: int) -> None:
    """SIGKILL to whatever lives in sessions that a test has started."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and session(int(name)) in sessions:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(int(name), signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the children of a process's main thread."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in text.split()]


def title(pid: int) -> str:
    """Return the process title, as ps shows it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace").strip()


def descriptors(pid: int) -> dict[int, str]:
    """Return the open descriptors of a process and what they are."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile
    return found
