"""Launching a template's interpreter: the first thing that a start does.

It takes a tenth of a second until an interpreter has imported what every worker needs, so it is
started before the configuration is read, and this module imports next to nothing.
"""

from __future__ import annotations

__all__ = ["CONTROL_FD", "MAX_FRAME", "Template", "launch_template"]

import contextlib
import os
import resource
import signal
import socket
import sys
from collections import deque

TYPE_CHECKING = False  # type checkers know the name; importing typing would cost 5 ms, before all
if TYPE_CHECKING:
    from typing import Any

CONTROL_FD = 3  # where the template finds its socket
# Nothing of what it imports is garbage: to look for some would take a tenth of its start.
_MAIN = "import gc; gc.disable(); from workers.template import main; main()"
MAX_FRAME = 1 << 20  # bytes of one message to or from a template
# The limits that we were started with. A supervisor of many workers raises its own; theirs stay.
DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)
# What systemd tells the supervisor is not for workers: none may speak for it.
_PRIVATE_ENVIRONMENT = frozenset(
    {
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
    }
)


class Template:
    """One template process, as its supervisor knows it.

    Attributes:
        recipe: what it was told to import, a `processes.Recipe`; None while it is launched in advance.
        loaded: it has imported that, and forks.
        folders: where the modules came from, once it is loaded.
        waiting: forks that were asked for before that: worker and frame.
        hopes: those who waited when the first of them was given up; None: nobody has been.
        given_up: why it was ended although somebody waited for it, "" where it was not.
        outbox: frames that its socket could not take yet, each with a descriptor to be handed over
            (or -1) and the sockets of which copies go along.
    """

    __slots__ = (
        "control",
        "folders",
        "given_up",
        "hopes",
        "loaded",
        "outbox",
        "pid",
        "pidfd",
        "recipe",
        "waiting",
    )

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.control = control
        self.recipe: Any = None
        self.loaded = False
        self.folders: tuple[str, ...] = ()
        self.waiting: list[tuple[str, bytes]] = []
        self.hopes: set[str] | None = None
        self.given_up = ""
        self.outbox: deque[tuple[bytes, int, tuple[socket.socket, ...]]] = deque()


def launch_template() -> Template:
    """Start a template's interpreter and return at once. It imports nothing of the user's yet.

    Raises:
        SpawnError: the operating system refused the process.
    """
    _inherit_nothing()
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as exc:
        raise _refused(exc) from exc
    try:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_FRAME)
        environment = {
            name: value for name, value in os.environ.items() if name not in _PRIVATE_ENVIRONMENT
        }
        pid = os.posix_spawn(
            sys.executable,
            # -P: the folder where the supervisor was started is not a place for modules.
            [sys.executable, "-P", "-c", _MAIN],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), CONTROL_FD),
            ],
            setpgroup=0,
            setsigmask=(),
            setsigdef=set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP},
        )
    except OSError as exc:
        ours.close()
        raise _refused(exc) from exc
    finally:
        theirs.close()
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, DESCRIPTORS)
    ours.setblocking(False)
    try:
        return Template(pid, ours)
    except OSError as exc:  # no descriptor or no memory for its pidfd
        ours.close()
        os.kill(pid, signal.SIGKILL)  # not reaped, so the number is still its own
        os.waitpid(pid, 0)
        raise _refused(exc) from exc


def _refused(exc: OSError) -> Exception:
    from supervisor.errors import SpawnError

    return SpawnError(f"the template process could not be started: {exc.strerror}")


def _inherit_nothing() -> None:
    """Keep for ourselves what our own parent has left open."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:  # noqa: PLR2004
            with contextlib.suppress(OSError):  # the listing's own has gone by now
                os.set_inheritable(int(name), False)
