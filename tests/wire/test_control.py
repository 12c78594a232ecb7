"""The control sockets: real ROUTERs, honest workers and clients, and everybody else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import pytest
import zmq

from supervisor import control as control_module
from supervisor.client import Client
from supervisor.control import Control, RuntimeDir, client_endpoint
from supervisor.core import flood
from supervisor.errors import (
    AlreadyRunningError,
    ConfigError,
    NoSupervisorError,
    SupervisorError,
)
from supervisor.protocol import (
    MAX_BYTES,
    Acknowledged,
    Answer,
    Cancel,
    Drained,
    Failed,
    FetchEvents,
    FromWorker,
    GetStatus,
    Hello,
    Inquire,
    Ready,
    Stop,
    ToClient,
    ToWorker,
    Usage,
    decode,
    encode,
)
from tests.supervised import Supervised, group, wait_until

PID = os.getpid()


class Desk:
    """Both ROUTERs in a folder, and whoever talks to them. Use as a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.drops: Counter[str] = Counter()
        self.control = Control(folder, self._dropped)
        self.folder = folder
        self._context = zmq.Context()
        self._peers: list[zmq.Socket[bytes]] = []

    def _dropped(self, reason: str, detail: str, times: int) -> None:
        assert detail
        self.drops[reason] += 1
        assert times == self.drops[reason]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.close()
        self._context.term()
        self.control.close()

    def dealer(self, routing_id: bytes | None = None, *, client: bool = False) -> zmq.Socket[bytes]:
        """Connect somebody, to the workers' side or the clients'."""
        dealer = self._context.socket(zmq.DEALER)
        self._peers.append(dealer)
        dealer.linger = 0
        if routing_id is not None:
            dealer.routing_id = routing_id
        dealer.connect(client_endpoint(self.folder) if client else self.control.workers_endpoint)
        return dealer

    def worker(self, name: str, token: str = "secret") -> zmq.Socket[bytes]:
        """Connect a worker that is expected, and let it say hello."""
        self.control.expect(name, token)
        dealer = self.dealer(f"{name}/route".encode())
        dealer.send(encode(Hello(name, token, PID)))
        assert self.heard(1) == [(name, Hello(name, token, PID))]
        return dealer

    def heard(self, count: int) -> list:
        """Wait for so many messages of workers, and return them."""
        return _collected(self.control.from_workers, count)

    def asked(self, count: int) -> list:
        """Wait for so many requests of clients, and return them."""
        return _collected(self.control.from_clients, count)

    def dropped(self, **expected: int) -> None:
        """Wait until exactly that was dropped, and nothing was heard meanwhile."""

        def all_dropped() -> bool:
            assert [*self.control.from_workers(), *self.control.from_clients()] == []
            return self.drops.total() >= sum(expected.values())

        wait_until(all_dropped, f"{expected}, not {self.drops}")
        assert dict(self.drops) == expected


def _collected(source: Callable[[], Iterable[Any]], count: int) -> list[Any]:
    found: list[Any] = []

    def enough() -> bool:
        found.extend(source())
        return len(found) >= count

    wait_until(enough, f"{count} messages, not {found}")
    return found


def told(dealer: zmq.Socket[bytes], kind: object) -> object:
    """Return the next message that a peer gets."""
    assert dealer.poll(20_000), "nothing came"
    return decode(dealer.recv(), kind)  # type: ignore[arg-type]


@pytest.fixture
def desk(tmp_path):
    with Desk(tmp_path) as desk:
        yield desk


GARBAGE = [
    [b""],
    [b"\xff" * 100],
    [b"GET / HTTP/1.1\r\n"],
    [encode(Ready()), encode(Ready())],
    [encode(Ready()), b""],
    [b"", encode(Ready())],
    [encode(Ready())[:-1]],
    [encode(Ready()) + b"\x00"],
    [encode(Ready()).replace(b"/1 ", b"/9 ")],
    [encode(Inquire(1))],  # the other direction
]


# --- workers -------------------------------------------------------------------------------------


def test_a_worker_with_its_token_is_heard_and_can_be_reached(desk):
    """Messages come in the order in which they were sent, and under the worker's own name."""
    dealer = desk.worker("jobs-1")
    sent = [Ready(), Acknowledged(1.5), Failed("e", "t"), Drained(reports={})]
    for message in sent:
        dealer.send(encode(message))
    assert desk.heard(4) == [("jobs-1", message) for message in sent]
    cancel = Cancel(deadline=12.5, abort_at=11.5, cause="stop")
    assert desk.control.to_worker("jobs-1", cancel)
    assert told(dealer, ToWorker) == cancel
    assert not desk.drops


@pytest.mark.parametrize("frames", GARBAGE, ids=lambda frames: repr(frames)[:40])
def test_garbage_is_counted_and_dropped(desk, frames):
    """From a stranger as from a proven worker; both sockets go on."""
    worker, stranger = desk.worker("jobs-1"), desk.dealer()
    client = desk.dealer(client=True)
    for peer in (worker, stranger, client):
        peer.send_multipart(frames)
    desk.dropped(malformed=3)
    worker.send(encode(Ready()))
    client.send(encode(GetStatus()))
    assert desk.heard(1) == [("jobs-1", Ready())]
    assert [request for _, request in desk.asked(1)] == [GetStatus()]


def test_only_the_token_makes_a_worker(desk):
    """Wrong, empty and other workers' tokens; unknown names; words before any hello."""
    desk.control.expect("jobs-1", "one")
    desk.control.expect("jobs-2", "two")
    stranger = desk.dealer()
    attempts = [
        Hello("jobs-1", "two", PID),
        Hello("jobs-1", "", PID),
        Hello("jobs-1", "on", PID),
        Hello("jobs-1", "öne", PID),
        Hello("jobs-9", "one", PID),
        Hello("", "", PID),
        Ready(),
        Drained(reports={}),
    ]
    for message in attempts:
        stranger.send(encode(message))
    desk.dropped(stranger=len(attempts))
    assert not desk.control.to_worker("jobs-1", Inquire(1))
    stranger.send(encode(Hello("jobs-1", "one", PID)))
    assert desk.heard(1) == [("jobs-1", Hello("jobs-1", "one", PID))]


def test_a_hello_counts_once(desk):
    """Replayed by the worker or by somebody who has overheard it, it changes nothing."""
    worker = desk.worker("jobs-1")
    thief = desk.dealer()
    for peer in (worker, thief):
        peer.send(encode(Hello("jobs-1", "secret", PID)))
    thief.send(encode(Drained(reports={})))
    desk.dropped(stranger=3)
    assert desk.control.to_worker("jobs-1", Inquire(7))
    assert told(worker, ToWorker) == Inquire(7)
    assert not thief.poll(0)


def test_a_worker_cannot_become_another_one(desk):
    """Also with a right token: a connection is one worker's for good."""
    worker = desk.worker("jobs-1")
    desk.control.expect("jobs-2", "two")
    worker.send(encode(Hello("jobs-2", "two", PID)))
    desk.dropped(stranger=1)
    worker.send(encode(Ready()))
    assert desk.heard(1) == [("jobs-1", Ready())]


def test_nobody_takes_over_a_route(desk):
    """A second connection with the same routing id gets nothing of what is meant for the first."""
    worker = desk.worker("jobs-1")
    double = desk.dealer(b"jobs-1/route")
    double.send(encode(Failed("forged", "")))
    worker.send(encode(Ready()))
    assert desk.heard(1) == [("jobs-1", Ready())]
    assert desk.control.to_worker("jobs-1", Inquire(1))
    assert told(worker, ToWorker) == Inquire(1)
    assert not double.poll(0)


def test_what_comes_after_the_end_is_dropped(desk):
    """A worker that is forgotten is a stranger: its messages and its token count no more."""
    worker = desk.worker("jobs-1")
    desk.control.forget("jobs-1")
    worker.send(encode(Ready()))
    worker.send(encode(Hello("jobs-1", "secret", PID)))
    desk.dropped(stranger=2)
    assert not desk.control.to_worker("jobs-1", Inquire(1))
    desk.control.forget("jobs-1")  # and once more is no error


def test_a_worker_that_has_gone_cannot_be_reached(desk):
    """To send to it is False, not an error and not silence."""
    worker = desk.worker("jobs-1")
    worker.close()
    wait_until(lambda: not desk.control.to_worker("jobs-1", Inquire(1)), "it is noticed")
    assert not desk.control.to_worker("never-1", Inquire(1))


def test_a_worker_that_does_not_read_blocks_nobody(desk):
    """What can't be sent is refused at once; the others are reached all the same."""
    desk.worker("deaf-1")
    other = desk.worker("jobs-1")
    wide = Cancel(deadline=1.0, abort_at=1.0, cause="x" * 10_000)
    began = time.monotonic()
    while desk.control.to_worker("deaf-1", wide):
        assert time.monotonic() < began + 20.0
    assert desk.control.to_worker("jobs-1", Inquire(1))
    assert told(other, ToWorker) == Inquire(1)


def test_a_frame_that_is_too_large_costs_its_sender_the_connection(desk):
    """It never reaches the parser; the others are heard."""
    worker, glutton = desk.worker("jobs-1"), desk.worker("fat-1", "other")
    glutton.send(b"x" * (MAX_BYTES + 1))
    wait_until(
        lambda: [*desk.control.from_workers()] or not desk.control.to_worker("fat-1", Inquire(1)),
        "it is thrown out",
    )
    worker.send(encode(Ready()))
    assert desk.heard(1) == [("jobs-1", Ready())]
    assert not desk.drops


def test_a_flood_is_read_in_portions(desk):
    """One turn reads so much at most: whoever floods one socket does not stall the rest."""
    worker = desk.worker("jobs-1")
    flood = control_module.WORKER_BUDGET * 2 + 500
    sender = threading.Thread(target=lambda: [worker.send(encode(Ready())) for _ in range(flood)])
    sender.start()
    portions: list[int] = []

    def all_is_read() -> bool:
        portions.append(len([*desk.control.from_workers()]))
        return sum(portions) >= flood

    wait_until(all_is_read, "all is read")
    sender.join()
    assert max(portions) <= control_module.WORKER_BUDGET
    assert sum(portions) == flood


def test_whoever_floods_delays_nobody_by_a_turn(desk):
    """A ROUTER takes from its peers in turn: one message of another comes in the same turn."""
    flooder, honest = desk.worker("mad-1"), desk.worker("jobs-1", "other")
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            flooder.send(encode(Usage("main", 1, 1, 1)))

    sender = threading.Thread(target=flood)
    sender.start()
    try:
        wait_until(
            lambda: len([*desk.control.from_workers()]) == control_module.WORKER_BUDGET, "a flood"
        )
        places = []
        for number in range(21):
            honest.send(encode(Acknowledged(number)))
            time.sleep(0.01)  # it is there by then, mostly; the flooder's queue is full
            turn: list[Any] = []

            def heard(number: int = number, turn: list[Any] = turn) -> bool:
                turn[:] = desk.control.from_workers()
                return ("jobs-1", Acknowledged(number)) in turn

            wait_until(heard, "the honest one is heard")
            places.append(turn.index(("jobs-1", Acknowledged(number))))
        # libzmq looks for what is new at others every hundred messages. One that comes in the middle
        # of a turn is further behind, and is nevertheless heard in that.
        assert sorted(places)[10] <= 102, places
    finally:
        over.set()
        for _ in range(10_000):  # the sender may wait for room
            [*desk.control.from_workers()]
        sender.join()


def test_a_turn_reads_so_many_bytes(desk):
    """Large messages are few in a turn: parsing them takes long."""
    glutton = desk.worker("fat-1")
    large = encode(Failed("", "x" * 900_000))
    sender = threading.Thread(target=lambda: [glutton.send(large) for _ in range(30)])
    sender.start()
    portions: list[int] = []

    def all_is_read() -> bool:
        portions.append(len([*desk.control.from_workers()]))
        return sum(portions) >= 30

    wait_until(all_is_read, "all is read")
    sender.join()
    assert max(portions) <= control_module.TURN_BYTES // 900_000 + 1


def test_a_worker_that_floods_is_told_of_once_and_not_heard_any_more(desk, monkeypatch):
    """Nothing that it sends afterwards is even parsed; it can still be sent to."""
    monkeypatch.setattr(flood, "MOST_MESSAGES", 50)
    mad, honest = desk.worker("mad-1"), desk.worker("jobs-1", "other")
    for _ in range(100):
        mad.send(encode(Ready()))
    heard = desk.heard(51)
    assert [message for _, message in heard[:50]] == [Ready()] * 50
    assert isinstance(heard[50][1], control_module.Flooded)
    desk.dropped(flood=49)
    assert desk.control.to_worker("mad-1", Inquire(1))
    assert told(mad, ToWorker) == Inquire(1)
    honest.send(encode(Ready()))
    assert desk.heard(1) == [("jobs-1", Ready())]


def test_garbage_of_a_worker_counts_as_its_flood(desk, monkeypatch):
    """It need not be valid to be too much."""
    monkeypatch.setattr(flood, "MOST_MESSAGES", 50)
    mad = desk.worker("mad-1")
    for _ in range(100):
        mad.send(b"no message")
    (found,) = desk.heard(1)
    assert isinstance(found[1], control_module.Flooded)


def test_a_hello_of_another_process_is_refused(desk):
    """The kernel says who is at the other end: a token that was stolen is of no use elsewhere."""
    desk.control.expect("jobs-1", "secret")
    liar = desk.dealer()
    liar.send(encode(Hello("jobs-1", "secret", PID + 1)))
    liar.send(encode(Ready()))
    desk.dropped(liar=1, stranger=1)
    liar.send(encode(Hello("jobs-1", "secret", PID)))
    assert desk.heard(1) == [("jobs-1", Hello("jobs-1", "secret", PID))]


# --- the command line ----------------------------------------------------------------------------


def test_each_client_gets_its_own_answer(desk):
    """Requests and answers of several clients do not mix."""
    clients = [desk.dealer(client=True) for _ in range(5)]
    requests = [GetStatus(), FetchEvents(7, follow=True), Stop(2.5), Stop(now=True), FetchEvents(0)]
    for client, request in zip(clients, requests, strict=True):
        client.send(encode(request))
    for route, request in desk.asked(5):
        assert desk.control.to_client(route, Answer({"you asked": repr(request)}))
    for client, request in zip(clients, requests, strict=True):
        assert told(client, ToClient) == Answer({"you asked": repr(request)})


def test_a_client_that_has_gone_is_no_error(desk):
    """The answer to it is dropped, and whoever asks next is answered."""
    client = desk.dealer(client=True)
    client.send(encode(GetStatus()))
    ((route, _),) = desk.asked(1)
    client.close()
    wait_until(lambda: not desk.control.to_client(route, Answer({})), "it is noticed")


def test_a_workers_words_on_the_clients_socket_are_garbage(desk):
    """And the other way round: each ROUTER understands its own side only."""
    client, stranger = desk.dealer(client=True), desk.dealer()
    client.send(encode(Hello("jobs-1", "secret", PID)))
    stranger.send(encode(Stop(now=True)))
    desk.dropped(malformed=2)


# --- the folder ----------------------------------------------------------------------------------


def test_a_folder_has_one_supervisor(tmp_path):
    """The second is refused with the first one's pid; when that has gone, the next may come."""
    first = RuntimeDir(tmp_path / "run", "orders")
    with pytest.raises(AlreadyRunningError, match=f"'orders' already runs .pid {os.getpid()}"):
        RuntimeDir(tmp_path / "run", "orders")
    first.release()
    RuntimeDir(tmp_path / "run", "orders").release()


def test_a_folder_in_use_is_not_tidied_away(tmp_path):
    """Its own lock would go with what is old in /tmp: `systemd-tmpfiles` skips what is locked."""
    folder = RuntimeDir(tmp_path / "run", "orders")
    aged = tmp_path / "aged.conf"
    aged.write_text(f"d {tmp_path} - - - abm:1s\n")
    tidy = ["systemd-tmpfiles", "--clean", str(aged)]
    look = os.open(folder.path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(look, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(look)
    if shutil.which(tidy[0]) is not None:
        time.sleep(1.5)  # it must be older than that to be tidied away
        subprocess.run(tidy, check=True, timeout=30.0)
        assert os.listdir(folder.path) == ["lock"]
    folder.release()


def test_a_command_that_looks_for_a_supervisor_keeps_none_from_starting(tmp_path):
    """Whoever looks has the lock for a moment, and lets go: that is no running supervisor."""
    folder = tmp_path / "run"
    RuntimeDir(folder, "orders").release()
    look = os.open(folder / "lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    lets_go = threading.Timer(0.02, os.close, [look])
    lets_go.start()
    RuntimeDir(folder, "orders").release()
    lets_go.join()


def test_commands_in_a_loop_keep_none_from_starting(tmp_path):
    """`status` again and again beside `start`, as monitoring does it."""
    folder = tmp_path / "run"
    RuntimeDir(folder, "orders").release()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            with contextlib.suppress(NoSupervisorError), Client(folder, "orders"):
                pass

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            RuntimeDir(folder, "orders").release()
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_release_leaves_no_socket(tmp_path):
    """What is left is the lock, which is empty-handed then: nobody is taken for running."""
    folder = RuntimeDir(tmp_path / "run", "orders")
    with Desk(tmp_path / "run"):
        assert {"control.sock", "workers.sock"} <= set(os.listdir(tmp_path / "run"))
        folder.release()
    assert os.listdir(tmp_path / "run") == ["lock"]
    with pytest.raises(NoSupervisorError):
        Client(tmp_path / "run", "orders")


def test_a_full_disk_is_no_mistake_of_the_file(tmp_path):
    """It passes, so it must not be told from 78, which keeps systemd from trying again."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "tmpfs", small]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("nothing may be mounted here")
    try:
        (small / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(SupervisorError, match="nothing can be written to") as caught:
            RuntimeDir(small, "orders")
        assert caught.value.exit_code == 1
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


@pytest.mark.parametrize("content", [b"", b"garbage\n", b"-1"])
def test_a_lock_that_names_nobody_is_no_supervisor(tmp_path, content):
    """Whoever holds it, and whatever it says: one sentence."""
    lock = tmp_path / "lock"
    lock.write_bytes(content)
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(NoSupervisorError, match="no supervisor named 'orders' runs here"):
            Client(tmp_path, "orders")


def test_a_folder_that_cannot_be_made_is_the_configurations_fault(tmp_path):
    """One problem, with the key and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        RuntimeDir(tmp_path / "file" / "run", "orders")
    (problem,) = caught.value.problems
    assert problem.key == "supervisor.runtime_dir"
    assert "directory" in problem.message


# --- a whole supervisor --------------------------------------------------------------------------


def test_a_supervisor_among_strangers_answers_on(tmp_path):
    """Garbage on both sockets: counted, logged ever more seldom, and without any effect."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        supervised.ready()
        with contextlib.ExitStack() as stack:
            context = stack.enter_context(zmq.Context())
            context.linger = 0
            for name in ("workers.sock", "control.sock"):
                stranger = stack.enter_context(context.socket(zmq.DEALER))
                stranger.connect(f"ipc://{supervised.runtime_dir}/{name}")
                for _ in range(20):
                    for frames in GARBAGE[:-1]:
                        stranger.send_multipart(frames)
                stranger.send(encode(Hello("idle-1", "wrong", PID)))
                stranger.send(encode(Failed("forged", "forged")))
            supervised.event("control.dropped", times=256, reason="malformed")
            supervised.event("control.dropped", times=2, reason="stranger")
            assert supervised.status()["groups"]["idle"]["ready"] == 2
        assert supervised.stop() == 0
    assert not supervised.events("worker.failed")
    times = [line["times"] for line in supervised.events("control.dropped", reason="malformed")]
    assert times == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_the_worker_side_speaks_what_the_supervisor_understands():
    """Whatever a worker may send is what the supervisor matches on, exhaustively."""
    assert {"Hello", "Ready", "Acknowledged", "Report", "Failed", "Drained"} <= {
        kind.__name__ for kind in FromWorker.__args__
    }
