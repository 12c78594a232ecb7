"""The Containerfile, as far as it can be judged without an engine."""

from __future__ import annotations

import json
import re

from supervisor.cli import main
from tests.supervised import REPO

CONFIG = "/etc/ackvisor/supervisor.toml"


def instructions() -> list[tuple[str, str]]:
    """Return what the last stage consists of."""
    text = (REPO / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]
    begin = max(index for index, (word, _) in enumerate(words) if word == "FROM")
    return words[begin:]


def test_the_supervisor_itself_is_process_1() -> None:
    """No shell stands between it and the signals of the engine, and it is not root."""
    found = dict(instructions())

    assert json.loads(found["ENTRYPOINT"]) == ["supervisor"]
    assert json.loads(found["CMD"]) == ["start", "-c", CONFIG]
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", found["USER"])


def test_its_health_is_that_it_answers() -> None:
    """By a command that there is, on the same file."""
    health = json.loads(dict(instructions())["HEALTHCHECK"].partition("CMD")[2])

    assert health == ["supervisor", "status", "-c", CONFIG]
    assert {"start", "status"} <= set(main.commands)
