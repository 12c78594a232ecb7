"""What has to run, and to end well, before anybody else starts: a migration.

Theory of operation. It is a roll whose steps are ends: each group with `before` gets one worker, in the
order of the file, and the next one comes when that one has ended with success. That it serves, or for
how long, means nothing. The first that fails ends it, and so does one that was told to end: what it was
for has not been done. What follows from that is for `rolls`: a start goes no further, a reload is
rejected.
"""

from __future__ import annotations

__all__ = ["Before"]

from supervisor.core.group import Slot
from supervisor.core.roll import Failure, Roll
from supervisor.core.worker import Step, Worker


class Before(Roll):
    """The books of one such run. Written by its own methods, called by Rolls only."""

    def became_ready(self, worker: Worker, slot: Slot, now: float) -> None:
        """To serve is not what it is for."""

    def review(self, now: float) -> None:
        """How it ends is what counts."""

    def failed(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> None:  # noqa: ARG002
        """Take note that its code has raised; it ends by itself, and then that is why."""
        move = self._moves.get(slot)
        if move is not None and move.successor is worker:
            self.failure = self.failure or failure

    def ended(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> bool:
        """Take note of an end; False when the ordinary rules decide what comes after it."""
        move = self._moves.get(slot)
        took = worker.history
        has_done_it = Step.EXITED in took and Step.CANCELLED not in took and not worker.failed
        if move is None or move.successor is not worker or not has_done_it:
            return super().ended(worker, slot, failure, now)
        del self._moves[slot]
        slot.finished = True
        self.advance(now)
        return True

    def _skip_what_is_not_wanted(self, now: float) -> None:
        """Nothing: it is wanted again although it has been done for another generation."""
