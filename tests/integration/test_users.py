"""`user`: workers with the rights of that user and no others, from before their code is imported."""

from __future__ import annotations

import os
import pwd
import re
import signal
import stat
import tempfile
from pathlib import Path

import pytest

from supervisor.config import load
from supervisor.config.users import find
from supervisor.config.values import Unfit
from supervisor.errors import ConfigError
from tests.supervised import Supervised, group, is_alive, wait_until

NOBODY = pwd.getpwnam("nobody")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@as_root
def test_workers_are_that_user_and_can_do_nothing_else(tmp_path):
    """User, groups and capabilities are gone before the import; so is the way back."""
    options = {"runtime_dir": str(tmp_path / "run")}
    config = group("app", "tests.lowly:rights", options, user="nobody")
    config += group("root", "tests.lowly:rights", options)
    config = config.replace('"nobody"', '"nobody"\nenv = { SHELL = "/given" }')
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        found = supervised.event("victim.rights", group="app")
        assert found["status"]["Uid"] == [str(NOBODY.pw_uid)] * 4
        assert found["status"]["Gid"] == [str(NOBODY.pw_gid)] * 4
        assert set(found["groups"]) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
        assert found["status"]["CapEff"] == found["status"]["CapBnd"] == ["0" * 16]
        assert found["status"]["NoNewPrivs"] == ["1"]
        assert found["imported_as"] == [NOBODY.pw_uid] * 3
        assert found["may"] == ["read its own environment", "list its own descriptors"]
        assert found["env"] == {
            "HOME": NOBODY.pw_dir,
            "USER": "nobody",
            "LOGNAME": "nobody",
            "SHELL": "/given",
        }
        # The other group is what the supervisor is, and has a template of its own.
        other = supervised.event("victim.rights", group="root")
        assert other["status"]["Uid"] == ["0"] * 4
        assert "look into the folder" in other["may"]
        assert {os.stat(f"/proc/{pid}").st_uid for pid in supervised.templates()} == {
            0,
            NOBODY.pw_uid,
        }
        # Nobody else gets to the sockets than before.
        assert stat.S_IMODE(os.stat(supervised.runtime_dir).st_mode) == 0o700
        assert supervised.status()["groups"]["app"]["ready"] == 1
        assert supervised.stop() == 0
        assert supervised.life("app-1")[2:] == ["cancelled", "acknowledged", "drained", "exited"]


@as_root
def test_such_a_worker_is_replaced_reloaded_killed_and_orphaned_like_any_other(tmp_path):
    """All that the supervisor and the template do for a worker works across the change of user."""
    config = group("app", "tests.lowly:idle", user="nobody", backoff="1ms")
    config += group("deaf", "tests.lowly:deaf", user="nobody")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        supervised.ready()
        os.kill(supervised.worker_pids()["app-1"], signal.SIGKILL)
        supervised.event("worker.ready", worker="app-2")
        done = supervised.command("restart", "app", "--wait")
        assert done.returncode == 0, done.stderr
        supervised.command("restart", "deaf")
        killed = supervised.event("worker.killed", worker="deaf-1")
        assert re.search(r"lowly\.py\", line \d+ in deaf", killed["stacks"])
        supervised.event("worker.exited", worker="deaf-1")
        pids = list(supervised.worker_pids().values())
        assert len(pids) == 2
        supervised.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), "they end with it")
        supervised.wait()
        wait_until(lambda: not supervised.processes(), "and the template")


@as_root
def test_check_import_runs_as_that_user():
    """A check as root runs no code of a group as root that a start would not."""
    source = "import os\nraise RuntimeError(f'imported as {os.getuid()}')\n"
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are root's alone
        folder = Path(name)
        folder.chmod(0o755)
        supervised = Supervised(
            folder, group("app", "mine:run", user="nobody"), modules={"mine": source}
        )
        done = supervised.command("check", "--import")
    assert f"imported as {NOBODY.pw_uid}" in done.stderr, done.stderr


def problem(tmp_path: Path, user: str, uid: int) -> str:
    """Return what is wrong with a group of that user when read by a process of that uid."""
    file = tmp_path / "test.toml"
    file.write_text(f'[workers.app]\nrun = "json:loads"\nuser = "{user}"\n')
    with pytest.raises(ConfigError) as caught:
        load(file, env={}, uid=uid)
    (found,) = caught.value.problems
    assert found.key == "workers.app.user"
    assert found.line == 3
    return found.message


@pytest.mark.parametrize("user", ["no-such-user", "4294967294", "99999999999999999999", "x\\ty"])
def test_an_unknown_user_is_a_problem_of_the_file(tmp_path, user):
    """With the key and its line; by name and by number."""
    assert "there is no user" in problem(tmp_path, user, 0)


def test_who_is_not_root_cannot_have_workers_of_another_user(tmp_path):
    """The remedy is named."""
    message = problem(tmp_path, "nobody", 4321)
    assert "started as root" in message
    assert "4321" in message


def test_root_is_no_user_to_become(tmp_path):
    """Neither by root itself nor by anybody else."""
    assert "is root" in problem(tmp_path, "root", 0)
    assert "is root" in problem(tmp_path, "root", 4321)


def test_the_user_that_one_is_already_needs_no_root():
    """The same file serves the service and the developer who has that name."""
    assert find("nobody", NOBODY.pw_uid) is None
    assert find(str(NOBODY.pw_uid), NOBODY.pw_uid) is None


@as_root
def test_numbers_are_users_too():
    """As systemd's User= has them."""
    found = find(str(NOBODY.pw_uid), 0)
    assert found is not None
    assert (found.name, found.uid, found.gid) == ("nobody", NOBODY.pw_uid, NOBODY.pw_gid)


@as_root
def test_a_root_without_the_capabilities_is_told_so(monkeypatch):
    """As in a container that dropped them: before the start, not in a traceback of its template."""
    monkeypatch.setattr("supervisor.config.users._effective", lambda: 0)
    with pytest.raises(Unfit, match="CAP_SETGID and CAP_SETUID"):
        find("nobody", 0)
