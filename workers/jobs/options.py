"""The options of a `workers.jobs` group, read and held against what they may be."""

from __future__ import annotations

__all__ = ["Handler", "Job", "Options", "OptionsError", "find_handler"]

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from workers.context import Context
from workers.worker import Job as WorkerJob


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at one job, as a handler sees it.

    Attributes:
        id: the job's number; the same in each attempt.
        payload: what was added.
        attempts: how often it has been started, this time included.
        ctx: ends when the job is out of time: when the worker has to stop, or when the job has been
            taken over by another worker. A handler that takes long looks at it now and then.
    """

    id: int
    payload: str
    attempts: int
    ctx: Context
    unit: WorkerJob | None = field(default=None, repr=False, compare=False)  # what is watched

    def busy_until(self, limit: float | Context) -> None:
        """Declare that this handler is going to be busy for a while; see `Worker.busy_until`.

        For a group with a `hang_timeout`: that is how long an attempt may take unless it says so.

        Args:
            limit: seconds from now, or a context: until its deadline.

        Raises:
            ValueError: the seconds are negative or not finite, or the context has no deadline.
        """
        if self.unit is not None:
            self.unit.busy_until(limit)


Handler = Callable[[Job, Any], Any]


class OptionsError(ValueError):
    """The group's `options` are wrong: one sentence that names the option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `[workers.NAME.options]` may hold. Durations are in seconds here, strings there.

    Attributes:
        handler: `module:function`, called with a Job and a connection.
        threads: how many jobs one worker process runs at once.
        max_attempts: how often a handler may raise before its job is kept as failed.
        lease: how long a job stays with a worker that nobody hears of any more.
        poll: how often a worker without work looks for some, at most.
    """

    handler: str
    threads: int = 1
    max_attempts: int = 5
    lease: float = 60.0
    poll: float = 1.0

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Self:
        """Return the options as they are meant.

        Raises:
            OptionsError: one is unknown, missing, or not of its kind.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise OptionsError(f"options.{name}: unknown option; {_hint(name, known)}")
        if not isinstance(options.get("handler"), str):
            raise OptionsError('options.handler: name the function, as in "myapp.tasks:handle"')
        return cls(
            handler=options["handler"],
            threads=_number("threads", options.get("threads", 1)),
            max_attempts=_number("max_attempts", options.get("max_attempts", 5)),
            lease=_seconds("lease", options.get("lease", 60)),
            poll=_seconds("poll", options.get("poll", 1)),
        )


def find_handler(name: str) -> Handler:
    """Import the function that `module:function` names.

    Raises:
        OptionsError: there is none, or it can't be called with a job and a connection.
    """
    module, _, path = name.partition(":")
    if not module or not path:
        raise OptionsError(f'options.handler: "{name}" is not of the form "module:function"')
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as exc:
        raise OptionsError(f'options.handler: "{name}" can\'t be imported: {exc}') from exc
    if not callable(found):
        raise OptionsError(f'options.handler: "{name}" is a {type(found).__name__}, no function')
    if inspect.iscoroutinefunction(found):
        raise OptionsError(f'options.handler: "{name}" is async; a handler is a plain function')
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as exc:
        raise OptionsError(f'options.handler: "{name}" is called with (job, conn): {exc}') from exc
    except ValueError:
        pass  # a function of C code may have no signature to look at
    return found  # type: ignore[no-any-return]


def _hint(name: str, known: list[str]) -> str:
    from difflib import get_close_matches  # for those who need it only

    near = get_close_matches(name, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"there are {', '.join(known)}"


def _number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionsError(f"options.{name}: a whole number from 1 on is wanted, not {value!r}")
    return value


_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?")
_UNITS = (3600.0, 60.0, 1.0, 0.001)


def _seconds(name: str, value: Any) -> float:
    """Read a duration as the configuration has them; workers cannot import its reader."""
    if isinstance(value, str) and value and (match := _DURATION.fullmatch(value)):
        counts = zip(match.groups(default="0"), _UNITS, strict=True)
        seconds = sum(float(count) * unit for count, unit in counts)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise OptionsError(f'options.{name}: a duration as "30s" is wanted, not {value!r}')
    if not 0 < seconds < math.inf:  # nor is it nan
        raise OptionsError(f"options.{name}: {value!r} is out of range")
    return seconds
