"""Pools inside workers: leaks are named while they last, and are no reason to be killed."""

from __future__ import annotations

from tests.supervised import Supervised, group

LEAKER = """
def run(worker):
    take(worker)
    worker.ready()
    worker.accepting.wait()

def take(worker):
    worker.kept = worker.pools["main"].get()
"""


def test_a_leak_is_told_while_it_lasts_and_again_in_the_report_of_the_stop(tmp_path):
    """pool.leak names the borrower's function once; the stop waits, reports, and kills nobody."""
    config = (
        f'[pools.main]\nurl = "sqlite:///{tmp_path}/leak.db"\nleak_threshold = "100ms"\n'
        + group("web", "leaker:run", count=2)
    )
    with Supervised(
        tmp_path, config, supervisor='grace = "1s"', modules={"leaker": LEAKER}
    ) as supervised:
        supervised.ready()
        for worker in ("web-1", "web-2"):
            leak = supervised.event("pool.leak", worker=worker)
            assert (leak["pool"], leak["group"]) == ("main", "web")
            assert leak["held_seconds"] >= 0.1
            assert "in take" in leak["stack"]
        assert supervised.stop() == 0
        assert len(supervised.events("pool.leak")) == 2
        assert not supervised.events("worker.killed")
        for drained in supervised.events("worker.drained"):
            report = drained["reports"]["main"]
            (leaked,) = report["leaked"]
            assert "in take" in leaked["stack"]


SETTINGS = """
from dataclasses import asdict
def run(worker):
    worker.log.info("pool.settings", **{k: str(v) for k, v in asdict(settings(worker)).items()})
    worker.ready()
    worker.accepting.wait()

def settings(worker):
    return worker.pools["main"]._state.settings
"""


def test_every_setting_of_the_file_reaches_the_pool(tmp_path):
    """What `[pools.NAME]` says is what the worker's pool goes by."""
    wanted = {
        "max_open": 7,
        "max_idle": 3,
        "max_lifetime": 61.0,
        "max_idle_time": 62.0,
        "acquire_timeout": 1.5,
        "leak_threshold": 6.0,
        "connect_timeout": 0.75,
        "max_connecting": 5,
        "validate_after_idle": 9.0,
        "keepalive": 11.0,
    }
    keys = "".join(f"{key} = {value}\n" for key, value in wanted.items())
    config = f'[pools.main]\nurl = "sqlite:///{tmp_path}/s.db"\n{keys}' + group("web", "told:run")
    with Supervised(tmp_path, config, modules={"told": SETTINGS}) as supervised:
        supervised.ready()
        (told,) = supervised.events("pool.settings")
        assert {key: told[key] for key in wanted} == {k: str(v) for k, v in wanted.items()}
        assert supervised.stop() == 0
