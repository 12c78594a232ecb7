"""A worker's own metrics: counters, gauges and histograms that `/metrics` shows for its group.

    seen = worker.metrics.counter("orders_seen", "Orders that were looked at.", labels=["region"])
    seen.labels("north").inc()

The names of the methods are those of prometheus_client. Nothing is written or sent until somebody
scrapes; then the supervisor adds up what the workers of a group have. What a worker had counted is
kept when it ends. What is declared here is bounded: names and labels are checked, and of a metric
with more series than MAX_SERIES the rest are one, whose labels all say "other".
"""

from __future__ import annotations

__all__ = ["Counter", "Family", "Gauge", "Histogram", "Metrics"]

import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Generic, Literal, TypeVar, overload

from supervisor.protocol import JOB_SECONDS, OTHER, Metric

# A report of all that is allowed here stays below the largest message of the wire.
MAX_METRICS = 50  # of one worker
MAX_SERIES = 100  # of one metric
MAX_SERIES_IN_ALL = 500  # of one worker
MAX_LABELS = 5
MAX_LABEL = 60  # characters of a label's value; what is longer is cut
MAX_HELP = 300
MAX_BUCKETS = 30

_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]{0,99}")
_OURS = ("supervisor_", "db_client_", "process_", "python_")
# These would collide with the series of another metric, or have a meaning of their own.
_SUFFIXES = ("_total", "_bucket", "_count", "_sum", "_created", "_info", "_gcount", "_gsum")


class _Series:
    """The figures of one set of label values. Any thread."""

    __slots__ = ("_lock", "figures")

    def __init__(self, lock: threading.Lock, size: int = 1) -> None:
        self._lock = lock
        self.figures = [0.0] * size


class Counter(_Series):
    """What only grows."""

    __slots__ = ()

    def inc(self, amount: float = 1) -> None:
        """Add to it.

        Raises:
            ValueError: the amount is negative or no number.
        """
        if not 0 <= amount < inf:
            raise ValueError(f"a counter grows by 0 or more, not by {amount!r}")
        with self._lock:
            self.figures[0] += amount


class Gauge(_Series):
    """What goes up and down. `/metrics` shows the sum over the living workers of a group."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Let it be this.

        Raises:
            ValueError: it is no finite number.
        """
        self.figures[0] = _finite(value)

    def inc(self, amount: float = 1) -> None:
        """Add to it; raises what `set` raises."""
        with self._lock:
            self.figures[0] += _finite(amount)

    def dec(self, amount: float = 1) -> None:
        """Take from it; raises what `set` raises."""
        self.inc(-amount)


class Histogram(_Series):
    """How often something was how large, by buckets."""

    __slots__ = ("_bounds",)

    def __init__(self, lock: threading.Lock, bounds: tuple[float, ...]) -> None:
        super().__init__(lock, len(bounds) + 2)
        self._bounds = bounds

    def observe(self, value: float) -> None:
        """Count one value.

        Raises:
            ValueError: it is no finite number.
        """
        if not -inf < value < inf:
            raise ValueError(f"{value!r} is no finite number")
        index = bisect_left(self._bounds, value)
        figures = self.figures
        with self._lock:
            figures[index] += 1
            figures[-1] += value


_S = TypeVar("_S", bound=_Series)


@dataclass(frozen=True, slots=True)
class _Words:
    """How a metric was declared."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...] = ()


class Family(Generic[_S]):
    """A metric with labels: one series for each combination of their values. Any thread."""

    def __init__(
        self, words: _Words, make: Callable[[threading.Lock], _S], registry: Metrics
    ) -> None:
        self.words = words
        self._make = make
        self._registry = registry
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], _S] = {}

    def labels(self, *values: object, **by_name: object) -> _S:
        """Return the series with these values, all by position or all by name.

        Keep what it returns where it is used often.

        Raises:
            ValueError: these are not exactly the labels that were declared.
        """
        try:
            known = self._series.get(values)  # type: ignore[arg-type]  # texts are found as they are
        except TypeError:  # a value that has no hash
            known = None
        if known is not None and not by_name:
            return known
        names = self.words.labels
        if by_name and not values and by_name.keys() == set(names):
            values = tuple(by_name[name] for name in names)
        elif by_name or len(values) != len(names):
            raise ValueError(f"metric {self.words.name!r} has the labels {list(names)}")
        key = tuple(_sendable(str(value))[:MAX_LABEL] for value in values)
        found = self._series.get(key)
        return found if found is not None else self._add(key)

    def _add(self, key: tuple[str, ...]) -> _S:
        with self._lock:
            if key not in self._series and not self._registry.has_room(
                self.words.name, len(self._series)
            ):
                key = (OTHER,) * len(key)
            if key not in self._series:
                self._series[key] = self._make(self._lock)
            return self._series[key]

    def collect(self) -> Metric:
        """Return the figures as they are now."""
        with self._lock:
            series = tuple((key, tuple(one.figures)) for key, one in self._series.items())
        words = self.words
        return Metric(
            name=words.name,
            kind=words.kind,
            help=words.help,
            labels=words.labels,
            bounds=words.bounds,
            series=series,
        )


class Metrics:
    """What a worker has declared. Any thread.

    Declaring a metric again in the same words returns the one that there is.
    """

    def __init__(self, log: Any) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._families: dict[str, Family[Any]] = {}
        self._has_warned: set[str] = set()
        self._size = 0  # series in all; written under the lock

    @overload
    def counter(self, name: str, help: str) -> Counter: ...
    @overload
    def counter(self, name: str, help: str, labels: Iterable[str]) -> Family[Counter]: ...
    def counter(
        self,
        name: str,
        help: str,  # noqa: A002  # the format's own word
        labels: Iterable[str] = (),
    ) -> Counter | Family[Counter]:
        """Return a `Counter`, or with labels what has one for each combination (`.labels(…)`).

        Args:
            name: as in "orders_seen"; `/metrics` adds "_total", unless it ends so.
            help: one sentence for whoever reads it.
            labels: names of labels. Of each, few values: a customer's number is none.

        Raises:
            ValueError: a name is not allowed, taken by another metric, or one too many.
        """
        words = _words("counter", name.removesuffix("_total"), help, labels)
        return self._declare(words, Counter)

    @overload
    def gauge(self, name: str, help: str) -> Gauge: ...
    @overload
    def gauge(self, name: str, help: str, labels: Iterable[str]) -> Family[Gauge]: ...
    def gauge(
        self,
        name: str,
        help: str,  # noqa: A002
        labels: Iterable[str] = (),
    ) -> Gauge | Family[Gauge]:
        """Return a `Gauge`, or with labels what has one for each combination; as `counter`."""
        return self._declare(_words("gauge", name, help, labels), Gauge)

    @overload
    def histogram(
        self,
        name: str,
        help: str,
        *,
        buckets: Iterable[float] = ...,
    ) -> Histogram: ...
    @overload
    def histogram(
        self,
        name: str,
        help: str,
        labels: Iterable[str],
        buckets: Iterable[float] = ...,
    ) -> Family[Histogram]: ...
    def histogram(
        self,
        name: str,
        help: str,  # noqa: A002
        labels: Iterable[str] = (),
        buckets: Iterable[float] = JOB_SECONDS,
    ) -> Histogram | Family[Histogram]:
        """Return a `Histogram`, or with labels what has one for each combination; as `counter`.

        Args:
            name: as in "parse_seconds".
            help: one sentence for whoever reads it.
            labels: names of labels.
            buckets: upper bounds, rising; one more bucket holds what is above them. The default
                is for seconds, from a millisecond to five minutes.
        """
        bounds = tuple(float(bound) for bound in buckets if bound != inf)
        rises = list(bounds) == sorted(set(bounds)) and all(map(isfinite, bounds))
        if not 1 <= len(bounds) <= MAX_BUCKETS or not rises:
            raise ValueError(f"metric {name!r} needs 1 to {MAX_BUCKETS} buckets, rising")
        words = _words("histogram", name, help, labels, bounds)
        return self._declare(words, lambda lock: Histogram(lock, bounds))

    def _declare(self, words: _Words, make: Callable[[threading.Lock], _S]) -> _S | Family[_S]:
        with self._lock:
            family: Family[_S] | None = self._families.get(words.name)
            if family is None:
                if len(self._families) >= MAX_METRICS:
                    raise ValueError(f"a worker has at most {MAX_METRICS} metrics of its own")
                family = self._families[words.name] = Family(words, make, self)
            elif family.words != words:
                raise ValueError(f"metric {words.name!r} was declared in other words before")
        return family if words.labels else family.labels()

    def has_room(self, name: str, series: int) -> bool:
        """Decide whether a metric that has so many series may have one more."""
        with self._lock:
            if (series < MAX_SERIES and self._size < MAX_SERIES_IN_ALL) or not series:
                self._size += 1
                return True
            is_news = name not in self._has_warned
            self._has_warned.add(name)
        if is_news:
            self._log.warning("metric.crowded", metric=name, most=MAX_SERIES, rest=OTHER)
        return False

    def collect(self) -> tuple[Metric, ...]:
        """Return all figures as they are now."""
        with self._lock:
            families = list(self._families.values())
        return tuple(family.collect() for family in families)


def _words(
    kind: Literal["counter", "gauge", "histogram"],
    name: str,
    help_: str,
    labels: Iterable[str],
    bounds: tuple[float, ...] = (),
) -> _Words:
    """Return how a metric is declared.

    Raises:
        ValueError: a name that is not allowed.
    """
    names = tuple(labels)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a metric: letters, digits and _")
    if name.startswith(_OURS):
        raise ValueError(f"metric {name!r}: {', '.join(_OURS)} are the supervisor's own")
    if name.endswith(_SUFFIXES):
        raise ValueError(f"metric {name!r}: the ending has a meaning of its own, leave it out")
    if len(names) > MAX_LABELS or len(set(names)) < len(names):
        raise ValueError(f"metric {name!r} may have up to {MAX_LABELS} labels, each once")
    for label in names:
        if not _NAME.fullmatch(label) or label.startswith("__") or label in {"group", "le"}:
            raise ValueError(f"metric {name!r}: a label cannot be called {label!r}")
    return _Words(kind, name, _sendable(help_)[:MAX_HELP], names, bounds)


def _finite(value: float) -> float:
    if not isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def _sendable(text: str) -> str:
    """Return text that is valid UTF-8."""
    return text.encode(errors="backslashreplace").decode()
