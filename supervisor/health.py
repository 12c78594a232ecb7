"""What `/readyz` answers: whether the fleet serves, and if not, why. Pure."""

from __future__ import annotations

__all__ = ["readiness"]

from collections.abc import Sequence
from typing import Any

from supervisor.core.snapshot import FleetSnapshot, GroupSnapshot


def readiness(fleet: FleetSnapshot) -> tuple[bool, dict[str, Any]]:
    """Return whether every group has its count ready, and the answer that says so.

    A worker that has ended as it should, and is not to be replaced, counts as ready here: it has
    done what it was for.
    """
    first = [group.name for group in fleet.groups if group.before and group.count]
    reasons = [reason for group in fleet.groups if (reason := _lack(group, first))]
    if fleet.state == "stopping":
        reasons.insert(0, "the supervisor is stopping")
    elif fleet.state == "starting" and not reasons:
        reasons.append("the supervisor is starting")
    return not reasons, {"state": fleet.state, "reasons": reasons}


def _lack(group: GroupSnapshot, first: Sequence[str]) -> str:
    """Return what a group lacks; `first` are those that others have to wait for."""
    if group.failure:
        return f"group {group.name} has failed: {group.failure}"
    if group.before:
        return ""  # those who wait for it say so
    if group.state == "waiting":
        pool = group.waiting_for and f"a dependency: pool {group.waiting_for.pool}"
        return f"group {group.name} waits for {pool or ', '.join(first)}"
    if group.ready + group.finished < group.count:
        return f"group {group.name}: {group.ready} of {group.count} ready"
    return ""
