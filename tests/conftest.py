"""What every test must leave behind: no child process, no descriptor, no thread, no file."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

# On a machine that does other things as well, an example that took long is no fault of ours.
settings.register_profile("ackvisor", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ackvisor")

SETTLE = 5.0  # seconds in which what a test has ended must be gone


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test that leaves a child process, a descriptor, a thread or a temporary file."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = _held()
    yield
    deadline = time.monotonic() + SETTLE
    while (left := _held() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not left, f"the test left behind: {sorted(left)}"
    files = [str(path.relative_to(temporary)) for path in temporary.rglob("*")]
    assert not files, f"the test left temporary files: {files}"


def _held() -> set[str]:
    """Name the children, descriptors and threads of this process."""
    held = {f"child {pid} {_name(pid)}" for pid in _children()}
    held |= {f"thread {ident} {_outermost(frame)}" for ident, frame in _frames()}
    for fd in os.listdir("/proc/self/fd"):
        try:
            held.add(f"descriptor {fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue  # the listing's own
    return held


def _frames() -> list[tuple[int, FrameType]]:
    """Return the stacks of all threads: threading does not know of bare ones."""
    return list(sys._current_frames().items())


def _outermost(frame: FrameType) -> str:
    """Name what a thread runs."""
    name = ""
    back: FrameType | None = frame
    while back is not None:
        if "threading" not in back.f_code.co_filename:
            name = f"{back.f_code.co_qualname} ({back.f_code.co_filename})"
        back = back.f_back
    return name


def _children() -> list[str]:
    found: list[str] = []
    for task in os.listdir("/proc/self/task"):
        try:
            found += Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii").split()
        except FileNotFoundError:
            continue
    return found


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return "gone"
