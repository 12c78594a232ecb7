"""Settings that running workers take: who has been told, who has confirmed, when that is over.

A reload that replaces nobody is done when every worker that could be told has confirmed, or has
had its time, and when nothing rolls any more (it may have asked for more workers, or fewer).
"""

from __future__ import annotations

__all__ = ["CONFIRM_DUE", "Tuning"]

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from supervisor import protocol
from supervisor.assignments import tune
from supervisor.config import Settings
from supervisor.core.actions import Announce
from supervisor.core.fleet import WorkerSnapshot

# Seconds from telling to confirming: a pool may have to close connections in between.
CONFIRM_DUE = 10.0


@dataclass(slots=True)
class _Reload:
    """A reload that is being applied; one that comes meanwhile joins it."""

    generation: int
    applied: dict[str, None] = field(default_factory=dict)  # the keys, in their order
    waiting: set[str] = field(default_factory=set)  # workers that have not confirmed
    failed: list[str] = field(default_factory=list)
    due: float = 0.0


class Tuning:
    """What running workers are told of changed settings. Owned by the loop.

    Args:
        send: puts a message on a worker's way; False when it cannot be reached.
    """

    def __init__(self, send: Callable[[str, protocol.Tune], bool]) -> None:
        self._send = send
        self._number = 0  # of the last message
        self._untold: dict[str, protocol.Tune] = {}  # who had not said hello
        self._reload: _Reload | None = None

    def begin(
        self,
        settings: Settings,
        generation: int,
        applied: Iterable[str],
        workers: Iterable[WorkerSnapshot],
        now: float,
    ) -> None:
        """Tell the workers of a generation, and wait for them."""
        self._number += 1
        reload = self._reload = self._reload or _Reload(generation)
        reload.applied |= dict.fromkeys(applied)
        reload.due = now + CONFIRM_DUE
        for worker in workers:
            if worker.group in settings.groups:
                message = tune(settings, worker.group, self._number)
                if self._send(worker.id, message):
                    reload.waiting.add(worker.id)
                else:
                    self._untold[worker.id] = message

    def registered(self, worker: str) -> None:
        """Tell a worker that has said hello what has changed since its spawn."""
        message = self._untold.pop(worker, None)
        if message is not None:
            self._send(worker, message)

    def confirmed(self, worker: str, number: int) -> None:
        """A worker has taken the settings of this number."""
        if self._reload is not None and number == self._number:
            self._reload.waiting.discard(worker)

    def forget(self, worker: str) -> None:
        """A worker has ended."""
        self._untold.pop(worker, None)
        if self._reload is not None:
            self._reload.waiting.discard(worker)

    def scale_failed(self, fields: Mapping[str, Any]) -> None:
        """Workers that were asked for have not come."""
        if self._reload is not None:
            self._reload.failed.append(f"scale of {fields['target']}: {fields['error']}")

    def next_deadline(self) -> float | None:
        """Return when `conclusion` is wanted at the latest."""
        return self._reload.due if self._reload is not None and self._reload.waiting else None

    def conclusion(self, now: float, *, is_rolling: bool) -> Announce | None:
        """Return that the reload is done, as soon as it is."""
        reload = self._reload
        if reload is None or is_rolling or (reload.waiting and now < reload.due):
            return None
        self._reload = None
        failed = reload.failed + [
            f"{worker} has not confirmed within {CONFIRM_DUE:g} s"
            for worker in sorted(reload.waiting)
        ]
        return Announce(
            "reload.done",
            {
                "generation": reload.generation,
                "applied": list(reload.applied),
                "replaced": 0,
                "failed": failed,
            },
        )
