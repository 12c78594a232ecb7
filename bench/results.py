"""What is made of samples: medians, ratios, verdicts, a table for eyes, JSON for programs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prettytable import HRuleStyle, PrettyTable

from bench.contenders import FLOOR, OURS
from bench.fleet import ContenderError


@dataclass(frozen=True)
class Figure:
    """A row of the table. Its samples are in seconds, bytes or per second, shown times `scale`.

    The bound is a factor on the floor's median or, with `of_floor` off, a number of `unit`s.
    """

    name: str
    title: str
    unit: str
    scale: float
    bound: float
    of_floor: bool = True


@dataclass
class Results:
    """What was measured so far, and what went wrong. Infinite: not within the deadline."""

    contenders: Sequence[str]
    figures: Sequence[Figure]
    failures: list[str] = field(default_factory=list)
    _samples: dict[tuple[Figure, str], list[float]] = field(default_factory=dict)

    def add(self, figure: Figure, contender: str, sample: float) -> None:
        if figure in self.figures:
            self._samples.setdefault((figure, contender), []).append(sample)

    def collect(self, contender: str, samples: Iterable[tuple[Figure, float]]) -> bool:
        """Keep all samples up to the first failure, and the failure; say whether all went well."""
        try:
            for figure, sample in samples:
                self.add(figure, contender, sample)
        except ContenderError as error:
            self.failures.append(str(error))
            return False
        return True

    def samples(self, figure: Figure, contender: str) -> list[float]:
        return self._samples.get((figure, contender), [])

    def median(self, figure: Figure, contender: str) -> float | None:
        samples = self.samples(figure, contender)
        return statistics.median(samples) if samples else None

    def bound(self, figure: Figure) -> float | None:
        """The bound in the unit of the samples; None when the floor it needs was not measured."""
        if not figure.of_floor:
            return figure.bound / figure.scale
        floor = self.median(figure, FLOOR)
        return None if floor is None else figure.bound * floor

    def verdict(self, figure: Figure) -> str | None:
        ours, bound = self.median(figure, OURS), self.bound(figure)
        if ours is None or bound is None:
            return None
        return "ok" if ours <= bound else "MISS"

    def best_peer(self, figure: Figure) -> float | None:
        medians = [
            self.median(figure, name) for name in self.contenders if name not in (FLOOR, OURS)
        ]
        return min((median for median in medians if median is not None), default=None)

    def table(self) -> str:
        """The figures for eyes: median, and under it least-greatest (n)."""
        peers = [name for name in self.contenders if name not in (FLOOR, OURS)]
        table = PrettyTable(
            ["figure", FLOOR, OURS, "/ floor", "/ best", "must be", "", *peers],
            hrules=HRuleStyle.ALL,
        )
        table.align = "r"
        table.align["figure"] = "l"
        for figure in self.figures:
            ours = self.median(figure, OURS)
            table.add_row(
                [
                    figure.title,
                    self._cell(figure, FLOOR),
                    self._cell(figure, OURS),
                    _ratio(ours, self.median(figure, FLOOR)),
                    _ratio(ours, self.best_peer(figure)),
                    f"≤ {figure.bound:g} {'x floor' if figure.of_floor else figure.unit}",
                    self.verdict(figure) or "",
                    *(self._cell(figure, name) for name in peers),
                ]
            )
        return table.get_string()

    def _cell(self, figure: Figure, contender: str) -> str:
        samples = [sample * figure.scale for sample in self.samples(figure, contender)]
        if not samples:
            return "-"
        median = statistics.median(samples)
        if math.isinf(median):
            return f"not in time\n({len(samples)})"
        return (
            f"{_number(median)} {figure.unit}\n"
            f"{_number(min(samples))}-{_number(max(samples))} ({len(samples)})"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for programs, in seconds, bytes and per second; null: not in time."""
        return {
            "failures": self.failures,
            "figures": {
                figure.name: {
                    "title": figure.title.replace("\n", " "),
                    "bound": self.bound(figure),
                    "verdict": self.verdict(figure),
                    "samples": {
                        name: [None if math.isinf(sample) else sample for sample in samples]
                        for name in self.contenders
                        if (samples := self.samples(figure, name))
                    },
                }
                for figure in self.figures
            },
        }


def _number(value: float) -> str:
    """Three digits that mean something, never an exponent."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _ratio(ours: float | None, other: float | None) -> str:
    return f"{ours / other:.2f}" if ours is not None and other else ""
