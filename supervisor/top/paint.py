"""Colours and weights of the terminal: a tone becomes a style, a cell becomes segments."""

from __future__ import annotations

__all__ = ["THEME", "Tones", "cursor", "fitted", "strip", "text", "tones"]

from collections.abc import Mapping, Sequence

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.strip import Strip
from textual.theme import Theme

from supervisor.top.layout import Cell, Column
from supervisor.top.model import Tone

Tones = Mapping[Tone, Style]

THEME = Theme(
    name="ackvisor",
    primary="#7aa2c4",
    secondary="#56616b",
    accent="#7aa2c4",
    foreground="#c9d1d9",
    background="#0f1316",
    surface="#0f1316",
    panel="#171d22",
    success="#86b58c",
    warning="#e3b05f",
    error="#f0776c",
    dark=True,
    variables={"footer-background": "#171d22", "footer-key-foreground": "#7aa2c4"},
)

_COLOURED = {
    Tone.DIM: Style(color="#6f7b86"),
    Tone.PLAIN: Style(color="#c9d1d9"),
    Tone.GOOD: Style(color="#86b58c"),
    Tone.NOTICE: Style(color="#7aa2c4"),
    Tone.WARN: Style(color="#e3b05f"),
    Tone.BAD: Style(color="#ffffff", bgcolor="#a32f2a", bold=True),
}
# Without colour: weight, and the marks that the rows bear anyway. An empty style would be taken for
# none by the library, which then draws nothing at all.
_PLAIN = {
    Tone.DIM: Style(dim=True),
    Tone.PLAIN: Style(dim=False),
    Tone.GOOD: Style(dim=False),
    Tone.NOTICE: Style(dim=False),
    Tone.WARN: Style(bold=True),
    Tone.BAD: Style(bold=True, reverse=True),
}


def tones(*, colour: bool) -> Tones:
    """Return the style of each tone."""
    return _COLOURED if colour else _PLAIN


def cursor(*, colour: bool) -> Style:
    """Return what the selected row wears."""
    return Style(bgcolor="#2a3640", bold=True) if colour else Style(reverse=True)


def strip(cells: Sequence[list[Segment]], width: int, style: Style) -> Strip:
    """Return a line of cells with a space between them, over `style`."""
    segments: list[Segment] = []
    for cell in cells:
        if segments:
            segments.append(Segment(" "))
        segments += cell
    return Strip(segments).adjust_cell_length(width).apply_style(style)


def fitted(cell: Cell, column: Column, styles: Tones) -> list[Segment]:
    """Return a cell in exactly its column's width; what is cut off ends with an ellipsis."""
    line = text(cell, styles)
    line.truncate(column.width, overflow="ellipsis")
    missing = Segment(" " * max(0, column.width - line.cell_len))
    pieces = [Segment(line.plain[start:end], style) for start, end, style in _runs(line)]
    return [missing, *pieces] if column.right else [*pieces, missing]


def _runs(line: Text) -> list[tuple[int, int, Style]]:
    runs = [(part.start, part.end, part.style) for part in line.spans]
    assert all(isinstance(style, Style) for _, _, style in runs)
    return runs  # type: ignore[return-value]  # `text` gives styles, no names


def text(cell: Cell, styles: Tones) -> Text:
    """Return a cell as the library's text, on one line."""
    line = Text(no_wrap=True, overflow="ellipsis", end="")
    for part, tone in cell:
        line.append(part, styles[tone])
    return line
