"""The loop: poll -> event -> core.handle -> run actions. Owns every socket, descriptor and clock.

It decides nothing. What has happened goes to the fleet as an event with the time, what the fleet
answers is carried out in order, and an action that fails comes back as an event.
"""

from __future__ import annotations

__all__ = ["Supervisor"]

import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import zmq

from supervisor import claims, log, protocol, requests
from supervisor.assignments import (
    allowances_wanted,
    assignment,
    budgeted,
    group_specs,
    recipe,
    terminable,
)
from supervisor.config import Settings, compared
from supervisor.control import Control, Flooded, RuntimeDir
from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import Fleet, Phase, WorkerSnapshot
from supervisor.core.worker import SUSPECT_STACKS_DUE
from supervisor.deaths import Deaths
from supervisor.errors import ConfigError, Problem, SpawnError, UsageError
from supervisor.examination import Examination, Examinations, dump
from supervisor.followers import Followers
from supervisor.generations import Generations
from supervisor.journal import Journal
from supervisor.launch import Template
from supervisor.lending import Lending
from supervisor.lines import Lines
from supervisor.memory import OomCounter
from supervisor.orphans import Notes, Orphans
from supervisor.processes import (
    Processes,
    TemplateDied,
    TemplateTainted,
    TemplateUnclear,
    reserve_descriptors,
)
from supervisor.signals import Signals
from supervisor.sockets import PATIENCE, Sockets
from supervisor.status import Answer, Reports, fleet_status, rss
from supervisor.tuning import Tuning

if TYPE_CHECKING:
    from supervisor.monitoring import Monitoring
    from supervisor.progress import Progress
    from supervisor.spokesman import Spokesman

MAX_DELAY = 366 * 86400.0  # seconds that a worker can ask for to become ready
MONITORING_DESCRIPTORS = 136  # as many connections as `http` allows, and its own
LONGEST_WAIT = 3600.0  # seconds of one poll
MAX_ERROR = 2_500  # characters; a worker's own runtime keeps to less
MAX_TRACEBACK = 120_000


class Supervisor:
    """One supervisor, from its first worker to its last.

    Args:
        settings: the configuration.
        spare: a template that was launched while the configuration was read.
        on_ready: called once, when every group is ready for the first time, with the seconds that took.
        on_finish: called once, with how each worker came through the stop.
        spokesman: who tells a service manager how it stands; None where there is none.
        terminal: writes to the terminal that shows the log, if there is one: what is under way.

    Raises:
        AlreadyRunningError: a supervisor of this name runs.
        AddressInUseError: others listen where it is to.
        ConfigError: `runtime_dir` or a socket's address cannot be used.
        SpawnError: the operating system does not allow that many workers.
        ListenError: the address for metrics and health cannot be listened on.
    """

    def __init__(
        self,
        settings: Settings,
        spare: Template | None,
        *,
        on_ready: Callable[[float], None],
        on_finish: Callable[[ac.Finish], None],
        spokesman: Spokesman | None = None,
        terminal: Callable[[str], object] | None = None,
    ) -> None:
        self._generations = Generations(settings)
        self._on_ready = on_ready
        self._on_finish = on_finish
        self._spokesman = spokesman
        self._be_patient(settings)
        self._log = log.get_logger()
        runtime_dir = Path(settings.supervisor.runtime_dir)
        self._runtime_dir = RuntimeDir(runtime_dir, settings.supervisor.name, settings.source)
        self._journal = Journal()
        self._lines = Lines()
        self._oom_counter = OomCounter()
        self._fleet = Fleet(
            group_specs(settings),
            grace=settings.supervisor.grace,
            abort_margin=settings.supervisor.abort_margin,
            draw=random.random,
            oom_kills=self._oom_counter.read(),
        )
        self._monitoring = self._monitored(settings.supervisor.listen)
        self._progress = self._shown(terminal)
        self._reserve(settings, {})
        self._signals = Signals()
        self._control = Control(runtime_dir, self._dropped)
        self._processes = Processes(spare, self._control.workers_path)
        self._sockets = Sockets(os.environ, os.getpid())
        self._say_where(self._sockets.open(1, settings, PATIENCE))
        self._counts: dict[str, int] = {}  # of groups that were scaled
        self._open_to_users(settings)
        self._lending = Lending(self._control.to_worker)
        self._lending.change(settings.budget_terms())
        self._notes = Notes(runtime_dir, lambda why: self._log.warning("note.failed", error=why))
        self._orphans = Orphans(runtime_dir, time.monotonic())
        self._wait_for_orphans()
        self._tuning = Tuning(self._control.to_worker)
        self._deaths = Deaths(self._control.to_worker)
        self._started = log.timestamp()
        self._reports = Reports()
        self._examinations = Examinations(
            self._processes.look,
            self._processes.halted,
            self._processes.take_stacks,
            self._control.to_worker,
        )
        self._requests = 0  # restarts and scalings that were accepted
        self._asking: list[Answer] = []  # who wants a status
        self._followers = Followers(self._journal, self._control.to_client)
        self._ended: list[ev.WorkerExited] = []  # whose last words have not been heard yet
        self._stop_signals: set[signal.Signals] = set()
        self._finish: ac.Finish | None = None

    @property
    def _settings(self) -> Settings:
        """The configuration in force."""
        return self._generations.settings

    def run(self) -> int:
        """Run until every worker is accounted for; return the exit code."""
        poller = zmq.Poller()
        for readable in (self._control.workers, self._control.clients):
            poller.register(readable, zmq.POLLIN)
        for descriptor in (
            self._processes.fileno(),
            self._signals.fileno(),
            self._orphans.fileno(),
        ):
            poller.register(descriptor, zmq.POLLIN)
        if self._monitoring is not None:
            poller.register(self._monitoring.fileno(), zmq.POLLIN)
            self._log.info("supervisor.listening", url=self._monitoring.url)
        self._carry_out(self._fleet.start(time.monotonic()))
        self._tell_manager()
        self._show_progress(time.monotonic())
        while self._finish is None:
            unwritten = log.backlog()
            if unwritten is not None:
                poller.register(unwritten, zmq.POLLOUT)
            ready = dict(poller.poll(self._poll_timeout()))
            if unwritten is not None:
                poller.unregister(unwritten)
                log.flush(0.0)
            self._turn(ready)
            if self._spokesman is not None:
                self._spokesman.turn_completed(time.monotonic())
        self._farewell()
        return self._finish.exit_code

    # --- one turn ------------------------------------------------------------------------------

    def _poll_timeout(self) -> int | None:
        dues = [
            due
            for due in (
                self._fleet.next_deadline(),
                self._processes.next_deadline(),
                self._lending.next_deadline(),
                self._tuning.next_deadline(),
                self._orphans.next_deadline(),
                self._notes.next_deadline(),
                self._reports.next_deadline(),
                self._examinations.next_deadline(),
                None if self._monitoring is None else self._monitoring.next_deadline(),
                self._spokesman.next_deadline() if self._spokesman is not None else None,
                self._progress.next_deadline() if self._progress is not None else None,
                log.repeats_due(),
            )
            if due is not None
        ]
        if not dues:
            return None
        # Rounded up: a turn that comes too early would find nothing due, and spin.
        return max(0, int(min(min(dues) - time.monotonic(), LONGEST_WAIT) * 1000) + 1)

    def _turn(self, ready: dict[Any, int]) -> None:
        self._hear_of_processes()
        if self._ended or self._control.workers in ready:
            for worker, message in self._control.from_workers():
                self._worker_message(worker, message)
        ended, self._ended = self._ended, []
        for report in ended:
            self._process_report(report)
        if self._signals.fileno() in ready:
            self._take_signals()
        if self._control.clients in ready:
            for client, request in self._control.from_clients():
                self._client_request(client, request)
        for examination in self._examinations.over(time.monotonic()):
            examination.then(examination)
        if self._monitoring is not None:
            self._monitoring.turn(time.monotonic())
        self._inquire()
        self._handle(ev.TimePassed())
        self._lending.time_passed(time.monotonic())
        self._notes.time_passed(time.monotonic())
        if self._orphans.time_passed(time.monotonic()):
            self._lending.orphaned(self._orphans.held())
        done = self._tuning.conclusion(time.monotonic(), is_rolling=self._fleet.is_rolling)
        if done is not None:
            self._announce(done)
        self._answer_inquiries(time.monotonic())
        self._show_progress(time.monotonic())
        log.sum_up(time.monotonic())
        self._tell_manager()  # before those who wait for the end of a reload hear of it
        self._followers.feed()

    def _tell_manager(self) -> None:
        if self._spokesman is not None:
            self._spokesman.tell(self._fleet, time.monotonic())

    def _show_progress(self, now: float) -> None:
        if self._progress is not None:
            self._progress.turn(self._fleet.phase, now, is_rolling=self._fleet.is_rolling)

    def _hear_of_processes(self) -> None:
        """Take what has happened to processes; an end lies after all that its worker has said."""
        for report in self._processes.reports(time.monotonic()):
            if isinstance(report, ev.WorkerExited):
                self._ended.append(report)
            else:
                self._process_report(report)

    def _handle(self, event: ev.Event) -> None:
        if isinstance(event, ev.WorkerExited | ev.WorkerNotBorn):
            # Before its successor asks for some.
            self._lending.leave(event.worker, was_born=isinstance(event, ev.WorkerExited))
        if isinstance(event, ev.WorkerBorn):
            self._note(event)
        self._carry_out(self._fleet.handle(event, time.monotonic()))
        if isinstance(event, ev.WorkerNotBorn):
            self._forget(event.worker)

    # --- what has happened ---------------------------------------------------------------------

    def _process_report(self, report: Any) -> None:
        match report:
            case TemplateTainted():
                self._log.warning(
                    "template.tainted",
                    entry_point=report.entry_point,
                    found=list(report.found),
                    effect="a fork would lose it, so its workers import for themselves",
                )
            case TemplateDied():
                self._log.warning("template.died", pid=report.pid, how=report.how)
            case TemplateUnclear():
                self._log.warning("template.unclear", pid=report.pid, error=report.error)
            case ev.StacksTaken():
                self._examinations.stacks_taken(report)
            case ev.WorkerExited(signal=signal.SIGKILL):
                self._handle(replace(report, oom_kills=self._oom_counter.read()))
            case _:
                self._handle(report)

    def _worker_message(self, worker: str, message: Any) -> None:
        match message:
            case protocol.Hello():
                self._hello(worker, message)
            case protocol.Ready():
                self._handle(ev.WorkerReady(worker))
            case protocol.Delayed() if not 0.0 < message.seconds < MAX_DELAY:
                self._dropped("delay", f"{worker} asks for {message.seconds} s to be ready", 1)
            case protocol.Delayed():
                self._handle(ev.WorkerDelayed(worker, message.seconds))
            case protocol.Acknowledged():
                self._handle(ev.WorkerAcknowledged(worker))
            case protocol.Failed():
                error = claims.clipped(message.error, MAX_ERROR)
                traceback = claims.clipped(message.traceback, MAX_TRACEBACK)
                pool = message.pool if message.pool in self._pools_of(worker) else ""
                self._handle(ev.WorkerFailed(worker, error, traceback, pool))
            case Flooded():
                self._handle(ev.WorkerFailed(worker, message.why, ""))
                self._handle(ev.WorkerLeaving(worker, message.why))  # a failure alone ends nothing
            case protocol.Unreachable() | protocol.Reachable():
                self._pool_reaches(worker, message)
            case protocol.Drained():
                self._drained(worker, message)
            case _:
                self._worker_answer(worker, message)

    def _worker_answer(self, worker: str, message: Any) -> None:
        """Pass on what a worker says that is nothing to its life."""
        match message:
            case protocol.Report():
                report = claims.report(message, self._pools_of(worker))
                self._reports.heard(worker, report)
                if self._monitoring is not None:
                    self._monitoring.heard(worker, report)
            case protocol.Examined():
                self._examinations.said(worker, message)
            case protocol.LeakFound():
                self._leak_found(worker, message)
            case protocol.Usage():
                self._lending.heard(worker, message)
            case protocol.SessionsEnded():
                self._lending.sessions_ended(message)
            case protocol.Tuned():
                self._tuning.confirmed(worker, message.number)
            case _:
                assert_never(message)

    def _hello(self, worker: str, hello: protocol.Hello) -> None:
        found = self._fleet.worker_of(worker)
        if found is not None and found.pid is None:
            # Its hello is here, so its birth is told by now: after this turn has asked.
            self._hear_of_processes()
            found = self._fleet.worker_of(worker)
        if found is None or hello.pid != found.pid:
            self._control.forget(worker)
            self._dropped("liar", f"{worker} says that its pid is {hello.pid}", 1)
        else:
            self._handle(ev.WorkerRegistered(worker))
            self._lending.registered(worker)
            self._tuning.registered(worker)

    def _pool_reaches(
        self, worker: str, message: protocol.Unreachable | protocol.Reachable
    ) -> None:
        if message.pool not in self._pools_of(worker):
            return
        if isinstance(message, protocol.Unreachable):
            error = claims.clipped(message.error, MAX_ERROR)
            self._handle(ev.WorkerUnreachable(worker, message.pool, error))
        else:
            self._handle(ev.WorkerReachable(worker, message.pool))

    def _drained(self, worker: str, drained: protocol.Drained) -> None:
        if not any(report.leaked for report in drained.reports.values()):
            self._lending.closed_all(worker)
        reports = claims.close_reports(drained, self._pools_of(worker))
        life = claims.life(drained, self._pools_of(worker))
        self._handle(ev.WorkerDrained(worker, reports, life))
        self._control.to_worker(worker, protocol.Farewell())

    def _pools_of(self, worker: str) -> tuple[str, ...]:
        """Return the pools that a worker was given; none where it has ended."""
        found = self._fleet.worker_of(worker)
        return (
            () if found is None else self._generations[found.generation].groups[found.group].pools
        )

    def _leak_found(self, worker: str, leak: protocol.LeakFound) -> None:
        found = self._fleet.worker_of(worker)
        if found is not None and leak.pool in self._pools_of(worker):
            self._announce(
                ac.Announce(
                    "pool.leak",
                    {
                        "worker": worker,
                        "group": found.group,
                        "pid": found.pid,
                        "generation": found.generation,
                        "pool": leak.pool,
                        "held_seconds": round(leak.held_seconds, 3),
                        "thread": claims.clipped(leak.thread, claims.MAX_NAME),
                        "stack": claims.clipped(leak.stack, claims.MAX_STACK),
                    },
                )
            )

    def _take_signals(self) -> None:
        for number in self._signals.take():
            match number:
                case signal.SIGTERM | signal.SIGINT:
                    if number in self._stop_signals:
                        self._handle(ev.StopNowRequested(f"{number.name} again"))
                    else:
                        self._stop_signals.add(number)
                        self._handle(ev.StopRequested(number.name))
                case signal.SIGQUIT:
                    self._handle(ev.StopNowRequested("SIGQUIT"))
                case signal.SIGHUP:
                    self._reload()
                case signal.SIGUSR1:
                    self._ask(lambda status: self._log.info("supervisor.status", **status))
                case signal.SIGUSR2:
                    self._dump_all()
                case _:  # SIGCHLD
                    self._processes.reap_strangers()

    def _dump_all(self) -> None:
        for worker in self._fleet.snapshot().workers:
            self._dump(worker, lambda found: self._log.info("worker.stacks", **found))

    def _dump(self, worker: WorkerSnapshot, then: Callable[[dict[str, Any]], object]) -> None:
        """Examine a worker thoroughly, and hand over what was found."""

        def found(examination: Examination) -> None:
            now = self._fleet.worker_of(worker.id) or worker
            halted = self._processes.halted(worker.id)
            then(dump(examination, now, halted, time.monotonic()))

        self._examinations.begin(
            worker.id, found, now=time.monotonic(), patience=SUSPECT_STACKS_DUE
        )

    # --- the command line ------------------------------------------------------------------------

    def _client_request(self, client: bytes, request: Any) -> None:
        match request:
            case protocol.GetStatus():
                self._ask(lambda status: self._control.to_client(client, protocol.Answer(status)))
            case protocol.FetchEvents():
                self._followers.asked(client, request)
            case protocol.Stop():
                refusal = requests.stop_refusal(request)
                if refusal:
                    self._refuse(client, refusal)
                    return
                if request.now:
                    self._handle(ev.StopNowRequested("supervisor stop --now"))
                else:
                    self._handle(ev.StopRequested("supervisor stop", request.grace))
                deadline = self._fleet.snapshot().deadline or time.monotonic()
                self._control.to_client(client, protocol.Stopping(os.getpid(), deadline))
            case protocol.Reload():
                self._control.to_client(client, self._reload())
            case protocol.Restart():
                self._restart(client, request.target)
            case protocol.Scale():
                self._scale(client, request)
            case protocol.Dump():
                self._dump_one(client, request.worker)
            case _:
                assert_never(request)

    def _restart(self, client: bytes, target: str) -> None:
        refusal = requests.restart_refusal(target, self._fleet.snapshot(), self._settings)
        if refusal:
            self._refuse(client, refusal)
            return
        self._handle(ev.RestartRequested(target, number=self._accepted(client)))

    def _accepted(self, client: bytes) -> int:
        """Say that a restart or a scaling will be done; return its number."""
        self._requests += 1
        accepted = protocol.Accepted(self._journal.last, request=self._requests)
        self._control.to_client(client, accepted)
        return self._requests

    def _dump_one(self, client: bytes, name: str) -> None:
        worker = self._fleet.worker_of(name)
        if worker is None:
            was_there = self._journal.names(name)
            refusal = requests.unknown_worker(name, self._fleet.snapshot(), was_there=was_there)
            self._refuse(client, refusal)
            return
        self._dump(worker, lambda found: self._control.to_client(client, protocol.Answer(found)))

    def _scale(self, client: bytes, request: protocol.Scale) -> None:
        refusal = requests.scale_refusal(request, self._fleet.snapshot(), self._settings)
        if refusal:
            self._refuse(client, refusal)
            return
        counts = {**self._counts, request.group: request.count}
        try:
            self._reserve(self._settings, counts)
        except SpawnError as exc:
            self._control.to_client(client, protocol.Refused(str(exc)))
            return
        for pool, terms in self._settings.budget_terms(counts).items():
            if terms.misfit:
                error = f"pools.{pool}.budget: {terms.misfit}"
                self._control.to_client(client, protocol.Refused(error))
                return
        self._handle(ev.ScaleRequested(request.group, request.count, self._accepted(client)))

    def _refuse(self, client: bytes, error: str) -> None:
        """Answer a request that names what does not exist, or means nothing."""
        self._control.to_client(client, protocol.Refused(error, UsageError.exit_code))

    # --- reload ----------------------------------------------------------------------------------

    def _reload(self) -> protocol.Accepted | protocol.Refused:
        """Read the configuration again, and have it applied: by a roll, or to those who run."""
        after = self._journal.last
        try:
            settings = self._reread()
            changes = compared(self._settings, settings)
            reason = ", ".join(changes.others)
            if changes.are_live and self._fleet.takes_settings:
                folders = self._processes.folders(self._generations.in_force)
                reason = self._generations.doubt_about_code(folders)
                if not reason:
                    self._apply(settings, changes.live)
                    return protocol.Accepted(after, self._generations.in_force, is_live=True)
            self._say_where(self._sockets.open(self._generations.last + 1, settings))
        except ConfigError as exc:
            self._announce(ac.Announce("reload.rejected", {"reason": str(exc)}))
            return protocol.Refused(str(exc))
        self._roll_to(settings, reason)
        return protocol.Accepted(after, self._generations.last)

    def _apply(self, settings: Settings, applied: tuple[str, ...]) -> None:
        """Put other settings in force for those who run, and for those to come."""
        before = self._generations.replace(settings)
        now = time.monotonic()
        self._tell_what_has_changed(before)
        self._processes.change_grace(settings.supervisor.grace)
        self._be_patient(*self._generations.all())
        self._notes.changed(settings.supervisor.grace, budgeted(settings, settings.pools))
        self._tuning.begin(
            settings, self._generations.in_force, applied, self._fleet.snapshot().workers, now
        )
        self._lending.bound({name: pool.max_open for name, pool in settings.pools.items()})
        self._rebudget()
        self._handle(
            ev.SettingsChanged(
                group_specs(settings), settings.supervisor.grace, settings.supervisor.abort_margin
            )
        )

    def _roll_to(self, settings: Settings, reason: str) -> None:
        """Begin the roll to a new generation."""
        self._generations.add(settings)
        self._be_patient(*self._generations.all())
        self._open_to_users(settings)
        self._rebudget()
        self._handle(
            ev.ReloadRequested(
                self._generations.last,
                group_specs(settings),
                settings.supervisor.grace,
                settings.supervisor.abort_margin,
                reason,
            )
        )

    def _reread(self) -> Settings:
        """Return what the file holds now.

        Raises:
            ConfigError: it is wrong, or changes what only a new supervisor can take.
        """
        if self._fleet.phase in (Phase.STOPPING, Phase.STOPPED):
            raise self._generations.refused(Problem("", "the supervisor is stopping"))
        if self._spokesman is not None:
            self._spokesman.reload_begins(time.monotonic())
        settings, problems = self._generations.reread()
        try:
            self._reserve(settings, {})
        except SpawnError as exc:
            problems.append(settings.problem(("workers",), str(exc)))
        if problems:
            raise self._generations.refused(*problems)
        return settings

    def _be_patient(self, *generations: Settings) -> None:
        """Let the service manager wait as long as a step may take under any of these."""
        if self._spokesman is not None:
            self._spokesman.patience = max(settings.longest_step for settings in generations)

    def _open_to_users(self, settings: Settings) -> None:
        if any(group.identity is not None for group in settings.groups.values()):
            self._control.open_to_users()

    def _reserve(self, settings: Settings, counts: Mapping[str, int]) -> None:
        """Demand the descriptors that these workers need; raises SpawnError."""
        reserve_descriptors(
            _most_workers(settings, counts),
            len(settings.sockets),
            MONITORING_DESCRIPTORS if self._monitoring is not None else 0,
        )

    def _take_force(self) -> None:
        """Let the configuration of the fleet's generation be in force."""
        before = self._settings
        self._generations.in_force = self._fleet.snapshot().generation
        if self._settings is not before:
            self._tell_what_has_changed(before)

    def _tell_what_has_changed(self, before: Settings) -> None:
        """Take note that another configuration is in force."""
        self._counts.clear()  # the file says otherwise
        log.change(self._settings.log.format, self._settings.log.level)
        for problem in self._sockets.adjust(self._settings):
            self._log.warning("socket.not_adjusted", problem=str(problem))
        for name in before.pools.keys() | self._settings.pools.keys():
            old, new = (
                settings.pools[name].budget if name in settings.pools else None
                for settings in (before, self._settings)
            )
            if old != new:
                fields = {"pool": name, "budget": new, "before": old}
                self._announce(ac.Announce("budget.changed", fields))

    def _retire(self, generation: int) -> None:
        """Let go of a generation that no worker will be spawned from any more."""
        self._processes.retire(generation)
        self._sockets.retire(generation)
        self._generations.retire(generation)
        self._rebudget()

    # --- budgets ---------------------------------------------------------------------------------

    def _rebudget(self) -> None:
        """Have each budget do for all generations that there are."""
        self._lending.change(self._generations.budget_terms(self._counts))

    def _note(self, birth: ev.WorkerBorn) -> None:
        """Write down what a worker may have, for who comes after us should we be killed."""
        found = self._fleet.worker_of(birth.worker)
        if found is not None:
            settings = self._generations[found.generation]
            pools = budgeted(settings, settings.groups[found.group].pools)
            self._notes.born(birth.worker, birth.pid, settings.supervisor.grace, pools)

    def _wait_for_orphans(self) -> None:
        """Do without what workers of a supervisor that was killed may still have."""
        held = self._orphans.held()
        if held:
            self._lending.orphaned(held)
            self._log.warning(
                "budget.orphans",
                workers=self._orphans.names,
                connections=held,
                effect="they are granted when these workers have ended",
            )

    # --- status ----------------------------------------------------------------------------------

    def _ask(self, answer: Answer) -> None:
        """Have a status answered, in this turn or the next."""
        self._asking.append(answer)

    def _inquire(self) -> None:
        """Ask every worker what it has in hand, then answer; the silent are not waited for.

        One question a turn, for however many clients.
        """
        if not self._asking:
            return
        asking, self._asking = self._asking, []
        serial = self._reports.next_serial()
        asked = [
            worker.id
            for worker in self._fleet.snapshot().workers
            if self._control.to_worker(worker.id, protocol.Inquire(serial))
        ]
        self._reports.inquire(serial, asking, asked)

    def _answer_inquiries(self, now: float) -> None:
        answers = self._reports.answerable(now)
        if not answers:
            return
        status = self._status(now)
        sizes = {worker["id"]: worker["rss_bytes"] for worker in status["workers"]}
        self._handle(ev.MemoryMeasured(sizes))  # since they are known now anyway
        for answer in answers:
            answer(status)

    def _status(self, now: float) -> dict[str, Any]:
        granted = self._lending.granted()
        opened = self._reports.open_connections(self._lending.terms())
        return {
            "name": self._settings.supervisor.name,
            "pid": os.getpid(),
            **fleet_status(self._fleet.snapshot(), self._reports, self._started, now),
            "budgets": {
                pool: {"budget": terms.budget, "granted": granted[pool], "open": opened[pool]}
                for pool, terms in self._lending.terms().items()
            },
        }

    def _shown(self, terminal: Callable[[str], object] | None) -> Progress | None:
        """Return what shows in the terminal what is under way; where there is none, nothing does."""
        if terminal is None:
            return None
        from supervisor.progress import Progress

        return Progress(terminal, self._fleet.snapshot)

    def _monitored(self, address: str) -> Monitoring | None:
        """Return what answers over HTTP; who does not want that does not pay for it."""
        if not address:
            return None
        from supervisor.monitoring import Monitoring

        return Monitoring(
            address,
            snapshot=self._fleet.snapshot,
            inquire=self._ask,
            newest=self._journal.newest,
            complain=lambda metric, why: self._log.warning(
                "metric.doubtful", metric=metric, why=why
            ),
            max_idle=lambda: {
                group: {
                    name: pool.max_idle for name, pool in self._settings.pools_of(group).items()
                }
                for group in self._settings.groups
            },
        )

    # --- what to do ------------------------------------------------------------------------------

    def _carry_out(self, actions: list[ac.Action]) -> None:
        # What touches a worker comes before what is written about it: a log line takes longer.
        for action in sorted(actions, key=_is_told):
            match action:
                case ac.Spawn():
                    self._spawn(action)
                case ac.SendCancel():
                    self._control.to_worker(
                        action.worker,
                        protocol.Cancel(action.deadline, action.abort_at, action.cause),
                    )
                case ac.Terminate():
                    self._processes.terminate(action.worker)
                case ac.Look():
                    seen = self._processes.look(action.worker)
                    if seen is not None:
                        self._handle(seen)
                case ac.TakeStacks():
                    self._examinations.begin(
                        action.worker,
                        lambda examination: self._handle(examination.report),
                        now=time.monotonic(),
                        patience=action.patience,
                    )
                case ac.Kill():
                    not_born = self._processes.kill(action.worker)
                    if not_born is not None:
                        self._handle(not_born)
                case ac.TellDeath():
                    self._deaths.tell(action, self._fleet.snapshot().workers)
                case ac.MeasureMemory():
                    workers = self._fleet.snapshot().workers
                    self._handle(ev.MemoryMeasured({each.id: rss(each.pid) for each in workers}))
                case ac.Retire():
                    self._take_force()
                    self._retire(action.generation)
                case ac.Announce():
                    self._announce(action)
                case ac.Finish():
                    self._finish = action
                case _:
                    assert_never(action)

    def _spawn(self, action: ac.Spawn) -> None:
        settings = self._generations[action.generation]
        token = os.urandom(16).hex()
        told = assignment(
            settings,
            action.worker,
            action.group,
            action.generation,
            token=token,
            endpoint=self._control.workers_endpoint,
            allowances=self._lending.join(
                action.worker,
                allowances_wanted(settings, action.group),
                protocol.application_name(settings.supervisor.name, action.worker, token),
                terminable(settings, action.group),
            ),
            deaths=self._deaths.of(action.group),
        )
        self._control.expect(action.worker, token)
        try:
            self._processes.spawn(
                action.worker,
                recipe(settings, settings.groups[action.group], action.generation),
                protocol.Fork(told),
                self._sockets.of(action.generation, told.sockets),
            )
        except SpawnError as exc:
            self._handle(ev.WorkerNotBorn(action.worker, str(exc)))

    def _announce(self, announce: ac.Announce) -> None:
        """Put an event into the journal, and into the log as one line."""
        event = {"time": log.timestamp(), "event": announce.event, **announce.fields}
        self._journal.append(event)
        if self._spokesman is not None:
            self._spokesman.note(announce)
        level, fields = self._lines.of(announce)
        getattr(self._log, level)(announce.event, time=event["time"], **fields)
        match announce.event:
            case "worker.exited":
                self._forget(announce.fields["worker"])
            case "group.scaled":
                self._counts[announce.fields["group"]] = announce.fields["count"]
                self._rebudget()
            case "scale.failed":
                self._tuning.scale_failed(announce.fields)
            case "supervisor.ready":
                self._on_ready(announce.fields["seconds"])
            case "supervisor.stopping":
                # Who connects from now on is refused at once, when the workers have closed theirs.
                self._sockets.close()
            case _:
                pass
        if self._monitoring is not None:
            self._monitoring.event(event)

    def _forget(self, worker: str) -> None:
        self._control.forget(worker)
        self._lending.forget(worker)
        self._tuning.forget(worker)
        self._notes.ended(worker)
        self._reports.forget(worker)
        self._examinations.forget(worker)

    def _say_where(self, listening: dict[str, str]) -> None:
        for name, address in listening.items():
            self._log.info("socket.listening", socket=name, address=address)

    def _dropped(self, reason: str, detail: str, times: int) -> None:
        """Log what the control sockets drop: the first of a kind, then ever more seldom."""
        if times & (times - 1) == 0:
            self._log.warning("control.dropped", reason=reason, detail=detail, times=times)

    # --- the end -----------------------------------------------------------------------------------

    def _farewell(self) -> None:
        assert self._finish is not None
        for client, request in self._control.from_clients():
            self._client_request(client, request)
        self._inquire()
        self._answer_inquiries(time.monotonic())
        self._followers.close()
        if self._monitoring is not None:
            self._monitoring.close()
        log.sum_up(math.inf)
        if self._progress is not None:
            self._progress.erase()
        self._on_finish(self._finish)
        if self._spokesman is not None:
            self._spokesman.close()
        self._processes.close()
        self._control.close()
        self._notes.close()
        self._orphans.close()
        self._runtime_dir.release()


def _most_workers(settings: Settings, counts: Mapping[str, int]) -> int:
    """Return how many workers there can be at once, those of a roll included."""
    return sum(
        counts.get(name, group.count) + group.surge for name, group in settings.groups.items()
    )


def _is_told(action: ac.Action) -> bool:
    return isinstance(action, ac.Announce)
