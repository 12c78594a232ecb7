"""What a program writes: lines are cut, counted, dropped, and harm no terminal."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.command.output import LAST_LINES, MAX_BYTES, MAX_LINE, MAX_LINES, Lines, Output


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.fields: list[dict[str, object]] = []
        self.dropped: list[tuple[int, int]] = []

    def info(self, _event: str, **fields) -> None:
        self.lines.append(fields["line"])
        self.fields.append(fields)

    def warning(self, _event: str, **fields) -> None:
        self.dropped.append((fields["lines"], fields["bytes"]))


@pytest.fixture
def pipe():
    """Both ends of a pipe that does not block, to read from and to write to."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read, write
    os.close(read)
    os.close(write)


def write(pipe, data: bytes, out: Output, now: float = 0.0) -> None:
    """Write all of it, and let it be read as it comes."""
    for begin in range(0, len(data), 1 << 15):
        os.write(pipe[1], data[begin : begin + (1 << 15)])
        assert out.read(pipe[0], now)


@given(st.binary(max_size=300).map(lambda data: data.replace(b"x", b"\n")), st.data())
def test_lines_do_not_depend_on_how_they_come(text: bytes, data: st.DataObject) -> None:
    """Whatever the pieces, the lines are those of the whole."""
    lines = Lines()
    found = []
    begin = 0
    while begin < len(text):
        end = data.draw(st.integers(begin + 1, len(text)))
        complete, left = lines.feed(text[begin:end], 1000)
        assert left == b""
        found += complete
        begin = end
    rest = lines.rest()
    whole = text.split(b"\n")
    assert [line for line, _ in found] == [line.removesuffix(b"\r") for line in whole[:-1]]
    assert (rest is None) == (whole[-1] == b"")


def test_a_long_line_is_cut_and_says_by_how_much() -> None:
    """What is beyond the limit is counted, never kept."""
    lines = Lines()
    for _ in range(100):
        assert lines.feed(b"y" * 100_000, 10) == ([], b"")
    assert lines.feed(b"\nnext\n", 10) == (
        [(b"y" * MAX_LINE, 10_000_000 - MAX_LINE), (b"next", 0)],
        b"",
    )


def test_what_is_too_much_for_a_second_is_counted_and_dropped(pipe) -> None:
    """So many lines a second; the next second tells what was dropped, and takes lines again."""
    log = Log()
    out = Output({"stdout": pipe[0]}, log, 0.0)
    write(pipe, b"".join(b"%d\n" % number for number in range(MAX_LINES + 500)), out)

    assert log.lines == [str(number) for number in range(MAX_LINES)]
    assert out.is_over_its_limit
    assert out.due == 1.0
    out.time_passed(0.999)
    assert log.dropped == []
    out.time_passed(1.0)
    assert log.dropped == [(500, 500 * 5)]
    assert out.due is None
    assert not out.is_over_its_limit
    write(pipe, b"again\n", out, 1.5)
    assert log.lines[-1] == "again"


def test_bytes_are_limited_too(pipe) -> None:
    """Few lines that are long fill a log as well."""
    log = Log()
    out = Output({"stdout": pipe[0]}, log, 0.0)
    write(pipe, (b"z" * (MAX_LINE - 1) + b"\n") * 200, out)
    assert len(log.lines) <= MAX_BYTES // (MAX_LINE - 1) + 8
    out.time_passed(1.0)
    assert len(log.lines) + log.dropped[0][0] == 200


def test_the_last_lines_are_known_although_they_were_dropped(pipe) -> None:
    """They say why a program has ended."""
    out = Output({"stdout": pipe[0]}, Log(), 0.0)
    write(pipe, b"chatter\n" * 50_000 + b"fatal: no space\nfatal: good bye", out)
    out.finish(0.5)
    last = out.last_lines.split("\n")
    assert last[-2:] == ["fatal: no space", "fatal: good bye"]
    assert len(last) <= LAST_LINES


def test_finish_takes_what_is_left_and_waits_for_nobody(pipe) -> None:
    """The pipe is still open on the other side: a grandchild may hold it for ever."""
    log = Log()
    out = Output({"stdout": pipe[0]}, log, 0.0)
    os.write(pipe[1], b"one\ntwo without an end")
    out.finish(0.0)
    assert log.lines == ["one", "two without an end"]


def test_binary_data_harms_no_terminal(pipe) -> None:
    """Escape sequences, and what is no text, are written as their codes."""
    log = Log()
    write(
        pipe, b"\x1b[31mred\x07 \xff\xc3\xa9\ttab \xc2\x9b2J\r\n", Output({"e": pipe[0]}, log, 0.0)
    )
    assert log.lines == ["\\x1b[31mred\\x07 \\xffé\ttab \\x9b2J"]


def test_a_log_that_takes_nothing_holds_up_nobody(pipe, monkeypatch) -> None:
    """Lines are dropped and counted while the log's reader sleeps."""
    reader, writer = os.pipe()
    try:
        with open(writer, "w", closefd=False) as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            log = Log()
            out = Output({"stdout": pipe[0]}, log, 0.0)
            write(pipe, b"heard\n", out)
            os.set_blocking(writer, False)
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(writer, b"x" * 4096)
            write(pipe, b"unheard\n" * 3, out)
            out.time_passed(1.0)
            assert (log.lines, log.dropped) == (["heard"], [])
            os.read(reader, 1 << 16)
            out.time_passed(2.0)
            assert log.dropped == [(3, 24)]
    finally:
        os.close(reader)
        os.close(writer)


def test_a_stream_that_is_closed_says_so(pipe) -> None:
    """Its end is the end of its lines, not of the program."""
    read, write_end = os.pipe()
    os.set_blocking(read, False)
    os.close(write_end)
    assert not Output({"stdout": read}, Log(), 0.0).read(read, 0.0)
    os.close(read)
