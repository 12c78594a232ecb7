"""The configuration under fuzz: Settings or ConfigError, never anything else, and no secret told."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from supervisor.config import Settings, load
from supervisor.config.lines import KeyPath, Lines
from supervisor.config.settings import (
    LATER,
    GroupSettings,
    PoolSettings,
    SocketSettings,
    SupervisorSettings,
)
from supervisor.config.values import Unfit, duration, expand, redacted
from supervisor.errors import ConfigError

# The autouse fixture of tests/conftest.py is per function, which is what it is there for.
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

PROD = (Path(__file__).parents[2] / "conf" / "prod.toml").read_text(encoding="utf-8")
ENV = {"ORDERS_WORKERS": "3", "SECRET": "s3cret", "EMPTY": ""}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fuzz.toml"


def outcome(file: Path, content: str | bytes) -> Settings | ConfigError:
    """Load a file; every promise about problems is checked on the way."""
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    file.write_bytes(data)
    try:
        return load(file, env=ENV, uid=1000)
    except ConfigError as error:
        assert error.problems
        last = data.replace(b"\r\n", b"\n").count(b"\n") + 1
        for problem in error.problems:
            assert problem.message.strip()
            assert problem.line is None or 1 <= problem.line <= last
            assert problem.message.isprintable(), problem.message
        lines = [each.line or last + 1 for each in error.problems]
        assert lines == sorted(lines)
        assert len(set(error.problems)) == len(error.problems)
        return error


# --- any text ----------------------------------------------------------------------------------


@relaxed
@given(st.text() | st.binary())
@example("a = 1979-13-99")
@example('a = "\\ud800"')
@example("[a]\n[[a]]")
@example("a.b = 1\na = { b = 1 }")
def test_any_text(file: Path, text: str | bytes) -> None:
    """No sequence of characters or bytes makes anything but settings or a ConfigError."""
    outcome(file, text)


TOKENS = ["\n", "[", "]", "[[", "]]", "{", "}", "=", ".", ",", '"', "'", '"""', "'''", "\\", "#"]
TOKENS += ["${", "${SECRET}", "$${", "true", "nan", "0", "-1", '"0"', "1979-05-27", "workers", " "]
TOKENS += [
    "pools",
    "jobs",
    "main",
    "run",
    "url",
    "options",
    "\0",
    "\r",
    "é",
    "\u2028",
    "0x" + "f" * 5000,
]


@relaxed
@given(st.data())
def test_a_damaged_file(file: Path, data: st.DataObject) -> None:
    """The shipped file with parts cut out, put in, repeated and swapped."""
    text = PROD
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        middle = data.draw(
            st.sampled_from(TOKENS) | st.just(text[start:end] * 2) | st.text(max_size=5)
        )
        text = text[:start] + middle + text[end:]
    outcome(file, text)


# --- any value for any key ---------------------------------------------------------------------

KEYS: dict[str, tuple[type[Any], str]] = {
    "supervisor": (SupervisorSettings, ""),
    "pools.main": (PoolSettings, "url = 'sqlite:///x.db'\n"),
    "workers.jobs": (GroupSettings, "run = 'a:b'\n"),
    "sockets.web": (SocketSettings, "listen = '127.0.0.1:8000'\n"),
}
strings = st.sampled_from(
    [
        "",
        "main",
        "always",
        "30s",
        "0",
        "1h30m",
        "512MiB",
        "a:b",
        "sqlite:///x.db",
        "${SECRET}",
        "${EMPTY}",
        "${ORDERS_WORKERS}",
        "${NONE}",
        "postgresql://a:b@c/d",
        "127.0.0.1:80",
        "$${",
    ]
) | st.text(st.characters(exclude_characters="'\n\r", exclude_categories=["Cc", "Cs"]))
scalars = (
    strings.map(lambda text: f"'{text}'")
    | st.integers().map(str)
    | st.floats().map(lambda number: str(number) if "e" not in str(number) else "1e300")
    | st.sampled_from(
        ["true", "false", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", '"\\u0000"']
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=8,
)


@relaxed
@given(st.data())
def test_any_value_for_any_key(file: Path, data: st.DataObject) -> None:
    """Whatever TOML can write, each key takes it or refuses it in words."""
    text = ""
    for table, (kind, needed) in KEYS.items():
        known = {*(each.name for each in fields(kind)), *LATER[kind]}
        known -= {"url", "run", "app"} if kind is not SocketSettings else {"listen"}
        names = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=4))
        lines = "".join(f"{name} = {data.draw(values)}\n" for name in names)
        text += f"[{table}]\n{needed}{lines}"
    assert tomllib.loads(text)

    found = outcome(file, text)
    if isinstance(found, Settings):
        assert found == outcome(file, f"# the same\n{text}")
    else:
        told = [
            each
            for each in found.problems
            if not re.search(r"_dir$|_file$|(pools|sockets)\[", each.key)
        ]
        assert "s3cret" not in "".join(each.message for each in told)  # paths and names are told


# --- lines -------------------------------------------------------------------------------------
# The oracle: a document in which every whole number is the number of the line that it stands in.

HERE = "§"  # replaced by the number of its line
blanks = st.sampled_from(["", " ", "\t", "  "])
breaks = st.sampled_from(["", " ", "\n", ' # a comment with ] } = and """\n', "\n\n\t"])
noise = st.sampled_from(
    [
        '"a # [b]"',
        "'c = \"'",
        '"\\""',
        '"""\na = 1\n[b]\n"""',
        "'''\n'' ]\n'''",
        '""""x"""""',
        '""',
        "''''''",
        '"""\\\n  """',
        '"""a\\"""b\n"""',
        "1.5",
        "-inf",
        "true",
        "1979-05-27 07:32:00",
    ]
)


def key(number: int) -> st.SearchStrategy[str]:
    kinds = [
        f"k{number}",
        f'"k.{number}"',
        f"'k {number} # ='",
        f'"k\\u0041\\"{number}"',
        f"{number}",
    ]
    return st.sampled_from(kinds)


@st.composite
def written(draw: st.DrawFn, depth: int = 0) -> str:
    """Draw a value: numbers of lines, and much that looks like keys and is none."""
    kind = draw(st.integers(0, 5 if depth < 3 else 3))
    if kind <= 1:
        return HERE
    if kind <= 3:
        return draw(noise)
    items = [draw(written(depth + 1)) for _ in range(draw(st.integers(0, 3)))]
    if kind == 4:
        inside = ",".join(draw(breaks) + item + draw(breaks) for item in items)
        ends = [",", ", # last\n"] if items else [" \n"]
        return f"[{inside}{draw(st.sampled_from(['', *ends]))}]"
    pairs = (
        f"{draw(blanks)}{draw(dotted(number))}{draw(blanks)}={draw(blanks)}{item}{draw(blanks)}"
        for number, item in enumerate(items)
    )
    return "{" + ",".join(pairs) + "}"


@st.composite
def dotted(draw: st.DrawFn, number: int) -> str:
    parts = [draw(key(number)), *draw(st.lists(key(0), max_size=2))]
    return f"{draw(blanks)}.{draw(blanks)}".join(parts)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Draw a document with headers of every kind."""
    text = ""
    arrays: list[str] = []
    for table in range(draw(st.integers(0, 4))):
        for number in range(draw(st.integers(0, 3))):
            text += draw(breaks).replace(" #", "\n #")
            text += f"{draw(blanks)}{draw(dotted(number))} = {draw(written())}{draw(blanks)}\n"
        name = f"{draw(key(100 + table))}{draw(blanks)}.{draw(key(table))}"
        kind = draw(st.integers(0, 3))
        if kind == 0 and arrays:
            text += f"[[{draw(st.sampled_from(arrays))}]]\n"
        elif kind == 1 and arrays:
            text += f"[{arrays[-1]}.sub{table}]\n"
        elif kind == 2:
            arrays.append(name)
            text += f"[[ {name} ]] # comment\n"
        else:
            text += f"{draw(blanks)}[{name}]{draw(blanks)}\n"
    return numbered(text)


def numbered(text: str) -> str:
    """Put the numbers of their lines in."""
    *parts, last = text.split(HERE)
    done = ""
    for part in parts:
        done += part
        done += str(done.count("\n") + 1)
    return done + last


def numbers(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif type(value) is int:
        yield path, value


EVERY_SHAPE = [
    "a = § # '",
    "b.\"c.d\".'e' = §",
    '"f\\u0067\\"" = [ §, [§,',
    "  §], { h = §, 'i'.j = [§] }, '''",
    "]''', § ]",
    "[k.l]",
    'm = """',
    "[k] = 1",
    'n = \\""" x"""""',
    "n = §",
    "[k]",
    "o = §",
    "[[p]]",
    "q = §",
    "[[p]]",
    "q = §",
    "[p.r]",
    "s = §",
    "[[p.t]]",
    "[[p.t]]",
    "u.v = §",
    "[p.t.w]",
    "x = §",
]


@relaxed
@given(documents(), st.booleans())
@example(numbered("\n".join(EVERY_SHAPE)), False)
def test_lines_are_right(text: str, windows: bool) -> None:
    """Every key, dotted, quoted, in inline tables and arrays, is found at its line."""
    document = tomllib.loads(text)
    lines = Lines(text.replace("\n", "\r\n") if windows else text)

    for path, line in numbers(document):
        assert (path, line) == (path, lines.of(path))


@relaxed
@given(
    st.text(st.sampled_from("".join({*"ab.=[]{}\"'\\#,\n \t1"}))), st.lists(st.sampled_from("ab"))
)
@example('"\\q" = 1', [])
def test_lines_never_raise(text: str, path: list[str]) -> None:
    """The scanner takes any text, also what tomllib would refuse."""
    line = Lines(text).of(tuple(path))

    assert line is None or 1 <= line <= text.count("\n") + 1


# --- values ------------------------------------------------------------------------------------


@given(*[st.integers(0, 999)] * 4)
def test_durations_add_up(hours: int, minutes: int, seconds: int, milliseconds: int) -> None:
    """A duration is the sum of its parts, whichever of them are written."""
    parts = ((hours, "h"), (minutes, "m"), (seconds, "s"), (milliseconds, "ms"))
    total = hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
    text = "".join(f"{number}{unit}" for number, unit in parts if number) or "0"

    assert duration(off=True)(text) == pytest.approx(total, abs=1e-9)
    assert duration(off=True)(total) == total


@given(st.text(st.sampled_from("ab${}:-")))
def test_what_is_escaped_stands_for_itself(text: str) -> None:
    """Any string can be written: with `${` doubled to `$${` it comes out as it was."""
    assert expand(text.replace("${", "$${"), {}) == text


@given(st.text(st.sampled_from("$${}:-AB ")), st.text(st.sampled_from("QZJ${A}")))
def test_a_reference_is_replaced_or_refused(text: str, value: str) -> None:
    """No string with references does anything but come out as a string or be refused."""
    try:
        assert isinstance(expand(text, {"A": value}), str)
    except Unfit as unfit:
        assert str(unfit)
        assert not {*"QZJ"} & {*str(unfit)}


# --- secrets -----------------------------------------------------------------------------------

# Letters that stand in no message of ours, and everything that cuts a URL into pieces.
passwords = st.text(st.sampled_from("QZJXK@:/?#&%[]$ "), min_size=4).map(
    lambda text: f"QZJ{text}QZJ"
)
SECRETS = [
    "postgresql://app:{}@db/orders",
    "postgresql://app:{}@db:port/orders",
    "postgresql://:{}@/",
    "postgre://app:{}@db/orders",
    "mysql://app:{}@db/orders",
    "POSTGRESQL://app:{}@db/orders",
    "sqlite://app:{}@db",
    "postgresql:/app:{}@db/orders",
    "app:{}@db/orders",
    "{}",
]


@relaxed
@given(
    passwords, st.sampled_from(SECRETS), st.sampled_from(["url", "url_file", "env"]), st.booleans()
)
def test_no_password_is_told(
    file: Path, password: str, shape: str, way: str, is_broken: bool
) -> None:
    """However wrong a URL is and wherever it comes from, its password is in no message or repr."""
    assume(shape != "{}" or "://" not in password)  # that would be a scheme
    url = shape.format(password)
    secret = file.with_name("secret")
    secret.write_text(url)
    lines = {
        "url": f"url = '{url.replace('${', '$${')}'",
        "url_file": "url_file = 'secret'",
        "env": "url = '${DB}'",
    }
    file.write_text(
        f"[workers.a]\nrun = 'a:b'\n[pools.main]\n{lines[way]}\n"
        f"max_open = {0 if is_broken else 1}\n"
    )
    try:
        told = repr(load(file, env={"DB": url}, uid=0))
    except ConfigError as error:
        told = f"{error}{error.problems!r}{error.__cause__}"
    finally:
        secret.unlink()
    assert "QZJ" not in told.upper()


@given(
    passwords,
    st.sampled_from(SECRETS[:8]),
    st.sampled_from(["", "?x=a@b", "?password=QZJ"]),
)
def test_redacted_hides_every_password(password: str, shape: str, query: str) -> None:
    """What `redacted` shows of a URL never holds its password, however badly it is quoted."""
    assert "QZJ" not in redacted(shape.format(password) + query)
