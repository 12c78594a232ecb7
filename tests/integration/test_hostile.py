"""Floods, lies and garbage from workers and clients: nobody else is delayed, and nothing is believed."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from supervisor.protocol import (
    FetchEvents,
    Hello,
    Ready,
    Refused,
    Restart,
    Scale,
    Stop,
    ToClient,
    decode,
    encode,
)
from tests.supervised import DUE, Supervised, group, wait_until

MIB = 1 << 20


def memory(pid: int) -> int:
    """Return the resident bytes of a process."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def connected(
    supervised: Supervised, count: int = 1, *, name: str = "control.sock"
) -> Iterator[list[zmq.Socket[bytes]]]:
    """Yield so many connections of strangers."""
    with zmq.Context() as context:
        context.max_sockets = count + 10
        context.linger = 0
        peers = [context.socket(zmq.DEALER) for _ in range(count)]
        try:
            for peer in peers:
                peer.connect(f"ipc://{supervised.runtime_dir}/{name}")
            yield peers
        finally:
            for peer in peers:
                peer.close()


# --- workers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["small", "large"])
def test_a_worker_that_floods_is_ended_and_delays_nobody(tmp_path, what):
    """It fails for what it does; the others get ready, are replaced, and drain as always."""
    config = group("mad", "flooder", {"what": what}, restart="never") + group(
        "idle", "idle", count=4, backoff="1ms"
    )
    with Supervised(tmp_path, config, supervisor='grace = "3s"') as supervised:
        failed = supervised.event("worker.failed", group="mad")
        assert failed["error"].startswith("it floods its supervisor: more than ")
        supervised.event("worker.ready", group="idle", count=4)
        victim = supervised.worker_pids()["idle-1"]
        os.kill(victim, signal.SIGKILL)
        supervised.event("worker.ready", worker="idle-5")
        assert supervised.status()["groups"]["idle"]["ready"] == 4
        assert memory(supervised.pid) < 300 * MIB
        killed = supervised.event("worker.killed", group="mad")
        assert "did not acknowledge" in killed["why"]
        assert supervised.event("worker.exited", group="mad")["reason"] == "failed"
        assert supervised.stop() == 1  # the group has failed
        drains = ["cancelled", "acknowledged", "drained", "exited"]
        for worker in ("idle-2", "idle-3", "idle-4", "idle-5"):
            assert supervised.life(worker)[2:] == drains
        assert len(supervised.events("worker.failed")) == 1


def test_a_stop_ends_in_the_midst_of_a_flood(tmp_path):
    """SIGTERM is heard, the others drain at once, and the flooder has until the deadline."""
    config = group("mad", "flooder", count=2) + group("idle", "idle", count=4)
    with Supervised(tmp_path, config, supervisor='grace = "2s"') as supervised:
        supervised.event("worker.ready", count=6)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 1
        for number in range(1, 5):
            assert supervised.life(f"idle-{number}")[2:] == [
                "cancelled",
                "acknowledged",
                "drained",
                "exited",
            ]
        order = [line["event"] for line in supervised.lines()]
        assert order.index("worker.drained") < order.index("worker.killed")


def test_nothing_that_a_false_witness_says_is_believed(tmp_path):
    """Doubled, early, late and forged words: its life is told as it was, and others' untouched."""
    config = (
        '[pools.main]\nurl = "sqlite:///data.db"\nmax_open = 2\nbudget = 6\n'
        + group("false", "false_witness")
        + group("idle", "idle")
    )
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        status = supervised.status()
        assert status["budgets"]["main"]["granted"] <= 6
        assert all(len(name) < 100 for w in status["workers"] for name in w["pools"])
        assert supervised.stop() == 0
        assert not supervised.events("pool.leak")
        for worker in ("false-1", "idle-1"):
            assert supervised.life(worker) == [
                "spawned",
                "ready",
                "cancelled",
                "acknowledged",
                "drained",
                "exited",
            ]
        drained = supervised.events("worker.drained", worker="false-1")[0]
        assert "nowhere" not in drained["reports"]
        assert supervised.events("control.dropped", reason="stranger")


def test_an_invented_pool_is_no_excuse(tmp_path):
    """Who ends badly and names a pool that it was not given has crashed: that counts as a failure."""
    config = group("debtor", "false_debtor", restart="never") + group("idle", "idle")
    with Supervised(tmp_path, config) as supervised:
        assert supervised.event("worker.exited", group="debtor")["cause"] == "crashed"
        assert supervised.event("group.failed", group="debtor")["cause"] == "crashed"
        supervised.stop()


def test_a_child_that_writes_to_the_lifeline_for_ever_stalls_nobody(tmp_path):
    """The worker's end is told all the same, and its child is killed."""
    with Supervised(tmp_path, group("last", "scribbler")) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
        assert supervised.events("worker.exited")[0]["leftovers"]


def test_more_workers_than_descriptors_are_refused_before_it_is_too_late(tmp_path):
    """By `scale` and by a reload as by a start: to run out of them would end the supervisor."""
    through = ["sh", "-c", 'ulimit -n 200; exec "$@"', "sh"]
    with Supervised(tmp_path, group("idle", "idle"), through=through) as supervised:
        supervised.ready()
        refused = supervised.command("scale", "idle=100")
        assert refused.returncode == 1
        assert "need 569 open descriptors, and the limit is 200" in refused.stderr
        text = supervised.config.read_text()
        supervised.config.write_text(text.replace("[workers.idle]", "[workers.idle]\ncount = 100"))
        refused = supervised.command("reload")
        assert refused.returncode == 1
        assert "open descriptors" in refused.stderr
        assert supervised.status()["groups"]["idle"]["count"] == 1
        assert supervised.stop() == 0


# --- clients -------------------------------------------------------------------------------------


def test_a_client_that_asks_for_ever_and_never_reads_costs_little(tmp_path):
    """Others are answered meanwhile, and what waits for it in memory is bounded."""
    with Supervised(tmp_path, group("idle", "idle", count=4)) as supervised:
        supervised.ready()
        before = memory(supervised.pid)
        with connected(supervised) as (flooder,):
            request = encode(FetchEvents(0, limit=10_000))
            sent = 0
            answered = 0
            end = time.monotonic() + DUE
            while sent < 20_000 and time.monotonic() < end:
                try:
                    flooder.send(request, zmq.DONTWAIT)
                    sent += 1
                except zmq.Again:  # it is not taken any faster
                    time.sleep(0.001)
                if sent % 5_000 == 0:
                    answered += supervised.status()["state"] == "ready"
            assert answered >= 4
        assert memory(supervised.pid) - before < 100 * MIB
        assert supervised.stop() == 0


def test_a_thousand_connections_keep_nobody_out(tmp_path):
    """Silent ones, and those that stop in the midst of a handshake."""
    with Supervised(tmp_path, group("idle", "idle", backoff="1ms")) as supervised:
        supervised.ready()
        with contextlib.ExitStack() as stack:
            stack.enter_context(connected(supervised, 500))
            for number in range(500):
                half = stack.enter_context(socket.socket(socket.AF_UNIX))
                half.settimeout(DUE)
                _connect(half, str(supervised.runtime_dir / "workers.sock"))
                half.send(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03"[: number % 12])
            os.kill(supervised.worker_pids()["idle-1"], signal.SIGKILL)
            supervised.event("worker.ready", worker="idle-2")
            assert supervised.status()["groups"]["idle"]["ready"] == 1
            assert supervised.stop() == 0


def _connect(client: socket.socket, path: str) -> None:
    """Connect; the queue of those who are to be accepted is short."""

    def is_connected() -> bool:
        try:
            client.connect(path)
        except BlockingIOError:
            return False
        return True

    wait_until(is_connected, "it is accepted")


@pytest.mark.parametrize(
    "request_",
    [
        FetchEvents(0, limit=-1),
        FetchEvents(-5, limit=0),
        FetchEvents(2**63, follow=False),
        Scale("idle", 10**9),
        Scale("idle", -1),
        Stop(grace=1e300),
        Stop(grace=math.nan),
        Stop(grace=-1.0),
    ],
    ids=repr,
)
def test_a_request_that_means_nothing_does_nothing(one, request_):
    """It is refused, or answered with nothing, and the supervisor goes on."""
    with connected(one) as (client,):
        client.send(encode(request_))
        assert client.poll(20_000), "no answer"
        answer: Any = decode(client.recv(), ToClient)  # type: ignore[arg-type]
        assert isinstance(answer, Refused) == (not isinstance(request_, FetchEvents))
    assert one.status()["groups"]["idle"] == {
        **one.status()["groups"]["idle"],
        "count": 1,
        "ready": 1,
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    with Supervised(tmp_path_factory.mktemp("one"), group("idle", "idle")) as supervised:
        yield supervised.ready()
        assert supervised.stop() == 0


def test_a_megabyte_on_the_clients_socket_is_not_even_received(one):
    """A client names a group; what is longer costs it the connection, and is not answered."""
    with connected(one) as (client,):
        client.send(encode(Restart("x" * MIB)))
        assert not client.poll(200)
    assert one.status()["state"] == "ready"


def test_strangers_on_the_workers_socket_are_not_told_who_is_there(one):
    """No answer of any kind to whoever has no token."""
    with connected(one, name="workers.sock") as (stranger,):
        for message in (Hello("idle-1", "", os.getpid()), Ready()):
            stranger.send(encode(message))
        wait_until(lambda: one.events("control.dropped", reason="stranger"), "it is dropped")
        assert not stranger.poll(200)
