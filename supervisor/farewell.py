"""What `stop` shows while it waits: who is outstanding until when, and how it ended."""

from __future__ import annotations

__all__ = ["show"]

import time
from typing import TextIO

from supervisor.client import Client
from supervisor.errors import NoSupervisorError
from supervisor.plain import counted
from supervisor.protocol import FetchEvents, Stopping

NAMED = 3  # outstanding workers that are named


def show(client: Client, stopping: Stopping, terminal: TextIO) -> None:
    """Show a stop from its begin to the supervisor's last event.

    Args:
        client: of that supervisor.
        stopping: its answer to the stop.
        terminal: where it is shown.
    """
    ends = time.strftime("%H:%M:%S", time.localtime(time.time() + _left(stopping)))
    outstanding: dict[str, None] = {}
    after = 0
    while True:
        try:
            batch = client.ask(FetchEvents(after, follow=True), _left(stopping) + 1.0)
        except NoSupervisorError:  # it has gone, or has better things to do
            terminal.write("\r\x1b[K")
            return
        after = batch.last
        for event in batch.events:
            match event["event"]:
                case "worker.spawned":
                    outstanding[event["worker"]] = None
                case "worker.drained" | "worker.exited":
                    outstanding.pop(event["worker"], None)
                case "supervisor.stopped":
                    killed = f", killed: {', '.join(event['killed'])}" if event["killed"] else ""
                    terminal.write(
                        f"\r\x1b[Kstopped: {counted(event['workers'], 'worker')}, "
                        f"{event['drained']} drained"
                        f"{killed}\n"
                    )
                    return
                case _:
                    pass
        terminal.write(f"\r\x1b[K{_progress(list(outstanding), ends)}")
        terminal.flush()


def _progress(outstanding: list[str], ends: str) -> str:
    named = ", ".join(outstanding[:NAMED]) + (", …" if len(outstanding) > NAMED else "")
    return f"draining until {ends}: {len(outstanding)} outstanding{': ' if named else ''}{named}"


def _left(stopping: Stopping) -> float:
    return max(0.0, stopping.deadline - time.monotonic())
