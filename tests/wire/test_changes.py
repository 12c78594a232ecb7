"""What a reload may apply to running workers: keys of the file, and the code beside it."""

from __future__ import annotations

import os
import time
from dataclasses import fields
from pathlib import Path

import pytest

from supervisor import sources
from supervisor.config import (
    GroupSettings,
    LogSettings,
    PoolSettings,
    Settings,
    SupervisorSettings,
    compared,
    load,
)
from supervisor.config.changes import _LIVE
from supervisor.sources import Sources

FILE = """
[supervisor]
name = "one"
grace = "10s"
path = ["."]
[log]
level = "info"
[pools.main]
url = "sqlite:///a.db"
max_open = 4
budget = 40
[workers.web]
run = "app:run"
count = 2
env = { A = "1" }
[workers.web.options]
depth = 1
"""


def read(folder: Path, *edits: tuple[str, str]) -> Settings:
    """Return the settings of the file with these edits."""
    text = FILE
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "one.toml").write_text(text)
    return load(folder / "one.toml", env={}, uid=0)


def test_nothing_has_changed(tmp_path):
    """Comments and order are not settings; and nothing is not something that could be applied."""
    changes = compared(read(tmp_path), read(tmp_path, ("[log]", "# more\n[log]")))
    assert (changes.live, changes.others, changes.are_live) == ((), (), False)


@pytest.mark.parametrize(
    ("old", "new", "live"),
    [
        ('grace = "10s"', 'grace = "12s"', ("supervisor.grace", "supervisor.abort_margin")),
        ('level = "info"', 'level = "debug"', ("log.level",)),
        ("max_open = 4", "max_open = 5", ("pools.main.max_open", "pools.main.max_idle")),
        ("budget = 40", "budget = 41\nmin = 2", ("pools.main.budget", "pools.main.min")),
        ("count = 2", "count = 3\nsurge = 2", ("workers.web.count", "workers.web.surge")),
        ("count = 2", 'count = 2\nmax_rss = "1GiB"', ("workers.web.max_rss",)),
    ],
)
def test_what_is_live(tmp_path, old, new, live):
    """Numbers and times that somebody looks up when he needs them."""
    changes = compared(read(tmp_path), read(tmp_path, (old, new)))
    assert (set(changes.live), changes.others) == (set(live), ())
    assert changes.are_live


@pytest.mark.parametrize(
    ("old", "new", "others"),
    [
        ('path = ["."]', 'path = [".", "lib"]', ["supervisor.path"]),
        ('"sqlite:///a.db"', '"sqlite:///b.db"', ["pools.main.url"]),
        ("budget = 40\n", "", ["pools.main.budget"]),
        ('run = "app:run"', 'run = "app:go"', ["workers.web.run"]),
        ('A = "1"', 'A = "2"', ["workers.web.env"]),
        ("depth = 1", "depth = 2", ["workers.web.options"]),
        ("[workers.web.options]", '[workers.b]\nrun = "b:b"\n[workers.web.options]', ["workers.b"]),
    ],
)
def test_what_needs_new_workers(tmp_path, old, new, others):
    """What a process is made of; one such key makes the whole reload a roll."""
    changes = compared(read(tmp_path), read(tmp_path, (old, new), ('"info"', '"debug"')))
    assert list(changes.others) == others
    assert not changes.are_live


def test_every_live_key_is_one():
    """A key that is renamed or goes is not left behind in the list."""
    assert set(_LIVE) == {SupervisorSettings, LogSettings, PoolSettings, GroupSettings}
    for kind, names in _LIVE.items():
        assert names <= {each.name for each in fields(kind)}


# --- the code --------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path):
    """Return a folder with code that was there a while before it is loaded."""
    (tmp_path / "app" / "inner").mkdir(parents=True)
    for name in ("app/a.py", "app/inner/b.py", "app/data.txt"):
        (tmp_path / name).write_text("pass\n")
    time.sleep(3 * sources.TICK)  # the resolution of what is measured
    return tmp_path / "app"


def test_the_same_code_leaves_no_doubt(code):
    """What is no code may be written all the time, and caches are the interpreter's own."""
    loaded = Sources([str(code)])
    (code / "data.txt").write_text("more")
    (code / "__pycache__").mkdir()
    (code / "__pycache__" / "a.py").write_text("")
    (code / ".git").mkdir()
    (code / ".git" / "hook.py").write_text("")
    assert loaded.doubt([]) == ""


def test_a_file_that_is_younger_is_found_wherever_it_is(code):
    """Below the folders of path, and in folders that code was imported from."""
    loaded = Sources([str(code)])
    (code / "inner" / "b.py").write_text("pass  # changed\n")
    assert loaded.doubt([]) == f"{code}/inner/b.py has changed"

    loaded = Sources([])
    assert loaded.doubt([str(code)]) == ""  # nobody has asked to look below it
    (code / "new.py").write_text("")
    assert loaded.doubt([str(code)]) == f"{code}/new.py has changed"


def test_an_archive_unpacked_with_its_old_times_is_found(code):
    """The time of the contents can be set by anybody; that of the change cannot."""
    loaded = Sources([str(code)])
    time.sleep(3 * sources.TICK)
    (code / "a.py").write_text("pass  # of last year\n")
    os.utime(code / "a.py", (1, 1))
    assert loaded.doubt([]) == f"{code}/a.py has changed"


def test_a_release_that_is_switched_by_a_link_is_found(code):
    """Its files may be older than what is loaded."""
    (code.parent / "two").mkdir()
    link = code.parent / "current"
    link.symlink_to("app")
    loaded = Sources([str(link)])
    assert loaded.doubt([]) == ""
    link.unlink()
    link.symlink_to("two")
    assert "is another one" in loaded.doubt([])


def test_what_cannot_be_looked_through_in_a_moment_is_a_doubt(code, monkeypatch):
    """A folder of that many entries, and a clock that was set."""
    loaded = Sources([str(code)])
    monkeypatch.setattr(sources, "MAX_ENTRIES", 2)
    assert "too much" in loaded.doubt([])
    monkeypatch.undo()
    assert loaded.doubt([]) == ""
    loaded._offset -= 1.0
    assert "the clock was set" in loaded.doubt([])
