"""A database that is away: its workers wait, nobody is blamed, and nobody hammers it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.servers import PostgreSQLServer, private_postgresql
from tests.supervised import Supervised, group, wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQLServer]:
    """Return a PostgreSQL of this module's own: to make another one takes seconds."""
    with private_postgresql() as server:
        yield server


@pytest.fixture
def running(server: PostgreSQLServer) -> Iterator[PostgreSQLServer]:
    """Return it, running; whoever stops it may start it again."""
    server.stop()
    server.start()
    yield server
    server.stop(signal.SIGQUIT)


def pool(url: str) -> str:
    """Return the TOML of a pool that is soon out of patience."""
    return f'[pools.main]\nurl = "{url}"\nacquire_timeout = "200ms"\n'


def users(name: str, run: str, **keys: object) -> str:
    """Return the TOML of a group that must not fail even once, and tries often."""
    fast = {"backoff": "20ms", "backoff_max": "200ms", "min_ready_time": "50ms"}
    return group(name, run, max_restarts=0, **fast, **keys)


def test_a_database_that_is_down_at_the_start_is_waited_for(tmp_path, running):
    """Groups wait and say for what, one worker at a time tries for all, none is to blame."""
    running.stop()
    config = pool(running.url()) + users("eager", "asks_first", count=2)
    config += users("silent", "gives_up_silently", count=2)
    config += users("patient", "waits_for_an_answer", count=1, ready_timeout="3s")
    with Supervised(tmp_path, config) as supervised:
        for name in ("eager", "silent", "patient"):
            waiting = supervised.event("group.waiting", group=name)
            assert waiting["pool"] == "main"
            assert "No such file or directory" in waiting["error"]
        late = supervised.event("worker.exited", group="patient")
        assert (late["reason"], late["cause"]) == ("was not ready within 3 s", "dependency")
        supervised.event("worker.exited", count=8)
        for name, shown in supervised.status()["groups"].items():
            assert (name, shown["state"], shown["cause"]) == (name, "waiting", "dependency")
            assert shown["waiting_for"]["pool"] == "main"
        tried = [e["group"] for e in supervised.events("worker.spawned")[5:]]
        assert {"eager", "silent"} <= set(tried)

        running.start()
        supervised.ready()
        assert {e["cause"] for e in supervised.events("worker.exited")} == {"dependency"}
        assert one_at_a_time(supervised, {"eager", "silent"}, after=4)
        for name in ("eager", "silent", "patient"):
            recovered = supervised.event("group.recovered", group=name)
            assert (recovered["was"], recovered["pool"]) == ("waiting", "main")
            assert len(supervised.events("group.waiting", group=name)) == 1
        assert supervised.stop() == 0
        assert not supervised.events("group.failed")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_database_that_goes_away_is_waited_for(tmp_path, running, how):
    """Workers that die of it are no failures, however many; they come back when it does."""
    config = pool(running.url()) + users("first", "asks_first", count=2)
    config += users("later", "asks_later", count=2) + users("awaits", "asks_first_async", count=2)
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        running.stop(how)
        for name in ("first", "later", "awaits"):
            supervised.event("group.waiting", group=name, pool="main")
        supervised.event("worker.exited", count=7)

        running.start()
        wait_until(lambda: all_are_back(supervised), "all of them are back")
        assert supervised.stop() == 0
        causes = {e.get("cause") for e in supervised.events("worker.exited")}
        assert causes == {"dependency", None}  # None: those that were stopped
        assert not supervised.events("group.failed")


def test_what_waiting_does_not_mend_fails(tmp_path, running):
    """A user whom the server refuses, and code that is wrong: the group has failed, and says why."""
    config = pool(running.url(user="nobody_here"))
    config += users("refused", "asks_first") + users("wrong", "no_such_function")
    with Supervised(tmp_path, config) as supervised:
        for name, why in (("refused", "ConnectError"), ("wrong", "no_such_function")):
            failed = supervised.event("group.failed", group=name)
            assert failed["cause"] == "startup"
            assert why in failed["reason"]
        assert not supervised.events("group.waiting")
        assert supervised.stop() == 1


def all_are_back(supervised: Supervised) -> bool:
    """Tell whether every group is complete, and waits for nothing."""
    groups = supervised.status()["groups"].values()
    return all(shown["ready"] == shown["count"] for shown in groups) and not any(
        shown["waiting_for"] for shown in groups
    )


def one_at_a_time(supervised: Supervised, groups: set[str], after: int) -> bool:
    """Tell whether each worker after the first few was spawned when the one before had ended."""
    living: set[str] = set()
    spawned = 0
    for line in supervised.events():
        if line.get("group") not in groups:
            continue
        match line["event"]:
            case "worker.spawned":
                spawned += 1
                if spawned > after and living:
                    return False
                living.add(line["worker"])
            case "worker.exited":
                living.discard(line["worker"])
            case "worker.ready":
                return True  # from here on there is a ramp
    return True
