"""What templates, workers and the core are told of the configuration. Pure: settings in, words out."""

from __future__ import annotations

__all__ = [
    "allowances_wanted",
    "assignment",
    "budgeted",
    "group_specs",
    "recipe",
    "terminable",
    "tune",
]

import signal
from collections.abc import Iterable, Mapping
from typing import Any

from supervisor import protocol
from supervisor.commands import COMMAND_RUN, command_options
from supervisor.config import GroupSettings, PoolSettings, Settings
from supervisor.core.budget import Tell
from supervisor.core.fleet import GroupSpec
from supervisor.processes import Recipe

JOBS = "workers.jobs:run"  # what counts in its table how often a job has ended its worker
SERVER = "workers.web:serve"  # what runs an application


def recipe(settings: Settings, group: GroupSettings, generation: int) -> Recipe:
    """Return what a group's template imports; groups of equal `env` and user share one.

    All commands of a user share one of their own: no import of an application is in their way, or changes the
    environment that they get.
    """
    is_command = bool(group.command)
    sharing = [
        other
        for other in settings.groups.values()
        if bool(other.command) == is_command
        and other.identity == group.identity
        and (is_command or other.env == group.env)
    ]
    pools = {name for other in sharing for name in other.pools}
    return Recipe(
        name=settings.supervisor.name,
        generation=generation,
        path=() if is_command else settings.supervisor.path,
        env=() if is_command else tuple(sorted(group.env.items())),
        entry_points=tuple(
            dict.fromkeys(entry for other in sharing for entry in _entry_points(other))
        ),
        schemes=tuple(sorted({settings.pools[name].url.partition(":")[0] for name in pools})),
        grace=settings.supervisor.grace,
        log_format=settings.log.format,
        log_level=settings.log.level,
        identity=group.identity,
    )


def _entry_points(group: GroupSettings) -> list[str]:
    """Return what a group's workers import: their code, and the handler where that is an option."""
    if group.command:
        return [COMMAND_RUN]
    if group.app:
        return [group.app, SERVER]
    handler = group.options.get("handler")
    return [group.run, handler] if isinstance(handler, str) and ":" in handler else [group.run]


def group_specs(settings: Settings) -> tuple[GroupSpec, ...]:
    """Return what the core has to know of the groups."""
    return tuple(_group_spec(name, group) for name, group in settings.groups.items())


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
        max_rss=group.max_rss,
        hang_timeout=group.hang_timeout,
        stop_signal=int(signal.Signals[group.stop_signal]),
        is_program=bool(group.command),
        answers_for_jobs=_answers_for_jobs(group),
        before=group.before,
    )


def _answers_for_jobs(group: GroupSettings) -> bool:
    return group.run == JOBS


def allowances_wanted(settings: Settings, group: str) -> dict[str, int]:
    """Return the pools of a group's workers that have a budget, with what a worker can use."""
    return {
        name: pool.max_open
        for name, pool in settings.pools_of(group).items()
        if pool.budget is not None
    }


def terminable(settings: Settings, group: str) -> frozenset[str]:
    """Return the pools of a group whose servers end sessions by their application name."""
    return frozenset(
        name
        for name, pool in settings.pools_of(group).items()
        if pool.budget is not None and pool.url.startswith("postgresql:")
    )


def budgeted(settings: Settings, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return `max_open` and budget of those of these pools that have one."""
    pools = ((name, settings.pools[name]) for name in names)
    return {name: (pool.max_open, pool.budget) for name, pool in pools if pool.budget is not None}


def assignment(
    settings: Settings,
    worker: str,
    group: str,
    generation: int,
    *,
    token: str,
    endpoint: str,
    allowances: Mapping[str, Tell],
    deaths: tuple[protocol.Death, ...] = (),
) -> protocol.Assignment:
    """Return all that one new worker is told; `allowances` are its first ones, by pool."""
    rules = settings.groups[group]
    return protocol.Assignment(
        worker=worker,
        group=group,
        generation=generation,
        token=token,
        supervisor=settings.supervisor.name,
        endpoint=endpoint,
        run=COMMAND_RUN if rules.command else rules.run,
        grace=settings.supervisor.grace,
        abort_margin=settings.supervisor.abort_margin,
        log_format=settings.log.format,
        log_level=settings.log.level,
        is_watched=rules.hang_timeout > 0.0 or _answers_for_jobs(rules),
        deaths=deaths,
        options=command_options(settings, rules) if rules.command else rules.options,
        pools={name: _pool(settings, name, allowances.get(name)) for name in rules.pools},
        app=rules.app,
        sockets=rules.sockets,
        figures=bool(settings.supervisor.listen),
    )


def tune(settings: Settings, group: str, number: int) -> protocol.Tune:
    """Return what a group's running workers are told of settings that they can take."""
    return protocol.Tune(
        number=number,
        grace=settings.supervisor.grace,
        abort_margin=settings.supervisor.abort_margin,
        log_format=settings.log.format,
        log_level=settings.log.level,
        pools={
            name: protocol.PoolLimits(**_limits(pool))
            for name, pool in settings.pools_of(group).items()
        },
    )


def _limits(pool: PoolSettings) -> dict[str, Any]:
    return {name: getattr(pool, name) for name in protocol.PoolLimits.__struct_fields__}


def _pool(settings: Settings, name: str, first: Tell | None) -> protocol.PoolSettings:
    pool = settings.pools[name]
    return protocol.PoolSettings(
        url=pool.url,
        blocking=pool.blocking,
        **_limits(pool),
        allowance=None if first is None else first.allowance,
        serial=0 if first is None else first.serial,
    )
