"""Who has died with jobs in flight, and how, as the workers of its group are told.

They take its jobs back, and whether a job counts as failed depends on whether its worker ended itself.
Those who are there are told at once, those to come with their assignment.
"""

from __future__ import annotations

__all__ = ["Deaths"]

from collections import deque
from collections.abc import Callable, Iterable

from supervisor import protocol
from supervisor.core.actions import TellDeath
from supervisor.core.fleet import WorkerSnapshot


class Deaths:
    """The deaths of each group. Owned by the loop's thread.

    Args:
        send: sends a message to a worker, if it can be reached.
    """

    def __init__(self, send: Callable[[str, protocol.Death], object]) -> None:
        self._send = send
        self._by_group: dict[str, deque[protocol.Death]] = {}

    def tell(self, death: TellDeath, workers: Iterable[WorkerSnapshot]) -> None:
        """Tell those of its group, and remember it for those to come."""
        message = protocol.Death(
            death.worker, death.pid or 0, death.code, death.signal, by_itself=death.by_itself
        )
        self._by_group.setdefault(death.group, deque(maxlen=protocol.DEATHS)).append(message)
        for worker in workers:
            if worker.group == death.group:
                self._send(worker.id, message)

    def of(self, group: str) -> tuple[protocol.Death, ...]:
        """Return what a new worker of this group is told, oldest first."""
        return tuple(self._by_group.get(group, ()))
