"""`supervisor check` on damaged files: what a person reads of them. The settings' own: tests/wire/test_config_fuzz."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from supervisor.cli import _complain, main
from supervisor.errors import SupervisorError
from tests.supervised import REPO

FILES = [(REPO / "conf" / name).read_text(encoding="utf-8") for name in ("dev.toml", "prod.toml")]
PIECES = ["\n", "[", "]]", "{", "=", '"', "'''", "\\", "#", "${", "${X}", "0", "-1", "nan", "true"]
PIECES += ["count", "run", "\0", "\x1b[2J", "é\u202e", "1979-05-27", "9" * 30, "[workers.x]\n"]
PIECES += ["[" * 200, "a." * 2000 + "b = 1\n", "run = 'no.such:thing'\n", "'''" + "\n" * 50]


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """Draw a shipped file with pieces cut out, put in, doubled and moved."""
    text = draw(st.sampled_from(FILES))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 60))
        piece = draw(st.sampled_from([*PIECES, text[start:end] * 2]) | st.text(max_size=4))
        text = text[:start] + piece + text[end:]
    return text


@pytest.fixture
def check(tmp_path):
    """Run `supervisor check` here; return its exit code, and the lines of both streams."""
    file = tmp_path / "damaged.toml"

    def run_it(text):
        file.write_bytes(text.encode(errors="surrogatepass"))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(["check", "-c", str(file)], standalone_mode=False) or 0
            except SupervisorError as exc:
                code = _complain(exc)
        prefix = re.compile(rf"supervisor: (warning: )?{re.escape(str(file))}: ")
        for line in err.getvalue().splitlines():
            assert prefix.match(line), line
            assert line.isprintable(), line
        return code, out.getvalue().splitlines(), err.getvalue().splitlines()

    return run_it


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(damaged())
@example("")
@example("[" * 5000)
@example("a = " + "[" * 5000)
@example("a = " + "{a=" * 5000)
@example(".".join("a" * 5000) + " = 1")
def test_check_of_a_damaged_file(check, text):
    """It is good, or has problems: 0 and one line, or 78 and one sentence for each, never a traceback."""
    code, out, err = check(text)
    assert code in (0, 78), (code, err)
    problems = [line for line in err if not line.startswith("supervisor: warning: ")]
    assert bool(problems) == (code == 78)
    assert len(out) == (code == 0)
