"""The terminal of `top`: draws a picture, takes keys. What it shows is decided in `model`."""

from __future__ import annotations

__all__ = ["Top"]

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.widgets import Footer, Input, Static

from supervisor.client import Client
from supervisor.errors import SupervisorError
from supervisor.plain import harmless
from supervisor.protocol import Dump, FromClient, Restart, Scale
from supervisor.report import dump_text
from supervisor.story import tell
from supervisor.top import paint
from supervisor.top.feed import Ended, Feed, Heard, Silent
from supervisor.top.layout import (
    budget_line,
    group_cells,
    group_columns,
    head_line,
    worker_cells,
    worker_columns,
)
from supervisor.top.looks import Confirm, Look
from supervisor.top.model import (
    SORTS,
    Fleet,
    GroupRow,
    Picture,
    Problem,
    Tone,
    matches,
    ordered,
)
from supervisor.top.table import Row, Table

GROUPS_SHOWN = 8  # lines at most, or a third of the screen
TALL = 32  # lines from which there is room for more events


class Told(Message):
    """The feed has heard something."""

    def __init__(self, what: Heard | Silent | Ended) -> None:
        self.what = what
        super().__init__()


class Answered(Message):
    """A question about a worker has been answered, or a request has come to something."""

    def __init__(self, worker: str, part: str, text: str, *, is_bad: bool = False) -> None:
        self.worker = worker
        self.part = part
        self.text = text
        self.is_bad = is_bad
        super().__init__()


class Top(App[None]):
    """The live view. `farewell` is what to say when it has ended.

    Args:
        connect: makes a client; called in threads, one for each question of the user's.
        client: an open one, for the feed.
    """

    TITLE = "supervisor top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { layout: vertical; background: $background; }
    #head, #problems, #budgets, #happened { height: auto; padding: 0 1; }
    #head { background: $panel; }
    #problems { max-height: 7; }
    #budgets { max-height: 3; }
    Table { padding: 0 1; background: $background; scrollbar-size-vertical: 1;
            overflow-x: hidden; scrollbar-color: $secondary; scrollbar-background: $background; }
    #groups { height: auto; max-height: 8; margin-top: 1; }
    #workers { height: 1fr; min-height: 3; }
    #caption { height: 1; padding: 0 1; margin-top: 1; }
    #happened { border-top: solid $secondary 40%; }
    #filter { display: none; height: 1; border: none; padding: 0 1; background: $panel; }
    #filter.open { display: block; }
    Confirm { align: center middle; background: $background 60%; }
    #confirm { width: 64; max-width: 95%; height: auto; padding: 1 2; background: $panel;
               border: round $primary; }
    #consequence { margin: 1 0; }
    #answers { height: 1; }
    #answers Button { margin-right: 2; }
    Look #look-head { background: $panel; padding: 0 1; height: 1; }
    Look #look-page { height: 1fr; padding: 1 1 0 1; background: $background; }
    Toast { max-width: 74; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "look", "Look into"),
        Binding("r", "restart", "Restart"),
        Binding("minus", "scale(-1)", "Drain one"),
        Binding("plus", "scale(1)", "Add one"),
        Binding("s", "sort", "Sort"),
        Binding("S", "reverse", "Reverse", show=False),
        Binding("slash", "filter", "Filter"),
        Binding("exclamation_mark", "only_trouble", "Wrong only"),
        Binding("tab", "app.focus_next", "Groups/workers", show=False),
        Binding("escape", "clear", "Clear", show=False),
        Binding("q", "leave", "Quit"),
        Binding("ctrl+c", "leave", "Quit", show=False, priority=True),
    ]

    def __init__(self, connect: Callable[[], Client], client: Client) -> None:
        # Without colour the terminal's own are left alone; textual then takes all colour away.
        super().__init__(ansi_color=os.environ.get("NO_COLOR") is not None)
        self.farewell = ""
        self._connect = connect
        self._feed = Feed(client, self._hear)
        self._fleet = Fleet()
        self._silent = 0.0
        self._words = ""
        self._only_trouble = False
        self._sort = "trouble"
        self._reversed = False
        self._picture: Picture | None = None

    # --- life ------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """Lay out the one screen."""
        yield Static(id="head")
        yield Static(id="problems")
        yield Static(id="budgets")
        yield Table(id="groups")
        yield Static(id="caption")
        yield Table(id="workers")
        yield Static(id="happened")
        yield Input(id="filter", placeholder="words that a worker's line must have", compact=True)
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Begin to listen, also to whoever ends us from outside: the terminal is put right first."""
        if not self.no_color:
            self.register_theme(paint.THEME)
            self.theme = paint.THEME.name
        self.query_one("#workers").focus()
        with contextlib.suppress(ValueError, RuntimeError):  # not in a thread's loop
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(
                    number, partial(self.exit, return_code=128 + number)
                )
        self._feed.start()

    def on_unmount(self) -> None:
        """Stop listening."""
        self._feed.stop()

    def action_leave(self) -> None:
        """Leave: nothing of the supervisor changes."""
        self.exit(return_code=0)

    def _hear(self, what: Heard | Silent | Ended) -> None:
        """Bring what the feed has heard into the app's thread."""
        self._post(Told(what))

    def _post(self, message: Message) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody looks any more
            self.post_message(message)

    @on(Told)
    def _told(self, message: Told) -> None:
        match message.what:
            case Ended(why, exit_code):
                self.farewell = why
                self.exit(return_code=exit_code)
                return
            case Silent(seconds):
                self._silent = seconds
            case Heard(status, happened):
                self._fleet.take_events(happened)
                if status is not None:
                    self._silent = 0.0
                    self._fleet.take_status(status, time.monotonic())
        self._draw()

    def _check_size(self) -> None:
        """Notice a resize of the moment in which the library was not listening yet."""
        if self.is_headless:
            return
        with contextlib.suppress(OSError, ValueError):
            size = Size(*os.get_terminal_size(sys.__stdout__.fileno()))  # type: ignore[union-attr]
            if size != self.size:
                self.post_message(events.Resize(size, size))

    def on_resize(self) -> None:
        """Draw anew for another size."""
        self.call_after_refresh(self._draw)

    # --- drawing ---------------------------------------------------------------------------------

    def _draw(self) -> None:
        if not self._fleet.has_been_seen or not self.is_running:
            return
        self._check_size()
        wall = time.time()
        picture = self._picture = self._fleet.picture(time.monotonic(), wall)
        screen = self.screen_stack[0]
        tones = paint.tones(colour=not self.no_color)
        width, height = self.size.width - 2, self.size.height
        screen.query_one("#head", Static).update(paint.text(head_line(picture), tones))
        screen.query_one("#problems", Static).update(self._problems(picture, tones, width))
        budgets = screen.query_one("#budgets", Static)
        budgets.display = bool(picture.budgets)
        budgets.update(
            Text("\n").join(
                paint.text(budget_line(budget, min(width, 100)), tones)
                for budget in picture.budgets
            )
        )
        self._draw_groups(picture.groups, width, height)
        self._draw_workers(picture, width)
        happened = [
            paint.text(((f"{age:>4} ago  ", Tone.DIM), (what, tone)), tones)
            for age, what, tone in self._fleet.recent(wall, 6 if height >= TALL else 2)
        ]
        for line in happened:
            line.truncate(width, overflow="ellipsis")
        screen.query_one("#happened", Static).update(Text("\n").join(happened))

    def _problems(self, picture: Picture, tones: paint.Tones, width: int) -> Text:
        problems = list(picture.problems)
        if self._silent:
            problems.insert(
                0,
                Problem(
                    Tone.BAD,
                    f"the supervisor (pid {picture.pid}) has not answered for "
                    f"{self._silent:.0f} s; this is what it said last",
                ),
            )
        limit = max(2, min(6, self.size.height // 6))
        lines = [
            paint.text((("! " if p.tone is Tone.BAD else "* ", p.tone), (p.text, p.tone)), tones)
            for p in problems[:limit]
        ]
        # The gravest one may take two lines (words do not fill them), so that its reason is read.
        for index, line in enumerate(lines):
            line.truncate(2 * width - 20 if index == 0 else width, overflow="ellipsis")
        if len(problems) > limit:
            lines[-1] = paint.text(
                ((f"… and {len(problems) - limit + 1} more problems", Tone.WARN),), tones
            )
        if not lines:
            calm = "all is well" if picture.state == "ready" else picture.state
            lines = [paint.text(((calm, picture.tone),), tones)]
        return Text("\n").join(lines)

    def _draw_groups(self, groups: Sequence[GroupRow], width: int, height: int) -> None:
        table = self.screen_stack[0].query_one("#groups", Table)
        most = max(3, min(GROUPS_SHOWN, height // 3))
        table.styles.height = min(len(groups) + 1, most)
        columns = group_columns(groups, width - 1)
        # What is wrong comes first; where nothing is, the file's order stays.
        listed = sorted(groups, key=lambda group: -max(group.tone, Tone.NOTICE))
        table.show(columns, [Row(group.name, group_cells(group, columns)) for group in listed])

    def _draw_workers(self, picture: Picture, width: int) -> None:
        table = self.screen_stack[0].query_one("#workers", Table)
        shown = [
            worker
            for worker in ordered(picture.workers, self._sort, reverse=self._reversed)
            if matches(worker, self._words, only_trouble=self._only_trouble)
        ]
        columns = worker_columns(shown, width - 1)
        conditions = [f"filter {self._words!r}"] if self._words else []
        conditions += ["only what is wrong"] if self._only_trouble else []
        order = f"{len(shown)} of {len(picture.workers)} workers, sorted by {self._sort}{', reversed' if self._reversed else ''}"
        caption = Text(" \u00b7 ".join([order, *conditions]), "dim" if self.no_color else "#6f7b86")
        self.screen_stack[0].query_one("#caption", Static).update(caption)
        hidden = len(picture.workers) - len(shown)
        empty = f"no worker is shown ({', '.join(conditions)}); Esc clears" if hidden else ""
        table.show(
            columns,
            [Row(worker.id, worker_cells(worker, columns)) for worker in shown],
            sorted_by=self._sort,
            empty=empty or "no workers",
        )

    # --- keys ------------------------------------------------------------------------------------

    def check_action(
        self,
        action: str,
        parameters: tuple[object, ...],  # noqa: ARG002
    ) -> bool | None:
        """Have the keys of the one screen there only."""
        there = ("look", "restart", "scale", "sort", "reverse", "filter", "only_trouble", "clear")
        return action not in there or len(self.screen_stack) == 1

    @property
    def _table(self) -> Table:
        groups = self.query_one("#groups", Table)
        return groups if groups.has_focus else self.query_one("#workers", Table)

    @on(Table.Chosen)
    def _chosen(self, message: Table.Chosen) -> None:
        self._look_into(message.table, message.key)

    def action_look(self) -> None:
        """Look into the selected worker; of a group, show only its workers."""
        table = self._table
        if table.selected is not None:
            self._look_into(table, table.selected)

    def _look_into(self, table: Table, key: str) -> None:
        if table.id == "groups":
            self.query_one("#filter", Input).value = f"group:{key}"
            self.query_one("#workers").focus()
        else:
            self.push_screen(Look(key))

    def action_sort(self) -> None:
        """Sort by the next of what can be sorted by."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._draw()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._reversed = not self._reversed
        self._draw()

    def action_only_trouble(self) -> None:
        """Show only the workers with which something is wrong, or all again."""
        self._only_trouble = not self._only_trouble
        self._draw()

    def action_filter(self) -> None:
        """Ask for words."""
        field = self.query_one("#filter", Input)
        field.add_class("open")
        field.focus()

    def action_clear(self) -> None:
        """Show all workers again."""
        self._only_trouble = False
        self.query_one("#filter", Input).value = ""
        self._close_filter()

    @on(Input.Changed, "#filter")
    def _filtered(self, message: Input.Changed) -> None:
        self._words = message.value
        self._draw()

    @on(Input.Submitted, "#filter")
    def _close_filter(self) -> None:
        self.query_one("#filter", Input).remove_class("open")
        self.query_one("#workers").focus()
        self._draw()

    # --- doing -----------------------------------------------------------------------------------

    def _group_of_selected(self) -> GroupRow | None:
        table, picture = self._table, self._picture
        if picture is None or table.selected is None:
            return None
        name = table.selected
        if table.id == "workers":
            name = next((each.group for each in picture.workers if each.id == name), "")
        return next((group for group in picture.groups if group.name == name), None)

    def action_restart(self) -> None:
        """Replace the selected worker, or those of the selected group."""
        table = self._table
        if table.selected is not None:
            self._confirm_restart(table.selected, is_group=table.id == "groups")

    def _confirm_restart(self, target: str, *, is_group: bool) -> None:
        if is_group:
            question = f"Restart every worker of group {target}?"
            consequence = (
                "One after the other, each one's replacement first. Each old one drains: it takes "
                "no new work, finishes what it has in flight, and ends."
            )
        else:
            question = f"Restart {target}?"
            consequence = (
                f"Its replacement is started first. Once that is ready, {target} drains: it takes "
                "no new work, finishes what it has in flight, and ends."
            )
        self._confirm(question, consequence, Restart(target), f"restart of {target}")

    def action_scale(self, step: int) -> None:
        """Have one worker more or fewer in the group of what is selected."""
        group = self._group_of_selected()
        if group is None or group.count + step < 0:
            return
        count = group.count + step
        if step < 0:
            question = f"Drain one worker of group {group.name}?"
            consequence = (
                f"The group has {count} instead of {group.count} then, until the next reload. "
                "The supervisor chooses which one: it takes no new work, finishes what it has in "
                "flight, and ends. To drain a certain one and have it replaced, restart it."
            )
        else:
            question = f"Add one worker to group {group.name}?"
            consequence = (
                f"The group has {count} instead of {group.count} then, until the next reload."
            )
        self._confirm(question, consequence, Scale(group.name, count), f"{group.name}={count}")

    def _confirm(self, question: str, consequence: str, request: FromClient, what: str) -> None:
        def answered(is_wanted: bool | None) -> None:
            if is_wanted:
                self._in_a_thread(partial(self._request, request, what))

        self.push_screen(Confirm(question, consequence), answered)

    def _request(self, request: FromClient, what: str) -> Answered:
        with self._connect() as client:
            client.ask(request)
        return Answered("", "", f"{what}: accepted; the events tell what comes of it")

    @on(Look.Asked)
    def _asked(self, message: Look.Asked) -> None:
        worker, part = message.worker, message.part
        self._in_a_thread(partial(self._question, worker, part), worker, part)

    @on(Look.RestartWanted)
    def _restart_wanted(self, message: Look.RestartWanted) -> None:
        self._confirm_restart(message.worker, is_group=False)

    def _question(self, worker: str, part: str) -> Answered:
        with self._connect() as client:
            if part == "now":
                text = dump_text(client.ask(Dump(worker)).data)
            else:
                listed = (event for event, _ in client.events(follow=False))
                text = tell(worker, listed) or f"no event that is kept names {worker}"
        return Answered(worker, part, text)

    def _in_a_thread(self, work: Callable[[], Answered], worker: str = "", part: str = "") -> None:
        """Have a conversation with the supervisor without keeping the screen waiting."""

        def run() -> None:
            try:
                answer = work()
            except SupervisorError as exc:
                answer = Answered(worker, part, str(exc), is_bad=True)
            self._post(answer)

        threading.Thread(target=run, name="top-question", daemon=True).start()

    @on(Answered)
    def _answered(self, message: Answered) -> None:
        if not message.part:
            self.notify(
                harmless(message.text),
                severity="error" if message.is_bad else "information",
                markup=False,
            )
            return
        screen = self.screen
        if isinstance(screen, Look) and screen.worker == message.worker:
            screen.tell(message.part, message.text)
