"""What templates, workers and the core are told of the configuration. Pure: settings in, words out."""

from __future__ import annotations

__all__ = ["allowances_wanted", "assignment", "group_specs", "recipe"]

from collections.abc import Mapping

from supervisor import protocol
from supervisor.config import GroupSettings, Settings
from supervisor.core.budget import Tell
from supervisor.core.fleet import GroupSpec
from supervisor.processes import Recipe


def recipe(settings: Settings, group: GroupSettings, generation: int) -> Recipe:
    """Return what a group's template imports; groups of equal `env` and user share one."""
    sharing = [
        other
        for other in settings.groups.values()
        if other.env == group.env and other.identity == group.identity
    ]
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
        identity=group.identity,
    )


def _entry_points(group: GroupSettings) -> list[str]:
    """Return what a group's workers import: their code, and the handler where that is an option."""
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
    )


def allowances_wanted(settings: Settings, group: str) -> dict[str, int]:
    """Return the pools of a group's workers that have a budget, with what a worker can use."""
    return {
        name: pool.max_open
        for name, pool in settings.pools_of(group).items()
        if pool.budget is not None
    }


def assignment(
    settings: Settings,
    worker: str,
    group: str,
    generation: int,
    *,
    token: str,
    endpoint: str,
    allowances: Mapping[str, Tell],
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
        run=rules.run,
        grace=settings.supervisor.grace,
        abort_margin=settings.supervisor.abort_margin,
        options=rules.options,
        pools={name: _pool(settings, name, allowances.get(name)) for name in rules.pools},
    )


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
