"""One connection budget over all workers: who may have how many connections of one pool.

Theory of operation. A *lease* is the right to have one connection. The ledger tells each worker its
*allowance*, an absolute number of leases; the worker's pool opens no more than that, and answers
every tell once it physically has no more. Between a tell that takes away and its answer the old
number still counts (the *ceiling*), so the sum of ceilings, of what dead workers may have left open
at the server, and of what is kept for workers that are to come, never exceeds the budget.

    free = budget - sum of ceilings - what the dead have left
    kept = the minimum of each worker that may still come: those missing, and a roll's extra ones

Nothing is said while nothing is scarce. A worker whose pool has waiters and no lease left says what
it wants (in use and waiting); it gets what is free; and if that is not enough, the others give up
what they do not use, and where all want more than there is, the budget is divided by max-min
fairness (Bertsekas and Gallager, Data Networks, 6.5.2): nobody has more while another who wants it has less.

Pure, like all of the core.
"""

from __future__ import annotations

__all__ = ["Ledger", "Tell", "Terms"]

from dataclasses import dataclass

from supervisor.errors import InvariantError


@dataclass(frozen=True, slots=True)
class Terms:
    """What a budget is and has to do for.

    `expected` workers, a roll's extra ones (`surge`) not counted, each with at least `minimum`.
    """

    budget: int
    expected: int
    surge: int
    minimum: int

    @property
    def misfit(self) -> str:
        """Why it cannot do, with the arithmetic; empty where it can."""
        needed = (self.expected + self.surge) * self.minimum
        if needed <= self.budget:
            return ""
        return (
            f"{self.expected} workers and {self.surge} more in a rolling restart need at least "
            f"({self.expected} + {self.surge}) x {self.minimum} = {needed} connections, "
            f"and the budget is {self.budget}"
        )

    def joined(self, other: Terms) -> Terms:
        """Return what does for both, as long as a roll leads from one to the other."""
        return Terms(
            max(self.budget, other.budget),
            max(self.expected, other.expected),
            max(self.surge, other.surge),
            min(self.minimum, other.minimum),
        )


@dataclass(frozen=True, slots=True)
class Tell:
    """What to tell a worker: its allowance from now on.

    `unused_only`: it keeps what is in use at this moment, should that be more.
    """

    worker: str
    allowance: int
    serial: int
    unused_only: bool = False


@dataclass(slots=True)
class _Share:
    """One worker's part. Invariant: ceiling >= allowance."""

    minimum: int
    maximum: int
    allowance: int = 0  # what it was told last
    ceiling: int = 0  # what it may still have open
    wanted: int = 0  # in use and waiting, as heard last
    serial: int = 0  # of the last tell; answers to older ones are stale

    @property
    def claim(self) -> int:
        """What it would use of leases without end."""
        return max(self.minimum, min(self.wanted, self.maximum))

    @property
    def is_starving(self) -> bool:
        return self.claim > self.allowance

    @property
    def is_coming_down(self) -> bool:
        """Whether it has been told to give back, and has not answered."""
        return self.ceiling > self.allowance


class Ledger:
    """The leases of one pool. Owned by the loop."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._shares: dict[str, _Share] = {}
        self._left: dict[str, tuple[int, float]] = {}  # who has died: leases, and until when
        self._orphaned = 0  # what workers of an earlier supervisor may still have

    # --- what is known -----------------------------------------------------------------------------

    @property
    def granted(self) -> int:
        """How many leases are out, those of the dead included."""
        living = sum(share.ceiling for share in self._shares.values())
        return living + self._lost

    @property
    def _lost(self) -> int:
        """How many leases nobody has who could give them back."""
        return self._orphaned + sum(leases for leases, _ in self._left.values())

    @property
    def free(self) -> int:
        """How many leases nobody has."""
        return self.terms.budget - self.granted

    @property
    def _kept(self) -> int:
        terms = self.terms
        missing = max(0, terms.expected + terms.surge - len(self._shares))
        return missing * terms.minimum

    def allowance_of(self, worker: str) -> int:
        """Return what a worker was told last, 0 for one that is not here."""
        share = self._shares.get(worker)
        return share.allowance if share else 0

    # --- what happens ------------------------------------------------------------------------------

    def join(self, worker: str, maximum: int) -> list[Tell]:
        """Give a new worker its first allowance: its even part, its minimum when all is out.

        It may be 0, where even the minimum has yet to come from others or from the dead.

        Returns:
            Its own tell, and then those of others who have to make room.
        """
        if worker in self._shares:
            raise InvariantError(f"BUG: {worker} joins a budget twice")
        terms = self.terms
        share = _Share(minimum=min(terms.minimum, maximum), maximum=maximum)
        self._shares[worker] = share
        even = (terms.budget - terms.surge * terms.minimum) // max(1, terms.expected)
        beyond_kept = max(0, self.free - self._kept)
        first = min(max(share.minimum, min(even, beyond_kept)), maximum, max(0, self.free))
        return [self._tell(worker, share, first), *self._balance()]

    def heard(self, worker: str, serial: int, accepted: int, wanted: int) -> list[Tell]:
        """Take a worker's answer or request.

        Args:
            worker: who.
            serial: of the last tell that it has carried out: it has no more than `accepted`.
            accepted: its allowance, which is above what was told only for `unused_only`.
            wanted: how many it has in use and is asked for.
        """
        share = self._shares.get(worker)
        if share is None:
            return []  # it has ended: its claim ended with it
        share.wanted = max(0, wanted)
        if serial == share.serial:
            # Never above what it could have had already: a liar gets nothing by this.
            share.allowance = share.ceiling = min(max(accepted, share.allowance), share.ceiling)
        return self._balance()

    def leave(self, worker: str, *, settled_at: float | None) -> list[Tell]:
        """Take back the leases of a worker that has ended.

        Args:
            worker: who.
            settled_at: when the server will surely have let go; None: it has closed them itself.
        """
        share = self._shares.pop(worker, None)
        if share is None:
            return []
        if settled_at is not None and share.ceiling:
            self._left[worker] = (share.ceiling, settled_at)
        return self._balance()

    def await_end(self, worker: str, until: float) -> bool:
        """Wait longer for what a dead worker had; False where it had nothing."""
        if worker not in self._left:
            return False
        self._left[worker] = (self._left[worker][0], until)
        return True

    def settled(self, worker: str) -> list[Tell]:
        """Take back at once what a dead worker had: the server has let go."""
        return self._balance() if self._left.pop(worker, None) is not None else []

    def by_spare(self) -> list[str]:
        """Return who has a lease, the one who needs his leases least first."""
        spare = {
            worker: share.allowance - share.wanted
            for worker, share in self._shares.items()
            if share.allowance
        }
        return sorted(spare, key=lambda worker: -spare[worker])

    def time_passed(self, now: float) -> list[Tell]:
        """Take back what the dead had, where its time has come."""
        settled = [worker for worker, (_, at) in self._left.items() if at <= now]
        for worker in settled:
            del self._left[worker]
        return self._balance() if settled else []

    def next_deadline(self) -> float | None:
        """Return when `time_passed` is wanted, or None."""
        return min((at for _, at in self._left.values()), default=None)

    def change(self, terms: Terms) -> list[Tell]:
        """Take new numbers. A lower budget holds once the workers have given back the rest."""
        self.terms = terms
        for share in self._shares.values():
            share.minimum = min(terms.minimum, share.maximum)
        return self._balance()

    def orphaned(self, leases: int) -> list[Tell]:
        """Take note of what workers that are nobody's any more may have. It only becomes less."""
        self._orphaned = leases
        return self._balance()

    def bound(self, maximum: int) -> list[Tell]:
        """Let each worker have so many at most; what is above that is called back."""
        tells = []
        for worker, share in self._shares.items():
            share.maximum = maximum
            share.minimum = min(self.terms.minimum, maximum)
            if share.allowance > maximum:
                tells.append(self._tell(worker, share, maximum))
        return tells + self._balance()

    # --- the balance -------------------------------------------------------------------------------

    def _balance(self) -> list[Tell]:
        """Move leases to where they are wanted; nothing to do is the common case."""
        over = max(0, self.granted + self._kept - self.terms.budget)
        if not over and not any(share.is_starving for share in self._shares.values()):
            return []
        targets = self._fair_targets()
        return [*self._take_back(targets, over), *self._hand_out(targets)]

    def _fair_targets(self) -> dict[str, int]:
        """Divide what is there by max-min fairness among what each one claims."""
        left = self.terms.budget - self._kept - self._lost
        targets: dict[str, int] = {}
        # Of equal claims the last one gets what the division leaves over: who has more already.
        open_claims = sorted(
            self._shares.items(), key=lambda item: (item[1].claim, item[1].allowance)
        )
        for position, (worker, share) in enumerate(open_claims):
            even = max(0, left) // (len(open_claims) - position)
            targets[worker] = min(share.claim, max(even, share.minimum))
            left -= targets[worker]
        return targets

    def _take_back(self, targets: dict[str, int], over: int) -> list[Tell]:
        """Ask those who have more than is fair, until enough is on its way."""
        missing = over + sum(
            max(0, targets[worker] - share.allowance) for worker, share in self._shares.items()
        )
        missing -= max(0, self.free - self._kept)
        missing -= sum(share.ceiling - share.allowance for share in self._shares.values())
        tells = []
        richest = sorted(
            self._shares.items(), key=lambda item: targets[item[0]] - item[1].allowance
        )
        for worker, share in richest:
            surplus = share.allowance - targets[worker]
            if missing <= 0 or surplus <= 0:
                break
            if share.is_coming_down:
                continue
            taken = min(surplus, missing)
            missing -= taken
            # What it wants may be old news: it keeps what it uses, and its answer says how much.
            fair = share.allowance - taken
            tells.append(self._tell(worker, share, fair, unused_only=share.wanted <= fair))
        return tells

    def _hand_out(self, targets: dict[str, int]) -> list[Tell]:
        """Give what is free to those who want it, the poorest first."""
        free, kept = self.free, self._kept
        raised: dict[str, int] = {}
        while free > 0:
            wanting = []
            for worker, share in self._shares.items():
                allowance = raised.get(worker, share.allowance)
                # What is kept for those to come is for those who are here and have not so much.
                ceiling = max(targets[worker], share.minimum) if free > kept else share.minimum
                if allowance < ceiling and not share.is_coming_down:
                    wanting.append((allowance, worker))
            if not wanting:
                break
            allowance, worker = min(wanting)
            raised[worker] = allowance + 1
            free -= 1
        return [
            self._tell(worker, self._shares[worker], allowance)
            for worker, allowance in raised.items()
        ]

    def _tell(
        self, worker: str, share: _Share, allowance: int, *, unused_only: bool = False
    ) -> Tell:
        takes_away = allowance < share.allowance
        share.serial += 1
        share.allowance = allowance
        share.ceiling = max(share.ceiling, allowance)
        if self.granted > self.terms.budget and allowance > 0 and not takes_away:
            raise InvariantError(f"BUG: {worker} is told {allowance} leases that are not there")
        return Tell(worker, allowance, share.serial, unused_only)
