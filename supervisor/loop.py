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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, assert_never

import zmq

from supervisor import log, protocol
from supervisor.config import GroupSettings, Settings, load
from supervisor.control import Control, RuntimeDir
from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.budget import Tell
from supervisor.core.budgets import LET_GO, SETTLE, Budgets, Telling
from supervisor.core.fleet import Fleet, GroupSpec, Phase, WorkerSnapshot
from supervisor.errors import ConfigError, Problem, SpawnError, UsageError
from supervisor.journal import CAPACITY, Journal
from supervisor.launch import Template
from supervisor.processes import (
    Processes,
    Recipe,
    TemplateDied,
    TemplateTainted,
    TemplateUnclear,
    reserve_descriptors,
)
from supervisor.signals import Signals

# Workers answer an inquiry from their link's thread, in a millisecond; one that holds the
# interpreter lock is shown with what it said last.
INQUIRY_DUE = 0.25
FOLLOWERS_BATCH = 500  # events
MAX_READING = 1000  # followers that may be behind at the end; who left without a word is among them
PAGE = os.sysconf("SC_PAGE_SIZE")

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


@dataclass(slots=True)
class _Inquiry:
    """A status that waits for the workers' reports."""

    client: bytes | None  # None: the log
    waiting: set[str]
    due: float


@dataclass(slots=True)
class _Known:
    """What a worker has last reported."""

    report: protocol.Report | None = None
    dump_wanted: bool = False
    has_closed: bool = False  # it says that all of its connections are closed
    untold: list[Telling] | None = field(default_factory=list)  # None: it is there to be told


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
        reserve_descriptors(sum(group.count for group in settings.groups.values()))
        self._signals = Signals()
        self._processes = Processes(spare)
        self._control = Control(runtime_dir, self._dropped)
        self._journal = Journal()
        self._fleet = Fleet(
            tuple(_group_spec(name, group) for name, group in settings.groups.items()),
            grace=settings.supervisor.grace,
            abort_margin=settings.supervisor.abort_margin,
            draw=random.random,
        )
        self._counts: dict[str, int] = {}  # of groups that were scaled
        self._budgets = Budgets()
        self._budgets.change(settings.budget_terms())
        self._started = log.timestamp()
        self._known: dict[str, _Known] = {}
        self._inquiries: dict[int, _Inquiry] = {}
        self._serial = 0
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
            ready = dict(poller.poll(self._poll_timeout()))
            self._turn(ready)
        self._farewell()
        return self._finish.exit_code

    # --- one turn ------------------------------------------------------------------------------

    def _poll_timeout(self) -> int | None:
        dues = [due.due for due in self._inquiries.values()]
        dues += [
            due
            for due in (
                self._fleet.next_deadline(),
                self._processes.next_deadline(),
                self._budgets.next_deadline(),
            )
            if due is not None
        ]
        if not dues:
            return None
        # Rounded up: a turn that comes too early would find nothing due, and spin.
        return max(0, int((min(dues) - time.monotonic()) * 1000) + 1)

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
        self._handle(ev.TimePassed())
        self._tell(self._budgets.time_passed(time.monotonic()))
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
            self._take_leases_back(event)  # before its successor asks for some
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
                known = self._known.get(report.worker)
                if known is not None and known.dump_wanted:
                    known.dump_wanted = False
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
                    self._tell_belatedly(worker)
            case protocol.Ready():
                self._handle(ev.WorkerReady(worker))
            case protocol.Acknowledged():
                self._handle(ev.WorkerAcknowledged(worker))
            case protocol.Failed():
                self._handle(ev.WorkerFailed(worker, message.error, message.traceback))
            case protocol.Drained():
                reports = {
                    name: protocol.to_builtins(report) for name, report in message.reports.items()
                }
                known = self._known.get(worker)
                if known is not None:
                    known.has_closed = not any(r.leaked for r in message.reports.values())
                self._handle(ev.WorkerDrained(worker, reports))
                self._control.to_worker(worker, protocol.Farewell())
            case protocol.Report():
                self._reported(worker, message)
            case protocol.LeakFound():
                self._leak_found(worker, message)
            case protocol.Usage():
                self._tell(
                    self._budgets.heard(
                        worker, message.pool, message.serial, message.accepted, message.wanted
                    )
                )
            case _:
                assert_never(message)

    def _leak_found(self, worker: str, leak: protocol.LeakFound) -> None:
        found = self._fleet.worker_of(worker)
        if found is not None:
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
                        "thread": leak.thread,
                        "stack": leak.stack,
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
                    self._inquire(None)
                case signal.SIGUSR2:
                    self._dump_all()
                case _:  # SIGCHLD
                    self._processes.reap_strangers()

    def _dump_all(self) -> None:
        for worker in self._fleet.snapshot().workers:
            self._known[worker.id].dump_wanted = True
            answer = self._processes.take_stacks(worker.id, time.monotonic())
            if answer is not None:
                self._process_report(answer)

    # --- the command line ------------------------------------------------------------------------

    def _client_request(self, client: bytes, request: Any) -> None:
        match request:
            case protocol.GetStatus():
                self._inquire(client)
            case protocol.FetchEvents():
                if request.follow:
                    self._reading.pop(client, None)
                    self._followers[client] = request.after
                else:
                    batch = self._journal.after(request.after, min(request.limit, CAPACITY))
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
        counts = {**self._counts, request.group: request.count}
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
        self._rebudget()
        self._handle(
            ev.ReloadRequested(
                self._last_generation,
                tuple(_group_spec(name, group) for name, group in settings.groups.items()),
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
        if problems:
            raise ConfigError(self._source, problems)
        return settings

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
        self._tell(self._budgets.change(terms))

    def _tell(self, tellings: Iterable[Telling]) -> None:
        for pool, tell in tellings:
            known = self._known[tell.worker]
            if known.untold is None:
                self._control.to_worker(tell.worker, _allowance(pool, tell))
            else:
                known.untold.append((pool, tell))

    def _tell_belatedly(self, worker: str) -> None:
        """Tell a worker what it could not be told before its hello."""
        known = self._known.get(worker)
        if known is not None and known.untold is not None:
            untold, known.untold = known.untold, None
            self._tell(untold)

    def _take_leases_back(self, event: ev.WorkerExited | ev.WorkerNotBorn) -> None:
        settled_at = None
        if isinstance(event, ev.WorkerExited):
            known = self._known.get(event.worker)
            has_closed = known is not None and known.has_closed
            settled_at = time.monotonic() + (LET_GO if has_closed else SETTLE)
        self._tell(self._budgets.leave(event.worker, settled_at))

    def _budget_status(self) -> dict[str, dict[str, int]]:
        opened = dict.fromkeys(self._budgets.terms(), 0)
        for known in self._known.values():
            for pool, stats in known.report.pools.items() if known.report else ():
                if pool in opened:
                    opened[pool] += stats.open
        granted = self._budgets.granted()
        return {
            pool: {"budget": terms.budget, "granted": granted[pool], "open": opened[pool]}
            for pool, terms in self._budgets.terms().items()
        }

    # --- status ----------------------------------------------------------------------------------

    def _inquire(self, client: bytes | None) -> None:
        """Ask every ready worker what it has in hand, then answer; the silent are not waited for."""
        self._serial += 1
        asked = {
            worker.id
            for worker in self._fleet.snapshot().workers
            if self._control.to_worker(worker.id, protocol.Inquire(self._serial))
        }
        due = time.monotonic() + (INQUIRY_DUE if asked else 0.0)
        self._inquiries[self._serial] = _Inquiry(client, asked, due)

    def _reported(self, worker: str, report: protocol.Report) -> None:
        known = self._known.get(worker)
        if known is not None:
            known.report = report
        inquiry = self._inquiries.get(report.number)
        if inquiry is not None:
            inquiry.waiting.discard(worker)

    def _answer_inquiries(self, now: float) -> None:
        for number, inquiry in list(self._inquiries.items()):
            if not inquiry.waiting or inquiry.due <= now:
                del self._inquiries[number]
                status = self._status(now)
                if inquiry.client is None:
                    self._log.info("supervisor.status", **status)
                else:
                    self._control.to_client(inquiry.client, protocol.Answer(status))

    def _status(self, now: float) -> dict[str, Any]:
        fleet = self._fleet.snapshot()
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
            "groups": {
                group.name: {
                    "count": group.count,
                    "ready": group.ready,
                    "state": group.state,
                    "restarts": group.restarts,
                    "failure": group.failure,
                    "next_restart_in_seconds": (
                        None
                        if group.next_restart is None
                        else round(max(0.0, group.next_restart - now), 3)
                    ),
                }
                for group in fleet.groups
            },
            "workers": [self._worker_status(worker, now) for worker in fleet.workers],
            "roll": None if fleet.roll is None else asdict(fleet.roll),
            "budgets": self._budget_status(),
        }

    def _worker_status(self, worker: WorkerSnapshot, now: float) -> dict[str, Any]:
        known = self._known.get(worker.id)
        report = known.report if known is not None else None
        return {
            "id": worker.id,
            "group": worker.group,
            "pid": worker.pid,
            "generation": worker.generation,
            "state": worker.state,
            "ready": worker.ready,
            "in_flight": report.in_flight if report else 0,
            "jobs_done": report.jobs_done if report else 0,
            "jobs_failed": report.jobs_failed if report else 0,
            "restarts": worker.restarts,
            "uptime_seconds": round(now - worker.spawned_at, 3),
            "rss_bytes": _rss(worker.pid),
            "pools": protocol.to_builtins(report.pools) if report else {},
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
        group = settings.groups[action.group]
        recipe = _recipe(settings, group, action.generation)
        token = os.urandom(16).hex()
        self._known[action.worker] = _Known()
        first, others = self._budgets.join(
            action.worker,
            {
                name: pool.max_open
                for name, pool in settings.pools_of(action.group).items()
                if pool.budget is not None
            },
        )
        self._tell(others)
        assignment = protocol.Assignment(
            worker=action.worker,
            group=action.group,
            generation=action.generation,
            token=token,
            supervisor=settings.supervisor.name,
            endpoint=self._control.workers_endpoint,
            run=group.run,
            grace=settings.supervisor.grace,
            abort_margin=settings.supervisor.abort_margin,
            options=group.options,
            pools={name: _pool(settings, name, first.get(name)) for name in group.pools},
        )
        self._control.expect(action.worker, token)
        try:
            self._processes.spawn(action.worker, recipe, protocol.Fork(assignment))
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
        self._known.pop(worker, None)
        for inquiry in self._inquiries.values():
            inquiry.waiting.discard(worker)

    def _dropped(self, reason: str, detail: str, times: int) -> None:
        """Log what the control sockets drop: the first of a kind, then ever more seldom."""
        if times & (times - 1) == 0:
            self._log.warning("control.dropped", reason=reason, detail=detail, times=times)

    # --- the end -----------------------------------------------------------------------------------

    def _farewell(self) -> None:
        assert self._finish is not None
        for client, request in self._control.from_clients():
            self._client_request(client, request)
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
    return grace is None or 0.0 <= grace < float("inf")


def _is_told(action: ac.Action) -> bool:
    return isinstance(action, ac.Announce)


def _recipe(settings: Settings, group: GroupSettings, generation: int) -> Recipe:
    """Return what the template of a group's workers imports; groups of equal `env` share one."""
    sharing = [other for other in settings.groups.values() if other.env == group.env]
    pools = {name for other in sharing for name in other.pools}
    return Recipe(
        name=settings.supervisor.name,
        generation=generation,
        path=settings.supervisor.path,
        env=tuple(sorted(group.env.items())),
        entry_points=tuple(
            dict.fromkeys(entry for other in sharing for entry in _entry_points(other))
        ),
        schemes=tuple(sorted({settings.pools[name].url.partition(":")[0] for name in pools})),
        grace=settings.supervisor.grace,
        log_format=settings.log.format,
        log_level=settings.log.level,
    )


def _entry_points(group: GroupSettings) -> list[str]:
    """Return what a group's workers import: their code, and the handler where that is an option."""
    handler = group.options.get("handler")
    return [group.run, handler] if isinstance(handler, str) and ":" in handler else [group.run]


def _group_spec(name: str, group: GroupSettings) -> GroupSpec:
    return GroupSpec(
        name=name,
        count=group.count,
        policy=group.policy,
        ready_timeout=group.ready_timeout,
        exit_on_failed=group.on_failed == "exit",
        surge=group.surge,
        min_ready_time=group.min_ready_time,
        max_age=group.max_age,
    )


def _allowance(pool: str, tell: Tell) -> protocol.Allowance:
    return protocol.Allowance(pool, tell.allowance, tell.serial, tell.unused_only)


def _pool(settings: Settings, name: str, first: Tell | None) -> protocol.PoolSettings:
    pool = settings.pools[name]
    return protocol.PoolSettings(
        url=pool.url,
        max_open=pool.max_open,
        max_idle=pool.max_idle,
        max_lifetime=pool.max_lifetime,
        max_idle_time=pool.max_idle_time,
        acquire_timeout=pool.acquire_timeout,
        leak_threshold=pool.leak_threshold,
        connect_timeout=pool.connect_timeout,
        max_connecting=pool.max_connecting,
        validate_after_idle=pool.validate_after_idle,
        keepalive=pool.keepalive,
        allowance=None if first is None else first.allowance,
        serial=0 if first is None else first.serial,
    )


def _rss(pid: int | None) -> int:
    """Return resident bytes, 0 for a process that is not there (any more)."""
    if pid is None:
        return 0
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0
