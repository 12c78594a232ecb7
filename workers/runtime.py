"""A worker's life: pools -> ready -> run -> cancel -> drain -> report -> exit.

The main thread runs the user's code and then drains, in an event loop (`aio`) where that code is
asynchronous; the link's thread receives the cancel, ends the contexts in time, and never runs user
code. Order of a stop, as INTERFACE.md has it:

    cancel        accepting ends: no new work
    abort_at      ctx ends: queries are cancelled, transactions roll back, jobs go back
    close limit   half-way from there to the deadline: pools stop waiting for what is lent
    deadline      the supervisor kills; without a supervisor, the process ends itself
"""

from __future__ import annotations

__all__ = ["live", "preload"]

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from setproctitle import setproctitle

from supervisor import log
from supervisor.errors import ProgramError
from supervisor.protocol import (
    Allowance,
    Assignment,
    Cancel,
    CloseReport,
    Death,
    Delayed,
    Drained,
    EndSessions,
    Failed,
    Figures,
    Hello,
    Life,
    Ready,
    Report,
    SessionsEnded,
    Timings,
    ToWorker,
    Tune,
    Tuned,
)
from supervisor.protocol import prepare as prepare_decoder
from workers import correlation
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.entry import is_async, resolve
from workers.examination import examine
from workers.holdings import Holdings
from workers.link import Link
from workers.pool import drivers
from workers.worker import Ledger, Tally, Worker

if TYPE_CHECKING:
    import socket

    from workers.aio import EventLoop

_NO_SOCKETS: Mapping[str, socket.socket] = MappingProxyType({})
MAX_ERROR = 2_000  # characters
MAX_STATUS = 500
MAX_TRACEBACK = 100_000
FAREWELL = 1.0  # seconds that the end of a process waits for the receipt of its last words

_FOR_LINES = ("supervisor.redaction", "supervisor.repeats")

Timer = tuple[float, Callable[[], object]]

_living: _Runtime | None = None  # the worker that this process is


def preload(schemes: Iterable[str]) -> None:
    """Import and make what every worker will need, before the fork: paid once, and shared."""
    prepare_decoder(ToWorker)
    for (
        module
    ) in _FOR_LINES:  # in the moment of a stop, or of its supervisor's death, all write some
        importlib.import_module(module)
    for scheme in schemes:
        with contextlib.suppress(Exception):  # each worker reports a missing driver itself
            drivers.from_url(f"{scheme}:///", None)


def preload_entry(entry_point: str, schemes: Iterable[str]) -> None:
    """Import a worker's module, and what its kind of entry needs. Raises what the module raises."""
    if is_async(resolve(entry_point)):
        from workers import aio

        aio.preload(schemes)


def prepare() -> None:
    """Lay out the signals of the workers that this process forks: a clean slate.

    It is not a worker's own business because it touches pages that all of them can share.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C reaches the whole terminal
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGUSR2, _stacks_written)


def _close_limit(abort_at: float, deadline: float, now: float) -> float:
    """Return when pools stop waiting: half of the time for aborting is kept for the way out.

    A stop that is hurried leaves less than the abort margin: then it is half of what there is.
    """
    return (max(abort_at, now) + deadline) / 2


def _terminated(number: int, _frame: object) -> None:
    if _living is None:  # nobody yet
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    else:
        _living.terminated()


def _stacks_written(_number: int, _frame: object) -> None:
    """Do nothing: faulthandler has written the stacks before it chained to this."""


def live(
    assignment: Assignment, lifeline: int, supervisor: int, sockets: Sequence[int]
) -> NoReturn:
    """Be this worker, from the fork to the end of the process.

    Args:
        assignment: who it is and what it runs.
        lifeline: a socket whose other end is the supervisor's, until either ends.
        supervisor: the pid that must be this process's parent by now.
        sockets: descriptors of the listening sockets that the assignment names, in its order.
    """
    code = 1
    try:
        os.setpgid(0, 0)
        if os.getppid() != supervisor:
            os._exit(1)  # it died while this process was made: nobody knows of it
        os.set_blocking(lifeline, False)
        os.write(lifeline, b"+")  # born; the kernel adds the pid
        code = _Runtime(assignment, lifeline, sockets).run()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            log.sum_up(math.inf)
        log.flush(log.PATIENCE)
        os._exit(code)


class _Runtime:
    """One worker's process. Written by the main thread and the link's, as noted."""

    def __init__(self, assignment: Assignment, lifeline: int, sockets: Sequence[int]) -> None:
        self._assignment = assignment
        self._lifeline = lifeline
        self._lock = threading.Lock()
        self._grace = assignment.grace
        self._abort_margin = assignment.abort_margin
        if (assignment.log_format, assignment.log_level) != log.in_force:
            log.change(assignment.log_format, assignment.log_level)
        self._deadline: float | None = None  # once it has to end; only ever comes nearer
        self._when_told: Tally | None = None  # what had become of its jobs then
        self._closing = Context.background().with_cancel()  # ends when waiting must end
        self._failed = False
        self._reports: dict[str, CloseReport] = {}
        gc.enable()
        setproctitle(
            f"supervisor: worker {assignment.worker} of {assignment.supervisor}, "
            f"generation {assignment.generation}"
        )
        log.bind(
            worker=assignment.worker,
            group=assignment.group,
            generation=assignment.generation,
        )
        self._log = log.get_logger()
        self._link = Link(
            assignment.endpoint,
            Hello(assignment.worker, assignment.token, os.getpid()),
            lifeline,
            self,
        )
        # Its pools are opened where what they raise is told.
        self._holdings = Holdings(assignment, self._link.send, self._link.call_at)
        self._watch_signals()
        log.conceal(pool.url for pool in assignment.pools.values())
        self._worker = Worker(
            id=assignment.worker,
            group=assignment.group,
            generation=assignment.generation,
            options=assignment.options,
            pools=self._holdings.pools,
            log=self._log,
            on_ready=self._ready,
            jobs=_scoreboard(lifeline) if assignment.is_watched else None,
            on_delay=lambda seconds: self._link.send(Delayed(seconds)),
            sockets=_shared(assignment.sockets, sockets) if sockets else _NO_SOCKETS,
            deaths=assignment.deaths,
        )
        log.correlate(functools.partial(correlation.fields_of, self._worker), self._link.call_at)

    def run(self) -> int:
        """Live the whole life; return the exit code."""
        self._link.start()
        code = self._run_user_code()
        self._take_leave()
        # The interpreter of a fork is not finalized (os._exit), but what was registered runs.
        atexit._run_exitfuncs()  # noqa: SLF001
        return code or int(self._failed)  # a thread of the WaitGroup may have raised since

    # --- signals -------------------------------------------------------------------------------

    def _watch_signals(self) -> None:
        """Let the supervisor see them, and take what `prepare` has laid out."""
        global _living  # noqa: PLW0603 (a process is one worker)
        # C code writes the number of each signal to the lifeline, whatever Python is doing: so the
        # supervisor learns of a SIGTERM, and of the end of the stacks that precede a SIGUSR2's.
        signal.set_wakeup_fd(self._lifeline, warn_on_full_buffer=False)
        _living = self
        faulthandler.register(signal.SIGUSR2, file=self._lifeline, all_threads=True, chain=True)
        faulthandler.enable(file=self._lifeline, all_threads=True)  # a crash tells where, too

    def terminated(self) -> None:
        """Drain although the link is dead. With a link, the supervisor answers with a cancel."""
        if self._link.has_ended:
            # In a thread of its own: this handler may have interrupted whoever holds a lock.
            threading.Thread(
                target=self._drain_without_link, name="ackvisor-terminated", daemon=True
            ).start()

    def _drain_without_link(self) -> None:
        for when, action in self._begin(self._grace_from_now(), None, "terminated"):
            time.sleep(max(0.0, when - time.monotonic()))
            action()

    # --- the link's thread ----------------------------------------------------------------------

    def cancelled(self, message: Cancel) -> None:
        """Take no new work; remember the deadline."""
        self._schedule(message.deadline, message.abort_at, message.cause)

    def inquired(self, number: int) -> None:
        """Report what is in hand."""
        self._link.send(self._report(number))

    def _report(self, number: int) -> Report:
        """Say what is in hand, and what has been measured where that is wanted. Any thread."""
        tally = self._worker.jobs.tally()
        return Report(
            number=number,
            in_flight=tally.in_flight,
            jobs_done=tally.done,
            jobs_failed=tally.failed,
            pools=self._holdings.stats(),
            status=_sendable(self._worker.status, MAX_STATUS),
            program_pid=self._worker.program_pid,
            figures=self._figures(tally) if self._assignment.figures else None,
        )

    def _figures(self, tally: Tally) -> Figures:
        return Figures(
            jobs_cancelled=tally.cancelled,
            job_seconds=Timings(tally.counts, tally.seconds),
            pools=self._holdings.timings(),
            own=self._worker.metrics.collect() if self._worker.has_metrics else (),
        )

    def examined(self, number: int) -> None:
        """Tell all that is in hand, from a thread that may hang where somebody holds a lock."""

        def tell() -> None:
            self._link.send(examine(number, self._worker.jobs, self._worker.pools))

        with contextlib.suppress(RuntimeError):  # no thread can be had: nobody waits for long
            threading.Thread(target=tell, name="ackvisor-examination", daemon=True).start()

    def allowed(self, message: Allowance) -> None:
        """Have another number of connections."""
        self._holdings.allowed(message)

    def tuned(self, message: Tune) -> None:
        """Take other settings; pools in a thread of the moment, since closing can take time."""
        self._grace, self._abort_margin = message.grace, message.abort_margin
        log.change(message.log_format, message.log_level)
        self._holdings.tuned(message)

        def take() -> None:
            self._holdings.take()
            self._link.send(Tuned(message.number))

        thread = threading.Thread(target=take, name="ackvisor-tune", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had: the link waits this once
            take()

    def ending(self, message: EndSessions) -> None:
        """End what a killed worker has left behind, in a thread of the moment."""

        def end() -> None:
            # Nothing may depend on it: the supervisor waits so long, and then goes on without.
            with contextlib.suppress(Exception, Cancelled):
                pool, name = message.pool, message.application_name
                if self._holdings.end_sessions(pool, name, self._worker.accepting):
                    self._link.send(SessionsEnded(pool, name))

        with contextlib.suppress(RuntimeError):  # no thread is to be had
            threading.Thread(target=end, name="ackvisor-sessions", daemon=True).start()

    def bereaved(self, message: Death) -> None:
        """Remember it, for whoever takes that worker's jobs back."""
        self._worker.deaths.append(message)

    def orphaned(self) -> None:
        """Drain as for a cancel, and be gone by the deadline without anybody's help."""
        grace = self._grace
        # The watchdog is a thread of C code: it ends the process whoever holds the interpreter.
        faulthandler.dump_traceback_later(max(grace, 0.001), exit=True)
        self._log.warning("worker.orphaned", grace_seconds=grace)
        self._schedule(self._grace_from_now(), None, "the supervisor has died")

    # --- the deadline, from whichever thread learns of it -------------------------------------------

    def _schedule(self, deadline: float, abort_at: float | None, cause: str) -> None:
        for when, action in self._begin(deadline, abort_at, cause):
            self._link.call_at(when, action)

    def _begin(self, deadline: float, abort_at: float | None, cause: str) -> list[Timer]:
        """Take no new work from now on; return what is to be done when, in order.

        A later deadline than one that is known already changes nothing.
        """
        if abort_at is None:
            abort_at = deadline - self._abort_margin
        with self._lock:
            if self._deadline is not None and deadline >= self._deadline:
                return []
            self._deadline = deadline
        self._when_told = self._when_told or self._worker.jobs.tally()
        self._worker.accepting.cancel(cause)
        return [
            (abort_at, lambda: self._worker.ctx.cancel(cause)),
            (
                _close_limit(abort_at, deadline, time.monotonic()),
                lambda: self._closing.cancel("out of time"),
            ),
        ]

    def _grace_from_now(self) -> float:
        return time.monotonic() + self._grace

    # --- the main thread --------------------------------------------------------------------------

    def _run_user_code(self) -> int:
        """Run the entry point and drain; say what it raised. Return the exit code that goes with it."""
        code = 0
        try:
            entry = self._entry_point()
            self._trace()
            if entry.loop is not None:
                self._worker.bind = correlation.bind
                self._holdings.loop = entry.loop
                entry.loop.run(self._open_and_await(entry))
            else:
                self._holdings.open(self._worker.accepting)
                entry.run(self._worker)
        except BaseException as exc:
            code = self._raised(exc)
        loop = self._holdings.loop
        if loop is None:
            self._drain()
        else:
            loop.run_to_its_end(self._drain_in_loop(loop))
            loop.end()
        return code

    def _ready(self) -> None:
        self._trace()  # who has a processor with a thread sets it up here, after the fork
        self._link.send(Ready())

    def _trace(self) -> None:
        """Have spans where the application has OpenTelemetry."""
        if self._worker.tracing is None and "opentelemetry.trace" in sys.modules:
            from workers import tracing  # for those who have it only

            tracing.begin(self._worker)

    def _entry_point(self) -> _EntryPoint:
        app = self._assignment.app
        if not app:
            run = resolve(self._assignment.run)
            if not is_async(run):
                return _EntryPoint(run)
            from workers.aio import EventLoop

            return _EntryPoint(run, EventLoop(), awaits_pools=True)
        target = resolve(app)
        from workers import web  # for those who have an application only
        from workers.aio import EventLoop

        interface = self._worker.options.get("interface") or web.interface_of(target)
        run = functools.partial(web.serve, app=target, interface=interface, closing=self._closing)
        return _EntryPoint(run, EventLoop(web.LOOP), awaits_pools=interface == "asgi")

    async def _open_and_await(self, entry: _EntryPoint) -> None:
        await self._holdings.open_in_loop(self._worker.accepting, awaited=entry.awaits_pools)
        await entry.run(self._worker)

    def _raised(self, exc: BaseException) -> int:
        """Tell what ended the entry point; return the exit code that goes with it."""
        if isinstance(exc, Cancelled | DeadlineExceeded) and self._worker.is_cancelled:
            return 0
        if isinstance(exc, SystemExit):
            return self._exit_code(exc)
        return self._fail(exc)

    def _exit_code(self, exc: SystemExit) -> int:
        if exc.code is None or isinstance(exc.code, int):
            if exc.code:
                self._holdings.outages.blame(exc)
            return exc.code or 0
        return self._fail(exc)

    def _fail(self, exc: BaseException) -> int:
        self._failed = True
        if isinstance(exc, ProgramError):
            last_lines = _sendable(log.redacted(exc.last_lines), MAX_TRACEBACK)
            self._link.send(Failed(error=_sendable(str(exc), MAX_ERROR), traceback=last_lines))
            return exc.exit_code
        summary = traceback.TracebackException(type(exc), exc, None)
        summary.__notes__ = None  # they would come last
        error = list(summary.format_exception_only())[-1].strip()
        text = "".join(traceback.format_exception(exc))
        self._link.send(
            Failed(
                error=_sendable(log.redacted(error), MAX_ERROR),
                traceback=_sendable(log.redacted(text), MAX_TRACEBACK),
                pool=self._holdings.outages.behind(exc),
            )
        )
        return 1

    def _drain(self) -> None:
        """Wait for work in flight and close the pools: all of it bounded."""
        self._begin_drain()
        with self._telling_threads():
            self._worker.wg.wait(self._closing)
        self._worker.jobs.until_idle(self._closing).wait()
        self._reports = self._holdings.close(self._closing, self._abort_margin)

    async def _drain_in_loop(self, loop: EventLoop) -> None:
        """Drain as `_drain` does, with the tasks that still run."""
        self._begin_drain()
        with self._telling_threads():
            await self._worker.wg.wait_async(self._closing)
        await self._worker.jobs.until_idle(self._closing)
        left = await loop.end_tasks(self._holdings.pools.values(), self._closing)
        if left:
            self._log.warning("worker.tasks_left", count=left)
        self._reports = await self._holdings.close_in_loop(loop, self._closing, self._abort_margin)
        await loop.end_threads(self._closing)

    def _begin_drain(self) -> None:
        if self._deadline is None:  # nobody has cancelled it: it ends by itself
            self._schedule(self._grace_from_now(), None, "the worker ends")

    @contextlib.contextmanager
    def _telling_threads(self) -> Iterator[None]:
        """Say what a wait for the WaitGroup raises."""
        try:
            yield
        except Cancelled:
            self._log.warning("worker.threads_left", outstanding=list(self._worker.wg.outstanding))
        except BaseExceptionGroup as group:
            _, failures = group.split(Cancelled)
            if failures is not None and not self._failed:
                self._fail(failures)

    def _take_leave(self) -> None:
        """Say the last words."""
        self._worker.ctx.cancel("the worker ends")
        for job in self._worker.jobs.in_flight():
            self._log.warning(
                "job.abandoned",
                job=job.name,
                thread=job.thread,
                held_seconds=round(time.monotonic() - job.since, 3),
            )
        if self._assignment.figures:
            self._link.send(self._report(0))  # so that nothing that was counted is lost
        self._link.finish(Drained(self._reports, self._life()), FAREWELL)

    def _life(self) -> Life:
        """Return what it has done, for the one line that is written about it."""
        tally, before = self._worker.jobs.tally(), self._when_told
        assert before is not None  # it is drained because somebody has told it to end
        return Life(
            done=tally.done,
            failed=tally.failed,
            cancelled=tally.cancelled,
            abandoned=tally.in_flight,
            finished=tally.done + tally.failed - before.done - before.failed,
            aborted=tally.cancelled - before.cancelled + tally.in_flight,
            pools=self._holdings.use(),
        )


class _EntryPoint(NamedTuple):
    """What a worker runs; with a loop it is awaited in that."""

    run: Callable[[Worker], Any]
    loop: EventLoop | None = None
    awaits_pools: bool = False


def _scoreboard(lifeline: int) -> Ledger:
    from workers.scoreboard import Scoreboard, receive

    return Scoreboard(receive(lifeline))


def _shared(names: Sequence[str], descriptors: Sequence[int]) -> Mapping[str, socket.socket]:
    from workers.sockets import SharedSockets  # for those who have some only

    return SharedSockets(dict(zip(names, descriptors, strict=True)))


def _sendable(text: str, most: int) -> str:
    """Return text that is not too long for the wire, and valid UTF-8; both of its ends are kept."""
    if len(text) > most:
        left_out = len(text) - most
        text = f"{text[: most // 2]} [… {left_out} characters …] {text[-most // 2 :]}"
    return text.encode(errors="backslashreplace").decode()
