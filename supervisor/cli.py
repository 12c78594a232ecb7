"""argv -> one command. The only place that prints an error and exits."""

from __future__ import annotations

__all__ = ["run"]

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from supervisor.errors import ConfigError, SupervisorError

if TYPE_CHECKING:
    from supervisor.client import Client
    from supervisor.config import Settings
    from supervisor.launch import Template

IMPORT_TIMEOUT = 60.0  # seconds for each entry point of `check --import`
STOP_MARGIN = 10.0  # seconds after its deadline in which a supervisor must have gone

_config = click.option(
    "-c",
    "--config",
    "config",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The configuration, a TOML file.",
)


def run(spare: Template | None) -> NoReturn:
    """Run the command that `sys.argv` names. `spare` is a template launched in advance."""
    try:
        main(obj=spare, standalone_mode=False)
        code = 0
    except click.exceptions.Exit as exc:
        code = exc.exit_code
    except click.Abort:
        code = 130
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except SupervisorError as exc:
        code = _complain(exc)
    except BrokenPipeError:  # the reader of our output has gone: nobody to tell
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _flush()
    # Nothing is left to clean up, and finalizing an interpreter takes longer than most commands.
    os._exit(code)


def _complain(exc: SupervisorError) -> int:
    for line in str(exc).splitlines():
        click.echo(f"supervisor: {line}", err=True)
    return exc.exit_code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ackvisor", prog_name="supervisor")
def main() -> None:
    """Run groups of worker processes that use databases.

    Every worker answers, every connection is accounted for, every kill is explained.
    """


@main.command()
@_config
@click.option("--import", "import_", is_flag=True, help="Also import each worker's module.")
def check(config: Path, *, import_: bool) -> None:
    """Read FILE and print every problem at once."""
    from supervisor.imports import check_entry_points, check_imports

    settings = _load(config)
    _warn(settings, config)
    problems = check_entry_points(settings)
    if import_ and not problems:
        problems = check_imports(settings, timeout=IMPORT_TIMEOUT)
    if problems:
        raise ConfigError(str(config), problems)
    workers = sum(group.count for group in settings.groups.values())
    click.echo(
        f"{config}: good. {_count(len(settings.groups), 'group')}, {_count(workers, 'worker')}, "
        f"{_count(len(settings.pools), 'pool')}."
    )


@main.command()
@_config
@click.pass_obj
def start(spare: Template | None, config: Path) -> None:
    """Run in the foreground until stopped (SIGTERM or Ctrl-C; twice: at once)."""
    settings = _load(config)
    _warn(settings, config)
    from supervisor import log
    from supervisor.loop import Supervisor
    from supervisor.report import stop_summary

    log.configure(settings.log.format, settings.log.level)
    for_eyes = settings.log.format == "console"

    def greet() -> None:
        if for_eyes:
            click.echo(_greeting(settings, config), err=True)

    def report(finish: Any) -> None:
        if for_eyes:
            click.echo(stop_summary(finish), err=True)

    supervisor = Supervisor(settings, spare, on_ready=greet, on_finish=report)
    raise click.exceptions.Exit(supervisor.run())


@main.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(config: Path, *, as_json: bool) -> None:
    """Show the fleet at a glance."""
    from supervisor.protocol import GetStatus

    with _client(_load(config)) as client:
        answer = client.ask(GetStatus()).data
    if as_json:
        import json

        click.echo(json.dumps(answer))
    else:
        from supervisor.report import status_table

        click.echo(status_table(answer))


@main.command()
@_config
@click.option("--follow", is_flag=True, help="Go on until the supervisor has stopped.")
def events(config: Path, *, follow: bool) -> None:
    """Print the life-cycle events as JSON lines."""
    import json

    with _client(_load(config)) as client:
        for event, missed in client.events(follow=follow):
            if missed:
                click.echo(f"supervisor: {missed} older events have been dropped", err=True)
            click.echo(json.dumps(event))


@main.command()
@_config
@click.option("--grace", metavar="D", help='Another grace than the configured one, as "10s".')
@click.option("--now", is_flag=True, help="At once: SIGKILL after at most a second.")
def stop(config: Path, grace: str | None, *, now: bool) -> None:
    """Stop the supervisor as SIGTERM does, and return when it has gone."""
    from supervisor.config.values import duration
    from supervisor.protocol import Stop

    if grace is not None and now:
        raise click.UsageError("--grace and --now exclude each other")
    seconds = None
    if grace is not None:
        try:
            seconds = duration()(grace)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--grace") from exc
    with _client(_load(config)) as client:
        stopping = client.ask(Stop(seconds, now))
        left = max(0.0, stopping.deadline - time.monotonic())
        if not client.wait_until_gone(stopping.deadline + STOP_MARGIN):
            raise SupervisorError(
                f"the supervisor (pid {stopping.pid}) is still there, {STOP_MARGIN:g} s after "
                f"the end of its {left:.3g} s of grace"
            )


# --- small things --------------------------------------------------------------------------------


def _load(config: Path) -> Settings:
    from supervisor.config import load

    return load(config, env=os.environ, uid=os.geteuid())


def _warn(settings: Settings, config: Path) -> None:
    for warning in settings.warnings:
        click.echo(f"supervisor: {config}: warning: {warning}", err=True)


def _client(settings: Settings) -> Client:
    from supervisor.client import Client

    return Client(Path(settings.supervisor.runtime_dir), settings.supervisor.name)


def _greeting(settings: Settings, config: Path) -> str:
    """Say what to try next, with commands that can be copied."""
    workers = sum(group.count for group in settings.groups.values())
    try_next: list[tuple[str, str]] = [
        (f"supervisor status -c {config}", "the fleet at a glance"),
        (f"supervisor events --follow -c {config}", "what happens, as JSON lines"),
    ]
    if any(group.run == "workers.jobs:run" for group in settings.groups.values()):
        try_next.append(
            (f'python -m workers.jobs add -c {config} "$PWD"/*', "give it files to hash")
        )
        try_next.append((f"python -m workers.jobs counts -c {config}", "how far it is"))
    width = max(len(command) for command, _ in try_next)
    lines = [f"  {command:{width}}   # {what}" for command, what in try_next]
    return "\n".join(
        [
            "",
            f"{settings.supervisor.name} is ready: {_count(workers, 'worker')}. Ctrl-C stops it.",
            "In another terminal:",
            *lines,
            "",
        ]
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
