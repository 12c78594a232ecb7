"""supervisord: supervisor/tests/test_end_to_end.py, what of it is about starts, output and text."""

from __future__ import annotations

import json
import subprocess

from tests.supervised import Supervised, group

SH = ("sh", "-c")


def program(name: str, *argv: str, env: dict[str, str] | None = None) -> str:
    """Return the TOML of a group that runs a program."""
    lines = [f"[workers.{name}]", f"command = {json.dumps(argv, ensure_ascii=False)}"]
    if env:
        lines += [f"[workers.{name}.env]", *(f"{k} = {json.dumps(v)}" for k, v in env.items())]
    return "\n".join(lines) + "\n"


def said(supervised: Supervised, name: str) -> str:
    """Return the first line that a group's program has written."""
    return str(supervised.event("worker.output", group=name)["line"])


def test_issues_291_550_638_986_1170(tmp_path):
    """Signs in the environment and in words arrive as they are; the group's env wins; no UTF-8 hurts nobody."""
    odd = "foo_%s_%_%%_$2_bar"
    config = (
        program("issue_291", *SH, 'echo "$ODD"; sleep 60')
        + program("issue_550", *SH, 'echo "$OWN"; sleep 60', env={"OWN": "group's"})
        + program("issue_638", *SH, r"printf 'a\377b\n'; sleep 60")
        + program("issue_986", *SH, "echo '%h:%p %P $${HOME}'; sleep 60")
    )
    env = {"ODD": odd, "OWN": "everybody's"}
    with Supervised(tmp_path, config, env=env) as supervised:
        assert said(supervised, "issue_291") == odd
        assert said(supervised, "issue_550") == "group's"
        assert said(supervised, "issue_638") in {"a\ufffdb", r"a\xffb"}
        assert said(supervised, "issue_986") == "%h:%p %P ${HOME}"
        assert supervised.status_once_ready()["state"] == "ready"
        assert supervised.stop() == 0


def test_issues_565_1231_1298(tmp_path):
    """Text that is not ASCII is followed, also where the locale has none, and by who reads one line only."""
    text = "Zwölf Boxkämpfer 蛇 🐍"
    config = program("hello", *SH, f"while :; do echo '{text}'; sleep 0.05; done")
    config += group(
        "news", "once", backoff="50ms", backoff_max="50ms"
    )  # for who follows: always more
    with Supervised(tmp_path, config) as supervised:
        supervised.event("worker.output")
        ascii_only = {
            **supervised.env,
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        }
        for locale in (supervised.env, ascii_only):
            follower = subprocess.Popen(
                supervised.words("status"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=supervised.cwd,
                env=locale,
            )
            out, err = follower.communicate(timeout=30.0)
            assert (follower.returncode, err) == (0, b""), err
            assert b"hello-1" in out
        shell = f"{' '.join(supervised.words('events', '--follow'))} | head -n 1"
        piped = subprocess.run(
            ["bash", "-o", "pipefail", "-c", shell],
            capture_output=True,
            timeout=30.0,
            check=False,
            cwd=supervised.cwd,
            env=ascii_only,
        )
        assert piped.stdout.count(b"\n") == 1
        assert b"Traceback" not in piped.stderr
        assert supervised.stop() == 0
