"""Metrics as Prometheus reads them, its text format or OpenMetrics. The one that knows its library.

It is imported when somebody listens, and by nobody else: it costs 60 ms and megabytes.
"""

from __future__ import annotations

__all__ = ["exposition"]

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import exposition as written
from prometheus_client.core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from supervisor.metrics import Buckets, Family

# Of the supervisor itself, as every exporter tells them; /proc is read at a scrape only.
_PROCESS = ProcessCollector(registry=None)
_OPENMETRICS = "application/openmetrics-text"


def exposition(families: Iterable[Family], media_type: str) -> tuple[bytes, str]:
    """Return the text and its full media type: "application/openmetrics-text", else Prometheus's own format.

    The families of the supervisor's own process (`process_cpu_seconds_total` and so on) come last.
    """
    accept = f"{_OPENMETRICS}; version=1.0.0" if media_type == _OPENMETRICS else ""
    encode, media_type = written.choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(families))
    registry.register(_PROCESS)
    return encode(registry), media_type


class _Once(Collector):
    """Families that have been worked out, for a registry that asks for them."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: names are checked where they are made."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Return them in the library's own words."""
        for family in self._families:
            name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
            metric = Metric(name, family.help, family.kind)
            for values, figure in sorted(family.series.items()):
                labels = dict(zip(family.labels, values, strict=True))
                if isinstance(figure, Buckets):
                    _histogram(metric, labels, figure)
                else:
                    metric.add_sample(family.name, labels, figure)
            yield metric


def _histogram(metric: Metric, labels: dict[str, str], buckets: Buckets) -> None:
    bounds = [*buckets.bounds, float("inf")]
    total = 0.0
    for bound, total in zip(bounds, accumulate(buckets.counts), strict=True):
        le = floatToGoString(bound)  # type: ignore[no-untyped-call]
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": le}, total)
    metric.add_sample(f"{metric.name}_count", labels, total)
    metric.add_sample(f"{metric.name}_sum", labels, buckets.sum)
