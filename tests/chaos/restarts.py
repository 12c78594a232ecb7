"""Crash after crash: what a supervisor still holds when a thousand workers have died.

    python -m tests.chaos.restarts [--restarts N] [--count N]

Real workers, each of which dies by itself as soon as it serves, in a different way each time: by a
code, an exception, a signal. Afterwards the supervisor has no more descriptors, hardly more memory and
no more children than before, and no zombie.
"""

from __future__ import annotations

__all__ = ["Figures", "Held", "measure"]

import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from tests.supervised import Supervised, children, descriptors, wait_until

CONFIG = """
[workers.mortal]
run = "tests.chaos.mortal:run"
count = {count}
max_restarts = 1000000
backoff = "1ms"
backoff_max = "2ms"
[workers.mortal.options]
enough = "{enough}"
"""
# The ring of events fills up to 10,000, and the C library keeps what it has had: so the first ones
# are not counted, and the rest may cost this much each at most. A leaked worker costs a multiple.
WARM_UP = 0.3
BYTES_EACH = 8_000
PATIENCE = 1.0  # seconds for one restart, on a busy machine


@dataclass(frozen=True)
class Held:
    """What the supervisor has at one moment."""

    descriptors: int
    rss_bytes: int
    children: int
    zombies: int


@dataclass(frozen=True)
class Figures:
    """What a run came to."""

    restarts: int
    seconds: float
    before: Held
    after: Held

    def __str__(self) -> str:
        return (
            f"{self.restarts} crash-restarts in {self.seconds:.1f} s: descriptors "
            f"{self.before.descriptors} -> {self.after.descriptors}, RSS "
            f"{self.before.rss_bytes / 1024:.0f} KiB -> {self.after.rss_bytes / 1024:.0f} KiB, "
            f"children {self.before.children} -> {self.after.children}, "
            f"zombies {self.before.zombies} -> {self.after.zombies}"
        )

    def check(self) -> None:
        """Raise AssertionError where something has leaked."""
        assert self.after.descriptors <= self.before.descriptors, self
        assert self.after.children <= self.before.children, self
        assert self.after.zombies == 0, self
        grown = self.after.rss_bytes - self.before.rss_bytes
        assert grown <= BYTES_EACH * self.restarts + (1 << 20), self


def measure(folder: Path, *, restarts: int, count: int) -> Figures:
    """Let that many workers die, `count` at a time, and look at the supervisor before and after."""
    enough = folder / "enough"  # while it is there, nobody dies
    enough.touch()
    with Supervised(folder, CONFIG.format(count=count, enough=enough)) as supervised:
        supervised.ready()
        warm = round(restarts * WARM_UP)
        _let_die(supervised, enough, count, warm)
        before = _held(supervised)
        began = time.monotonic()
        _let_die(supervised, enough, count, restarts)
        seconds = time.monotonic() - began
        after = _held(supervised)
        died = len(supervised.events("worker.exited"))
        assert died >= warm + restarts
        assert supervised.stop() == 0
        return Figures(died - warm, seconds, before, after)


def _let_die(supervised: Supervised, enough: Path, count: int, deaths: int) -> None:
    """Let so many workers die, and the rest live on."""
    already = len(supervised.events("worker.exited"))
    enough.unlink()
    for pid in supervised.worker_pids().values():
        os.kill(pid, signal.SIGKILL)
    due = 30.0 + deaths * PATIENCE
    supervised.event("worker.exited", count=already + deaths, due=due)
    enough.touch()
    wait_until(lambda: _is_calm(supervised, count), "nobody dies any more")


def _is_calm(supervised: Supervised, count: int) -> bool:
    groups = supervised.status()["groups"]
    return groups["mortal"]["ready"] == count and len(children(supervised.pid)) == count + 1


def _held(supervised: Supervised) -> Held:
    pid = supervised.pid
    resident = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    of_it = children(pid)
    # The least of some looks: the connection of the command that has just asked is open a moment longer.
    held = min(_count_descriptors(pid, after=0.03 * look) for look in range(10))
    return Held(held, resident * 4096, len(of_it), sum(map(_is_zombie, of_it)))


def _count_descriptors(pid: int, *, after: float) -> int:
    time.sleep(after)
    return len(descriptors(pid))


def _is_zombie(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] == "Z"


@click.command()
@click.option("--restarts", default=1000, show_default=True)
@click.option("--count", default=4, show_default=True, help="How many workers live at a time.")
def main(restarts: int, count: int) -> None:
    """Let workers die, and check that the supervisor keeps nothing of them."""
    folder = Path(tempfile.mkdtemp(prefix="restarts-"))
    figures = measure(folder, restarts=restarts, count=count)
    click.echo(figures)
    figures.check()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
