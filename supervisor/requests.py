"""What the command line may ask for: why a request names what does not exist, or means nothing."""

from __future__ import annotations

__all__ = ["restart_refusal", "scale_refusal", "stop_refusal", "unknown_worker"]

from supervisor import protocol
from supervisor.config import Settings
from supervisor.config.values import LONGEST, MAX_COUNT
from supervisor.core.fleet import FleetSnapshot


def stop_refusal(request: protocol.Stop) -> str:
    """Return why this cannot be a stop; "" when it can."""
    if request.grace is None or 0.0 <= request.grace <= LONGEST:
        return ""
    return f"a grace of {request.grace} s cannot be meant"


def restart_refusal(target: str, fleet: FleetSnapshot, settings: Settings) -> str:
    """Return why `target` cannot be restarted; "" when it can."""
    known = {group.name for group in fleet.groups} | {worker.id for worker in fleet.workers}
    if target not in known:
        return f"there is no group or worker named {target!r}"
    if target in settings.groups and settings.groups[target].before:
        return f"{target} runs once, before the others; a reload runs it again"
    return ""


def scale_refusal(request: protocol.Scale, fleet: FleetSnapshot, settings: Settings) -> str:
    """Return why a group cannot have so many workers; "" when it can, as far as it alone goes."""
    if request.group not in {group.name for group in fleet.groups}:
        return f"there is no group named {request.group!r}"
    group = settings.groups.get(request.group)
    if group is not None and group.before:
        return f"{request.group} runs once, before the others"
    if not 0 <= request.count <= MAX_COUNT:
        return f"a group has 0 to {MAX_COUNT} workers"
    return ""


def unknown_worker(name: str, fleet: FleetSnapshot, *, was_there: bool = False) -> str:
    """Return that there is no such worker, and which there are where a group was named."""
    if was_there:
        return f"{name} has gone; `supervisor why {name}` tells how it ended"
    workers = [worker.id for worker in fleet.workers if worker.group == name]
    hint = f"; {name!r} is a group: name one of {', '.join(workers)}" if workers else ""
    return f"there is no worker named {name!r}{hint}"
