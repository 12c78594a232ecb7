"""The loop: poll -> event -> core.handle -> run actions. Owns every socket, descriptor and clock.

It decides nothing. What has happened goes to the fleet as an event with the time, what the fleet
answers is carried out in order, and an action that fails comes back as an event.
"""

from __future__ import annotations

__all__ = ["Supervisor"]

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, assert_never

import zmq

from supervisor import claims, log, protocol
from supervisor.assignments import allowances_wanted, assignment, group_specs, recipe
from supervisor.config import Settings, load
from supervisor.config.values import LONGEST
from supervisor.control import Control, Flooded, RuntimeDir
from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import Fleet, Phase
from supervisor.errors import ConfigError, Problem, SpawnError, UsageError
from supervisor.journal import CAPACITY, Journal
from supervisor.launch import Template
from supervisor.lending import Lending
from supervisor.processes import (
    Processes,
    TemplateDied,
    TemplateTainted,
    TemplateUnclear,
    reserve_descriptors,
)
from supervisor.signals import Signals
from supervisor.status import Reports, group_status, worker_status

FOLLOWERS_BATCH = 500  # events
LONGEST_WAIT = 3600.0  # seconds of one poll
MAX_COUNT = 10_000  # workers of a group, as in the configuration
MAX_ERROR = 2_500  # characters; a worker's own runtime keeps to less
MAX_TRACEBACK = 120_000
MAX_READING = 1000  # followers that may be behind at the end; who left without a word is among them

_LEVELS = {
    "worker.killed": "error",
    "worker.failed": "error",
    "worker.hung": "error",
    "group.failed": "error",
    "worker.not_spawned": "warning",
    "pool.leak": "warning",
    "reload.rejected": "error",
    "reload.rolled_back": "error",
    "restart.failed": "error",
    "scale.failed": "error",
    "recycle.failed": "error",
}


class Supervisor:
    """One supervisor, from its first worker to its last.

    Args:
        settings: the configuration.
        spare: a template that was launched while the configuration was read.
        on_ready: called once, when every group is ready for the first time.
        on_finish: called once, with how each worker came through the stop.

    Raises:
        AlreadyRunningError: a supervisor of this name runs.
        ConfigError: `runtime_dir` cannot be used.
        SpawnError: the operating system does not allow that many workers.
    """

    def __init__(
        self,
        settings: Settings,
        spare: Template | None,
        *,
        on_ready: Callable[[], None],
        on_finish: Callable[[ac.Finish], None],
    ) -> None:
        self._source = settings.source
        self._generations = {1: settings}
        self._in_force = 1
        self._last_generation = 1
        self._on_ready = on_ready
        self._on_finish = on_finish
        self._log = log.get_logger()
        runtime_dir = Path(settings.supervisor.runtime_dir)
        self._runtime_dir = RuntimeDir(runtime_dir, settings.supervisor.name)
        reserve_descriptors(_most_workers(settings, {}))
        self._signals = Signals()
        self._control = Control(runtime_dir, self._dropped)
        self._processes = Processes(spare, self._control.workers_path)
        self._journal = Journal()
        self._fleet = Fleet(
            group_specs(settings),
            grace=settings.supervisor.grace,
            abort_margin=settings.supervisor.abort_margin,
            draw=random.random,
        )
        self._counts: dict[str, int] = {}  # of groups that were scaled
        self._open_to_users(settings)
        self._lending = Lending(self._control.to_worker)
        self._lending.change(settings.budget_terms())
        self._started = log.timestamp()
        self._reports = Reports()
        self._dumps_wanted: set[str] = set()
        self._asking: list[bytes | None] = []  # who wants a status; None: the log
        self._followers: dict[bytes, int] = {}  # who waits for events after which number
        self._reading: dict[bytes, int] = {}  # who has been sent events up to which number
        self._ended: list[ev.WorkerExited] = []  # whose last words have not been heard yet
        self._stop_signals: set[signal.Signals] = set()
        self._finish: ac.Finish | None = None

    @property
    def _settings(self) -> Settings:
        """The configuration in force."""
        return self._generations[self._in_force]

    def run(self) -> int:
        """Run until every worker is accounted for; return the exit code."""
        poller = zmq.Poller()
        for readable in (self._control.workers, self._control.clients):
            poller.register(readable, zmq.POLLIN)
        for descriptor in (self._processes.fileno(), self._signals.fileno()):
            poller.register(descriptor, zmq.POLLIN)
        self._carry_out(self._fleet.start(time.monotonic()))
        while self._finish is None:
            unwritten = log.backlog()
            if unwritten is not None:
                poller.register(unwritten, zmq.POLLOUT)
            ready = dict(poller.poll(self._poll_timeout()))
            if unwritten is not None:
                poller.unregister(unwritten)
                log.flush(0.0)
            self._turn(ready)
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
                self._reports.next_deadline(),
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
        self._inquire()
        self._handle(ev.TimePassed())
        self._lending.time_passed(time.monotonic())
        self._answer_inquiries(time.monotonic())
        self._feed_followers()

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
                if report.worker in self._dumps_wanted:
                    self._dumps_wanted.discard(report.worker)
                    self._log.info(
                        "worker.stacks",
                        worker=report.worker,
                        stacks=report.stacks,
                        missing=report.missing,
                    )
                self._handle(report)
            case _:
                self._handle(report)

    def _worker_message(self, worker: str, message: Any) -> None:
        match message:
            case protocol.Hello():
                found = self._fleet.worker_of(worker)
                if found is not None and found.pid is None:
                    # Its hello is here, so its birth is told by now: after this turn has asked.
                    self._hear_of_processes()
                    found = self._fleet.worker_of(worker)
                if found is None or message.pid != found.pid:
                    self._control.forget(worker)
                    self._dropped("liar", f"{worker} says that its pid is {message.pid}", 1)
                else:
                    self._handle(ev.WorkerRegistered(worker))
                    self._lending.registered(worker)
            case protocol.Ready():
                self._handle(ev.WorkerReady(worker))
            case protocol.Acknowledged():
                self._handle(ev.WorkerAcknowledged(worker))
            case protocol.Failed():
                error = claims.clipped(message.error, MAX_ERROR)
                traceback = claims.clipped(message.traceback, MAX_TRACEBACK)
                self._handle(ev.WorkerFailed(worker, error, traceback))
            case protocol.Drained():
                reports = claims.close_reports(message, self._pools_of(worker))
                if not any(report.leaked for report in message.reports.values()):
                    self._lending.closed_all(worker)
                self._handle(ev.WorkerDrained(worker, reports))
                self._control.to_worker(worker, protocol.Farewell())
            case protocol.Report():
                self._reports.heard(worker, claims.report(message, self._pools_of(worker)))
            case protocol.LeakFound():
                self._leak_found(worker, message)
            case protocol.Usage():
                self._lending.heard(worker, message)
            case Flooded():
                self._handle(ev.WorkerFailed(worker, message.why, ""))
                self._handle(ev.WorkerLeaving(worker, message.why))  # a failure alone ends nothing
            case _:
                assert_never(message)

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
                    self._asking.append(None)
                case signal.SIGUSR2:
                    self._dump_all()
                case _:  # SIGCHLD
                    self._processes.reap_strangers()

    def _dump_all(self) -> None:
        for worker in self._fleet.snapshot().workers:
            self._dumps_wanted.add(worker.id)
            answer = self._processes.take_stacks(worker.id, time.monotonic())
            if answer is not None:
                self._process_report(answer)

    # --- the command line ------------------------------------------------------------------------

    def _client_request(self, client: bytes, request: Any) -> None:
        match request:
            case protocol.GetStatus():
                self._asking.append(client)
            case protocol.FetchEvents():
                if request.follow:
                    self._reading.pop(client, None)
                    self._followers[client] = request.after
                else:
                    limit = max(1, min(request.limit, FOLLOWERS_BATCH))
                    batch = self._journal.after(request.after, limit)
                    self._control.to_client(client, batch)
            case protocol.Stop() if not _is_grace(request.grace):
                self._refuse(client, f"a grace of {request.grace} s cannot be meant")
            case protocol.Stop():
                if request.now:
                    self._handle(ev.StopNowRequested("supervisor stop --now"))
                else:
                    self._handle(ev.StopRequested("supervisor stop", request.grace))
                deadline = self._fleet.snapshot().deadline or time.monotonic()
                self._control.to_client(client, protocol.Stopping(os.getpid(), deadline))
            case protocol.Reload():
                after = self._journal.last
                problems = self._reload()
                answer: protocol.ToClient = protocol.Accepted(after, self._last_generation)
                if problems:
                    answer = protocol.Refused(problems)
                self._control.to_client(client, answer)
            case protocol.Restart():
                self._restart(client, request.target)
            case protocol.Scale():
                self._scale(client, request)
            case _:
                assert_never(request)

    def _restart(self, client: bytes, target: str) -> None:
        fleet = self._fleet.snapshot()
        known = {group.name for group in fleet.groups} | {worker.id for worker in fleet.workers}
        if target not in known:
            self._refuse(client, f"there is no group or worker named {target!r}")
            return
        self._control.to_client(client, protocol.Accepted(self._journal.last))
        self._handle(ev.RestartRequested(target))

    def _scale(self, client: bytes, request: protocol.Scale) -> None:
        if request.group not in {group.name for group in self._fleet.snapshot().groups}:
            self._refuse(client, f"there is no group named {request.group!r}")
            return
        if not 0 <= request.count <= MAX_COUNT:
            self._refuse(client, f"a group has 0 to {MAX_COUNT} workers")
            return
        counts = {**self._counts, request.group: request.count}
        try:
            reserve_descriptors(_most_workers(self._settings, counts))
        except SpawnError as exc:
            self._control.to_client(client, protocol.Refused(str(exc)))
            return
        for pool, terms in self._settings.budget_terms(counts).items():
            if terms.misfit:
                error = f"pools.{pool}.budget: {terms.misfit}"
                self._control.to_client(client, protocol.Refused(error))
                return
        self._control.to_client(client, protocol.Accepted(self._journal.last))
        self._handle(ev.ScaleRequested(request.group, request.count))

    def _refuse(self, client: bytes, error: str) -> None:
        """Answer a request that names what does not exist, or means nothing."""
        self._control.to_client(client, protocol.Refused(error, UsageError.exit_code))

    def _feed_followers(self) -> None:
        for client, after in list(self._followers.items()):
            if self._journal.last > after:
                del self._followers[client]
                batch = self._journal.after(after, FOLLOWERS_BATCH)
                if self._control.to_client(client, batch):
                    self._reading[client] = batch.last
        while len(self._reading) > MAX_READING:
            del self._reading[next(iter(self._reading))]

    # --- reload ----------------------------------------------------------------------------------

    def _reload(self) -> str:
        """Read the configuration again and begin the roll; return what is wrong, "" for nothing."""
        try:
            settings = self._reread()
        except ConfigError as exc:
            self._announce(ac.Announce("reload.rejected", {"reason": str(exc)}))
            return str(exc)
        self._last_generation += 1
        self._generations[self._last_generation] = settings
        self._open_to_users(settings)
        self._rebudget()
        self._handle(
            ev.ReloadRequested(
                self._last_generation,
                group_specs(settings),
                settings.supervisor.grace,
                settings.supervisor.abort_margin,
            )
        )
        return ""

    def _reread(self) -> Settings:
        """Return what the file holds now.

        Raises:
            ConfigError: it is wrong, or changes what only a new supervisor can take.
        """
        if self._fleet.phase in (Phase.STOPPING, Phase.STOPPED):
            raise ConfigError(self._source, [Problem("", "the supervisor is stopping")])
        from supervisor.imports import check_entry_points

        before = self._settings.supervisor
        settings = load(self._source, env=os.environ, uid=os.geteuid())
        problems = check_entry_points(settings)
        problems += [
            settings.problem(
                ("supervisor", key), "is for the whole life of a supervisor: restart it"
            )
            for key in ("name", "runtime_dir")
            if getattr(settings.supervisor, key) != getattr(before, key)
        ]
        try:
            reserve_descriptors(_most_workers(settings, {}))
        except SpawnError as exc:
            problems.append(settings.problem(("workers",), str(exc)))
        if problems:
            raise ConfigError(self._source, problems)
        return settings

    def _open_to_users(self, settings: Settings) -> None:
        if any(group.identity is not None for group in settings.groups.values()):
            self._control.open_to_users()

    def _take_force(self) -> None:
        """Let the configuration of the fleet's generation be in force."""
        before = self._settings
        self._in_force = self._fleet.snapshot().generation
        if self._settings is before:
            return
        self._counts.clear()  # the file says otherwise
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
        del self._generations[generation]
        self._rebudget()

    # --- budgets ---------------------------------------------------------------------------------

    def _rebudget(self) -> None:
        """Have each budget do for all generations that there are."""
        terms = self._settings.budget_terms(self._counts)
        for settings in self._generations.values():
            for pool, others in settings.budget_terms().items():
                if settings is not self._settings:
                    terms[pool] = terms[pool].joined(others) if pool in terms else others
        self._lending.change(terms)

    # --- status ----------------------------------------------------------------------------------

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
        clients = self._reports.answerable(now)
        if not clients:
            return
        status = self._status(now)
        for client in clients:
            if client is None:
                self._log.info("supervisor.status", **status)
            else:
                self._control.to_client(client, protocol.Answer(status))

    def _status(self, now: float) -> dict[str, Any]:
        fleet = self._fleet.snapshot()
        granted = self._lending.granted()
        opened = self._reports.open_connections(self._lending.terms())
        return {
            "name": self._settings.supervisor.name,
            "pid": os.getpid(),
            "state": fleet.state,
            "generation": fleet.generation,
            "started": self._started,
            "deadline_in_seconds": (
                None if fleet.deadline is None else round(fleet.deadline - now, 3)
            ),
            "outstanding": list(fleet.outstanding) if fleet.deadline is not None else [],
            "groups": {group.name: group_status(group, now) for group in fleet.groups},
            "workers": [
                worker_status(worker, self._reports.last(worker.id), now)
                for worker in fleet.workers
            ],
            "roll": None if fleet.roll is None else asdict(fleet.roll),
            "budgets": {
                pool: {"budget": terms.budget, "granted": granted[pool], "open": opened[pool]}
                for pool, terms in self._lending.terms().items()
            },
        }

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
                case ac.TakeStacks():
                    answer = self._processes.take_stacks(action.worker, time.monotonic())
                    if answer is not None:
                        self._handle(answer)
                case ac.Kill():
                    self._processes.kill(action.worker)
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
            allowances=self._lending.join(action.worker, allowances_wanted(settings, action.group)),
        )
        self._control.expect(action.worker, token)
        try:
            self._processes.spawn(
                action.worker,
                recipe(settings, settings.groups[action.group], action.generation),
                protocol.Fork(told),
            )
        except SpawnError as exc:
            self._handle(ev.WorkerNotBorn(action.worker, str(exc)))

    def _announce(self, announce: ac.Announce) -> None:
        """Put an event into the journal, and into the log as one line."""
        event = {"time": log.timestamp(), "event": announce.event, **announce.fields}
        self._journal.append(event)
        level = _LEVELS.get(announce.event, "info")
        getattr(self._log, level)(announce.event, time=event["time"], **announce.fields)
        match announce.event:
            case "worker.exited":
                self._forget(announce.fields["worker"])
            case "group.scaled":
                self._counts[announce.fields["group"]] = announce.fields["count"]
                self._rebudget()
            case "supervisor.ready":
                self._on_ready()
            case _:
                pass

    def _forget(self, worker: str) -> None:
        self._control.forget(worker)
        self._lending.forget(worker)
        self._reports.forget(worker)
        self._dumps_wanted.discard(worker)

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
        # Whoever is still busy with its last batch finds the rest when it comes back for more.
        self._journal.ended = True
        for client, after in (self._reading | self._followers).items():
            self._control.to_client(client, self._journal.after(after, CAPACITY))
        self._on_finish(self._finish)
        self._processes.close()
        self._control.close()
        self._runtime_dir.release()


def _is_grace(grace: float | None) -> bool:
    return grace is None or 0.0 <= grace <= LONGEST


def _most_workers(settings: Settings, counts: Mapping[str, int]) -> int:
    """Return how many workers there can be at once, those of a roll included."""
    return sum(
        counts.get(name, group.count) + group.surge for name, group in settings.groups.items()
    )


def _is_told(action: ac.Action) -> bool:
    return isinstance(action, ac.Announce)
