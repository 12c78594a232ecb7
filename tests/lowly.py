"""Workers that run as another user. They import nothing that their template has not imported before:

the interpreter's own folder may be closed to them, as it is where root has built it at home.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from workers.worker import Worker


def idle(worker: Worker) -> None:
    """Serve, and do nothing."""
    worker.ready()
    worker.accepting.wait()


def deaf(worker: Worker) -> None:
    """Swallow whatever comes, in an endless loop."""
    worker.ready()
    while True:
        with contextlib.suppress(BaseException):
            while True:
                pass


def rights(worker: Worker) -> None:
    """Try what only somebody else may do, and say what it is and what it could do."""
    told = _read("/proc/self/status").decode().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in told)}
    supervisor = os.getppid()
    attempts: dict[str, Callable[[], object]] = {
        "become root": lambda: os.setresuid(0, 0, 0),
        "take root's group": lambda: os.setgroups([0]),
        "look into the folder": lambda: os.listdir(worker.options["runtime_dir"]),
        "open the lock": lambda: os.open(f"{worker.options['runtime_dir']}/lock", os.O_RDONLY),
        "signal the supervisor": lambda: os.kill(supervisor, 0),
        "read its environment": lambda: _read(f"/proc/{supervisor}/environ"),
        "read its own environment": lambda: _read("/proc/self/environ"),
        "list its own descriptors": lambda: os.listdir("/proc/self/fd"),
    }
    may = []
    for what, attempt in attempts.items():
        with contextlib.suppress(PermissionError):
            attempt()
            may.append(what)
    worker.log.info(
        "victim.rights",
        may=may,
        status={name: status[name] for name in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs")},
        groups=os.getgroups(),
        env={name: os.environ.get(name) for name in ("HOME", "USER", "LOGNAME", "SHELL")},
        imported_as=IMPORTED_AS,
    )
    worker.ready()
    worker.accepting.wait()


IMPORTED_AS = os.getresuid()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
