"""`supervisor top`: the fleet, live in a terminal.

`model` and `layout` decide what is shown, and are pure. `feed` asks the supervisor in a thread of
its own, `app` draws and takes keys. Only `app` needs the extra `top`, and only this command pays
for it.
"""

from __future__ import annotations

__all__ = ["show"]

import os
import sys
from collections.abc import Callable

from supervisor.client import Client
from supervisor.errors import SupervisorError, UsageError


def show(connect: Callable[[], Client]) -> tuple[int, str]:
    """Show the fleet until the user leaves or the supervisor ends.

    Args:
        connect: makes a client of the supervisor; called in several threads.

    Returns:
        The exit code, and what to say after the terminal is as it was ("": nothing).

    Raises:
        UsageError: this is no terminal.
        SupervisorError: the extra is not installed.
        NoSupervisorError: no supervisor answers.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") in {"", "dumb"}:
        raise UsageError("top needs a terminal; `supervisor status` shows the same once, as text")
    try:
        import textual  # noqa: F401
    except ModuleNotFoundError as exc:
        raise SupervisorError(
            f"top needs what is not installed ({exc.name}): pip install 'ackvisor[top]'"
        ) from exc
    # Before anything is drawn: what is wrong at once is one sentence on a terminal left alone.
    client = connect()
    from supervisor.top.app import Top

    app = Top(connect, client)
    app.run()
    return app.return_code or 0, app.farewell
