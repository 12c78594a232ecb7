"""A table for the terminal, with a heading that stays and a cursor that stays with its row."""

from __future__ import annotations

__all__ = ["Row", "Table"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from supervisor.top import paint
from supervisor.top.layout import Cell, Column
from supervisor.top.model import Tone


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: whose it is, and its cells."""

    key: str
    cells: Sequence[Cell]


class Table(ScrollView, can_focus=True):
    """Rows under a heading that stays, and a cursor that stays with its row when rows move.

    Only the lines that can be seen are drawn, so 500 workers cost what 20 cost.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "move(-1000000)", "First", show=False),
        Binding("end", "move(1000000)", "Last", show=False),
    ]

    class Chosen(Message):
        """Somebody wants to look into a row."""

        def __init__(self, table: Table, key: str) -> None:
            self.table = table
            self.key = key
            super().__init__()

    def __init__(self, *, id: str) -> None:  # noqa: A002
        super().__init__(id=id)
        self.selected: str | None = None
        self._rows: Sequence[Row] = ()
        self._columns: Sequence[Column] = ()
        self._sorted_by = ""
        self._empty = ""

    @property
    def cursor(self) -> int:
        """The index of the selected row; 0 where there is none."""
        return next((i for i, row in enumerate(self._rows) if row.key == self.selected), 0)

    def show(
        self,
        columns: Sequence[Column],
        rows: Sequence[Row],
        *,
        sorted_by: str = "",
        empty: str = "",
    ) -> None:
        """Draw these rows. One that was selected and is gone gives its place to the next one."""
        before = self.cursor
        keys = {row.key for row in rows}
        self._rows, self._columns = rows, columns
        self._sorted_by, self._empty = sorted_by, empty
        if self.selected not in keys:
            self.selected = rows[min(before, len(rows) - 1)].key if rows else None
        self.virtual_size = Size(self.size.width, len(rows) + 1)
        self.refresh()

    def action_move(self, step: int) -> None:
        """Move the cursor; it stops at both ends."""
        if self._rows:
            index = max(0, min(len(self._rows) - 1, self.cursor + step))
            self.selected = self._rows[index].key
            self._follow_cursor(index)
            self.refresh()

    def action_page(self, direction: int) -> None:
        """Move the cursor by what can be seen."""
        self.action_move(direction * max(1, self.size.height - 2))

    def _follow_cursor(self, index: int) -> None:
        top, visible = int(self.scroll_offset.y), max(1, self.size.height - 1)
        if index < top:
            self.scroll_to(y=index, animate=False, force=True)
        elif index >= top + visible:
            self.scroll_to(y=index - visible + 1, animate=False, force=True)

    def on_click(self, event: events.Click) -> None:
        """Select a row; a second click looks into it."""
        index = event.y - 1 + int(self.scroll_offset.y)
        if event.y > 0 and 0 <= index < len(self._rows):
            self.selected = self._rows[index].key
            self.refresh()
            if event.chain == 2:  # noqa: PLR2004
                self.post_message(self.Chosen(self, self._rows[index].key))

    def render_line(self, y: int) -> Strip:
        """Draw the heading, or the row that belongs on this line."""
        width = self.size.width
        colour = not self.app.no_color
        tones = paint.tones(colour=colour)
        if y == 0:
            heading = [self._heading(column, tones) for column in self._columns]
            return paint.strip(heading, width, self.rich_style)
        index = y - 1 + int(self.scroll_offset.y)
        if index >= len(self._rows):
            text = self._empty if index == 0 else ""
            return paint.strip([[Segment(text, tones[Tone.DIM])]], width, self.rich_style)
        row = self._rows[index]
        is_selected = self.has_focus and row.key == self.selected
        segments = [
            paint.fitted(cell, column, tones)
            for cell, column in zip(row.cells, self._columns, strict=True)
        ]
        style = self.rich_style + paint.cursor(colour=colour) if is_selected else self.rich_style
        return paint.strip(segments, width, style)

    def _heading(self, column: Column, tones: paint.Tones) -> list[Segment]:
        title = column.title
        is_key = column.key == self._sorted_by
        style = tones[Tone.DIM] + Style(bold=is_key, underline=is_key)
        text = title.rjust(column.width) if column.right else title.ljust(column.width)
        lead = len(text) - len(text.lstrip())
        tail = len(text) - len(text.rstrip())
        if not title:
            return [Segment(text, tones[Tone.DIM])]
        return [Segment(" " * lead), Segment(title[: column.width], style), Segment(" " * tail)]
