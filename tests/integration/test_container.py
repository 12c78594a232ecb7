"""As the first process of a container: here of a pid namespace, which only root may make."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import unavailable
from tests.supervised import DUE, Supervised, children, group, state, wait_until

THROUGH = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
# Holds the process up where it has not got to its loop yet, and its config is not even read.
HOLD_UP = """
import sys, time
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "supervisor.cli":
            open({reached!r}, "w").close()
            time.sleep(60)
sys.meta_path.insert(0, Finder())
"""


class Contained(Supervised):
    """A supervisor that is process 1; `process` is the unshare that waits for it."""

    @property
    def first(self) -> int:
        """Process 1, as seen from outside."""
        return int(wait_until(lambda: next(iter(children(self.pid)), 0), "there is a process 1"))

    def kill_first(self, number: signal.Signals) -> None:
        """Send it a signal, as a container engine does."""
        os.kill(self.first, number)

    def inside(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container."""
        return subprocess.run(
            ["nsenter", f"--target={self.first}", "--pid", "--mount", *words],
            capture_output=True,
            text=True,
            timeout=DUE,
            check=False,
            cwd=self.cwd,
            env=self.env,
        )


@pytest.fixture(autouse=True)
def namespaces() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a pid namespace")
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        unavailable("unshare and nsenter are not installed")
    tried = subprocess.run([*THROUGH, "true"], check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no pid namespace can be made here: {tried.stderr.strip()}")
    yield


def test_process_1_supervises_reaps_strangers_and_stops(tmp_path: Path) -> None:
    """Whose parents have gone are its children: none stays a zombie, none stops the stop."""
    config = group("web", "idle", count=2)
    with Contained(tmp_path, config, through=THROUGH) as supervised:
        supervised.ready()
        own = sorted(children(supervised.first))
        assert len(own) == 3
        status = supervised.inside(*supervised.words("status"))
        assert (status.returncode, status.stderr) == (0, "")

        orphans = "for n in 1 2 3 4 5; do (sleep 0.0$n &); done; setsid sleep 60 &"
        assert supervised.inside("sh", "-c", f"exec >/dev/null 2>&1; {orphans}").returncode == 0
        left = wait_until(
            lambda: (now := _adopted(supervised.first, own)) and len(now) == 1 and now,
            "all but the longest one have ended, and are reaped",
        )

        supervised.kill_first(signal.SIGTERM)
        assert supervised.wait() == 0
        assert supervised.event("supervisor.stopped")["drained"] == 2
        wait_until(lambda: not state(left[0]), "the kernel has ended what was left")


def test_process_1_reloads_on_sighup(tmp_path: Path) -> None:
    """The kernel gives process 1 only signals that it has handlers for: it has them."""
    with Contained(
        tmp_path, group("web", "idle", min_ready_time="0"), through=THROUGH
    ) as container:
        container.ready()
        container.kill_first(signal.SIGHUP)
        container.event("reload.done", generation=2)
        container.kill_first(signal.SIGINT)
        assert container.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_process_1_can_be_stopped_before_its_loop_turns(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A stop that comes in the first tenth of a second is not lost; it ends as others do."""
    reached = tmp_path / "reached"
    (tmp_path / "sitecustomize.py").write_text(HOLD_UP.format(reached=str(reached)))
    env = {"PYTHONPATH": str(tmp_path)}
    with Contained(tmp_path, group("web", "idle"), through=THROUGH, env=env) as supervised:
        wait_until(reached.exists, "it is about to import the rest of itself")

        supervised.kill_first(number)

        assert supervised.wait() == 128 + number


def _adopted(first: int, own: list[int]) -> list[int]:
    """Return the children that are not its own, zombies included."""
    return [pid for pid in children(first) if pid not in own]
