"""`supervisor top` against real supervisors: by the library's pilot, and in a real terminal."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest

from supervisor.client import Client
from supervisor.top.app import Top
from supervisor.top.looks import Confirm, Look
from tests.supervised import DUE, REPO, Supervised, group, wait_until

FLEET = group("jobs", "idle", count=2) + group("busy", "endless", count=1)
needs_tmux = pytest.mark.skipif(
    shutil.which("tmux") is None and not os.environ.get("CI"), reason="tmux is not installed"
)


async def until(pilot, condition, what):
    """Let the app go on until a condition holds."""
    deadline = time.monotonic() + DUE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DUE} s: {what}"
        await pilot.pause(0.05)


def driven(supervised, steps, size=(80, 24)):
    """Run the app against a supervisor, drive it by `steps(app, pilot)`, and return it."""
    connect = partial(Client, supervised.runtime_dir, "test")

    async def main():
        app = Top(connect, connect())
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app._picture is not None, "the first picture")
            await steps(app, pilot)
        return app

    return asyncio.run(main())


def shown(app):
    """Return the ids of the workers in the table."""
    return [row.key for row in app.screen_stack[0].query_one("#workers")._rows]


def test_it_filters_sorts_and_looks_into_a_worker(tmp_path):
    """The fleet is there; words hide the rest; Enter shows a worker's stacks, and `w` its story."""

    async def steps(app, pilot):
        assert sorted(shown(app)) == ["busy-1", "jobs-1", "jobs-2"]
        await pilot.press("slash", *"busy", "enter")
        await until(pilot, lambda: shown(app) == ["busy-1"], "the filter")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Look), "the look")

        def text():
            return str(app.screen.query_one("#look-text").content)

        await until(pilot, lambda: "jobs in flight: 1" in text(), "the dump")
        assert "endless" in text()
        await pilot.press("w")
        await until(pilot, lambda: "was spawned, pid" in text(), "the story")
        await pilot.press("escape", "escape")
        await until(pilot, lambda: len(shown(app)) == 3, "all of them again")

    with Supervised(tmp_path, FLEET, supervisor='grace = "2s"') as supervised:
        supervised.ready()
        driven(supervised, steps)


def test_nothing_is_done_without_a_yes(tmp_path):
    """`r` and No changes nothing; `r` and `y` replaces the worker; `-` and `y` drains one."""

    async def steps(app, pilot):
        await pilot.press("slash", *"group:jobs", "enter")
        await until(pilot, lambda: shown(app) == ["jobs-1", "jobs-2"], "the filter")
        await pilot.press("r")
        assert isinstance(app.screen, Confirm)
        await pilot.press("enter")
        await until(pilot, lambda: not isinstance(app.screen, Confirm), "No")
        await pilot.press("r")
        await pilot.press("y")
        await until(pilot, lambda: shown(app) == ["jobs-2", "jobs-3"], "the replacement")
        assert not supervised.events("worker.cancelled", worker="jobs-2")
        await pilot.press("minus")
        await pilot.press("y")
        await until(pilot, lambda: len(shown(app)) == 1, "one fewer")

    with Supervised(tmp_path, FLEET, supervisor='grace = "2s"') as supervised:
        supervised.ready()
        driven(supervised, steps)
        assert supervised.events("group.scaled") or supervised.events("scale.done")


def test_a_stop_ends_it_with_zero_and_a_death_with_69(tmp_path):
    """When the supervisor has stopped, top says so and ends with 0; when it was killed, with 69."""
    for number, code, word in ((signal.SIGTERM, 0, "has stopped"), (signal.SIGKILL, 69, "died")):
        folder = tmp_path / str(code)  # short: so are the paths of sockets
        folder.mkdir()

        async def steps(app, pilot, number=number):
            supervised.signal(number)
            await until(pilot, lambda: app.farewell, "the farewell")

        with Supervised(folder, group("jobs", "idle"), supervisor='grace = "2s"') as supervised:
            supervised.ready()
            app = driven(supervised, steps)
            supervised.wait()
            wait_until(lambda: not supervised.processes(), "the workers have gone, too")
        assert (app.return_code, word in app.farewell) == (code, True), app.farewell


def test_without_a_terminal_it_is_one_sentence(tmp_path):
    """Where there is no terminal, top names what to use instead, and ends with 2."""
    supervised = Supervised(tmp_path, FLEET)
    done = supervised.command("top")

    assert done.returncode == 2
    assert done.stderr == (
        "supervisor: top needs a terminal; `supervisor status` shows the same once, as text\n"
    )


class Tmux:
    """A terminal of 80 columns and 24 lines, with a shell in it."""

    def __init__(self, folder):
        self.socket = str(folder / "tmux")
        self.run(
            "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "env", "PS1=$ ", "sh"
        )

    def run(self, *words):
        return subprocess.run(
            ["tmux", "-S", self.socket, *words],
            capture_output=True, text=True, check=True, timeout=DUE, cwd=REPO,
        ).stdout  # fmt: skip

    def keys(self, *keys):
        self.run("send-keys", *keys)

    def screen(self, *options):
        return self.run("capture-pane", "-p", *options)

    def sees(self, *words):
        """Wait until every word stands on the screen."""
        try:
            wait_until(
                lambda: all(word in self.screen() for word in words), f"{words} are seen", 8.0
            )
        except AssertionError:
            print(self.screen())
            raise
        return self.screen()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.run("kill-server")


@needs_tmux
@pytest.mark.parametrize("leave", ["q", "C-c"])
def test_a_real_terminal_is_left_as_it_was(tmp_path, leave):
    """At 80x24 and after a resize the fleet is on the screen; without colour none is sent."""
    with (
        Supervised(tmp_path, FLEET, supervisor='grace = "2s"') as supervised,
        Tmux(tmp_path) as terminal,
    ):
        supervised.ready()
        terminal.keys(f"stty -g > {tmp_path}/before", "Enter")
        wait_until((tmp_path / "before").exists, "the terminal's settings")
        words = shlex.join(["env", "NO_COLOR=1", *supervised.words("top")])
        terminal.keys(f"clear; {words}; echo code=$?", "Enter")
        screen = terminal.sees("all is well", "jobs-2", "busy-1", "FLIGHT", "Quit")
        assert max(len(line) for line in screen.splitlines()) <= 80
        colours = terminal.screen("-e")
        assert "38;2;" not in colours and "48;2;" not in colours and "[31m" not in colours
        terminal.run("resize-window", "-x", "120", "-y", "30")
        screen = terminal.sees("PID", "all is well", "Quit")
        assert max(len(line) for line in screen.splitlines()) > 80
        terminal.keys(leave)
        screen = terminal.sees("code=0")
        assert "all is well" not in screen
        terminal.keys(f"stty -g > {tmp_path}/after", "Enter")
        wait_until(
            lambda: (tmp_path / "after").exists() and (tmp_path / "after").read_text(), "settings"
        )
        assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()


@needs_tmux
def test_a_killed_supervisor_leaves_the_terminal_clean(tmp_path):
    """When the supervisor dies, the screen is as before, with one sentence and 69."""
    with (
        Supervised(tmp_path, group("jobs", "idle"), supervisor='grace = "2s"') as supervised,
        Tmux(tmp_path) as terminal,
    ):
        supervised.ready()
        terminal.keys(f"{shlex.join(supervised.words('top'))}; echo code=$?", "Enter")
        terminal.sees("jobs-1")
        supervised.signal(signal.SIGKILL)
        assert "has died" in terminal.sees("code=69")
        wait_until(lambda: not supervised.processes(), "the workers have gone, too")
