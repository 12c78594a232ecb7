"""A supervisor in a terminal shows what is under way, and that never mixes with its log."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from pathlib import Path

from tests.supervised import DUE, Supervised, group, wait_until

APP = """
import time, pathlib
def run(worker):
    folder = pathlib.Path(worker.options["folder"])
    while not (folder / "speak").exists(): time.sleep(0.01)
    worker.log.warning("spoken", text="." * 5)
    while not (folder / "go").exists(): time.sleep(0.01)
    worker.ready()
    worker.accepting.wait()
    while not (folder / "end").exists(): time.sleep(0.01)
"""
STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The reading end of a terminal: what was written, and the lines that are left standing."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        self.shown = ""

    def until(self, words: str, after: int = 0) -> int:
        """Read until these words are shown behind that place; return the place behind them."""
        deadline = time.monotonic() + DUE
        while (at := self.shown.find(words, after)) < 0:
            assert time.monotonic() < deadline, f"{words!r} is missing in {self.shown!r}"
            self.read(0.1)
        return at + len(words)

    def read(self, timeout: float) -> bool:
        """Read what is there; False at the end of it."""
        if not select.select([self.ours], [], [], timeout)[0]:
            return True
        try:
            piece = os.read(self.ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return False
        self.shown += piece.decode()
        return bool(piece)

    def lines(self) -> list[str]:
        """Return what a person sees: a carriage return goes back, and ESC [ K erases what follows."""
        lines: list[str] = []
        for written in self.shown.split("\n"):
            seen, column = "", 0
            for part in re.split(r"(\r|\x1b\[K)", written):
                if part == "\r":
                    column = 0
                elif part == "\x1b[K":
                    seen = seen[:column]
                else:
                    text = STEERING.sub("", part)
                    seen = seen[:column] + text + seen[column + len(text) :]
                    column += len(text)
            lines.append(seen)
        return lines


def test_a_start_and_a_stop_show_who_is_outstanding(tmp_path: Path) -> None:
    """While it lasts, on a line that lines of the log take the place of; then it is gone."""
    config = group("slow", "app:run", {"folder": str(tmp_path)}, count=2)
    supervised = Supervised(
        tmp_path, config, modules={"app": APP}, log_format="console", env={"TERM": "xterm"}
    )
    terminal = Terminal()
    try:
        with supervised.start(output=terminal.theirs):
            os.close(terminal.theirs)
            at = terminal.until("0 of 2 ready; not ready yet slow-1, slow-2")
            (tmp_path / "speak").touch()
            at = terminal.until("spoken", at)
            at = terminal.until("spoken", at)
            at = terminal.until("0 of 2 ready", at)
            (tmp_path / "go").touch()
            at = terminal.until("is ready: 2 workers in ", at)
            os.kill(supervised.pid, 15)
            at = terminal.until("2 outstanding: slow-", at)
            (tmp_path / "end").touch()
            at = terminal.until("stopped: 2 workers, 2 drained", at)
            while terminal.read(DUE):
                pass
            assert supervised.wait() == 0
    finally:
        os.close(terminal.ours)
    seen = terminal.lines()
    assert not [line for line in seen if "starting, " in line or "outstanding" in line]
    spoken = [line for line in seen if "spoken" in line]
    assert len(spoken) == 2
    assert all(re.match(r"[0-9:.]+ \[warning +\] spoken ", line) for line in spoken)
    assert all(line.endswith(" text=.....") for line in spoken)


def test_a_terminal_that_cannot_erase_a_line_is_shown_nothing(tmp_path: Path) -> None:
    """There the log is all."""
    config = group("slow", "app:run", {"folder": str(tmp_path)})
    supervised = Supervised(
        tmp_path, config, modules={"app": APP}, log_format="console", env={"TERM": "dumb"}
    )
    (tmp_path / "speak").touch()
    (tmp_path / "end").touch()
    terminal = Terminal()
    with supervised.start(output=terminal.theirs):
        os.close(terminal.theirs)
        terminal.until("spoken")
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1.2, "it would show something")
        (tmp_path / "go").touch()
        terminal.until("is ready: 1 worker in ")
        os.kill(supervised.pid, 15)
        while terminal.read(DUE):
            pass
        assert supervised.wait() == 0
    os.close(terminal.ours)
    assert "of 1 ready" not in terminal.shown
    assert "\x1b[K" not in terminal.shown


def test_a_command_that_waits_says_so_in_a_terminal(tmp_path: Path) -> None:
    """`check --import` of a module that takes its time; nothing of it is left."""
    supervised = Supervised(
        tmp_path, group("slow", "app:run"), modules={"app": f"import time; time.sleep(2.0)\n{APP}"}
    )
    terminal = Terminal()
    check = subprocess.Popen(
        supervised.words("check", "--import"),
        stdout=terminal.theirs,
        stderr=terminal.theirs,
        env={**supervised.env, "TERM": "xterm"},
    )
    os.close(terminal.theirs)
    while terminal.read(DUE):
        pass
    os.close(terminal.ours)
    assert check.wait(DUE) == 0
    assert re.search(r"importing the workers' modules, [0-9]+ s", terminal.shown)
    assert [line for line in terminal.lines() if line] == [
        f"{supervised.config}: good. 1 group, 1 worker, 0 pools."
    ]
