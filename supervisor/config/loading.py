"""From a file to Settings: read, parse, check each key, then the keys against one another.

Nothing stops at the first problem. A value that is bad is left out of the checks that would need
it, so that one mistake makes one problem, and a key that was only misspelt is not missed as well.
"""

from __future__ import annotations

__all__ = ["default_runtime_dir", "load", "locate"]

import contextlib
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from supervisor.config import users
from supervisor.config import values as read
from supervisor.config.lines import KeyPath, Lines
from supervisor.config.settings import (
    APP_OPTIONS,
    BEFORE_TIMEOUT,
    LATER,
    GroupSettings,
    LogSettings,
    PoolSettings,
    Settings,
    SocketSettings,
    SupervisorSettings,
    dotted,
)
from supervisor.core.policy import Restart
from supervisor.errors import ConfigError, Problem

MAX_BYTES = 1 << 20  # of the file; larger ones are something else
MAX_SECRET = 1 << 16  # of a url_file
# An ipc socket's path has 107 bytes (sun_path less its NUL). 24 of them are for our file names.
MAX_RUNTIME_DIR = 107 - 24
MAX_SOCKET_PATH = 107
MAX_SOCKETS = 64  # of a group; so many descriptors can travel with one message, and more
MAX_DEPTH = 32  # options are encoded and decoded by recursive code

_TABLES = ("supervisor", "log", "pools", "workers", "sockets")
_HOMES = {
    "[supervisor]": SupervisorSettings,
    "[log]": LogSettings,
    "[pools.NAME]": PoolSettings,
    "[workers.NAME]": GroupSettings,
    "[sockets.NAME]": SocketSettings,
}
_WORK = ("run", "app", "command")  # a group has exactly one of them
_NOT_FOR_COMMANDS = {
    "options": "a program is told by its arguments and by env",
    "pools": "a program opens its own connections",
}
_NOT_BEFORE = (
    "count",
    "restart",
    "max_restarts",
    "restart_window",
    "backoff",
    "backoff_max",
    "on_failed",
    "notify",
    "min_ready_time",
    "surge",
    "max_age",
)
_PUBLIC = "may be read by everybody on this machine"


def load(source: str | os.PathLike[str], *, env: Mapping[str, str], uid: int) -> Settings:
    """Return the settings that a file holds. May be called from any thread.

    Args:
        source: the file; problems name it as it is given here. Relative paths in the file are
            relative to its folder, symbolic links not followed.
        env: the environment that `${NAME}` and the default of `runtime_dir` are taken from.
        uid: the user for whom the default of `runtime_dir` is made.

    Raises:
        ConfigError: with every problem there is, in the order of the lines.
    """
    # Links are not followed: one that Kubernetes mounts leads into a folder that the next change
    # of the configuration removes.
    path = os.path.abspath(source)
    try:
        text, mode = _contents(path, MAX_BYTES)
    except read.Unfit as unfit:
        raise ConfigError(str(source), [Problem("", str(unfit))]) from unfit
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(str(source), [_syntax_problem(exc, text)]) from exc
    is_public = bool(mode & stat.S_IROTH)
    reading = _Reading(path, os.path.dirname(path), env, uid, Lines(text), is_public)
    settings = reading.settings(document)
    if settings is None:
        problems = sorted(reading.problems, key=lambda each: each.line or len(text) + 1)
        raise ConfigError(str(source), problems)
    return settings


def locate(source: str | os.PathLike[str], *, env: Mapping[str, str], uid: int) -> tuple[str, str]:
    """Return name and runtime_dir of the supervisor that a file belongs to, however bad the file is.

    A running supervisor must be reachable also when somebody has broken its file meanwhile. What
    cannot be read counts as absent.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    path = os.path.abspath(source)
    try:
        text, _ = _contents(path, MAX_BYTES)
    except read.Unfit as unfit:
        raise ConfigError(str(source), [Problem("", str(unfit))]) from unfit
    table = _beginning(text).get("supervisor")
    known = {}
    for key in ("name", "runtime_dir"):
        value = table.get(key) if isinstance(table, dict) else None
        if isinstance(value, str):
            with contextlib.suppress(read.Unfit):
                known[key] = read.expand(value, env)
    name = known.get("name") or os.path.splitext(os.path.basename(path))[0]
    if "runtime_dir" not in known:
        return name, default_runtime_dir(name, env, uid)
    return name, os.path.normpath(os.path.join(os.path.dirname(path), known["runtime_dir"]))


def _beginning(text: str) -> dict[str, Any]:
    """Return what a document holds before its first mistake."""
    lines = text.splitlines()
    while lines:
        try:
            return tomllib.loads("\n".join(lines))
        except RecursionError:
            break
        except ValueError as exc:
            place = re.search(r"at line (\d+)", str(exc))
            end = len(lines) if place is None else int(place[1])
            del lines[min(end, len(lines)) - 1 :]
    return {}


def default_runtime_dir(name: str, env: Mapping[str, str], uid: int) -> str:
    """Return where the control sockets of a supervisor of that name are, if the file is silent.

    systemd's RuntimeDirectory (the first, where there are several), the user's own run-time
    directory, or a private folder under the system's temporary one. As the XDG specification asks,
    a relative path in a variable counts as none.
    """
    own = env.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if os.path.isabs(own):
        return os.path.normpath(own)
    users = env.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(users):
        return os.path.normpath(os.path.join(users, name))
    temporary = env.get("TMPDIR", "")
    if not os.path.isabs(temporary):
        temporary = "/tmp"  # noqa: S108  the folder in it is made with mode 0700 and checked
    return os.path.normpath(os.path.join(temporary, f"ackvisor-{uid}-{name}"))


def _contents(path: str, limit: int) -> tuple[str, int]:
    """Return the text of a regular file and its mode; raise Unfit with one sentence."""

    def opened(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)  # opening a FIFO would wait for its writer

    try:
        with open(path, "rb", opener=opened) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise read.Unfit("is not a regular file")
            data = file.read(limit + 1)
    except FileNotFoundError as exc:
        raise read.Unfit("there is no such file") from exc
    except (OSError, ValueError) as exc:
        if isinstance(exc, read.Unfit):
            raise
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise read.Unfit(f"cannot be read: {reason.lower()}") from exc
    if len(data) > limit:
        raise read.Unfit(f"is larger than {limit >> 10} KiB")
    if data.startswith(b"\xef\xbb\xbf"):
        raise read.Unfit("begins with a byte order mark; save it as UTF-8 without one")
    try:
        return data.decode(), mode
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise read.Unfit(f"is not UTF-8: byte 0x{data[exc.start]:02x} in line {line}") from exc


def _syntax_problem(exc: Exception, text: str) -> Problem:
    message = "it is nested too deep" if isinstance(exc, RecursionError) else str(exc)
    place = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message)
    if place is None:
        return Problem("", f"is not valid TOML: {message}")
    what = f"is not valid TOML: {place[1][:1].lower()}{place[1][1:]}"
    if place[2] is None:
        return Problem("", f"{what} at the end", text.rstrip("\n").count("\n") + 1)
    return Problem("", f"{what} at column {place[3]}", int(place[2]))


def _readers(kind: type[Any]) -> dict[str, read.Reader]:
    return {each.name: each.metadata["reader"] for each in fields(kind) if each.metadata}


_BAD: Any = object()  # what became of a value that has been reported


@dataclass(slots=True)
class _Table:
    """What one table came to: its good values with defaults, and where each given key stands."""

    path: KeyPath
    values: dict[str, Any] = field(default_factory=dict)
    given: dict[str, KeyPath] = field(default_factory=dict)

    def at(self, name: str) -> KeyPath:
        return self.given.get(name, (*self.path, name))


@dataclass(slots=True)
class _Reading:
    """One reading of one document. Every method notes what is wrong and goes on."""

    source: str
    folder: str
    env: Mapping[str, str]
    uid: int
    lines: Lines
    is_public: bool  # everybody on this machine may read the file
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(dotted(path), message, self.lines.of(path)))

    def warning(self, path: KeyPath, message: str) -> None:
        self.warnings.append(Problem(dotted(path), message, self.lines.of(path)))

    # --- the file's tables ---------------------------------------------------------------------

    def settings(self, document: dict[str, Any]) -> Settings | None:
        """Return the settings, or None when there are problems."""
        tables: dict[str, tuple[KeyPath, dict[str, Any]]] = {
            each: ((each,), {}) for each in _TABLES
        }
        for name, value, path, _ in self.spelled(document, (), _TABLES):
            tables[name] = (path, value) if self.is_table(value, path) else (path, {})
        supervisor = self.supervisor(*tables["supervisor"])
        log = self.table(LogSettings, *tables["log"])
        pools = {each: self.pool(*table) for each, table in self.named(*tables["pools"])}
        sockets = {each: self.socket(*table) for each, table in self.named(*tables["sockets"])}
        groups = {
            each: self.group(*table, pools, sockets)
            for each, table in self.named(*tables["workers"])
        }
        self.check_addresses(sockets, groups)
        if not document.get(str(tables["workers"][0][0])):
            self.problem(
                ("workers",),
                "there is no group of workers; "
                'at least one is needed: [workers.NAME] with run = "module:function"',
            )
        self.check_group_names(groups)
        if self.problems:
            return None
        settings = Settings(
            source=self.source,
            supervisor=SupervisorSettings(**supervisor.values),
            log=LogSettings(**log.values),
            pools={each: PoolSettings(**pool.values) for each, pool in pools.items()},
            groups={
                each: GroupSettings(name=each, **group.values) for each, group in groups.items()
            },
            sockets={
                each: SocketSettings(name=each, **socket.values) for each, socket in sockets.items()
            },
            warnings=tuple(self.warnings),
            lines=self.lines,
        )
        for name, terms in settings.budget_terms().items():
            if terms.misfit:
                self.problem(("pools", name, "budget"), terms.misfit)
        return None if self.problems else settings

    def supervisor(self, path: KeyPath, raw: dict[str, Any]) -> _Table:
        table = self.table(SupervisorSettings, path, raw)
        values = table.values
        if "name" not in table.given:
            stem = os.path.splitext(os.path.basename(self.source))[0]
            try:
                values["name"] = read.name(stem)
            except read.Unfit:
                self.problem(table.at("name"), "is needed: the name of this file cannot be one")
        if "runtime_dir" in values:
            values["runtime_dir"] = self.absolute(values["runtime_dir"])
        elif "runtime_dir" not in table.given and "name" in values:
            values["runtime_dir"] = default_runtime_dir(values["name"], self.env, self.uid)
        length = len(values.get("runtime_dir", "").encode(errors="surrogatepass"))
        if length > MAX_RUNTIME_DIR:
            self.problem(
                table.at("runtime_dir"),
                f"{read.quoted(values['runtime_dir'])} has {length} bytes; the path of a socket "
                f"in it leaves {MAX_RUNTIME_DIR}",
            )
        grace = values.get("grace")
        if grace is not None and "abort_margin" not in table.given:
            values["abort_margin"] = min(5.0, grace / 4)
        elif grace is not None and values.get("abort_margin", 0.0) > grace:
            self.problem(table.at("abort_margin"), f"must not be above grace ({grace:g}s)")
        values["path"] = tuple(self.absolute(each) for each in values.get("path", ()))
        for index, each in enumerate(values["path"]):
            if not os.path.exists(each):
                self.warning((*table.at("path"), index), f"{read.quoted(each)} does not exist")
        return table

    def pool(self, path: KeyPath, raw: dict[str, Any]) -> _Table:
        table = self.table(PoolSettings, path, raw)
        values, given = table.values, table.given
        if "url" in given and "url_file" in given:
            self.problem(table.at("url_file"), "stands beside url; a pool has exactly one of them")
        elif "url" not in given and "url_file" not in given:
            self.problem(path, "needs url, or url_file for a secret")
        elif values.get("url_file"):
            self.secret(table)
        if "url" in values:
            self.url(table, raw.get("url"))
        if "max_open" in values:
            if "max_idle" not in given:
                values["max_idle"] = values["max_open"]
            elif values.get("max_idle", 0) > values["max_open"]:
                self.problem(
                    table.at("max_idle"),
                    f"{values['max_idle']} is above max_open ({values['max_open']})",
                )
            if "min" in given and values.get("min", 0) > values["max_open"]:
                self.problem(
                    table.at("min"), f"{values['min']} is above max_open ({values['max_open']})"
                )
        if "min" in given and "budget" not in given:
            self.problem(
                table.at("min"), "is what a budget guarantees each worker, and there is no budget"
            )
        return table

    def secret(self, table: _Table) -> None:
        """Take the URL from the file that holds it."""
        path = table.values["url_file"] = self.absolute(table.values["url_file"])
        try:
            text, mode = _contents(path, MAX_SECRET)
        except read.Unfit as unfit:
            self.problem(table.at("url_file"), f"{read.quoted(path)}: {unfit}")
            return
        table.values["url"] = text.rstrip("\r\n")
        if mode & stat.S_IROTH and read.has_password(text):
            self.warning(table.at("url_file"), f"{read.quoted(path)} {_PUBLIC}")

    def url(self, table: _Table, written: object) -> None:
        """Bring the URL into its one spelling."""
        at = table.at("url" if "url" in table.given else "url_file")
        try:
            url = table.values["url"] = read.resolved_url(table.values["url"], self.folder)
        except read.Unfit as unfit:
            self.problem(at, str(unfit))
            return
        if url.startswith("sqlite:///:memory:"):
            self.warning(at, "a database in memory is another one in every connection")
        if self.is_public and isinstance(written, str) and read.has_password(written):
            self.warning(at, f"holds a password, and the file {_PUBLIC}; use url_file or ${{NAME}}")

    def group(
        self,
        path: KeyPath,
        raw: dict[str, Any],
        pools: Collection[str],
        sockets: Collection[str],
    ) -> _Table:
        table = self.table(GroupSettings, path, raw)
        values, given = table.values, table.given
        work = [each for each in _WORK if each in given]
        if not work:
            self.problem(
                path,
                'needs run = "module:function", app = "module:app" or command = ["program"]',
            )
        for other in work[1:]:
            self.problem(
                table.at(other),
                f"stands beside {work[0]}; a group has exactly one of {', '.join(_WORK)}",
            )
        self.check_command(table)
        if values.get("before"):
            self.check_before(table)
        if "pools" not in given:
            values["pools"] = () if "command" in given else tuple(pools)
        self.check_names(values.get("pools", ()), table.at("pools"), "pools", pools)
        self.check_names(values.get("sockets", ()), table.at("sockets"), "sockets", sockets)
        if len(values.get("sockets", ())) > MAX_SOCKETS:
            self.problem(table.at("sockets"), f"names more than {MAX_SOCKETS} sockets")
        if "app" in given:
            self.app(table, raw.get("options", {}))
        if values.get("user"):
            try:
                values["identity"] = users.find(values["user"], self.uid)
            except read.Unfit as unfit:
                self.problem(table.at("user"), str(unfit))
        backoff, most = values.get("backoff"), values.get("backoff_max")
        if backoff is not None and most is not None and backoff > most:
            at = table.at("backoff" if "backoff" in given else "backoff_max")
            self.problem(at, f"backoff ({backoff:g}s) must not be above backoff_max ({most:g}s)")
        return table

    def check_command(self, table: _Table) -> None:
        """Note what a command cannot have, and what only a command can."""
        if "command" in table.given:
            wrong = {key: f"is for run; {remedy}" for key, remedy in _NOT_FOR_COMMANDS.items()}
        else:
            wrong = dict.fromkeys(("notify", "stop_signal"), "is for a command")
        self.check_absent(table, wrong)

    def check_before(self, table: _Table) -> None:
        """Note what makes no sense for what runs once, before the others."""
        message = "makes no sense with before: it runs once, to its end"
        self.check_absent(table, dict.fromkeys(_NOT_BEFORE, message))
        table.values["restart"] = Restart.NEVER
        if "ready_timeout" not in table.given:
            table.values["ready_timeout"] = BEFORE_TIMEOUT

    def check_absent(self, table: _Table, wrong: Mapping[str, str]) -> None:
        """Note each key that was given, is good by itself, and does not belong there."""
        for key, message in wrong.items():
            if key in table.given and key in table.values:
                self.problem(table.at(key), message)

    def app(self, table: _Table, options: Any) -> None:
        """Check what only a group with an application needs, and read the options of its server."""
        if "sockets" not in table.given:
            self.problem(table.at("app"), 'needs sockets = ["NAME"]: where it is to be reached')
        elif table.values.get("sockets") == ():
            self.problem(table.at("sockets"), "is empty: an app needs one to be reached by")
        if "options" in table.values:
            table.values["options"] = {
                name: got
                for name, value, here, is_exact in self.spelled(
                    options, table.at("options"), APP_OPTIONS
                )
                if is_exact and (got := self.value(APP_OPTIONS[name], value, here)) is not _BAD
            }

    def check_names(
        self, names: Sequence[str], path: KeyPath, table: str, known: Collection[str]
    ) -> None:
        """Note which pools or sockets of a group do not exist, or come twice."""
        for index, each in enumerate(names):
            if each not in known:
                hint = read.did_you_mean(each, known)
                self.problem((*path, index), f"there is no [{table}.{dotted((each,))}]{hint}")
            elif each in names[:index]:
                self.problem((*path, index), f'"{each}" comes twice')

    def check_group_names(self, groups: Collection[str]) -> None:
        """Note names that read as a worker's: with "a" and "a-1", `restart a-1` means both."""
        for each in groups:
            other, _, number = each.rpartition("-")
            if number.isdecimal() and other in groups:
                self.problem(("workers", each), f'a worker of group "{other}" has the same name')

    def socket(self, path: KeyPath, raw: dict[str, Any]) -> _Table:
        table = self.table(SocketSettings, path, raw)
        values, given = table.values, table.given
        if "listen" not in given:
            self.problem(path, 'needs listen, as in "127.0.0.1:8000" or "unix:/path"')
        kind, _, rest = values.get("listen", "").partition(":")
        if kind == "unix":
            file = self.absolute(rest)
            values["listen"] = f"unix:{file}"
            if len(file.encode(errors="surrogatepass")) > MAX_SOCKET_PATH:
                self.problem(
                    table.at("listen"),
                    f"{read.quoted(file)} is longer than the {MAX_SOCKET_PATH} bytes that the path "
                    "of a socket may have",
                )
        elif kind:
            for key in ("mode", "owner"):
                if key in given:
                    self.problem(table.at(key), "is for unix sockets, which are files")
        if kind == "systemd" and "backlog" in given:
            self.problem(table.at("backlog"), "is set in the .socket unit, by Backlog=")
        return table

    def check_addresses(self, sockets: Mapping[str, _Table], groups: Mapping[str, _Table]) -> None:
        """Note addresses that come twice, and sockets that nobody would accept from."""
        first: dict[str, str] = {}
        served = {name for group in groups.values() for name in group.values.get("sockets", ())}
        for name, table in sockets.items():
            listen = table.values.get("listen", "")
            if listen and not listen.endswith(":0") and first.setdefault(listen, name) != name:
                self.problem(
                    table.at("listen"), f"is the address of [sockets.{first[listen]}], too"
                )
            if name not in served:
                self.warning(table.path, "no group names it in its sockets, so it is not opened")

    # --- what all tables have in common --------------------------------------------------------

    def named(
        self, path: KeyPath, raw: dict[str, Any]
    ) -> Iterator[tuple[str, tuple[KeyPath, dict[str, Any]]]]:
        """Yield the tables in a table of tables, as [pools.NAME]."""
        for name, value in raw.items():
            here = (*path, name)
            try:
                read.name(name)
            except read.Unfit as unfit:
                self.problem(here, str(unfit))
            if self.is_table(value, here):
                yield name, (here, value)

    def is_table(self, raw: object, path: KeyPath) -> bool:
        if isinstance(raw, dict):
            return True
        header = path[0] if path[0] in {"supervisor", "log"} else f"{path[0]}.NAME"
        self.problem(path, f"expected a table, as [{header}], not {read.kind_of(raw)}")
        return False

    def table(self, kind: type[Any], path: KeyPath, raw: dict[str, Any]) -> _Table:
        """Read the table of one class: what was given and is good, defaults for what was not."""
        table = _Table(path)
        readers, later = _readers(kind), LATER[kind]
        for name, value, here, is_exact in self.spelled(raw, path, (*readers, *later)):
            table.given[name] = here
            if is_exact and name in readers:
                got = self.value(readers[name], value, here)
                if got is not _BAD:
                    table.values[name] = got
            elif is_exact:
                got = self.value(later[name].reader, value, here)
                if got is not _BAD and got != later[name].off:
                    self.problem(here, f"not yet supported: {later[name].lacks}")
        for each in fields(kind):
            if each.name in readers and each.name not in table.given:
                if each.default is not MISSING:
                    table.values[each.name] = each.default
                elif each.default_factory is not MISSING:
                    table.values[each.name] = each.default_factory()
        return table

    def spelled(
        self, raw: dict[str, Any], path: KeyPath, known: Collection[str]
    ) -> Iterator[tuple[str, Any, KeyPath, bool]]:
        """Yield (name, value, path, True) for known keys, and note the unknown ones.

        A misspelt one is yielded as the one that was meant, with False, unless that is there too.
        """
        taken = set(raw)
        for name, value in raw.items():
            here = (*path, name)
            if name in known:
                yield name, value, here, True
                continue
            home = _home(name)
            meant = None if home else read.nearest(name, known)
            remedy = f'; did you mean "{meant}"?' if meant else home and f"; it belongs in {home}"
            self.problem(here, f"unknown key{remedy}")
            if meant is not None and meant not in taken:
                taken.add(meant)
                yield meant, value, here, False

    def value(self, reader: read.Reader, raw: object, path: KeyPath) -> Any:
        """Return what the reader makes of a value, or _BAD."""
        before = len(self.problems)
        expanded = self.expanded(raw, path)
        unset = {each.key for each in self.problems[before:]}
        try:
            value = reader(expanded)
        except read.Unfit as unfit:
            for inside, message in unfit.faults:
                if dotted((*path, *inside)) not in unset:
                    self.problem((*path, *inside), message)
            return _BAD
        return _BAD if unset else value

    def expanded(self, raw: Any, path: KeyPath) -> Any:
        """Return a value with the references to the environment replaced in all its strings."""
        if isinstance(raw, str):
            try:
                return read.expand(raw, self.env)
            except read.Unfit as unfit:
                self.problem(path, str(unfit))
        elif len(path) > MAX_DEPTH:
            self.problem(path, f"is nested more than {MAX_DEPTH} deep")
            return ""
        elif isinstance(raw, dict):
            return {each: self.expanded(value, (*path, each)) for each, value in raw.items()}
        elif isinstance(raw, list):
            return [self.expanded(value, (*path, index)) for index, value in enumerate(raw)]
        return raw

    def absolute(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.folder, path))


def _home(name: str) -> str:
    """Return the table that has a key of this name, "" when none has."""
    for home, kind in _HOMES.items():
        if name in LATER[kind] or name in _readers(kind):
            return home
    return ""
