"""How the workers died whose jobs are taken back, as far as the supervisor has told. No I/O.

Who looks for dead workers sees one before anybody can have told of it. What it died of decides what
becomes of its jobs, so its jobs wait for the supervisor's word, for a moment: it knows at once, if it
is its supervisor and lives.
"""

from __future__ import annotations

__all__ = ["WORD_WITHIN", "Deaths", "how_it_ended"]

import signal
from collections.abc import Collection

from supervisor.protocol import Death
from workers.jobs.owner import Owner

WORD_WITHIN = 1.0  # seconds for the word on a death: the supervisor may be busy


class Deaths:
    """What is known of dead workers. Used by the thread whose turn it is to ask.

    Args:
        told: what the supervisor tells; another thread appends to it.
    """

    def __init__(self, told: Collection[Death]) -> None:
        self._told = told
        self._due: dict[Owner, float] = {}  # whose word is waited for, and until when

    def of(self, owner: Owner) -> Death | None:
        """Return what was told of a dead worker, None where nothing was."""
        for death in list(self._told):
            if (death.worker, death.pid) == (owner.worker, owner.pid):
                return death
        return None

    def awaits_word(self, owner: Owner, now: float) -> bool:
        """Return whether a worker that was found dead is to be left alone until more is known."""
        if self.of(owner) is None and now < self._due.setdefault(owner, now + WORD_WITHIN):
            return True
        self._due.pop(owner, None)
        return False


def how_it_ended(owner: Owner, death: Death | None) -> str:
    """Say what a dead worker died of, and where more is to be found."""
    more = f"`supervisor why {owner.worker}` may tell more"
    if death is None:
        return f"{owner.name} has died; {more}"
    if death.signal is None:
        return f"{owner.name} exited with code {death.code}; {more}"
    try:
        name = signal.Signals(death.signal).name
    except ValueError:
        name = f"signal {death.signal}"
    return f"{owner.name} was ended by {name}; {more}"
