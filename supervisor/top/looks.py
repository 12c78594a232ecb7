"""What `top` lays over its screen: a question before something is done, a look into a worker."""

from __future__ import annotations

__all__ = ["Confirm", "Look"]

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Footer, Static

from supervisor.plain import harmless


class Confirm(ModalScreen[bool]):
    """Ask before something is done. Only `y` and the button do it; Enter on what is focused: No."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, question: str, consequence: str) -> None:
        super().__init__()
        self._question = question
        self._consequence = consequence

    def compose(self) -> ComposeResult:
        """Lay out the question."""
        with Vertical(id="confirm"):
            yield Static(Text(self._question, style="bold"), id="question")
            yield Static(Text(self._consequence), id="consequence")
            with Horizontal(id="answers"):
                yield Button("No (n)", id="no", compact=True)
                yield Button("Yes (y)", id="yes", compact=True)

    def action_answer(self, answer: bool) -> None:
        """Answer."""
        self.dismiss(answer)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer by mouse, or by Enter."""
        self.dismiss(event.button.id == "yes")


class Look(Screen[None]):
    """Look into one worker: what it is doing now, and what has happened to it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        Binding("d", "ask('now')", "Doing now"),
        Binding("w", "ask('story')", "Why: its story"),
        Binding("tab", "other", "Other", show=False),
        Binding("r", "restart", "Restart it"),
        Binding("f5", "again", "Again", show=False),
    ]

    class Asked(Message):
        """A part is wanted: "now" or "story"; the app answers by `tell`."""

        def __init__(self, worker: str, part: str) -> None:
            self.worker = worker
            self.part = part
            super().__init__()

    class RestartWanted(Message):
        """The worker is to be replaced."""

        def __init__(self, worker: str) -> None:
            self.worker = worker
            super().__init__()

    def __init__(self, worker: str) -> None:
        super().__init__()
        self.worker = worker
        self.part = "now"

    def compose(self) -> ComposeResult:
        """Lay out the two parts' heading and a page that scrolls."""
        yield Static(id="look-head")
        with VerticalScroll(id="look-page"):
            yield Static("asking …", id="look-text")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Ask at once."""
        self.query_one("#look-page").focus()
        self.action_ask("now")

    def action_ask(self, part: str) -> None:
        """Ask for one of the two parts."""
        self.part = part
        what = {"now": "what it is doing now", "story": "its story"}[part]
        self.query_one("#look-head", Static).update(Text(f"{self.worker} \u00b7 {what}", "bold"))
        self.app.post_message(self.Asked(self.worker, part))

    def action_other(self) -> None:
        """Go to the other part."""
        self.action_ask("story" if self.part == "now" else "now")

    def action_again(self) -> None:
        """Ask for the same again."""
        self.action_ask(self.part)

    def action_restart(self) -> None:
        """Replace it."""
        self.app.post_message(self.RestartWanted(self.worker))

    def tell(self, part: str, text: str) -> None:
        """Show an answer, if it is still the one that is wanted."""
        if part == self.part:
            self.query_one("#look-text", Static).update(Text(harmless(text, lines=True)))
