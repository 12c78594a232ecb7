"""The wheel as a user installs it: what it holds, and that it runs without the checkout."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.supervised import REPO, Supervised, group

APPLICATION = """
def run(worker):
    worker.ready()
    worker.accepting.wait()
    worker.log.info("application.done")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel of this checkout."""
    if importlib.util.find_spec("hatchling") is None:
        assert "CI" not in os.environ, "hatchling is needed to build the wheel"
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys, hatchling.build as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=REPO, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def program(wheel, tmp_path):
    """Install the wheel into an environment of its own; return the path of its command."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install"),
            *("--no-deps", "--no-index", "--no-compile", str(wheel)),
        ],
        check=True,
    )
    # Its dependencies are ours; a path in a .pth brings no editable installs with it.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "supervisor"


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    """Every module and both markers for type checkers; the licence; no test and no benchmark."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        str(path.relative_to(REPO))
        for package in ("supervisor", "workers")
        for path in (REPO / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == modules
    assert {"supervisor/py.typed", "workers/py.typed", "workers/template.py"} <= names
    assert {name.partition("/")[2] for name in info} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }
    assert wheel.name.startswith("ackvisor-")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_installed_wheel_runs_without_the_checkout(program, tmp_path):
    """--help, check, start, status and stop, from a folder that has nothing of ours."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    supervised = Supervised(
        tmp_path,
        group("app", "application:run", count=2),
        modules={"application": APPLICATION},
        program=[str(program)],
        cwd=elsewhere,
    )
    supervised.config.write_text(supervised.config.read_text().replace(f', "{REPO}"', ""))
    supervised.env.pop("PYTHONPATH", None)
    where = "import supervisor, workers; print(supervisor.__file__, workers.__file__)"
    found = subprocess.run(
        [str(program.parent / "python"), "-c", where],
        capture_output=True,
        text=True,
        check=True,
        cwd=elsewhere,
        env=supervised.env,
    ).stdout.split()
    assert all(Path(path).is_relative_to(program.parent.parent) for path in found)

    done = subprocess.run([str(program), "--help"], capture_output=True, text=True, check=True)
    assert "start" in done.stdout
    assert supervised.command("check", "--import").returncode == 0
    with supervised:
        supervised.ready()
        assert supervised.status()["groups"]["app"]["ready"] == 2
        assert supervised.command("stop").returncode == 0
        assert supervised.wait() == 0
    assert len(supervised.events("application.done")) == 2
    assert str(REPO) not in supervised.text()
