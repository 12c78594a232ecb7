"""The state diagram in ARCHITECTURE.md is drawn from the table that the code runs by.

`python -m tests.core.test_diagram` draws it anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from supervisor.core.lifecycle import DECISIONS, TRANSITIONS, State

ARCHITECTURE = Path(__file__).resolve().parents[2] / "ARCHITECTURE.md"
BEGIN = (
    "<!-- drawn from supervisor/core/lifecycle.py by tests/core/test_diagram.py: do not edit -->"
)
END = "<!-- end of the drawing -->"


def edges() -> dict[tuple[State, State], list[str]]:
    """Return what leads from one state to another: reports as they are, decisions after a slash."""
    found: dict[tuple[State, State], list[str]] = {}
    for before in State:
        for report, after in TRANSITIONS[before].items():
            words = re.findall("[A-Z][a-z]+", report.__name__.removeprefix("Worker"))
            found.setdefault((before, after), []).append(" ".join(words).lower())
        for decision, after in DECISIONS[before].items():
            found.setdefault((before, after), []).append(f"/ {decision.value}")
    return {edge: words for edge, words in found.items() if edge[0] is not edge[1]}


def drawing() -> str:
    """Return the block for ARCHITECTURE.md, its markers included.

    The end of a process is drawn only where nothing else leads on; it is possible in all states that
    are named below the drawing. What leaves a state as it is is left out.
    """
    drawn = edges()
    ends = [before for (before, after), words in drawn.items() if words == ["exited"]]
    lines = [f"    [*] --> {State.SPAWNING.name} : spawn"]
    for (before, after), words in drawn.items():
        is_last = all(edge[1] is after for edge in drawn if edge[0] is before)
        if before not in ends or after is not State.EXITED or is_last:
            lines.append(f"    {before.name} --> {after.name} : {', '.join(words)}")
    lines.append(f"    {State.EXITED.name} --> [*]")
    below = (
        "What is reported stands as it is, what the supervisor decides after a slash. The process can "
        f"end, which leads to {State.EXITED.name}, in: {', '.join(state.name for state in ends)}."
    )
    return "\n".join([BEGIN, "```mermaid", "stateDiagram-v2", *lines, "```", "", below, END])


def redrawn(text: str) -> str:
    """Return a document with its drawing replaced, or with one added at its end."""
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        return f"{text.rstrip()}\n\n## A worker's states\n\n{drawing()}\n".lstrip()
    _, end, after = rest.partition(END)
    assert end, f"the end marker is missing: {END}"
    return before + drawing() + after


def test_the_drawing_in_the_architecture_is_up_to_date() -> None:
    """Whoever changes the table draws it anew: `python -m tests.core.test_diagram`."""
    text = ARCHITECTURE.read_text(encoding="utf-8")

    assert text.count(BEGIN) == 1
    assert redrawn(text) == text, "stale: run python -m tests.core.test_diagram"


def test_every_state_and_every_way_on_is_drawn() -> None:
    """Every change of state in the table can be found in the block."""
    text = drawing()
    for (before, after), words in edges().items():
        line = f"    {before.name} --> {after.name} : {', '.join(words)}\n"
        below = text.partition("in: ")[2]

        assert line in text or (words == ["exited"] and before.name in below)


def test_a_drawing_is_the_only_thing_that_is_touched() -> None:
    """What stands before and behind it stays, and drawing twice changes nothing."""
    text = f"# Title\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nBehind.\n"
    new = redrawn(text)

    assert new == f"# Title\n\nBefore.\n\n{drawing()}\n\nBehind.\n"
    assert redrawn(new) == new


@pytest.mark.parametrize("text", ["", "# Title\n"])
def test_a_document_without_a_drawing_gets_one(text: str) -> None:
    """At its end, under a heading of its own."""
    assert redrawn(text) == f"{text}\n## A worker's states\n\n{drawing()}\n".lstrip()


if __name__ == "__main__":
    found = ARCHITECTURE.read_text(encoding="utf-8") if ARCHITECTURE.exists() else ""
    ARCHITECTURE.write_text(redrawn(found), encoding="utf-8")
