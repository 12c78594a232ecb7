"""Processes: templates, workers, their ends. Owns every pidfd and lifeline; decides nothing.

A worker is known by three descriptors' worth of truth, none of them a pid that could be reused:

    lifeline   a socket pair with the worker: its birth (the kernel names its pid), its last words
               (stacks, and the number of each signal that it got), its end; and for the worker, ours
    pidfd      its end and its exit status, at once and exactly
    group      its process group: what it has started is gone too before it counts as exited; what
               has left the group is found by its mark (`lineage`)

Templates are launched when they are needed and again when they die. The supervisor is a child
subreaper, so workers forked by a template's midwife become its own children.
"""

from __future__ import annotations

__all__ = [
    "Processes",
    "Recipe",
    "TemplateDied",
    "TemplateTainted",
    "TemplateUnclear",
    "reserve_descriptors",
]

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from supervisor import lineage
from supervisor.core import events as ev
from supervisor.core.jobs import JobSeen
from supervisor.errors import SpawnError, WireError
from supervisor.launch import MAX_FRAME, Template, launch_template

if TYPE_CHECKING:
    from supervisor import protocol

# A black box keeps the last words only: a worker that floods it harms nobody.
MAX_BLACK_BOX = 1 << 18
KIB = 1024  # bytes; the kernel tells sizes in these
# What a lifeline carries beside text: numbers of signals.
_NO_TEXT = bytes(byte for byte in range(32) if byte not in b"\n\t")
# What forks faster than it is killed is left running after so many attempts, and named: a stop ends.
MAX_SWEEPS = 50
MAX_NAMES = 50
# Stacks are complete when the signal's number follows them; where user code has taken that over,
# they are taken for complete when nothing has come for this long.
STACKS_QUIET = 0.05
# What the supervisor has open: for itself and its clients; for each worker its lifeline (for a
# moment both ends), its pidfd, its connection and its scoreboard.
OWN_DESCRIPTORS = 64
WORKER_DESCRIPTORS = 5
SOCKET_DESCRIPTORS = 3
_CREDENTIALS = struct.Struct("=iII")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a template imports; workers of equal recipes share one template."""

    name: str
    generation: int
    path: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    entry_points: tuple[str, ...]
    schemes: tuple[str, ...]
    identity: protocol.Identity | None
    # These may change while it runs, and are no reason for another one.
    grace: float = field(compare=False)
    log_format: str = field(compare=False)
    log_level: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class TemplateTainted:
    """Importing the entry point started what a fork does not survive; its workers import it."""

    entry_point: str
    found: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TemplateDied:
    """A template has died. Workers are not touched by that."""

    pid: int
    how: str


@dataclass(frozen=True, slots=True)
class TemplateUnclear:
    """What a template has sent is no message, and was dropped."""

    pid: int
    error: str


Report = ev.WorkerEvent | TemplateTainted | TemplateDied | TemplateUnclear


@dataclass(slots=True, eq=False)
class _Child:
    """One worker's process, from the request on."""

    worker: str
    group: str
    template: Template
    lifeline: socket.socket
    theirs: int  # the worker's end, until it is sent; then -1
    sockets: tuple[socket.socket, ...] = ()  # of which it gets copies; not ours to close
    pid: int = 0  # 0: not born
    pidfd: int = -1
    board: int = -1  # its scoreboard, where it is watched
    black_box: bytearray = field(default_factory=bytearray)
    dump_from: int = -1  # where in the black box the stacks that were asked for begin
    dump_due: float | None = None
    code: int | None = None
    signal: int | None = None
    used: resource.struct_rusage | None = None  # by it and all that it has waited for
    leftovers: dict[int, str] = field(default_factory=dict)  # pidfds of what it left behind
    left_names: list[str] = field(default_factory=list)
    sweeps: int = 0  # how often what it left behind was killed


class Processes:
    """All processes of one supervisor. Owned by the loop's thread.

    Args:
        spare: a template that was launched in advance.
        door: the path of the socket that workers connect to.
    """

    def __init__(self, spare: Template | None = None, door: str = "") -> None:
        _become_subreaper()
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[int], Iterator[Report]]] = {}
        self._spare = spare
        self._door = door
        self._templates: dict[Recipe, Template] = {}
        self._leaving: list[Template] = []  # of no use any more, and not yet gone
        self._tainted: set[str] = set()  # entry points that templates must not import
        self._children: dict[str, _Child] = {}
        self._has_strangers = False  # there may be orphans to reap
        self._has_adopted: bool | None = None  # as of this call of `reports`; None: not looked yet
        # Templates that have died: living workers may use what their imports had started.
        self._fallen: list[int] = []
        if spare is not None:
            self._watch_template(spare)

    # --- what the loop calls -----------------------------------------------------------------------

    def fileno(self) -> int:
        """Return a descriptor that is readable when `reports` has something."""
        return self._epoll.fileno()

    def spawn(
        self,
        worker: str,
        recipe: Recipe,
        fork: protocol.Fork,
        sockets: tuple[socket.socket, ...] = (),
    ) -> None:
        """Ask for a worker's process. Answered by WorkerBorn or WorkerNotBorn, in every case.

        It gets copies of `sockets`. One of them that is closed before they are sent makes a worker
        that is not born.

        Raises:
            SpawnError: the operating system refused a descriptor or a process.
        """
        from supervisor.protocol import encode

        template = self._template(recipe)
        try:
            lifeline, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as exc:
            raise SpawnError(f"no lifeline for {worker}: {exc.strerror}") from exc
        lifeline.setblocking(False)
        lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        group = fork.assignment.group
        child = _Child(worker, group, template, lifeline, theirs.detach(), sockets)
        if fork.assignment.is_watched:
            from supervisor import scoreboard

            try:
                child.board = scoreboard.make(worker)
                socket.send_fds(lifeline, [b"b"], [child.board])  # waits there for the worker
            except OSError as exc:
                self._release(child)
                raise SpawnError(f"no scoreboard for {worker}: {exc.strerror}") from exc
        self._children[worker] = child
        self._watch(lifeline.fileno(), lambda _events: self._lifeline_readable(child))
        frame = encode(fork)
        if template.loaded:
            self._send(template, frame, child)
        else:
            template.waiting.append((worker, frame))

    def terminate(self, worker: str) -> None:
        """SIGTERM to the worker itself."""
        child = self._children.get(worker)
        if child is not None and child.pidfd >= 0:
            _signal(child.pidfd, signal.SIGTERM)

    def kill(self, worker: str) -> ev.WorkerNotBorn | None:
        """SIGKILL to the worker and its process group; of an unborn one, to its template.

        Not while others wait for the same import who have the time for it: then it is only not
        waited for any more.

        Returns:
            That it was not born, where that is known at once.
        """
        child = self._children.get(worker)
        if child is None:
            return None
        if child.pid:
            if child.code is None and child.signal is None:
                _signal(child.pidfd, signal.SIGKILL)
            _kill_group(child.pid)
        else:
            return self._give_up(child)
        return None

    def _give_up(self, child: _Child) -> ev.WorkerNotBorn | None:
        template = child.template
        why = _why_not_spawned(template)
        others = {worker for worker, _ in template.waiting} - {child.worker}
        # Those who came later do not count: an import that hangs has an end.
        template.hopes = others if template.hopes is None else template.hopes & others
        if template.hopes and not template.loaded:
            template.waiting = [each for each in template.waiting if each[0] != child.worker]
            del self._children[child.worker]
            self._release(child)
            return ev.WorkerNotBorn(child.worker, why)
        template.given_up = template.given_up or why
        _signal(template.pidfd, signal.SIGKILL)
        return None

    def take_stacks(self, worker: str, now: float) -> ev.StacksTaken | None:
        """Ask the worker's process for the stack of every thread, whatever its code is doing.

        Returns:
            The answer where it is known at once that there are none; else StacksTaken follows.
        """
        child = self._children.get(worker)
        if child is None or not child.pid:
            return ev.StacksTaken(worker, "", "it has no process")
        if halt := self.halted(worker):
            return ev.StacksTaken(worker, "", f"{halt}, so it can't write any")
        child.dump_from = len(child.black_box)
        child.dump_due = now + STACKS_QUIET * 4
        _signal(child.pidfd, signal.SIGUSR2)
        return None

    def look(self, worker: str) -> ev.WorkerSeen | None:
        """Return what a worker works on, read from outside; None where it is not watched."""
        child = self._children.get(worker)
        if child is None or child.board < 0:
            return None
        return ev.WorkerSeen(worker, self._seen(child), self.halted(worker))

    def _seen(self, child: _Child) -> tuple[JobSeen, ...]:
        """Return the jobs on its scoreboard, which outlives it."""
        if child.board < 0:
            return ()
        from supervisor import scoreboard

        return scoreboard.read(child.board)

    def halted(self, worker: str) -> str:
        """Say why a worker's process cannot run at all, "" where it can."""
        child = self._children.get(worker)
        if child is None or not child.pid:
            return "it has no process"
        return _HALTS.get(_state_of(child.pid), "")

    def next_deadline(self) -> float | None:
        """Return when `reports` wants to be called at the latest."""
        return min(
            (child.dump_due for child in self._children.values() if child.dump_due is not None),
            default=None,
        )

    def reports(self, now: float) -> Iterator[Report]:
        """Yield all that has happened to processes. Never blocks."""
        self._has_adopted = None
        for fd, events in self._epoll.poll(0):
            handler = self._watched.get(fd)
            if handler is not None:
                yield from handler(events)
        for child in list(self._children.values()):
            if child.dump_due is not None and child.dump_due <= now:
                yield self._stacks(child)
        if self._has_strangers:
            self.reap_strangers()

    def reap_strangers(self) -> None:
        """Reap orphans of workers, which are ours because we are their subreaper.

        One that can't be told from our own yet is reaped by `reports`, when it can.
        """
        self._has_strangers = True
        if any(not child.pid for child in self._children.values()):
            return  # what has ended may be a worker whose birth is not read yet
        known = self._known_children()
        while (found := _first_ended()) and found not in known:
            os.waitid(os.P_PID, found, os.WEXITED | os.WNOHANG)
        # Behind a known one, whose end its own pidfd tells, there may be others.
        self._has_strangers = bool(found)

    def _known_children(self) -> set[int]:
        known = {child.pid for child in self._children.values()}
        return known | {template.pid for template in self._all_templates()}

    def retire(self, generation: int) -> None:
        """End the templates of a generation; its workers live on."""
        for recipe, template in list(self._templates.items()):
            if recipe.generation == generation:
                del self._templates[recipe]
                self._leaving.append(template)
                _signal(template.pidfd, signal.SIGKILL)

    def folders(self, generation: int) -> tuple[str, ...] | None:
        """Return where the modules of a generation came from; None where that is not known."""
        found: dict[str, None] = {}
        for recipe, template in self._templates.items():
            if recipe.generation == generation:
                if not template.loaded or self._tainted & set(recipe.entry_points):
                    return None
                found |= dict.fromkeys(template.folders)
        return tuple(found) or None

    def change_grace(self, seconds: float) -> None:
        """Let the workers of every template live on for so long when the supervisor has died."""
        from supervisor.protocol import Grace, encode

        for template in self._templates.values():
            if template.recipe is not None:
                template.recipe = replace(template.recipe, grace=seconds)
            self._send(template, encode(Grace(seconds)), None)

    def close(self) -> None:
        """End the templates and release every descriptor. No worker may be left."""
        for template in self._all_templates():
            _signal(template.pidfd, signal.SIGKILL)
            _kill_group(template.pid)  # it is not reaped yet, so the number is its own
        for template in self._all_templates():
            os.waitid(os.P_PIDFD, template.pidfd, os.WEXITED)
            self._fallen.append(template.pid)
            self._drop_template(template)
        if lineage.orphans(()):
            lineage.kill(self._fallen)
        self._epoll.close()

    # --- templates -----------------------------------------------------------------------------

    def _template(self, recipe: Recipe) -> Template:
        template: Template | None = self._templates.get(recipe)
        if template is None:
            door = self._opened_door(recipe)
            if self._spare is not None:
                template, self._spare = self._spare, None
            else:
                template = launch_template()
                self._watch_template(template)
            template.recipe = recipe
            self._templates[recipe] = template
            self._load(template, recipe, door)
        return template

    def _opened_door(self, recipe: Recipe) -> int:
        """Return a descriptor of the workers' socket for a template of another user, else -1.

        The socket's folder stays ours alone: who has the descriptor can connect, nobody else.
        """
        if recipe.identity is None:
            return -1
        try:
            return os.open(self._door, os.O_PATH | os.O_CLOEXEC)
        except OSError as exc:
            raise SpawnError(f"{self._door}: {exc.strerror}") from exc

    def _load(self, template: Template, recipe: Recipe, door: int) -> None:
        from supervisor.protocol import Load, encode

        load = Load(
            name=recipe.name,
            generation=recipe.generation,
            path=recipe.path,
            env=dict(recipe.env),
            entry_points=tuple(e for e in recipe.entry_points if e not in self._tainted),
            schemes=recipe.schemes,
            grace=recipe.grace,
            log_format=recipe.log_format,
            log_level=recipe.log_level,
            identity=recipe.identity,
        )
        template.outbox.append((encode(load), door, ()))
        self._flush(template)

    def _watch_template(self, template: Template) -> None:
        self._watch(template.pidfd, lambda _events: self._template_ended(template))
        self._watch(
            template.control.fileno(), lambda events: self._template_speaks(template, events)
        )

    def _template_speaks(self, template: Template, events: int) -> Iterator[Report]:
        from supervisor.protocol import FromTemplate, Loaded, decode

        if events & select.EPOLLOUT:
            self._flush(template)
        if not events & select.EPOLLIN:
            return
        try:
            frame = template.control.recv(MAX_FRAME)
        except (BlockingIOError, ConnectionError):
            return
        if not frame:
            return
        try:
            message: Any = decode(frame, FromTemplate)  # type: ignore[arg-type]
        except WireError as exc:  # the application shares the process, and may write anywhere
            yield TemplateUnclear(template.pid, str(exc))
            return
        if isinstance(message, Loaded):
            template.loaded = True
            template.folders = message.folders
            waiting, template.waiting = template.waiting, []
            for worker, fork in waiting:
                if (child := self._children.get(worker)) is not None:
                    self._send(template, fork, child)
        elif template.recipe is not None and self._templates.get(template.recipe) is template:
            yield TemplateTainted(message.entry_point, message.found)
            self._tainted.add(message.entry_point)
            yield from self._replace(template)

    def _replace(self, template: Template) -> Iterator[Report]:
        """Let another template take over what this one was asked for."""
        recipe, waiting = template.recipe, template.waiting
        assert recipe is not None
        template.waiting = []
        del self._templates[recipe]
        self._leaving.append(template)
        try:
            successor = self._template(recipe)
        except SpawnError as exc:
            for worker, _ in waiting:
                if (child := self._children.pop(worker, None)) is not None:
                    self._release(child)
                    yield ev.WorkerNotBorn(worker, str(exc))
            return
        successor.waiting = waiting
        for worker, _ in waiting:
            if (child := self._children.get(worker)) is not None:
                child.template = successor

    def _template_ended(self, template: Template) -> Iterator[Report]:
        recipe = template.recipe
        was_loaded = template.loaded
        retired = recipe is None or self._templates.get(recipe) is not template
        if retired:
            _kill_group(template.pid)  # it is not reaped yet, so the number is its own
        ended = os.waitid(os.P_PIDFD, template.pidfd, os.WEXITED | os.WNOHANG)
        if ended is None:
            return
        how = _how(ended)
        unsent, template.waiting = template.waiting, []
        self._drop_template(template)
        if retired:
            # None of its workers is left: what its imports have started goes, too.
            if lineage.orphans(self._known_children()):
                lineage.kill([template.pid], timeout=0.0)
            return
        self._fallen.append(template.pid)
        yield TemplateDied(template.pid, how)
        why = (
            template.given_up or f"the template ended with {how} while it imported the application"
        )
        blamed: set[str] = set()  # one death is one failure, however many workers waited for it
        for worker, _ in unsent:
            child = self._children.pop(worker, None)
            if child is not None:
                self._release(child)
                is_to_blame = child.group not in blamed and not template.given_up
                yield ev.WorkerNotBorn(worker, why, by_application=is_to_blame)
                blamed.add(child.group)
        if was_loaded and recipe is not None:
            with contextlib.suppress(SpawnError):  # else it is launched with the next worker
                self._template(recipe)

    def _drop_template(self, template: Template) -> None:
        if self._spare is template:
            self._spare = None
        if template in self._leaving:
            self._leaving.remove(template)
        if template.recipe is not None and self._templates.get(template.recipe) is template:
            del self._templates[template.recipe]
        self._unwatch(template.control.fileno())
        self._unwatch(template.pidfd)
        template.control.close()
        os.close(template.pidfd)
        for _, fd, _ in template.outbox:
            if fd >= 0:
                os.close(fd)
        template.outbox.clear()

    def _all_templates(self) -> list[Template]:
        spare = [self._spare] if self._spare is not None else []
        return [*self._templates.values(), *self._leaving, *spare]

    def _send(self, template: Template, frame: bytes, child: _Child | None) -> None:
        fd = -1
        sockets: tuple[socket.socket, ...] = ()
        if child is not None:
            fd, child.theirs = child.theirs, -1
            sockets = child.sockets
        template.outbox.append((frame, fd, sockets))
        self._flush(template)

    def _flush(self, template: Template) -> None:
        """Send what the template can take now; its own end is told by its pidfd."""
        while template.outbox:
            frame, fd, sockets = template.outbox[0]
            try:
                if fd >= 0:
                    copied = [sock.fileno() for sock in sockets]
                    socket.send_fds(template.control, [frame], [fd, *copied])
                else:
                    template.control.send(frame)
            except BlockingIOError:
                self._epoll.modify(template.control.fileno(), select.EPOLLIN | select.EPOLLOUT)
                return
            except OSError:
                pass  # it has died, or cannot take this frame: the closed lifeline tells of it
            template.outbox.popleft()
            if fd >= 0:
                os.close(fd)
        with contextlib.suppress(OSError):
            self._epoll.modify(template.control.fileno(), select.EPOLLIN)

    # --- workers -------------------------------------------------------------------------------

    def _lifeline_readable(self, child: _Child) -> Iterator[Report]:
        data, pid = _receive(child.lifeline)
        if data is None:
            return
        if not child.pid:
            yield from self._first_words(child, data, pid)
        elif not data:
            self._unwatch(child.lifeline.fileno())  # its pidfd tells the rest
        else:
            yield from self._last_words(child, data)

    def _first_words(self, child: _Child, data: bytes, pid: int) -> Iterator[Report]:
        if data.startswith(b"+"):
            # Exact: it is our own child, and nobody but us can reap it.
            child.pid, child.pidfd = pid, os.pidfd_open(pid)
            self._watch(child.pidfd, lambda _events: self._worker_ended(child))
            yield ev.WorkerBorn(child.worker, pid)
            if len(data) > 1:
                yield from self._last_words(child, data[1:])
            return
        del self._children[child.worker]
        self._release(child)
        why = (
            data[1:].decode(errors="replace")
            or child.template.given_up
            or "its template or midwife ended before it was born"
        )
        yield ev.WorkerNotBorn(child.worker, why)

    def _last_words(self, child: _Child, data: bytes) -> Iterator[Report]:
        if signal.SIGTERM in data:
            yield ev.WorkerLeaving(child.worker, "SIGTERM from outside")
        child.black_box += data.translate(None, _NO_TEXT)
        if len(child.black_box) > MAX_BLACK_BOX:
            cut = len(child.black_box) - MAX_BLACK_BOX
            del child.black_box[:cut]
            child.dump_from = max(0, child.dump_from - cut)
        if child.dump_due is not None:
            child.dump_due = time.monotonic() + STACKS_QUIET
            if signal.SIGUSR2 in data:
                yield self._stacks(child)

    def _stacks(self, child: _Child) -> ev.StacksTaken:
        stacks = child.black_box[child.dump_from :].decode(errors="replace")
        child.dump_due = None
        child.black_box.clear()
        missing = "" if stacks else _why_no_stacks(child.pid)
        return ev.StacksTaken(child.worker, stacks, missing)

    def _worker_ended(self, child: _Child) -> Iterator[Report]:
        # It is our child and not reaped, so the number is its own; only this tells what it has used.
        pid, status, child.used = os.wait4(child.pid, os.WNOHANG)
        if not pid:
            return
        if os.WIFEXITED(status):
            child.code = os.WEXITSTATUS(status)
        else:
            child.signal = os.WTERMSIG(status)
        read = 0  # so much at most: what it has left behind may write on and on
        while read < MAX_BLACK_BOX and (words := _receive(child.lifeline)[0]):
            read += len(words)
            yield from self._last_words(child, words)
        child.dump_due = None
        self._unwatch(child.pidfd)
        yield from self._when_group_is_empty(child)

    def _when_group_is_empty(self, child: _Child) -> Iterator[Report]:
        """Report the exit, once nothing is left of what the worker has started.

        What is left of its group is our own child by now (we are its subreaper), or has a living
        parent in the group: nobody else reaps it, so the group's number can't be reused meanwhile.
        """
        if child.sweeps < MAX_SWEEPS:
            child.sweeps += 1
            self._kill_leftovers(child)
        if not child.leftovers:
            del self._children[child.worker]
            stacks = child.black_box.decode(errors="replace") if child.signal is not None else ""
            seen = self._seen(child)
            self._release(child)
            used = child.used
            yield ev.WorkerExited(
                child.worker,
                child.code,
                child.signal,
                tuple(child.left_names),
                stacks,
                max_rss_bytes=0 if used is None else used.ru_maxrss * KIB,
                cpu_seconds=0.0 if used is None else used.ru_utime + used.ru_stime,
                jobs=seen,
            )

    def _kill_leftovers(self, child: _Child) -> None:
        """SIGKILL to what the worker has left behind, in its group and out of it."""
        if _group_exists(child.pid):
            for pid, name in _members(child.pid):
                with contextlib.suppress(ProcessLookupError):
                    self._await_leftover(child, os.pidfd_open(pid), f"{name} (pid {pid})")
            _kill_group(child.pid)
        # One look does for all whose ends were told together: what they have left behind was
        # adopted before their pidfds became readable.
        if self._has_adopted is None:
            self._has_adopted = lineage.orphans(self._known_children())
        if self._has_adopted:
            for each in lineage.descendants([child.pid]):
                _signal(each.pidfd, signal.SIGKILL)
                self._await_leftover(child, each.pidfd, f"{each.name} (pid {each.pid})")

    def _await_leftover(self, child: _Child, pidfd: int, name: str) -> None:
        child.leftovers[pidfd] = name
        if name not in child.left_names and len(child.left_names) < MAX_NAMES:
            child.left_names.append(name)
        self._watch(pidfd, lambda _events: self._leftover_ended(child, pidfd))

    def _leftover_ended(self, child: _Child, pidfd: int) -> Iterator[Report]:
        self._unwatch(pidfd)
        os.close(pidfd)
        del child.leftovers[pidfd]
        if not child.leftovers:
            self.reap_strangers()
            yield from self._when_group_is_empty(child)

    def _release(self, child: _Child) -> None:
        self._unwatch(child.lifeline.fileno())
        child.lifeline.close()
        for fd in (child.theirs, child.pidfd, child.board):
            if fd >= 0:
                self._unwatch(fd)
                os.close(fd)

    # --- descriptors ---------------------------------------------------------------------------

    def _watch(self, fd: int, handler: Callable[[int], Iterator[Report]]) -> None:
        self._watched[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)


def reserve_descriptors(workers: int, sockets: int, others: int = 0) -> None:
    """Raise this process's limit of open descriptors, and demand that it holds so much.

    `others` are descriptors beside theirs and the usual ones.

    To run out of them later would be fatal: ZeroMQ aborts the process that cannot accept.

    Raises:
        SpawnError: it cannot be raised that far.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # During a reload there may be another set of sockets; of systemd's we keep the originals.
    needed = OWN_DESCRIPTORS + others + workers * WORKER_DESCRIPTORS + sockets * SOCKET_DESCRIPTORS
    if needed > most:
        raise SpawnError(
            f"{workers} workers, those of a roll included, need {needed} open descriptors, and the limit is {most}; "
            "raise it with `ulimit -n`, or LimitNOFILE= in the unit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _become_subreaper() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise SpawnError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


def _first_ended() -> int:
    """Return the pid of a child that has ended and is not reaped yet, 0 when there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 0 if found is None else found.si_pid


def _receive(lifeline: socket.socket) -> tuple[bytes | None, int]:
    """Return what is there (None: nothing, b"": the end) and the pid of who sent it."""
    try:
        data, ancillary, _, _ = lifeline.recvmsg(65536, socket.CMSG_SPACE(_CREDENTIALS.size))
    except BlockingIOError:
        return None, 0
    except ConnectionError:
        return b"", 0
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return data, int(_CREDENTIALS.unpack(value)[0])
    return data, 0


def _signal(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _kill_group(pgid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def _group_exists(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _members(pgid: int) -> Iterator[tuple[int, str]]:
    """Yield pid and name of each living member of a process group."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError, ValueError):
                name, state, group = _stat(int(entry))
                if group == pgid and state not in "ZX":
                    yield int(entry), name


def _stat(pid: int) -> tuple[str, str, int]:
    """Return name, state letter and process group, as proc(5) has them."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        text = file.read()
    name, _, rest = text.partition("(")[2].rpartition(")")
    state, _, group, *_ = rest.split(maxsplit=3)
    return name, state, int(group)


def _state_of(pid: int) -> str:
    try:
        return _stat(pid)[1]
    except (OSError, ValueError):
        return "X"


_HALTS = {"T": "it is stopped (SIGSTOP)", "t": "it is stopped by a debugger"}
_STATES = {
    **_HALTS,
    "D": "it is in an uninterruptible system call (state D)",
    "Z": "it has ended",
    "X": "it has ended",
}


def _why_no_stacks(pid: int) -> str:
    return _STATES.get(_state_of(pid), "it wrote none: its SIGUSR2 is blocked or taken over")


def _why_not_spawned(template: Template) -> str:
    """Say what a template does that has not made a worker in time."""
    if _state_of(template.pid) in _HALTS:
        return "its template was stopped (SIGSTOP, or a debugger)"
    if template.loaded:
        return "its template did not fork it"
    return (
        "its template was still importing the application; "
        "where that takes so long, raise ready_timeout"
    )


def _how(ended: os.waitid_result) -> str:
    if ended.si_code == os.CLD_EXITED:
        return f"code {ended.si_status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(ended.si_status).name
    return f"signal {ended.si_status}"
