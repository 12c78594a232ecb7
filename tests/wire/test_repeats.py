"""When lines say the same, and how many of them are written."""

from __future__ import annotations

from supervisor.repeats import MAX_KEYS, MOST, WINDOW, Repeated, Repeats, sameness


def raised(where: int, words: str, cause: BaseException | None = None) -> BaseException:
    """Return an error that was raised in one of two places."""
    try:
        if where:
            raise KeyError(words) from cause
        raise KeyError(words) from cause
    except KeyError as exc:
        return exc


def test_the_first_lines_of_a_window_are_written_and_the_rest_is_counted():
    """With the times of the first and the last; after the window it begins anew."""
    repeats = Repeats()
    written = [repeats.take("k", "error", "e", 100.0 + n / 10) for n in range(MOST + 5)]
    assert written == [True] * MOST + [False] * 5
    assert repeats.due == 100.0 + WINDOW
    assert repeats.over(repeats.due - 0.001) == []
    assert repeats.over(repeats.due) == [Repeated("error", "e", 5, 101.0, 101.4)]
    assert repeats.due is None
    assert repeats.take("k", "error", "e", 111.0)


def test_nobody_is_told_of_what_was_all_written():
    """A window that has held nothing back is forgotten, and wakes nobody."""
    repeats = Repeats()
    for _ in range(MOST):
        assert repeats.take("k", "error", "e", 1.0)
    assert repeats.due is None
    assert repeats.over(1.0 + WINDOW) == []


def test_lines_that_cannot_be_remembered_are_written():
    """What is remembered is bounded."""
    repeats = Repeats()
    for key in range(MAX_KEYS):
        repeats.take(key, "error", "e", 1.0)
    assert all(repeats.take("other", "error", "e", 1.0) for _ in range(2 * MOST))


def test_lines_say_the_same_when_everything_in_them_is_the_same():
    """Level, event and every field."""
    line = {"event": "e", "where": "here"}
    assert sameness("error", line) == sameness("error", dict(line))
    assert sameness("error", line) != sameness("warning", line)
    assert sameness("error", line) != sameness("error", {**line, "where": "there"})
    assert sameness("error", {"event": "e" * 10_000}) is None
    assert sameness("error", {"event": "e", "exc_info": True}) is None


def test_errors_say_the_same_when_they_were_raised_there_and_with_these_words():
    """So does what they were raised from."""
    lines = [
        {"event": "e", "exc_info": error}
        for error in (
            raised(0, "a"),
            raised(1, "a"),
            raised(0, "b"),
            raised(0, "a", raised(0, "c")),
            raised(0, "a", raised(0, "d")),
        )
    ]
    assert len({sameness("error", line) for line in lines}) == 5
    again = raised(0, "a")
    triple = {"event": "e", "exc_info": (type(again), again, again.__traceback__)}
    assert sameness("error", lines[0]) == sameness("error", triple)
