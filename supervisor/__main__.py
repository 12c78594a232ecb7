"""The command `supervisor`, also as `python -m supervisor`.

A start launches its template's interpreter before anything else, so that it boots on another core
while the command line and the configuration are read. If these are wrong, it ends unused.
"""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import os
import signal
import sys


def main() -> None:
    """Run one command and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C ends a command without a traceback. A supervisor has its own handler later.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:
        _end_as_others_do()
    _open_standard_streams()
    spare = None
    if sys.argv[1:2] == ["start"] and "--help" not in sys.argv:
        from supervisor.errors import SpawnError
        from supervisor.launch import launch_template

        with contextlib.suppress(SpawnError):  # tried again when it is needed, and told then
            spare = launch_template()
    from supervisor.cli import run

    run(spare)


def _end_as_others_do() -> None:
    """Let the signals of a stop end us until the loop takes them over.

    The kernel gives the first process of a container none that it has no handler for.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, _frame: os._exit(128 + number))


def _open_standard_streams() -> None:
    """Open those that our own parent has closed, or sockets and files would get their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            # The lowest free descriptor is this one, since those below it are open by now.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
            os.set_inheritable(number, True)


if __name__ == "__main__":
    main()
