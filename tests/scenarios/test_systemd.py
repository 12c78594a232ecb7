"""systemd: test/units/TEST-80-NOTIFYACCESS.sh, without a systemd."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from tests.supervised import Supervised, group


def caught(pid: int) -> set[int]:
    """Return the signals that a process has handlers for, as systemd reads them."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    mask = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_notify_reload_well_behaved(tmp_path):
    """notify-reload-no-handler, …-toggle-handler: SIGHUP has a handler before READY=1, and keeps it.

    The manager looks when it reads READY=1, and kills what would die of its reload signal.
    """
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(30.0)
        env = {"NOTIFY_SOCKET": str(path)}
        config = group("web", "idle", min_ready_time=0)
        with Supervised(tmp_path, config, env=env) as supervised:
            words: list[str] = []
            while words.count("READY=1") < 3:
                lines = manager.recv(8192).decode().splitlines()
                assert signal.SIGHUP in caught(supervised.pid), lines
                words += [line for line in lines if line.endswith("=1")]
                if lines[0] == "READY=1":
                    supervised.signal(signal.SIGHUP)
                elif lines[0] == "RELOADING=1":
                    assert lines[1].startswith("MONOTONIC_USEC=")
            assert words == ["READY=1", "RELOADING=1", "READY=1", "RELOADING=1", "READY=1"]
            assert supervised.stop() == 0
