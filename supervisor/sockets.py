"""Listening sockets: bound here, or taken from systemd, before any worker that serves them is made.

All workers of a group, of every generation, accept from one and the same socket, so a connection
that has come in is nobody's until somebody takes it, and a roll refuses none. A socket lives as long
as a generation names its address. Workers get copies of the descriptor; only this module binds.

A unix path belongs to whoever holds a lock on its folder while looking: two supervisors that start
at once can't both take over the same stale one. It is removed at the end, if it still is ours.
"""

from __future__ import annotations

__all__ = ["AddressInUseError", "Sockets"]

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from supervisor.config import Settings, SocketSettings
from supervisor.errors import ConfigError, Problem

FIRST_PASSED = 3  # sd_listen_fds(3): passed descriptors begin here
# An address is often in use for a moment only, by what has just ended. A start waits that long.
PATIENCE = 2.0
_RETRY = 0.25  # each look at a unix socket is a connection there
_LOCK_DUE = 1.0  # seconds in which another supervisor has looked at a folder

_NEEDS_SYSTEMD = "is this process started through its .socket unit?"


class AddressInUseError(ConfigError):
    """Somebody else listens at an address. That may pass, so it is not the configuration's fault."""

    exit_code = 69


class _InUse(Exception):  # noqa: N818  it may pass
    """Why an address cannot be had now."""


class _Unfit(Exception):  # noqa: N818  it describes the setting
    """Why an address cannot be had at all; `key` is the one to change."""

    def __init__(self, message: str, key: str = "listen") -> None:
        super().__init__(message)
        self.key = key


@dataclass(slots=True, eq=False)
class _Listener:
    """One open socket. `made` is the file of a unix socket of ours: device and inode."""

    sock: socket.socket
    path: str = ""
    made: tuple[int, int] = (0, 0)

    def close(self) -> None:
        self.sock.close()
        if self.path:
            with contextlib.suppress(OSError):  # it may have been removed, or replaced
                found = os.lstat(self.path)
                if (found.st_dev, found.st_ino) == self.made:
                    os.unlink(self.path)


class Sockets:
    """All listening sockets of one supervisor, by generation. Owned by the loop's thread.

    Args:
        environ: the environment; what systemd says in it of passed sockets is taken out of it, so
            that it never reaches a worker.
        pid: this process, which must be the one that systemd passed them to.
    """

    def __init__(self, environ: MutableMapping[str, str], pid: int) -> None:
        self._passed, self._lack = _take_passed(environ, pid)
        self._open: dict[str, _Listener] = {}  # by address
        self._named: dict[int, dict[str, str]] = {}  # generation -> name -> address

    def open(self, generation: int, settings: Settings, patience: float = 0.0) -> dict[str, str]:
        """Have every socket that a group of this generation names; those that there are stay as they are.

        Args:
            generation: which the settings belong to.
            settings: a good configuration.
            patience: seconds to wait, blocking, for an address that is in use.

        Returns:
            The name of each socket that listens newly, and where.

        Raises:
            AddressInUseError: others listen there. As with ConfigError, nothing has changed.
            ConfigError: an address cannot be bound, or systemd did not pass it.
        """
        give_up = time.monotonic() + patience
        added: dict[str, _Listener] = {}
        while True:
            problems, in_use = self._add(settings, added)
            if problems or not in_use or time.monotonic() >= give_up:
                break
            time.sleep(_RETRY)
        if problems or in_use:
            for listener in added.values():
                listener.close()
            if problems:
                raise ConfigError(settings.source, problems + in_use)
            raise AddressInUseError(settings.source, in_use)
        self._open |= added
        self._named[generation] = {each.name: each.address for each in _served(settings)}
        return {
            each.name: shown_address(added[each.address].sock)
            for each in _served(settings)
            if each.address in added
        }

    def _add(
        self, settings: Settings, added: dict[str, _Listener]
    ) -> tuple[list[Problem], list[Problem]]:
        """Bind what is missing; return what can't be had, and what can't be had now."""
        problems: list[Problem] = []
        in_use: list[Problem] = []
        for each in _served(settings):
            if each.address in self._open or each.address in added:
                continue
            try:
                added[each.address] = self._listener(each)
            except _InUse as exc:
                in_use.append(settings.problem(("sockets", each.name, "listen"), str(exc)))
            except _Unfit as exc:
                problems.append(settings.problem(("sockets", each.name, exc.key), str(exc)))
        return problems, in_use

    def _listener(self, settings: SocketSettings) -> _Listener:
        kind, _, rest = settings.listen.partition(":")
        if kind == "systemd":
            return self._from_systemd(rest)
        if kind == "unix":
            return _bound_unix(rest, settings)
        return _Listener(_bound_tcp(settings.listen, settings.backlog))

    def _from_systemd(self, name: str) -> _Listener:
        if self._lack:
            raise _Unfit(f"{self._lack}; {_NEEDS_SYSTEMD}")
        found = self._passed.get(name, [])
        if not found:
            names = ", ".join(sorted(self._passed)) or "none"
            raise _Unfit(
                f'systemd passed no socket named "{name}", but {names}; '
                "FileDescriptorName= in the .socket unit names them"
            )
        if len(found) > 1:
            raise _Unfit(
                f'systemd passed {len(found)} sockets named "{name}"; '
                "give each its own .socket unit with its own FileDescriptorName="
            )
        return _Listener(_copied(found[0], name))

    def of(self, generation: int, names: Sequence[str]) -> tuple[socket.socket, ...]:
        """Return the sockets that a generation knows by these names, in this order."""
        addresses = self._named[generation]
        return tuple(self._open[addresses[name]].sock for name in names)

    def retire(self, generation: int) -> None:
        """Forget a generation, and close what no other one names."""
        self._named.pop(generation, None)
        kept = {address for named in self._named.values() for address in named.values()}
        for address in self._open.keys() - kept:
            self._open.pop(address).close()

    def adjust(self, settings: Settings) -> list[Problem]:
        """Let sockets that have been open before be as the settings in force want them.

        Returns:
            What could not be changed, and therefore is as it was.
        """
        problems = []
        for each in _served(settings):
            listener = self._open.get(each.address)
            if listener is None:
                continue  # a stop has closed it
            if not each.is_passed:
                listener.sock.listen(each.backlog)
            if listener.path:
                try:
                    os.chmod(listener.path, each.mode)
                    _give(listener.path, each.owner)
                except (OSError, _Unfit) as exc:
                    problems.append(settings.problem(("sockets", each.name), str(exc)))
        return problems

    def close(self) -> None:
        """Close everything, and remove the files of our own. Workers hold copies of their own."""
        for listener in self._open.values():
            listener.close()
        self._open.clear()
        self._named.clear()


def _served(settings: Settings) -> list[SocketSettings]:
    """Return the sockets that a group names: connections to others would wait for ever."""
    named = {name for group in settings.groups.values() for name in group.sockets}
    return [each for each in settings.sockets.values() if each.name in named]


def shown_address(sock: socket.socket) -> str:
    """Return where a socket listens, as it would stand in the configuration."""
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name}"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- bound by us -------------------------------------------------------------------------------


def _bound_tcp(listen: str, backlog: int) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        family, *_, address = socket.getaddrinfo(
            host,
            int(port),
            type=socket.SOCK_STREAM,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,  # nobody is asked for names
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as exc:
        raise _Unfit(f"{listen} cannot be bound: {exc.strerror}") from exc
    try:
        # Connections of an earlier life that are in TIME_WAIT do not count as in use.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # The same on every machine, whatever its bindv6only says; both are two sockets.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise _InUse(f"another process listens at {listen}") from exc
        remedy = ""
        if exc.errno == errno.EACCES:
            remedy = "; ports below 1024 need root, CAP_NET_BIND_SERVICE, or systemd's socket"
        elif exc.errno == errno.EADDRNOTAVAIL:
            remedy = "; no interface of this machine has that address"
        raise _Unfit(f"{listen} cannot be bound: {exc.strerror}{remedy}") from exc
    return sock


def _bound_unix(path: str, settings: SocketSettings) -> _Listener:
    with _locked(os.path.dirname(path)):
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # By the umask, so that nobody gets in between bind and chmod.
        before = os.umask(0o777 & ~settings.mode)
        try:
            sock.bind(path)
        except OSError as exc:
            sock.close()
            raise _Unfit(f"{path} cannot be bound: {exc.strerror}") from exc
        finally:
            os.umask(before)
        found = os.lstat(path)
        listener = _Listener(sock, path, (found.st_dev, found.st_ino))
        try:
            _give(path, settings.owner)
        except _Unfit:
            listener.close()
            raise
        sock.listen(settings.backlog)
        return listener


def _give(path: str, owner: str) -> None:
    """Let a file belong to "user:group", either of which may be missing."""
    import grp
    import pwd

    user, _, group = owner.partition(":")
    uid = gid = -1
    try:
        if user:
            uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        if group:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        if owner:
            os.chown(path, uid, gid, follow_symlinks=False)
    except KeyError as exc:
        raise _Unfit(f"{owner}: there is no such user or group on this machine", "owner") from exc
    except OSError as exc:
        raise _Unfit(f"{path} cannot be given to {owner}: {exc.strerror}", "owner") from exc


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Be the only supervisor that looks at the sockets in a folder. Leaves no file behind."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise _Unfit(f"the folder {folder} cannot be opened: {exc.strerror}") from exc
    give_up = time.monotonic() + _LOCK_DUE
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise _InUse(f"another process keeps the folder {folder} locked") from None
                time.sleep(0.001)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that has died; demand that there is nothing else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise _Unfit(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISSOCK(found.st_mode):
        raise _Unfit(f"{path} exists and is not a socket; remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        why = f": {os.strerror(code)}" if code not in {0, errno.EAGAIN} else ""
        raise _InUse(f"another process listens at {path}{why}")
    try:
        os.unlink(path)
    except OSError as exc:
        raise _Unfit(
            f"{path} is left from a dead process and cannot be removed: {exc.strerror}"
        ) from exc


# --- passed by systemd -------------------------------------------------------------------------


def _take_passed(environ: MutableMapping[str, str], pid: int) -> tuple[dict[str, list[int]], str]:
    """Return the passed descriptors by name, or why there are none, as sd_listen_fds(3) reads it."""
    said = {name: environ.pop(name) for name in list(environ) if name.startswith("LISTEN_")}
    whom, number = said.get("LISTEN_PID", ""), said.get("LISTEN_FDS", "")
    if not whom or not number:
        return {}, "systemd passed no sockets (LISTEN_PID and LISTEN_FDS are not set)"
    if whom != str(pid):
        return {}, f"systemd passed its sockets to process {whom[:20]}, and this is {pid}"
    if not number.isdecimal() or len(number) > 4:  # noqa: PLR2004
        return {}, f"LISTEN_FDS is {number[:20]!r}, not a number of sockets"
    names = said["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in said else []
    passed: dict[str, list[int]] = {}
    for index in range(int(number)):
        fd = FIRST_PASSED + index
        with contextlib.suppress(OSError):  # not open: whoever names it is told
            os.set_inheritable(fd, False)
        passed.setdefault(names[index] if index < len(names) else "unknown", []).append(fd)
    return passed, ""


def _copied(fd: int, name: str) -> socket.socket:
    """Return a socket that can be accepted from. The original stays: it could not be had again."""
    try:
        sock = socket.socket(fileno=os.dup(fd))
    except OSError as exc:
        raise _Unfit(f'what systemd passed as "{name}" is no socket: {exc.strerror}') from exc
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listens:
        sock.close()
        raise _Unfit(
            f'what systemd passed as "{name}" does not accept connections; '
            "its unit needs ListenStream= and Accept=no"
        )
    sock.setblocking(False)
    return sock
