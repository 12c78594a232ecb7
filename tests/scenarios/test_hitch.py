"""hitch: the recipe of varnish/hitch#285."""

from __future__ import annotations

import functools
import signal
import time

from tests.supervised import Supervised, group, wait_until

GAPS = (0.01, 0.09)  # seconds
SERVE = """
def run(worker):
    worker.log.info("code.serves", version={version})
    with worker.job("small"):
        worker.ready()
        worker.accepting.wait()
"""


def test_double_sighup(tmp_path):
    """hitch#285: of two SIGHUPs 10 to 90 ms apart the second is in force; nothing is left of the first."""
    config = group("web", "app:run", count=2, min_ready_time=0)
    modules = {"app": SERVE.format(version=0)}
    with Supervised(tmp_path, config, modules=modules) as supervised:
        supervised.ready()
        for version, gap in enumerate(GAPS, start=1):
            supervised.signal(signal.SIGHUP)
            time.sleep(gap)
            (tmp_path / "app.py").write_text(SERVE.format(version=version))
            supervised.signal(signal.SIGHUP)
            newest = [version] * 2
            wait_until(functools.partial(_are, supervised, newest), "the second one")
            wait_until(lambda: supervised.status()["state"] == "ready", "it is over")
            assert _are(supervised, newest)
            wait_until(lambda: len(supervised.templates()) == 1, "one template")
        assert supervised.stop() == 0
    assert not supervised.events("worker.killed")
    # Who has served has ended in order, whichever generation it was of.
    served = {line["worker"] for line in supervised.events("worker.ready")}
    assert served <= {line["worker"] for line in supervised.events("worker.drained")}


def _are(supervised: Supervised, versions: list[int]) -> bool:
    """Tell whether that is what the living workers run."""
    told = {line["worker"]: line["version"] for line in supervised.events("code.serves")}
    return [told.get(worker, -1) for worker in supervised.worker_pids()] == versions
