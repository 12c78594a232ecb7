"""A private Prometheus for a test: on a free port, with its data in the test's folder, gone afterwards."""

from __future__ import annotations

__all__ = ["PROMTOOL", "Prometheus", "require_prometheus"]

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.servers import START_TIMEOUT, STOP_TIMEOUT, free_port, unavailable
from tests.supervised import wait_until

PROGRAM = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")


def require_prometheus() -> None:
    """Skip the test where Debian's package prometheus is missing; in CI that is a failure."""
    if PROGRAM is None or PROMTOOL is None:
        unavailable("Prometheus is not installed (Debian: apt-get install prometheus)")


class Prometheus:
    """One that scrapes a target and keeps rules. Use as a `with` block.

    Args:
        folder: an empty folder for configuration, data and log.
        target: "host:port" of what is scraped, as the job "ackvisor".
        rules: the text of a file of rules.
    """

    def __init__(self, folder: Path, target: str, rules: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "rules.yml").write_text(rules, encoding="utf-8")
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}\n"
            "rule_files: [rules.yml]\n"
            "scrape_configs:\n"
            f"  - {{job_name: ackvisor, static_configs: [{{targets: ['{target}']}}]}}\n",
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    PROGRAM or "prometheus",
                    f"--config.file={self.folder}/prometheus.yml",
                    f"--storage.tsdb.path={self.folder}/data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                    "--log.level=warn",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "GOMAXPROCS": "1"},  # the other core is the supervisor's
            )
        try:
            wait_until(self._is_ready, "Prometheus is ready", START_TIMEOUT)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                continue
            break

    def _is_ready(self) -> bool:
        assert self.process is not None
        log = self.folder / "log"
        assert self.process.poll() is None, log.read_text(encoding="utf-8")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=10) as got:
                return bool(got.status == 200)
        except OSError:
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of the API; fails with the reason for what is refused."""
        words = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{words}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as exc:
            with exc:
                reason = exc.read().decode()
        raise AssertionError(f"{parameters}: {reason}")

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Evaluate an expression now; return the labels and value of each series."""
        found = self.ask("query", query=query)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def samples(self, selector: str) -> list[tuple[dict[str, str], list[float]]]:
        """Return all samples of each series that the selector takes, of the last ten minutes."""
        found = self.ask("query", query=f"{selector}[10m]")["result"]
        return [(series["metric"], [float(v) for _, v in series["values"]]) for series in found]
