"""`supervisor check` and `check --import`: entry points that are there, and that import."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import multiprocess.resource_tracker
import pytest

from supervisor.config import Settings, load
from supervisor.imports import check_entry_points, check_imports

CONF = Path(__file__).parents[2] / "conf"
ENOUGH = 30.0  # seconds for an import that takes none


App = Callable[..., Settings]


@pytest.fixture
def app(tmp_path: Path) -> App:
    """Write an application's files, and a configuration that runs some of them."""

    def app(files: dict[str, str], *runs: str, path: str = '["."]', env: str = "") -> Settings:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        text = f"[supervisor]\npath = {path}\n"
        for number, run in enumerate(runs):
            text += f'[workers.w{number}]\nrun = "{run}"\nenv = {{ {env} }}\n'
        (tmp_path / "app.toml").write_text(text)
        return load(tmp_path / "app.toml", env={}, uid=0)

    return app


@pytest.fixture
def no_tracker() -> Iterator[None]:
    """End the process that multiprocess keeps for shared memory once it has spawned anything."""
    yield
    multiprocess.resource_tracker._resource_tracker._stop()


FILES = {
    "plain.py": "",
    "package/__init__.py": "",
    "package/module.py": "",
    "package/broken/__init__.py": "",
    "namespace/deep/module.py": "",
}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- is it there? ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        "plain:run",
        "package:run",
        "package.module:run",
        "namespace.deep.module:run",
        "zipped:run",
        "time:sleep",
        "json.decoder:JSONDecoder",
        "multiprocess.context:Process",
    ],
)
def test_a_module_that_is_there_is_found(app: App, tmp_path: Path, run: str) -> None:
    """Modules, packages, namespaces, zip files, built-in and installed modules are all found."""
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as archive:
        archive.writestr("zipped.py", "")
    settings = app(FILES, run, path='[".", "lib.zip"]')

    assert check_entry_points(settings) == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            "plian:run",
            'module "plian" is neither in path ({}) nor installed; did you mean "plain"?',
        ),
        ("qqqqqqq.a:run", 'module "qqqqqqq" is neither in path ({}) nor installed'),
        ("plain.a:run", 'there is no module "plain.a": "plain" is a module and not a package'),
        (
            "package.modul:run",
            (
                'there is no module "package.modul": package "package" has no "modul"'
                '; did you mean "module"?'
            ),
        ),
        (
            "namespace.deep.x.y:run",
            'there is no module "namespace.deep.x.y": package "namespace.deep" has no "x"',
        ),
        ("namespace.deep:run", '"namespace.deep" is a folder without code (no __init__.py)'),
        (
            "package.broken.x:run",
            'there is no module "package.broken.x": package "package.broken" has no "x"',
        ),
    ],
)
def test_a_module_that_is_not_there_is_told(
    app: App, tmp_path: Path, run: str, message: str
) -> None:
    """What lacks is named with the place that was looked in and the nearest name there."""
    settings = app(FILES, "plain:run", run)
    (problem,) = check_entry_points(settings)

    assert problem.key == "workers.w1.run"
    assert problem.line == 7
    assert problem.message == message.format(tmp_path)


def test_nothing_is_imported_to_find_a_module(app: App, tmp_path: Path) -> None:
    """Not even a parent package is run, and none is left in sys.modules."""
    mark = tmp_path / "was-imported"
    harm = f"open({str(mark)!r}, 'w').close()\nraise RuntimeError\n"
    names = ("marked/__init__.py", "marked/inner/__init__.py", "marked/inner/module.py")
    settings = app(dict.fromkeys(names, harm), "marked.inner.module:run")

    assert check_entry_points(settings) == []
    assert not mark.exists()
    assert not [name for name in sys.modules if name.startswith("marked")]


def test_a_module_that_has_just_been_written_is_found(app: App, tmp_path: Path) -> None:
    """The import system's listing of a folder is not trusted, though the folder looks unchanged."""
    settings = app({"early.py": ""}, "late:run")
    before = tmp_path.stat().st_mtime_ns
    assert len(check_entry_points(settings)) == 1
    (tmp_path / "late.py").touch()
    os.utime(tmp_path, ns=(before, before))

    assert check_entry_points(settings) == []


@pytest.mark.parametrize("name", ["dev.toml", "prod.toml"])
def test_the_shipped_entry_points_are_there(name: str) -> None:
    """What the files in conf/ run can be found on a fresh clone."""
    assert check_entry_points(load(CONF / name, env={}, uid=0)) == []


# --- does it import? ---------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("no_tracker")


def test_entry_points_that_import(app: App) -> None:
    """Functions, methods, classes and partial objects are called by `run`; nothing is wrong."""
    text = "import functools\ndef run(worker): pass\nclass C:\n  def run(self): pass\nP = functools.partial(run)\n"

    settings = app({"good.py": text}, "good:run", "good:C.run", "good:P")

    assert check_imports(settings, timeout=ENOUGH) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def rum(worker): pass", 'module "user" has no "run"; did you mean "rum"?'),
        ("run = 3", '"user:run" cannot be called: it is of type int'),
        ("\nimport qqqqqqq", "ModuleNotFoundError: No module named 'qqqqqqq' ({file}, line 2)"),
        (
            "import json\n\njson.loads('[')",
            "JSONDecodeError: Expecting value: line 1 column 2 (char 1) ({file}, line 3)",
        ),
        ("\ndef (", "SyntaxError: invalid syntax ({file}, line 2)"),
        ("raise SystemExit(3)", "SystemExit: 3 ({file}, line 1)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt ({file}, line 1)"),
        (
            "raise ExceptionGroup('two\\nlines', [OSError()])",
            "ExceptionGroup: two lines (1 sub-exception) ({file}, line 1)",
        ),
        (
            "class E(Exception):\n  def __str__(self): 1/0\nraise E",
            "E: <exception str() failed> ({file}, line 3)",
        ),
        ("raise ValueError('x' * 100_000)", "x… ({file}, line 1)"),
        ("raise ValueError('\\udcff')", "ValueError: \udcff ({file}, line 1)"),
        ("import os\nos._exit(4)", "ended the process (exit code 4)"),
        ("import os\nos._exit(0)", "ended the process (exit code 0)"),
        ("import os\nos.kill(os.getpid(), 11)", "ended the process (Segmentation fault)"),
        ("import os\nos.closerange(0, 1000)\ndef run(): pass", "ended the process (exit code 1)"),
    ],
)
def test_an_entry_point_that_does_not_import(
    app: App, tmp_path: Path, text: str, message: str
) -> None:
    """The problem is the traceback's last line and the user's own line that led to it."""
    (problem,) = check_imports(app({"user.py": text}, "user:run"), timeout=ENOUGH)

    assert (problem.line, problem.key) == (4, "workers.w0.run")
    assert problem.message.endswith(message.format(file=tmp_path / "user.py"))
    assert len(problem.message) < 1000


def test_a_virtual_environment_in_path_is_not_the_users_code(app: App, tmp_path: Path) -> None:
    """The user's own line is told, not one of a package that is installed below `path`."""
    packages = ".venv/lib/site-packages"
    files = {
        f"{packages}/installed.py": "def f(): raise OSError('no')",
        "user.py": f"import sys\nsys.path.append('{tmp_path}/{packages}')\n"
        "import installed\ninstalled.f()",
    }
    (problem,) = check_imports(app(files, "user:run"), timeout=ENOUGH)

    assert problem.message.endswith(f"OSError: no ({tmp_path}/user.py, line 4)")


def test_an_import_sees_path_and_env(app: App) -> None:
    """The workers' `path` comes before everything installed, and their `env` is set."""
    files = {
        "user.py": "import os, click\nassert os.environ['MODE'] == 'prod'\nrun = click.ours",
        "click.py": "def ours(worker): pass",
    }
    settings = app(files, "user:run", env='MODE = "prod"')

    assert check_imports(settings, timeout=ENOUGH) == []
    assert "MODE" not in os.environ


def test_an_import_has_a_deadline_and_leaves_nothing(app: App, tmp_path: Path) -> None:
    """An import that hangs is ended at its deadline, with the processes that it has started."""
    pids = tmp_path / "pids"
    text = (
        "import os, signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(1000)\n"
    )
    began = time.monotonic()
    (problem,) = check_imports(app({"user.py": text}, "user:run"), timeout=2.0)

    assert time.monotonic() - began >= 2.0
    assert problem.message == 'importing "user" had not ended after 2 s'
    deadline = time.monotonic() + ENOUGH
    while left := [pid for pid in map(int, pids.read_text().split()) if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)


def test_a_process_that_has_not_even_begun_is_ended(app: App) -> None:
    """The shortest deadline holds, though the child has made no process group yet."""
    settings = app({"user.py": "import time\ntime.sleep(1000)"}, "user:run")
    (problem,) = check_imports(settings, timeout=0.001)

    assert problem.message == 'importing "user" had not ended after 0.001 s'


def test_a_grandchild_that_keeps_the_pipe_does_not_delay(app: App, tmp_path: Path) -> None:
    """A process that dies is told at once, also when its own child holds all its descriptors."""
    text = "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\nos._exit(5)\n"
    began = time.monotonic()
    (problem,) = check_imports(app({"user.py": text}, "user:run"), timeout=600.0)

    assert problem.message == 'importing "user" ended the process (exit code 5)'
    assert time.monotonic() - began < 600.0


def test_one_bad_import_does_not_hide_another(app: App) -> None:
    """Each group's entry point is tried in a process of its own."""
    files = {"a.py": "import os\nos._exit(1)", "b.py": "def run(w): pass", "c.py": "x"}
    found = check_imports(app(files, "a:run", "b:run", "c:run"), timeout=ENOUGH)

    assert [each.key for each in found] == ["workers.w0.run", "workers.w2.run"]
