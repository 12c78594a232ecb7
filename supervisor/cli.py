"""argv -> one command. The only place that prints an error and exits."""

from __future__ import annotations

__all__ = ["run"]

import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from supervisor import systemd
from supervisor.errors import ConfigError, SupervisorError, UsageError
from supervisor.output import unwritable
from supervisor.plain import counted

if TYPE_CHECKING:
    from supervisor.client import Client
    from supervisor.config import Settings
    from supervisor.launch import Template
    from supervisor.protocol import FromClient

IMPORT_TIMEOUT = 60.0  # seconds for each entry point of `check --import`
MAX_DIGITS = 18  # of a number of workers, which `int` has to read
LAST_LINES = 1.0  # seconds that a log which nobody reads may keep the end of a start
STOP_MARGIN = 10.0  # seconds after its deadline in which a supervisor must have gone

_config = click.option(
    "-c",
    "--config",
    "config",
    required=True,
    metavar="FILE",
    type=click.Path(readable=False, path_type=Path),  # reading it says why not, with 78
    help="The configuration, a TOML file.",
)


_wait = click.option("--wait", is_flag=True, help="Return when it is done; 1 when it failed.")


def run(spare: Template | None) -> NoReturn:
    """Run the command that `sys.argv` names. `spare` is a template launched in advance."""
    try:
        # click returns the code of an Exit, and None where a command just returns.
        code = main(obj=spare, standalone_mode=False) or 0
    except click.Abort:
        code = 130
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except SupervisorError as exc:
        code = _complain(exc)
    except OSError as exc:
        if not _is_of_output(exc):
            raise
        code = 0 if isinstance(exc, BrokenPipeError) else _complain(unwritable(exc))
    _flush()
    # Nothing is left to clean up, and finalizing an interpreter takes longer than most commands.
    os._exit(code)


def _is_of_output(exc: OSError) -> bool:
    """Tell whether it was raised by click itself, which writes the help and the version."""
    *_, (frame, _) = traceback.walk_tb(exc.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "click"


def _complain(exc: SupervisorError) -> int:
    for line in str(exc).splitlines():
        _remark(f"supervisor: {line}", "error")
    return exc.exit_code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _completes(*, workers: bool, groups: bool = False, suffix: str = "") -> dict[str, Any]:
    """Return the keyword of an argument that a shell completes with names from the configuration."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        from supervisor import completion

        config = ctx.params.get("config")
        if config is None:  # -c has not been typed yet: there is nothing to ask
            return []
        found = [f"{name}{suffix}" for name in completion.groups(config)] if groups else []
        found += completion.workers(config) if workers else []
        return [name for name in found if name.startswith(incomplete)]

    return {"shell_complete": complete}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ackvisor", prog_name="supervisor")
def main() -> None:
    """Run groups of worker processes that use databases.

    Every worker answers, every connection is accounted for, every kill is explained.
    """


@main.command()
@_config
@click.option("--import", "import_", is_flag=True, help="Also import each worker's module.")
@click.option("--connect", is_flag=True, help="Also ask each pool's server what it allows.")
def check(config: Path, *, import_: bool, connect: bool) -> None:
    """Read FILE and print every problem at once."""
    from supervisor.imports import check_entry_points, check_imports

    settings = _load(config)
    _warn(settings, config)
    problems = check_entry_points(settings)
    if import_ and not problems:
        with _shown("importing the workers' modules"):
            problems = check_imports(settings, timeout=IMPORT_TIMEOUT)
    if problems:
        raise ConfigError(str(config), problems)
    if connect:
        _check_connections(settings, config)
    workers = sum(group.count for group in settings.groups.values())
    _say(
        f"{config}: good. {counted(len(settings.groups), 'group')}, {counted(workers, 'worker')}, "
        f"{counted(len(settings.pools), 'pool')}."
    )


@main.command()
@_config
@click.pass_obj
def start(spare: Template | None, config: Path) -> None:
    """Run in the foreground until stopped (SIGTERM or Ctrl-C; twice: at once)."""
    manager = systemd.take_notify_variables(os.environ, os.getpid())
    settings = _load(config)
    _warn(settings, config)
    if manager is not None or systemd.is_service(os.environ, os.getpid()):
        _warn_of_unit(settings)
    from supervisor import log
    from supervisor.loop import Supervisor
    from supervisor.plain import takes_lines_back

    log.configure(settings.log.format, settings.log.level, patience=0.0)
    for_eyes = settings.log.format == "console" and not systemd.is_journal(2, os.environ)

    def greet(seconds: float) -> None:
        if for_eyes:
            log.write(_greeting(settings, config, seconds) + "\n")

    def report(finish: Any) -> None:
        if for_eyes:
            from supervisor.report import stop_summary

            log.write(stop_summary(finish) + "\n")

    spokesman = None
    if manager is not None:
        from supervisor.spokesman import Spokesman

        spokesman = Spokesman(*manager)
        if manager[1] is not None:
            import faulthandler

            faulthandler.enable()  # a watchdog kills by SIGABRT: the journal gets the stack
    supervisor = Supervisor(
        settings,
        spare,
        on_ready=greet,
        on_finish=report,
        spokesman=spokesman,
        terminal=log.draw if for_eyes and takes_lines_back(sys.stderr, os.environ) else None,
    )
    code = supervisor.run()
    log.flush(LAST_LINES)
    raise click.exceptions.Exit(code)


@main.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(config: Path, *, as_json: bool) -> None:
    """Show the fleet at a glance."""
    from supervisor.protocol import GetStatus

    with _client(config) as client, _shown("asking the supervisor"):
        answer = client.ask(GetStatus()).data
    if as_json:
        import json

        _say(json.dumps(answer))
    else:
        from supervisor.report import status_table

        _say(status_table(answer))


@main.command()
@_config
def top(config: Path) -> None:
    """Show the fleet live; look into workers, and restart them.

    It needs a terminal, and the extra `top` of the package. It polls once a second.
    """
    from supervisor.top import show

    code, farewell = show(_connector(config))
    if farewell:
        _remark(f"supervisor: {farewell}")
    raise click.exceptions.Exit(code)


@main.command()
@_config
@click.option("--follow", is_flag=True, help="Go on until the supervisor has stopped.")
def events(config: Path, *, follow: bool) -> None:
    """Print the life-cycle events as JSON lines."""
    import json

    with _client(config) as client:
        for event, missed in client.events(follow=follow):
            if missed:
                _remark(f"supervisor: {missed} older events have been dropped")
            _say(json.dumps(event))


@main.command()
@_config
@click.argument("worker", metavar="WORKER", **_completes(workers=True))
def why(config: Path, worker: str) -> None:
    """Tell the story of a WORKER, also of one that is gone, from its spawn to its end."""
    from supervisor.story import tell

    with _client(config) as client:
        told = tell(worker, (event for event, _ in client.events(follow=False)))
    if told is None:
        raise UsageError(f"no event names {worker!r}; the last 10,000 events are kept")
    _say(told)


@main.command()
@_config
@click.option("--grace", metavar="D", help='Another grace than the configured one, as "10s".')
@click.option("--now", is_flag=True, help="At once: SIGKILL after at most a second.")
def stop(config: Path, grace: str | None, *, now: bool) -> None:
    """Stop the supervisor as SIGTERM does, and return when it has gone."""
    from supervisor.config.values import duration
    from supervisor.farewell import show
    from supervisor.protocol import Stop

    if grace is not None and now:
        raise click.UsageError("--grace and --now exclude each other")
    seconds = None
    if grace is not None:
        try:
            seconds = duration()(grace)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--grace") from exc
    with _client(config) as client:
        stopping = client.ask(Stop(seconds, now))
        left = max(0.0, stopping.deadline - time.monotonic())
        if sys.stderr.isatty():
            show(client, stopping, sys.stderr)
        if not client.wait_until_gone(stopping.deadline + STOP_MARGIN):
            raise SupervisorError(
                f"the supervisor (pid {stopping.pid}) is still there, {STOP_MARGIN:g} s after "
                f"the end of its {left:.3g} s of grace"
            )


@main.command()
@_config
@_wait
def reload(config: Path, *, wait: bool) -> None:
    """Re-read FILE and the code, and replace all workers one by one, as SIGHUP does."""
    from supervisor.protocol import Reload

    _roll(config, Reload(), "reload", wait=wait)


@main.command()
@_config
@_wait
@click.argument("target", metavar="GROUP|WORKER", **_completes(groups=True, workers=True))
def restart(config: Path, target: str, *, wait: bool) -> None:
    """Replace the workers of GROUP, or one WORKER, the replacement first."""
    from supervisor.protocol import Restart

    _roll(config, Restart(target), "restart", wait=wait)


@main.command()
@_config
@_wait
@click.argument("size", metavar="GROUP=N", **_completes(groups=True, workers=False, suffix="="))
def scale(config: Path, size: str, *, wait: bool) -> None:
    """Have N workers in GROUP, until the next reload."""
    from supervisor.config.values import MAX_COUNT
    from supervisor.protocol import Scale

    group, _, count = size.rpartition("=")
    if not group or not count.isdecimal():
        raise click.BadParameter(f"{size!r} is not GROUP=N", param_hint="GROUP=N")
    if len(count) > MAX_DIGITS or int(count) > MAX_COUNT:
        raise click.BadParameter(f"a group has 0 to {MAX_COUNT} workers", param_hint="GROUP=N")
    _roll(config, Scale(group, int(count)), "scale", wait=wait)


def _check_connections(settings: Settings, config: Path) -> None:
    """Show what each server allows; what cannot fit is a wrong configuration."""
    from supervisor.connections import check_connections, misfits
    from supervisor.report import connections_table

    with _shown(f"asking {counted(len(settings.pools), 'server')}"):
        checks = check_connections(settings)
    _say(connections_table(checks))
    problems = misfits(settings, checks)
    unreached = [f"{config}: pools.{each.pool}: {each.error}" for each in checks if each.error]
    if problems:
        for line in unreached:
            _remark(f"supervisor: {line}")
        raise ConfigError(str(config), problems)
    if unreached:
        raise SupervisorError("\n".join(unreached))


@main.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.argument("worker", metavar="WORKER", **_completes(workers=True))
def dump(config: Path, worker: str, *, as_json: bool) -> None:
    """Show what WORKER is doing, also when it hangs.

    The stack of every thread and asyncio task, the jobs in flight, and what it has borrowed from
    which pool. What needs its help and cannot be had is named, with the reason.
    """
    from supervisor.protocol import Dump

    with _client(config) as client, _shown(f"looking into {worker}"):
        answer = client.ask(Dump(worker)).data
    if as_json:
        import json

        _say(json.dumps(answer))
    else:
        from supervisor.report import dump_text

        _say(dump_text(answer))


# --- small things --------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Print to standard output. A reader who has seen enough ends the command, and is no error."""
    from supervisor.plain import harmless

    try:
        click.echo(harmless(text, lines=True))
    except OSError as exc:
        error = unwritable(exc)
        if isinstance(exc, BrokenPipeError):
            raise click.exceptions.Exit(0) from exc
        raise error from exc


@contextlib.contextmanager
def _shown(what: str) -> Iterator[None]:
    """Show in a terminal what is waited for, where that takes longer than a second."""
    from supervisor.plain import takes_lines_back

    if not takes_lines_back(sys.stderr, os.environ):
        yield
        return
    from supervisor.progress import while_waiting

    with while_waiting(what, sys.stderr):
        yield


def _remark(text: str, level: str = "info") -> None:
    """Print to standard error, where somebody may be listening."""
    if systemd.is_journal(2, os.environ):
        text = systemd.prioritized(text, level)
    from supervisor.plain import harmless

    with contextlib.suppress(OSError):
        click.echo(harmless(text, lines=True), err=True)


def _roll(config: Path, request: FromClient, kind: str, *, wait: bool) -> None:
    """Ask for a roll; with `wait` show how far it is, and fail when it does."""
    from supervisor.rolling import follow

    with _client(config) as client:
        with _shown(f"asking for the {kind}"):
            accepted = client.ask(request)
        if wait:
            _say(follow(client, kind, accepted, sys.stderr))


def _load(config: Path) -> Settings:
    from supervisor.config import load

    return load(config, env=os.environ, uid=os.geteuid())


def _warn(settings: Settings, config: Path) -> None:
    for warning in settings.warnings:
        _remark(f"supervisor: {config}: warning: {warning}", "warning")


def _warn_of_unit(settings: Settings) -> None:
    """Say so when systemd waits less long for the end of a stop than a stop may take."""
    from supervisor.core.standing import STOP_SLACK
    from supervisor.unit import stop_timeout, unit_of

    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            unit = unit_of(file.read())
    except OSError:
        return
    timeout = stop_timeout(unit) if unit else None
    needed = settings.supervisor.grace + STOP_SLACK
    if timeout is not None and timeout < needed:
        _remark(
            f"supervisor: warning: TimeoutStopSec of {unit} is {timeout:g} s, and a stop may take "
            f"{needed:g} s: supervisor.grace, and {STOP_SLACK:g} s for who must be killed then; "
            f"set TimeoutStopSec={math.ceil(needed)} in the unit",
            "warning",
        )


def _client(config: Path) -> Client:
    return _connector(config)()


def _connector(config: Path) -> Callable[[], Client]:
    """Return what connects to the supervisor of that configuration, as often as it is called."""
    from supervisor.client import Client
    from supervisor.config import locate

    name, runtime_dir = locate(config, env=os.environ, uid=os.geteuid())
    return partial(Client, Path(runtime_dir), name)


def _greeting(settings: Settings, config: Path, seconds: float) -> str:
    """Say what to try next, with commands that can be copied."""
    import shlex

    from supervisor.assignments import JOBS

    workers = sum(group.count for group in settings.groups.values() if not group.before)
    file, at = shlex.quote(str(config)), _folder_to_name()
    try_next: list[tuple[str, str]] = [
        (f"{at}supervisor status -c {file}", "the fleet at a glance"),
        (f"{at}supervisor events --follow -c {file}", "what happens, as JSON lines"),
    ]
    if any(group.run == JOBS for group in settings.groups.values()):
        try_next.append(
            (
                f'find "$PWD" -name "*.py" | {at}python -m workers.jobs add -c {file}',
                "files to hash",
            )
        )
        try_next.append((f"{at}python -m workers.jobs counts -c {file}", "how far it is"))
    width = max(len(command) for command, _ in try_next)
    lines = [f"  {command:{width}}   # {what}" for command, what in try_next]
    are_ready = f"{counted(workers, 'worker')} in {seconds:.1f} s"
    return "\n".join(
        [
            "",
            f"{settings.supervisor.name} is ready: {are_ready}. Ctrl-C stops it.",
            "In another terminal:",
            *lines,
            "",
        ]
    )


def _folder_to_name() -> str:
    """Return the folder of our commands with a slash, "" where PATH has it, as `make run` does not."""
    import shlex

    ours = Path(sys.executable).parent
    homes = (Path(folder) for folder in os.get_exec_path())
    first = next((home for home in homes if (home / "supervisor").exists()), None)
    if first == ours or not (ours / "supervisor").exists():
        return ""
    near = os.path.relpath(ours)
    return shlex.quote(f"{ours if near.startswith('..') else near}/")
