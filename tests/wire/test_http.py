"""The HTTP listener against real sockets: what is served, what is refused, and that nobody stalls it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from supervisor import http
from supervisor.errors import ListenError
from supervisor.http import Answer, Http
from tests.supervised import DUE

LARGE = b"x" * 30_000_000  # no socket buffer holds that


class Server:
    """A listener that is turned as the loop does it, at a time of the test's own."""

    def __init__(self) -> None:
        self.http = Http("127.0.0.1:0")
        self.asked: list[str] = []
        self.held: list[http.Request] = []
        self.ahead = 0.0  # seconds that the clock is ahead

    def turn(self) -> None:
        now = time.monotonic() + self.ahead
        for request in self.http.requests(now):
            self.asked.append(request.path)
            if request.path == "/later":
                self.held.append(request)
            else:
                body = LARGE if request.path == "/large" else request.path.encode()
                self.http.answer(request, Answer(200, body), now)

    def until(self, condition):
        deadline = time.monotonic() + DUE
        while not (result := condition()):
            assert time.monotonic() < deadline
            self.turn()
        return result

    def open(self) -> socket.socket:
        """Return a client's socket; the kernel accepts it before we do."""
        _, _, port = self.http.url.strip("/").rpartition(":")
        client = socket.create_connection(("127.0.0.1", int(port)), timeout=DUE)
        client.setblocking(False)
        return client

    def exchange(self, sent: bytes, client: socket.socket | None = None) -> bytes:
        """Send, and return what came until the server closed or has sent one whole answer."""
        with contextlib.ExitStack() as stack:
            if client is None:
                client = stack.enter_context(self.open())
            client.send(sent)
            received = bytearray()

            def has_come() -> bool:
                try:
                    more = client.recv(65536)
                except BlockingIOError:
                    return False
                received.extend(more)
                return not more or is_whole(bytes(received))

            self.until(has_come)
            return bytes(received)


def is_whole(received: bytes) -> bool:
    head, blank, body = received.partition(b"\r\n\r\n")
    lengths = [
        int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")
    ]
    return bool(blank) and len(body) >= lengths[0]


def get(path: str = "/x", more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: here\r\n{more}\r\n".encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.close()


def connections(server: Server) -> int:
    return len(server.http._connections)


# --- what is served ------------------------------------------------------------------------------


def test_requests_are_answered_on_one_connection_one_after_the_other(server):
    """A connection is kept, and requests that were sent together are answered in order."""
    with server.open() as client:
        first = server.exchange(get("/a?query=1"), client)
        assert first.startswith(b"HTTP/1.1 200 OK\r\nDate: ")
        assert first.endswith(b"\r\n\r\n/a")
        client.send(get("/b") + get("/c") + get("/d", "Connection: close\r\n"))
        received = b""

        def has_closed():
            nonlocal received
            with contextlib.suppress(BlockingIOError):
                more = client.recv(65536)
                received += more
                return not more
            return False

        server.until(has_closed)
    assert server.asked == ["/a", "/b", "/c", "/d"]
    assert received.index(b"/b") < received.index(b"/c") < received.index(b"/d")


def test_a_request_behind_one_that_waits_is_answered_after_it(server):
    """An answer may come later; what was sent behind its request is not forgotten."""
    with server.open() as client:
        client.send(get("/later") + get("/next"))
        server.until(lambda: server.held)
        server.turn()
        assert server.asked == ["/later"]
        server.http.answer(server.held[0], Answer(503, b"late"), time.monotonic())
        assert server.http.next_deadline() == 0.0
        server.until(lambda: "/next" in server.asked)
        server.http.answer(server.held[0], Answer(200, b"twice"), time.monotonic() + 1000)
        received = b""
        with contextlib.suppress(BlockingIOError):
            received = client.recv(65536)
    assert received.startswith(b"HTTP/1.1 503 Service Unavailable")
    assert received.endswith(b"/next")


def test_head_is_answered_without_a_body(server):
    """A HEAD has the length that the GET's answer has, and no body."""
    answer = server.exchange(b"HEAD /abc HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"Content-Length: 4\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_an_old_client_is_served(server):
    """HTTP/1.0 without any header is enough, and its connection is closed."""
    assert server.exchange(b"GET /old HTTP/1.0\r\n\r\n").endswith(b"/old")


def test_a_large_answer_leaves_as_fast_as_it_is_read(server):
    """What does not fit into the socket's buffer follows when the client has read."""
    with server.open() as client:
        client.send(get("/large"))
        server.until(lambda: server.asked)
        received = 0

        def has_all():
            nonlocal received
            with contextlib.suppress(BlockingIOError):
                received += len(client.recv(1 << 20))
            return received >= len(LARGE)

        server.until(has_all)
        assert server.exchange(get("/next"), client).endswith(b"/next")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without a Host
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3, 400),  # TLS
        (b"\x00\xff" * 3000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 100_000, 431),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_request_of_ours_is_refused_and_the_connection_closed(server, sent, status):
    """The client is told why, and no request comes of it."""
    with server.open() as client:
        answer = server.exchange(sent, client)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nConnection: close\r\n" in answer
    server.until(lambda: connections(server) == 0)
    assert server.asked == []
    assert server.exchange(get()).endswith(b"/x")


def test_a_refused_client_that_goes_on_sending_is_not_reset(server):
    """What it has not sent yet must not take away from it why it was refused."""
    with server.open() as client:
        client.send(b"GET /" + b"y" * 100_000)
        server.until(lambda: connections(server) == 1)
        server.turn()
        with contextlib.suppress(BlockingIOError):
            client.send(b"y" * 100_000)
        received = bytearray()

        def has_ended():
            try:
                more = client.recv(65536)
            except BlockingIOError:
                return False
            received.extend(more)
            return not more

        server.until(has_ended)
    assert received.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "192.0.2.1:80", "no.such.host.invalid:80"])
def test_an_address_that_cannot_be_listened_on_is_one_sentence(server, address):
    """It names the key, the address and the reason; nothing stays open."""
    port = server.http.url.strip("/").rpartition(":")[2]
    address = address.format(port=port)
    with pytest.raises(ListenError) as caught:
        Http(address)
    assert str(caught.value).startswith(f"supervisor.listen: {address}: ")
    assert "\n" not in str(caught.value)


# --- nobody stalls it ----------------------------------------------------------------------------


def test_a_request_that_comes_byte_by_byte_is_cut_off(server):
    """A slow client has its time from the first byte to the last, however busy it looks."""
    with server.open() as slow, server.open() as silent:
        for byte in get()[:-1]:
            slow.send(bytes([byte]))
            server.turn()
        due = server.http.next_deadline()
        assert due <= time.monotonic() + http.REQUEST_DUE
        server.ahead = http.REQUEST_DUE
        server.until(lambda: ends(slow).startswith(b"HTTP/1.1 408 "))
        server.until(lambda: is_closed(silent))
    server.until(lambda: connections(server) == 0)
    assert server.asked == []
    assert server.http.next_deadline() is None


def test_a_client_that_never_reads_is_dropped(server):
    """An answer that does not leave in time goes with its connection; others are served meanwhile."""
    with server.open() as deaf:
        deaf.send(get("/large"))
        server.until(lambda: server.asked == ["/large"])
        assert server.exchange(get()).endswith(b"/x")
        server.ahead = http.ANSWER_DUE - 1
        server.turn()
        assert connections(server) >= 1
        server.ahead = http.ANSWER_DUE + 1
        server.until(lambda: connections(server) == 0)


def test_an_idle_connection_is_closed_in_the_end(server):
    """Whoever keeps a connection without asking for anything loses it."""
    with server.open() as client:
        server.exchange(get(), client)
        server.ahead = http.REQUEST_DUE * 2
        server.turn()
        assert connections(server) == 1
        server.ahead = http.IDLE_DUE + 1
        server.until(lambda: is_closed(client))


def test_a_thousand_connections_keep_nobody_out(server):
    """There are never more than the limit; who has been silent longest makes room for who comes."""
    with contextlib.ExitStack() as stack:
        crowd = []
        for number in range(1000):
            crowd.append(stack.enter_context(server.open()))
            if number % 100 == 99:
                server.until(lambda: has_accepted_all(server))
                assert connections(server) <= http.MAX_CONNECTIONS
        assert server.exchange(get()).endswith(b"/x")
        assert connections(server) <= http.MAX_CONNECTIONS
        assert is_closed(crowd[0])
        assert not is_closed(crowd[-1])
    server.until(lambda: connections(server) == 0)


def test_who_is_being_answered_is_the_last_to_make_room(server):
    """A flood of connections does not take the answer away from who waits for one."""
    with contextlib.ExitStack() as stack:
        asker = stack.enter_context(server.open())
        asker.send(get("/later"))
        server.until(lambda: server.held)
        for _ in range(http.MAX_CONNECTIONS + 20):
            stack.enter_context(server.open())
        server.until(lambda: has_accepted_all(server))
        server.http.answer(server.held[0], Answer(200, b"here"), time.monotonic())
        assert server.until(lambda: ends(asker)).endswith(b"here")


def test_one_turn_does_a_bounded_piece_of_work(server):
    """However many clients wait, a turn reads and accepts so many of them at most."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.open()) for _ in range(100)]
        server.turn()
        assert connections(server) == http.MAX_ACCEPTS
        server.until(lambda: connections(server) == 100)
        for client in clients:
            client.send(get())
        server.turn()
        assert len(server.asked) <= http.MAX_EVENTS
        server.until(lambda: len(server.asked) == 100)


def test_an_answer_for_who_has_gone_goes_nowhere(server):
    """Not to the next one on the same descriptor, either."""
    with server.open() as client:
        client.send(get("/later"))
        server.until(lambda: server.held)
    server.ahead = http.ANSWER_DUE + 1
    server.until(lambda: connections(server) == 0)
    server.ahead = 0.0
    with server.open() as other:
        server.until(lambda: connections(server) == 1)
        server.http.answer(server.held[0], Answer(200, b"not for you"), time.monotonic())
        assert ends(other) == b""


def ends(client: socket.socket) -> bytes:
    try:
        return client.recv(65536)
    except BlockingIOError:
        return b""


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(65536) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def has_accepted_all(server: Server) -> bool:
    import select

    return not select.select([server.http._listener], [], [], 0)[0]
