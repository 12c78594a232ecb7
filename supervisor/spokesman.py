"""Speaks for the supervisor to the service manager: what `standing` decides, `notify` sends."""

from __future__ import annotations

__all__ = ["Spokesman"]

from supervisor import log
from supervisor.core import actions as ac
from supervisor.core.fleet import Fleet
from supervisor.core.standing import Message, Standing
from supervisor.notify import Notifier


class Spokesman:
    """The one who talks to the service manager. Owned by the loop's thread; never raises.

    Args:
        address: where the manager listens, as NOTIFY_SOCKET has it.
        watchdog: seconds after which it kills who gives no sign of life; None: never.

    Attributes:
        patience: seconds that a step of a start or a roll may take. Written by the loop.
    """

    def __init__(self, address: str, watchdog: float | None) -> None:
        self.patience = 0.0
        self._standing = Standing(watchdog)
        self._notifier = Notifier(address)
        self._address = address
        self._was_heard = True

    def reload_begins(self, now: float) -> None:
        """Say that a reload has been asked for. Called before its configuration is read."""
        self._say(self._standing.reload_begins(now), now)

    def note(self, announce: ac.Announce) -> None:
        """Take note of a life-cycle event."""
        self._standing.note(announce)

    def tell(self, fleet: Fleet, now: float) -> None:
        """Say what has changed in this turn."""
        self._say(self._standing.told(fleet.snapshot(with_workers=False), self.patience, now), now)

    def turn_completed(self, now: float) -> None:
        """Give a sign of life when one is due, and try again what could not be sent."""
        self._say(self._standing.sign_of_life(now), now)
        retry_at = self._notifier.next_deadline()
        if retry_at is not None and retry_at <= now:
            self._notifier.flush(now)

    def next_deadline(self) -> float | None:
        """Return when a turn is wanted at the latest, None for never."""
        dues = (self._standing.next_deadline(), self._notifier.next_deadline())
        return min((due for due in dues if due is not None), default=None)

    def close(self) -> None:
        """Release the socket."""
        self._notifier.close()

    def _say(self, message: Message, now: float) -> None:
        if not message:
            return
        self._notifier.send(message, now)
        was_heard, self._was_heard = self._was_heard, not self._notifier.error
        if was_heard and not self._was_heard:
            log.get_logger().warning(
                "notify.failed", address=self._address, error=self._notifier.error
            )
