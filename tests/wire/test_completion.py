"""What a shell offers, and what the command line says of slips: without any supervisor."""

from __future__ import annotations

import os

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from supervisor import requests
from supervisor.cli import main
from supervisor.client import Client
from supervisor.config.values import Unfit, duration, size
from supervisor.errors import NoSupervisorError
from supervisor.plain import counted
from tests.core.script import Script, group

FILE = """
[supervisor]
runtime_dir = "nowhere"
[workers.jobs]
run = "workers.jobs:run"
[workers.journal]
command = ["true"]
[workers.web]
app = "web:app"
"""


def offered(words, incomplete):
    """Return what is offered for a word that has begun so."""
    found = ShellComplete(main, {}, "supervisor", "_SUPERVISOR_COMPLETE").get_completions(
        words, incomplete
    )
    return [item.value for item in found]


def test_groups_are_offered_from_the_file(tmp_path):
    """Also where no supervisor runs; for `scale` with the sign that has to follow."""
    config = tmp_path / "orders.toml"
    config.write_text(FILE)
    at = ["-c", str(config)]
    assert offered(["restart", *at], "jo") == ["jobs", "journal"]
    assert offered(["scale", *at], "") == ["jobs=", "journal=", "web="]
    assert offered(["why", *at], "") == []
    assert offered(["restart"], "jo") == []


@pytest.mark.parametrize("content", [b"", b"[workers", b"\xff\xfe", b"workers = 3"])
def test_a_file_that_cannot_be_read_offers_nothing(tmp_path, content):
    """Who presses Tab reads no error."""
    config = tmp_path / "orders.toml"
    config.write_bytes(content)
    assert offered(["restart", "-c", str(config)], "") == []
    assert offered(["restart", "-c", str(tmp_path / "missing")], "") == []


@pytest.mark.parametrize("count", ["10001", "1000000", "9" * 5000])
def test_too_many_workers_are_told_the_limit(tmp_path, count):
    """What is a number is not called anything else."""
    result = CliRunner().invoke(main, ["scale", f"jobs={count}", "-c", str(tmp_path / "f.toml")])
    assert result.exit_code == 2
    assert "a group has 0 to 10000 workers" in result.output


def test_who_looks_into_one_that_has_gone_is_told_where_to_look():
    """Its story is there still."""
    said = requests.unknown_worker("jobs-1", Script(group()).snapshot(), was_there=True)
    assert said == "jobs-1 has gone; `supervisor why jobs-1` tells how it ended"


def test_the_folder_of_another_user_is_named(tmp_path, monkeypatch):
    """The default folder has the uid in its name: root looks in another one than the owner."""
    other = tmp_path / "ackvisor-1000-orders"
    other.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: other.stat().st_uid + 1)
    with pytest.raises(NoSupervisorError) as caught:
        Client(tmp_path / "ackvisor-0-orders", "orders")
    assert f"looked in {tmp_path / 'ackvisor-0-orders'}" in str(caught.value)
    assert f"there is {other}, of uid {other.stat().st_uid}: ask as that user" in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(NoSupervisorError) as caught:
        Client(tmp_path / "ackvisor-0-orders", "orders")
    assert "start one with" in str(caught.value)


def test_one_worker_is_no_workers():
    """As everywhere in English."""
    assert [counted(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]


@pytest.mark.parametrize("value", ["1B", "1MiB", 1, "2000TiB"])
def test_a_size_that_no_worker_is_below_is_refused(value):
    """One sentence with both ends; 0 is off."""
    with pytest.raises(Unfit, match=r"from 16MiB .no worker is smaller. to 1024TiB, or 0 for off"):
        size(value)
    assert size(0) == 0
    assert size("16MiB") == 16 << 20


def test_an_age_below_a_second_is_refused():
    """A fleet would do nothing but replace its workers."""
    age = duration(off=True, least=1.0)
    with pytest.raises(Unfit, match='a duration from 1s to one year, or "0" for off, not "1ms"'):
        age("1ms")
    assert (age("1s"), age("0")) == (1.0, 0.0)
