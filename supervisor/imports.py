"""What `supervisor check` says about entry points: is the module there, and does it import?

The first is answered without importing anything of the user's, not even a parent package. The
second is answered by a process of its own, with a deadline: what it breaks or leaves running goes
with it. Nothing here is used while a supervisor runs.
"""

from __future__ import annotations

__all__ = ["check_entry_points", "check_imports"]

import contextlib
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any, NamedTuple

from supervisor.commands import missing_program
from supervisor.config import GroupSettings, Settings
from supervisor.config.values import did_you_mean
from supervisor.errors import Problem, SpawnError

if TYPE_CHECKING:
    from supervisor.protocol import Identity

MAX_ANSWER = 1 << 16  # bytes; honest answers are clipped to a fraction of it
MAX_MESSAGE = 500  # characters of an exception's message: one line is to be read, not a page


# --- without importing -------------------------------------------------------------------------


def check_entry_points(settings: Settings) -> list[Problem]:
    """Return a problem for each group whose `run`, `app` or `command` names what is not there.

    Looks where its workers will look: for a module in `path`, then on this interpreter's own path;
    for a program in the PATH that it will have.
    """
    importlib.invalidate_caches()  # a file may be younger than the listing of its folder
    problems = []
    for group in settings.groups.values():
        if group.command:
            fault = missing_program(settings, group)
        else:
            fault = _missing(_module(group), settings.supervisor.path)
        if not fault and group.app:
            fault = _lacks_server(settings.supervisor.path)
        if fault:
            problems.append(settings.problem(("workers", group.name, _key(group)), fault))
    return problems


def _key(group: GroupSettings) -> str:
    """Return the key that says what a group's workers import."""
    if group.command:
        return "command"
    return "app" if group.app else "run"


def _entry_point(group: GroupSettings) -> str:
    return group.app or group.run


def _module(group: GroupSettings) -> str:
    return _entry_point(group).partition(":")[0]


def _lacks_server(path: Sequence[str]) -> str:
    """Return what is missing to serve an application; "" when nothing is."""
    missing = [name for name in ("uvicorn", "a2wsgi") if _missing(name, path)]
    if not missing:
        return ""
    are = "are" if len(missing) > 1 else "is"
    return f'needs {" and ".join(missing)}, which {are} not installed: pip install "ackvisor[web]"'


def _missing(module: str, own: Sequence[str]) -> str:
    """Return why there is no such module; "" when there is one."""
    top, *parts = module.split(".")
    everywhere = [*own, *sys.path]
    spec = _find(top, everywhere, is_top=True)
    if spec is None:
        return (
            f'module "{top}" is neither in path ({", ".join(own)}) nor installed'
            f"{did_you_mean(top, _modules(everywhere))}"
        )
    name = top
    for part in parts:
        inside = spec.submodule_search_locations
        if inside is None:
            return f'there is no module "{module}": "{name}" is a module and not a package'
        spec = _find(f"{name}.{part}", inside, is_top=False)
        if spec is None:
            hint = did_you_mean(part, _modules(inside))
            return f'there is no module "{module}": package "{name}" has no "{part}"{hint}'
        name = f"{name}.{part}"
    return "" if spec.loader else f'"{module}" is a folder without code (no __init__.py)'


def _find(name: str, path: Sequence[str], *, is_top: bool) -> ModuleSpec | None:
    """Find a module as an import would; importlib.util.find_spec imports the parent packages."""
    for finder in sys.meta_path:
        if finder is PathFinder:
            spec = _find_on_path(name, path)
        else:
            try:
                spec = finder.find_spec(name, None if is_top else path)
            except Exception:  # somebody's own finder, in want of a parent that is not imported
                spec = None
        if spec is not None:
            return spec
    return None


def _find_on_path(name: str, path: Sequence[str]) -> ModuleSpec | None:
    """Do what PathFinder does, which for a namespace package insists on an imported parent."""
    portions: list[str] = []
    for entry in path:
        finder = pkgutil.get_importer(entry or ".")
        spec = finder.find_spec(name) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        if spec is not None:
            portions += spec.submodule_search_locations or ()
    if not portions:
        return None
    namespace = ModuleSpec(name, None, is_package=True)
    namespace.submodule_search_locations = portions
    return namespace


def _modules(path: Sequence[str]) -> list[str]:
    return [each.name for each in pkgutil.iter_modules(path)]


# --- by importing ------------------------------------------------------------------------------


def check_imports(settings: Settings, *, timeout: float) -> list[Problem]:
    """Import every group's entry point in a process of its own; return what failed, and where.

    Each has `timeout` seconds, and the group's `env`. Its process is gone, with all it started in
    its process group, when this returns.

    Raises:
        SpawnError: the operating system refuses a process.
    """
    problems = []
    path = settings.supervisor.path
    for group in settings.groups.values():
        fault = ""
        if not group.command:
            fault = _try_import(group, _wanted(settings, group), path, timeout)
        if fault:
            problems.append(settings.problem(("workers", group.name, _key(group)), fault))
    return problems


class _Wanted(NamedTuple):
    """What has to go with an entry point.

    `interface` is None for a `run`; of an application, what it is said to be, or "". `pools` are those
    that are not to block: the schemes of their URLs, by name.
    """

    interface: str | None
    pools: dict[str, str]


def _wanted(settings: Settings, group: GroupSettings) -> _Wanted:
    pools = settings.pools_of(group.name)
    return _Wanted(
        group.options.get("interface", "") if group.app else None,
        {name: pool.url.partition(":")[0] for name, pool in pools.items() if not pool.blocking},
    )


def _try_import(group: GroupSettings, wanted: _Wanted, path: Sequence[str], timeout: float) -> str:
    """Return why the entry point does not import, or cannot have these pools; "" when all is well."""
    import multiprocess

    run = _entry_point(group)
    context = multiprocess.get_context("spawn")
    deadline = time.monotonic() + timeout
    answers, answer = context.Pipe(duplex=False)
    process = context.Process(
        target=_answer,
        args=(answer, (run, wanted), tuple(path), group.env, group.identity),
    )
    with answers:
        try:
            process.start()
        except OSError as exc:
            raise SpawnError(f"no process to import {run}: {exc.strerror}") from exc
        finally:
            answer.close()
        pidfd = os.pidfd_open(process.pid)
        try:
            _wait((answers.fileno(), pidfd), deadline)
            told = _received(answers)
            # Without an answer it has died, or closed its descriptors and is about to die.
            has_ended = told is None and _wait((pidfd,), deadline)
        finally:
            os.close(pidfd)
            code = _kill(process)
    if told is not None:
        return told
    what = f'importing "{_module(group)}"'
    if not has_ended:
        return f"{what} had not ended after {timeout:g} s"
    end = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
    return f"{what} ended the process ({end})"


def _wait(fds: Sequence[int], deadline: float) -> bool:
    """Wait until one can be read; False: the deadline came first."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _received(answers: Any) -> str | None:
    """Return the child's answer, None where there is none. It is text: nothing is unpickled."""
    try:
        if answers.poll(0):
            return str(json.loads(answers.recv_bytes(MAX_ANSWER)))
    except (EOFError, OSError, ValueError):  # gone, or user code has written to our pipe
        pass
    return None


def _kill(process: Any) -> int:
    """End the child and its process group; return its exit code.

    Its pid is nobody else's: it is reaped here and nowhere before.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have made its group yet
    process.join()
    code = int(process.exitcode)
    process.close()
    return code


def _answer(
    answer: Any,
    what: tuple[str, _Wanted],
    path: Sequence[str],
    env: Mapping[str, str],
    identity: Identity | None,
) -> None:
    """Import an entry point, in the child, and say what came of it: "" for nothing to complain of."""
    run, wanted = what
    os.setpgid(0, 0)
    if identity is not None:
        from supervisor.privileges import become

        become(identity)
    os.environ.update(env)
    sys.path[:0] = [folder for folder in path if folder not in sys.path]
    try:
        told = _fault(run, wanted)
    except BaseException as exc:  # whatever user code raises is the answer
        told = f'importing "{run.partition(":")[0]}" failed: {_described(exc, path)}'
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # user code may have closed or replaced them
            stream.flush()
    answer.send_bytes(json.dumps(told).encode())


def _fault(run: str, wanted: _Wanted) -> str:
    module, _, names = run.partition(":")
    found: Any = importlib.import_module(module)
    where = f'module "{module}"'
    for name in names.split("."):
        if not hasattr(found, name):
            return f'{where} has no "{name}"{did_you_mean(name, dir(found))}'
        found = getattr(found, name)
        where = f'"{name}"'
    if not callable(found):
        return f'"{run}" cannot be called: it is of type {type(found).__name__}'
    # By its name, as everything that runs in a worker.
    return str(importlib.import_module("workers.entry").check(found, *wanted))


def _described(exc: BaseException, path: Sequence[str]) -> str:
    """Return the last line of the traceback, and the user's own line that led to it."""
    lines = traceback.format_exception_only(exc)
    headline = next((line for line in lines if not line.startswith(" ")), lines[-1])
    text = " ".join(headline.split())
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"
    places = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(exc.__traceback__)
        if frame.f_code.co_filename not in {__file__, importlib.__file__}
        and not frame.f_code.co_filename.startswith("<frozen importlib")
    ]
    if isinstance(exc, SyntaxError) and exc.filename:
        places.append((exc.filename, exc.lineno or 0))
    own = [place for place in places if _is_under(place[0], path)] or places
    return f"{text} ({own[-1][0]}, line {own[-1][1]})" if own else text


def _is_under(file: str, path: Sequence[str]) -> bool:
    """Tell whether a file is the user's: in `path`, and not in a virtual environment there."""
    inside = any(file.startswith(folder.rstrip("/") + "/") for folder in path)
    return inside and "/site-packages/" not in file
