"""The settings of a pool, checked in one place. Pure. All durations are seconds."""

from __future__ import annotations

__all__ = ["Settings"]

from dataclasses import dataclass, replace
from math import inf

# A lifetime ends anywhere in its last fifth: connections that were born together (a start, a
# fail-over) must not die together, or the server sees the herd again every half hour.
LIFETIME_JITTER = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an operator may set. A duration of 0 switches off what it limits, where noted."""

    max_open: int = 10
    """Never more physical connections than this: open, being opened or being closed."""
    max_idle: int | None = None
    """Kept when nobody needs them; None follows `max_open`."""
    min: int = 0
    """Kept open also when idle; opened in the background from the start."""
    max_lifetime: float = 1800.0
    """A connection is replaced when it gets this old, or up to a fifth earlier. 0: never."""
    max_idle_time: float = 600.0
    """An idle connection above `min` is closed after this. 0: never."""
    acquire_timeout: float = 3.0
    """How long an acquire waits, dial included, unless it says otherwise."""
    leak_threshold: float = 5.0
    """A loan longer than this is reported, once. 0: off."""
    connect_timeout: float = 5.0
    """How long one dial may take. It may outlive its asker: the next one gets the connection."""
    max_connecting: int = 2
    """Dials in flight at once."""
    validate_after_idle: float = 1.0
    """A connection that was idle longer than this is tried before it is lent. 0: always."""
    keepalive: float = 0.0
    """An idle connection is tried this often. 0: never."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: names the setting and what it would have to be.
        """
        for name in ("max_open", "max_connecting"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("max_idle", "min"):
            value = getattr(self, name)
            if value is None and name == "max_idle":
                continue
            if not isinstance(value, int) or not 0 <= value <= self.max_open:
                raise ValueError(
                    f"{name} must be between 0 and max_open ({self.max_open}), not {value!r}"
                )
        for name in (
            "max_lifetime",
            "max_idle_time",
            "acquire_timeout",
            "leak_threshold",
            "validate_after_idle",
            "keepalive",
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name} must be a number of seconds, 0 or more, not {value!r}")
        if not isinstance(self.connect_timeout, int | float) or not 0 < self.connect_timeout < inf:
            raise ValueError(
                f"connect_timeout must be a number of seconds above 0, not {self.connect_timeout!r}"
            )

    def changed(self, **changes: float | None) -> Settings:
        """Return a copy with these settings changed; None leaves one as it is.

        A `max_idle` or `min` above a lowered `max_open` follows it down, unless given here.
        """
        wanted: dict[str, float] = {k: v for k, v in changes.items() if v is not None}
        ceiling = wanted.get("max_open", self.max_open)
        if "max_idle" not in wanted and self.max_idle is not None and self.max_idle > ceiling:
            wanted["max_idle"] = ceiling
        if "min" not in wanted and self.min > ceiling:
            wanted["min"] = ceiling
        return replace(self, **wanted)  # type: ignore[arg-type]  # checked by __post_init__
