"""Examinations under way: what is being asked of a worker, and what of it has come.

Two roads lead to what a worker is doing. With its help: its link asks a thread made for it, which
holds the interpreter lock while it looks at the others. From outside, where no answer comes: the
stacks, which C code in it writes on a signal, and the jobs on its scoreboard, where it has one.

The help is asked for first, because the signal is not free of danger: its handler walks the frames
of all threads, and one that runs meanwhile can crash the process. Who does not answer has somebody
who holds the lock, so nothing runs. What could not be had is named, and why.
"""

from __future__ import annotations

__all__ = ["Examination", "Examinations", "dump"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from supervisor import protocol
from supervisor.core import events as ev
from supervisor.core.fleet import WorkerSnapshot
from supervisor.core.jobs import JobSeen, told

# Seconds for stacks from outside to be written and read, which is the end of each examination.
OUTSIDE = 0.2
_ENDED = "it has ended"
_NO_HELLO = "it has not said hello yet"
_SILENT = (
    "it did not answer: its control thread gets no turn, as when C code holds the interpreter lock"
)


@dataclass(slots=True, eq=False)
class Examination:
    """One examination. Written by Examinations.

    Attributes:
        then: what is done with it when it is over.
        outside_at: when the worker is not waited for any more, and its stacks are taken from outside.
        due: when it is over at the latest.
        seen: its scoreboard, None where it has none.
        was_asked: it could be asked.
        is_outside: stacks from outside are under way.
        stacks: None until they have come, or it is clear that there are none; then it is over.
        said: what it has answered.
    """

    worker: str
    then: Callable[[Examination], object]
    outside_at: float
    due: float
    seen: ev.WorkerSeen | None
    was_asked: bool = False
    is_outside: bool = False
    stacks: ev.StacksTaken | None = None
    said: protocol.Examined | None = None

    @property
    def jobs(self) -> tuple[JobSeen, ...] | None:
        """The jobs in flight; None where they could not be had."""
        if self.said is not None and "jobs" not in self.said.missing:
            return tuple(
                JobSeen(job.name, job.since, job.until, job.thread) for job in self.said.jobs
            )
        return None if self.seen is None else self.seen.jobs

    @property
    def report(self) -> ev.StacksTaken:
        """What the core asks for: stacks and jobs."""
        stacks = self.stacks or ev.StacksTaken(self.worker, "", "it wrote none in time")
        return ev.StacksTaken(self.worker, stacks.stacks, stacks.missing, self.jobs)


class Examinations:
    """All examinations of one supervisor. Owned by the loop's thread.

    Args:
        look: reads a worker's scoreboard.
        halted: says why its process does not run, "" where it does.
        take_stacks: asks for its stacks; what it returns is the answer, where that is known at once.
        send: sends it a message; False where it can't be reached.
    """

    def __init__(
        self,
        look: Callable[[str], ev.WorkerSeen | None],
        halted: Callable[[str], str],
        take_stacks: Callable[[str, float], ev.StacksTaken | None],
        send: Callable[[str, protocol.ToWorker], bool],
    ) -> None:
        self._look = look
        self._halted = halted
        self._take_stacks = take_stacks
        self._send = send
        self._serial = 0
        self._open: dict[int, Examination] = {}

    def begin(
        self, worker: str, then: Callable[[Examination], object], *, now: float, patience: float
    ) -> None:
        """Examine a worker.

        Args:
            worker: its id.
            then: for whoever takes what is `over`: told when it is.
            now: the time.
            patience: seconds until it is over at the latest; above OUTSIDE.
        """
        self._serial += 1
        due = now + patience
        new = Examination(worker, then, due - OUTSIDE, due, self._look(worker))
        self._open[self._serial] = new
        if not self._halted(worker):
            new.was_asked = self._send(worker, protocol.Examine(self._serial))
        if not new.was_asked:
            self._go_outside(new, now)

    def _go_outside(self, examination: Examination, now: float) -> None:
        # Who waits for its stacks already gets the same ones: twice at a time would garble both.
        under_way = any(
            other.is_outside and other.worker == examination.worker and other.stacks is None
            for other in self._open.values()
        )
        examination.is_outside = True
        if not under_way:
            examination.stacks = self._take_stacks(examination.worker, now)

    def stacks_taken(self, report: ev.StacksTaken) -> None:
        """Take the stacks of a worker, from outside."""
        for examination in self._open.values():
            if examination.is_outside and examination.worker == report.worker:
                examination.stacks = examination.stacks or report

    def said(self, worker: str, answer: protocol.Examined) -> None:
        """Take a worker's answer; one to nobody's question, or to another's, is dropped."""
        examination = self._open.get(answer.number)
        if examination is not None and examination.worker == worker:
            examination.said = answer
            missing = answer.missing.get("stacks", "")
            examination.stacks = ev.StacksTaken(worker, answer.stacks, missing)

    def forget(self, worker: str) -> None:
        """A worker has ended: nothing more will come from it."""
        for examination in self._open.values():
            if examination.worker == worker and examination.stacks is None:
                examination.stacks = ev.StacksTaken(worker, "", _ENDED)

    def next_deadline(self) -> float | None:
        """Return when `over` is to be asked at the latest."""
        dues = [
            0.0 if each.stacks else each.due if each.is_outside else each.outside_at
            for each in self._open.values()
        ]
        return min(dues, default=None)

    def over(self, now: float) -> list[Examination]:
        """Return the examinations that are over, and forget them; go on with the others."""
        for each in self._open.values():
            if each.stacks is None and not each.is_outside and each.outside_at <= now:
                self._go_outside(each, now)
        ended = [number for number, each in self._open.items() if each.stacks or each.due <= now]
        return [self._open.pop(number) for number in ended]


def dump(
    examination: Examination, worker: WorkerSnapshot, halted: str, now: float
) -> dict[str, Any]:
    """Return the outcome of an examination as `dump --json` shows it.

    Args:
        examination: one that is over.
        worker: whom it is about.
        halted: why its process does not run, "" where it does.
        now: the time.
    """
    report, said = examination.report, examination.said
    missing = {"stacks": report.missing} if report.missing else {}
    if said is not None:
        missing |= said.missing
    else:
        silence = halted or (_SILENT if examination.was_asked else _NO_HELLO)
        missing |= dict.fromkeys(("tasks", "loans"), silence)
        if report.jobs is None:
            missing["jobs"] = silence
    return {
        "worker": worker.id,
        "group": worker.group,
        "pid": worker.pid,
        "generation": worker.generation,
        "state": worker.state,
        "halted": halted,
        "uptime_seconds": round(now - worker.spawned_at, 3),
        "jobs": told(report.jobs or (), now),
        "loans": [] if said is None else [_loan(loan) for loan in said.loans],
        "tasks": [] if said is None else [protocol.to_builtins(task) for task in said.tasks],
        "threads": (
            {} if said is None else {f"0x{n:016x}": name for n, name in said.threads.items()}
        ),
        "stacks": report.stacks,
        "missing": missing,
    }


def _loan(loan: protocol.Loan) -> dict[str, Any]:
    return protocol.to_builtins(loan) | {"held_seconds": round(loan.held_seconds, 3)}  # type: ignore[no-any-return]
