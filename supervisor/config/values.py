"""What a value in the file may be: durations, sizes, names, URLs; and `${NAME}` in strings.

A reader takes what TOML gave and returns what the program uses, or raises Unfit with the end of a
sentence that begins with the key. It never quotes what came from the environment (it names the
reference instead) or more of a URL than its scheme: both may hold secrets.
"""

from __future__ import annotations

__all__ = [
    "Reader",
    "Unfit",
    "address",
    "array",
    "blank_or",
    "choice",
    "did_you_mean",
    "duration",
    "entry_point",
    "environment",
    "expand",
    "flag",
    "has_password",
    "kind_of",
    "member",
    "mode",
    "name",
    "nearest",
    "options",
    "owner",
    "quoted",
    "redacted",
    "resolved_url",
    "root_path",
    "size",
    "socket_address",
    "text",
    "whole",
]

import os
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Self

from supervisor.config.lines import KeyPath

Reader = Callable[[Any], Any]

LONGEST = 366 * 86400  # seconds; a longer duration is a slip of the pen
SHORTEST = 0.001
SMALLEST = 16 << 20  # bytes; a worker has more when it has just started
LARGEST = 1 << 50
MAX_COUNT = 10_000  # workers of a group
MAX_PORT = 65535
MAX_NAME = 64  # names become part of paths, process titles and worker ids

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_DURATION = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?")
_UNITS = (3600.0, 60.0, 1.0, 0.001)
_SIZE = re.compile(rf"{_NUMBER}(B|KiB|MiB|GiB|TiB)?")
_SIZES = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_REFERENCE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")
_ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?")  # as useradd(8) has them
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}")

# What programs take as a request to end. SIGKILL is what comes after the grace.
_STOP_SIGNALS = (
    "SIGTERM",
    "SIGINT",
    "SIGQUIT",
    "SIGHUP",
    "SIGUSR1",
    "SIGUSR2",
    "SIGWINCH",
    "SIGABRT",
)
# What systemd puts into the environment of a service, and the setting of the unit that asks for it.
_UNIT_SETTINGS = {
    "RUNTIME_DIRECTORY": "RuntimeDirectory",
    "STATE_DIRECTORY": "StateDirectory",
    "CACHE_DIRECTORY": "CacheDirectory",
    "LOGS_DIRECTORY": "LogsDirectory",
    "CONFIGURATION_DIRECTORY": "ConfigurationDirectory",
    "CREDENTIALS_DIRECTORY": "LoadCredential",
}

_SCHEMES = ("sqlite", "postgresql", "mysql", "redis", "rediss")
_ALIASES = {"postgres": "postgresql", "mariadb": "mysql"}


class Unfit(ValueError):  # noqa: N818  it describes the value, not a failure of the program
    """Why a value cannot be taken. `faults` are (place inside the value, sentence)."""

    def __init__(self, message: str = "", inside: Iterable[tuple[KeyPath, str]] = ()) -> None:
        self.faults = [*([((), message)] if message else ()), *inside]
        super().__init__(message)


class FromEnvironment(str):  # noqa: SLOT000  a handful, and short-lived
    """A string with a part taken from the environment; `written` is how it stands in the file.

    The environment knows no numbers: readers of numbers take the digits of such a string.
    """

    written: str

    def __new__(cls, value: str, written: str) -> Self:
        self = super().__new__(cls, value)
        self.written = written
        return self


# --- what is said ------------------------------------------------------------------------------


def kind_of(value: object) -> str:
    """Name what TOML gave in words for people."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    for kind, words in (*kinds.items(), (list, "an array"), (dict, "a table")):
        if isinstance(value, kind):
            return words
    return "a date or time"


def shown(value: object) -> str:
    """Quote a scalar for a message; what is not a scalar, or too long for one, is described."""
    if isinstance(value, FromEnvironment):
        return f'the value of "{value.written}"' if len(value.written) <= MAX_NAME else "its value"
    if isinstance(value, str):
        return quoted(value if len(value) <= MAX_NAME else f"{value[:MAX_NAME]}…")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST):
        return str(value)
    return "a number of that size" if isinstance(value, int) else kind_of(value)


def quoted(text: str) -> str:
    """Quote a text so that it stays in its line and shows what a terminal would not."""
    return f'"{text}"' if text.isprintable() else repr(text)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    import difflib  # it costs milliseconds, and only a faulty file needs it

    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?`, or nothing."""
    found = nearest(word, known)
    return f'; did you mean "{found}"?' if found else ""


# --- readers -----------------------------------------------------------------------------------


def text(value: object) -> str:
    """Read a string that is not empty and can be a path, an argument or a variable."""
    if not isinstance(value, str):
        raise Unfit(f"expected a string, not {kind_of(value)}")
    if not value:
        raise Unfit("must not be empty")
    if "\0" in value:
        raise Unfit("must not hold a NUL character")
    return str(value)


def name(value: object) -> str:
    """Read a name: letters, digits, "-", "_" and ".", beginning with a letter or digit."""
    word = text(value)
    if len(word) > MAX_NAME or not _NAME.fullmatch(word):
        raise Unfit(
            f'expected a name of at most {MAX_NAME} letters, digits, "-", "_" and ".", '
            f"beginning with a letter or digit, not {shown(value)}"
        )
    return word


def command(value: object) -> tuple[str, ...]:
    """Read a program and its arguments, which may be empty strings."""
    words: tuple[str, ...] = array(_argument, least=1)(value)
    if not words[0]:
        raise Unfit(inside=[((0,), "must be the name of a program")])
    return words


def _argument(value: object) -> str:
    return "" if value == "" else text(value)


def flag(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise Unfit(f"expected true or false, not {shown(value)}")
    return value


def whole(least: int, most: int) -> Reader:
    """Return a reader of whole numbers in a range."""

    def read(value: object) -> int:
        number = value
        # No whole number in reach has more digits than this, and int() refuses some thousand.
        if isinstance(value, FromEnvironment) and re.fullmatch("[0-9]{1,18}", value):
            number = int(value)
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise Unfit(f"expected a whole number from {least} to {most}, not {shown(value)}")
        return number

    return read


def duration(*, off: bool = False, least: float = SHORTEST) -> Reader:
    """Return a reader of durations, in seconds; with `off` 0 is allowed and means off."""

    def read(value: object) -> float:
        seconds = _measured(value)
        if off and seconds == 0:
            return 0.0
        if seconds is None:
            raise Unfit(
                'expected a duration such as "250ms", "30s", "5m" or "1h30m", or a number of '
                f"seconds, not {shown(value)}"
            )
        if not least <= seconds <= LONGEST:
            zero = ', or "0" for off' if off else ""
            shortest = "1ms" if least == SHORTEST else f"{least:g}s"
            raise Unfit(
                f"expected a duration from {shortest} to one year{zero}, not {shown(value)}"
            )
        return float(seconds)

    return read


def _measured(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if not isinstance(value, str):
        return None
    if re.fullmatch(_NUMBER, value):
        return float(value)
    match = _DURATION.fullmatch(value)
    if match is None or not value:
        return None
    hours, minutes, seconds, thousandths = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds + thousandths / 1000


def size(value: object) -> int:
    """Read a size, in bytes; 0 means off."""
    number: float = 0
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number = float(match[1]) * _SIZES[match[2]]
    else:
        raise Unfit(f'expected a size such as "512MiB" or "1GiB", not {shown(value)}')
    if number and not SMALLEST <= number <= LARGEST:
        raise Unfit(
            "expected a size from 16MiB (no worker is smaller) to 1024TiB, or 0 for off, not "
            f"{shown(value)}"
        )
    return int(number)


def choice(*words: str) -> Reader:
    """Return a reader of one word out of several."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            known = ", ".join(f'"{word}"' for word in words)
            hint = did_you_mean(value, words) if type(value) is str else ""
            raise Unfit(f"expected one of {known}, not {shown(value)}{hint}")
        return str(value)

    return read


def member(kind: type[Enum]) -> Reader:
    """Return a reader of the values of an enumeration of strings."""
    read = choice(*(each.value for each in kind))
    return lambda value: kind(read(value))


def array(reader: Reader, *, least: int = 0) -> Reader:
    """Return a reader of arrays whose items `reader` takes."""

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Unfit(f'expected an array such as ["…"], not {kind_of(value)}')
        if len(value) < least:
            raise Unfit("must not be empty")
        items, faults = [], []
        for index, item in enumerate(value):
            try:
                items.append(reader(item))
            except Unfit as unfit:
                faults += [((index, *inside), message) for inside, message in unfit.faults]
        if faults:
            raise Unfit(inside=faults)
        return tuple(items)

    return read


def blank_or(reader: Reader) -> Reader:
    """Return a reader that also takes "", which stands for off."""
    return lambda value: "" if isinstance(value, str) and not value else reader(value)


def entry_point(value: object) -> str:
    """Read "module:function": dotted names on both sides."""
    word = text(value)
    module, _, function = word.partition(":")
    names = (*module.split("."), *function.split("."))
    is_file = module.endswith(".py") or "/" in module
    if is_file or not all(each.isidentifier() for each in names):
        hint = "; name the module as an import does, not its file" if is_file else ""
        raise Unfit(
            f'expected "module:function" as in "workers.jobs:run", not {shown(value)}{hint}'
        )
    return word


def stop_signal(value: object) -> str:
    """Read the name of a signal that a program can be told to stop by."""
    if not isinstance(value, str) or value not in _STOP_SIGNALS:
        hint = did_you_mean(value, _STOP_SIGNALS) if isinstance(value, str) else ""
        raise Unfit(f'expected the name of a signal such as "SIGTERM", not {shown(value)}{hint}')
    return str(value)


def address(value: object) -> str:
    """Read "HOST:PORT"; an IPv6 host stands in brackets."""
    word = text(value)
    host, _, port = word.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    digits = re.fullmatch("[0-9]{1,5}", port)
    if not host or not digits or int(port) > MAX_PORT or (":" in host and not bracketed):
        raise Unfit(f'expected "HOST:PORT" as in "127.0.0.1:9464", not {shown(value)}')
    return word


def socket_address(value: object) -> str:
    """Read "HOST:PORT" with an IP address or localhost, "unix:PATH" or "systemd:NAME"."""
    word = text(value)
    kind, _, rest = word.partition(":")
    if kind in {"unix", "systemd"}:
        if not rest or rest.startswith("@"):  # an abstract name has no mode and no owner
            raise Unfit(f'expected "unix:/path" or "systemd:NAME", not {shown(value)}')
        return word
    host = address(value).rpartition(":")[0]
    # Names would have to be asked for, of who may take long or not answer.
    if host != "localhost" and not _is_ip(host):
        raise Unfit(
            'expected an IP address or localhost, as in "127.0.0.1:8000", "0.0.0.0:8000" for all '
            f'IPv4 interfaces or "[::]:8000" for all IPv6 ones, not {shown(value)}'
        )
    return word


def _is_ip(host: str) -> bool:
    import ipaddress  # for those who have sockets only

    try:
        version = ipaddress.ip_address(host.strip("[]")).version
    except ValueError:
        return False
    return (version == 6) == host.startswith("[")  # noqa: PLR2004


def mode(value: object) -> int:
    """Read the mode of a file: octal digits in a string."""
    word = text(value)
    if not re.fullmatch("0?[0-7]{3}", word):
        raise Unfit(f'expected octal digits in a string, as in "0660", not {shown(value)}')
    return int(word, 8)


def owner(value: object) -> str:
    """Read "user", "user:group" or ":group": names, or numbers."""
    word = text(value)
    user, colon, group = word.partition(":")
    if not all(_ACCOUNT.fullmatch(each) for each in (user or "x", group or "x")) or (
        colon and not group
    ):
        raise Unfit(f'expected "user", "user:group" or ":group", not {shown(value)}')
    return word


def root_path(value: object) -> str:
    """Read the path below which an application is mounted: "/api"."""
    word = text(value)
    if not word.startswith("/") or word.endswith("/") or not word.isascii():
        raise Unfit(f'expected a path without a slash at its end, as in "/api", not {shown(value)}')
    return word


def environment(value: object) -> dict[str, str]:
    """Read a table of environment variables."""
    if not isinstance(value, dict):
        raise Unfit(f'expected a table as in {{ NAME = "value" }}, not {kind_of(value)}')
    faults: list[tuple[KeyPath, str]] = []
    for variable, content in value.items():
        if not _VARIABLE.fullmatch(variable):
            faults.append(((variable,), "is no name for an environment variable"))
        elif not isinstance(content, str):
            faults.append(((variable,), f"expected a string, not {kind_of(content)}: quote it"))
        elif "\0" in content:
            faults.append(((variable,), "must not hold a NUL character"))
    if faults:
        raise Unfit(inside=faults)
    return {variable: str(content) for variable, content in value.items()}


def options(value: object) -> dict[str, Any]:
    """Read what is handed to the workers: anything that arrives there as it was written."""
    if not isinstance(value, dict):
        raise Unfit(f"expected a table, not {kind_of(value)}")
    faults: list[tuple[KeyPath, str]] = []
    plain = _plain(value, (), faults)
    if faults:
        raise Unfit(inside=faults)
    return dict(plain)


def _plain(value: Any, path: KeyPath, faults: list[tuple[KeyPath, str]]) -> Any:
    """Return a copy of plain types; note what would not survive the way to the worker."""
    if isinstance(value, dict):
        return {key: _plain(item, (*path, key), faults) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, (*path, index), faults) for index, item in enumerate(value)]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        faults.append((path, "is a whole number of more than 64 bits"))
    elif not isinstance(value, int | float):
        faults.append((path, "is a date or time; write it as a string"))
    return value


# --- the environment ---------------------------------------------------------------------------


def expand(written: str, env: Mapping[str, str]) -> str:
    """Return the string with `${NAME}` and `${NAME:-default}` replaced, and `$${` as `${`.

    As in a shell, the default also stands in for an empty variable. What was inserted is not
    looked into again.

    Raises:
        Unfit: a variable is not set and has no default, or is no text; a reference is malformed.
    """
    if "${" not in written:
        return written
    unset: list[str] = []

    def replace(match: re.Match[str]) -> str:
        variable, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        if variable is None:
            raise Unfit('"${" must be ${NAME} or ${NAME:-default}; write "$${" for the characters')
        if default is not None and "${" in default:
            raise Unfit(f"the default of ${{{variable}}} must not hold a reference of its own")
        value = env.get(variable)
        if default is not None and not value:
            return default
        if value is None:
            unset.append(variable)
            return ""
        if not value.isascii() and _is_broken(value):
            raise Unfit(f"the environment variable {variable} is not UTF-8")
        return value

    value = _REFERENCE.sub(replace, written)
    if unset:
        names = " and ".join(dict.fromkeys(unset))
        verb, them = ("is", "it") if len(set(unset)) == 1 else ("are", "them")
        setting = next((_UNIT_SETTINGS[each] for each in unset if each in _UNIT_SETTINGS), "")
        by_systemd = f" (systemd does, for a unit with {setting}=)" if setting else ""
        raise Unfit(
            f"{names} {verb} not set in the environment; set {them}{by_systemd}, or write "
            f"${{{unset[0]}:-default}}"
        )
    return FromEnvironment(value, written)


def _is_broken(value: str) -> bool:
    """Tell whether a string holds surrogates: bytes that were no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


# --- URLs --------------------------------------------------------------------------------------


def resolved_url(url: str, folder: str) -> str:
    """Return a pool's URL in its one spelling, with the path of SQLite's file made absolute.

    The path is taken as it is up to the first "?", as SQLAlchemy does.

    Raises:
        Unfit: no such scheme, or a SQLite URL that names no file. Quotes nothing but the scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme.lower()):
        raise Unfit("expected a URL such as sqlite:///jobs.db or postgresql://app@host/database")
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if scheme not in _SCHEMES:
        hint = did_you_mean(scheme, _SCHEMES)
        raise Unfit(f'unknown scheme "{scheme}"; known are {", ".join(_SCHEMES)}{hint}')
    if not url.isprintable():
        raise Unfit("holds a character that does not print")
    if scheme == "sqlite":
        return _resolved_sqlite(rest, folder)
    return f"{scheme}://{rest}"


def _resolved_sqlite(rest: str, folder: str) -> str:
    path, mark, query = rest.partition("?")
    if path in {"", "/"}:
        raise Unfit("names no file; write sqlite:///relative.db or sqlite:////absolute.db")
    if not path.startswith("/"):
        raise Unfit("needs three slashes before a relative path, four before an absolute one")
    if path == "/:memory:":
        return f"sqlite:///:memory:{mark}{query}"
    if "?" in folder:
        raise Unfit('the folder of the file holds a "?", which ends the path in a URL')
    return f"sqlite:///{os.path.normpath(os.path.join(folder, path[1:]))}{mark}{query}"


def redacted(url: str) -> str:
    """Return a URL that may be shown: without its password, wherever that may be in it.

    Where the URL is malformed it hides too much rather than too little.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme.lower()):
        return "***"
    login, at, place = rest.rpartition("@")
    user, _, password = login.partition(":")
    if password:
        rest = f"{user}:***@{place}"
    elif not at:
        host, _, port = re.split("[/?#]", rest, maxsplit=1)[0].rpartition(":")
        if port and host and not port.isdecimal() and not port.endswith("]"):
            rest = f"{host}:***"  # a slip in the port, or the password of a URL without "@"
    return f"{scheme}://" + re.sub(r"(?i)(pass\w*|pwd|secret|token)=[^&]*", r"\1=***", rest)


def has_password(written: str) -> bool:
    """Tell whether a URL, as it stands in a file, holds a password itself."""
    plain = _REFERENCE.sub(lambda match: match[2] or "", written)
    return "://" in plain and redacted(plain) != plain
