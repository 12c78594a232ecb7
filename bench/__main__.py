"""What `make bench` runs: the supervision figures, the pool's, a budget's, and what all of it costs a job.

`--peers floor,cotyledon` limits it to some contenders, `--only stop` (may be repeated) to some
figures, `--repeat 3` does so many rounds instead of those that fit in four minutes. The exit code says whether all could be measured, not
whether all bounds were met: a bound missed on a busy machine is to be read, not to break a build.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import supervision
from bench.contenders import CONTENDERS, ROOT, Contender
from bench.results import Results

_MODULES = ("pool", "budget", "cost")  # each of them prints figures of its own
_ROUNDS = 7
_CLEANS_UP_S = 30.0
_BUDGET_S = 235.0  # for the supervision figures; a busy machine has fewer rounds, see n


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    # As a Ctrl-C: out through every `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = options.only or [*(figure.name for figure in supervision.FIGURES), *_MODULES]
    figures = [figure for figure in supervision.FIGURES if figure.name in wanted]
    failed = False
    if figures:
        contenders = _present(options.peers)
        if not contenders:
            return 1
        machine = _machine()
        rounds, budget_s = (options.repeat, math.inf) if options.repeat else (_ROUNDS, _BUDGET_S)
        results = supervision.measure(contenders, figures, rounds, budget_s, _progress)
        _progress("")
        _show(results, machine)
        failed = bool(results.failures)
        if options.json:
            options.json.write_text(json.dumps(machine | results.as_json(), indent=1) + "\n")
    for module in _MODULES:
        if module in wanted:
            failed |= _run(module) != 0
    return int(failed)


def _run(module: str) -> int:
    """Run a module's figures in an interpreter of their own; an interrupt lets it clean up."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", f"bench.{module}"]
    # In a session of its own: a Ctrl-C reaches it once, from here.
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as popen:
        try:
            return popen.wait()
        except BaseException:
            popen.send_signal(signal.SIGINT)
            try:
                popen.wait(_CLEANS_UP_S)
            except subprocess.TimeoutExpired:
                popen.kill()
            raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    names = [figure.name for figure in supervision.FIGURES]
    parser.add_argument("--only", action="append", metavar="FIGURE", choices=[*names, *_MODULES])
    parser.add_argument("--peers", type=_contenders, default=CONTENDERS)
    parser.add_argument("--repeat", type=_positive, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _contenders(text: str) -> list[Contender]:
    known = {contender.name: contender for contender in CONTENDERS}
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
    return [known[name] for name in names]


def _present(contenders: Sequence[Contender]) -> list[Contender]:
    for contender in contenders:
        if missing := contender.missing():
            print(f"without {contender.name}: {missing}", file=sys.stderr)
    return [contender for contender in contenders if not contender.missing()]


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "versions": {
            name: metadata.version(name) for name in ("ackvisor", "circus", "cotyledon", "gunicorn")
        },
    }


def _show(results: Results, machine: dict[str, Any]) -> None:
    print(results.table())
    print(
        "Median, least-greatest (n). / best: to the best peer. Not in time: somebody was still there"
        " after 3 s.\n"
        "The floor is a bare loop of fork and waitpid, for the cancel a bare ROUTER with DEALERs."
        " Wake-ups are context\n"
        "switches, voluntary or not, of all threads in 10 s of idling; the supervisor's include"
        " those of every process\n"
        "that is no worker. MB are 10⁶ bytes.\n"
        f"Python {machine['python']}, Linux {machine['kernel']}, {machine['cores']} cores, load"
        f" {machine['load_before']:.1f} before;"
        f" {', '.join(f'{name} {version}' for name, version in machine['versions'].items())}."
    )
    for failure in dict.fromkeys(results.failures):
        print(f"FAILED: {failure}")


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
