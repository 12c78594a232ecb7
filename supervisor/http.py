"""HTTP for those who look: a listening socket and few connections, none of which can hold up the loop.

It reads requests and writes answers; what is answered is not its business. Nothing here blocks, and
everything is bounded: how many connections there are, how large a request is, how long it may take to
come, how long its answer may take to leave, and how much is done in one turn of the loop. When there
are too many connections the one that has been silent longest goes, so that newcomers always get in.
Only GET and HEAD are served.
"""

from __future__ import annotations

__all__ = ["MAX_CONNECTIONS", "Answer", "Http", "Request"]

import contextlib
import errno
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus

import h11

from supervisor.errors import ListenError

MAX_CONNECTIONS = 128
MAX_REQUEST = 8192  # bytes of request line and headers, as nginx has it
BACKLOG = 512  # connections that wait to be accepted
# What one turn of the loop does at most; whatever is left over is there at the next one.
MAX_ACCEPTS = 64
MAX_EVENTS = 64
REQUEST_DUE = 10.0  # seconds from the first byte of a request to its last, or from the connect
IDLE_DUE = 90.0  # seconds of silence between two requests: a scraper comes once a minute
ANSWER_DUE = 30.0  # seconds for an answer to leave
LINGER_DUE = 2.0  # seconds for the other side to see our last words before the connection goes
PAUSE = 1.0  # seconds without accepting when the system has no descriptor to spare

_MAY_PASS = {errno.EAGAIN, errno.ECONNABORTED, errno.EINTR, errno.EPROTO}


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back. `headers` beside those for its type, length and date."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class _Stage(Enum):
    """What a connection is about."""

    IDLE = auto()  # between two requests
    READING = auto()  # a request, or the first byte of the first one, is awaited
    ASKING = auto()  # its request has been handed over
    WRITING = auto()
    LINGERING = auto()  # all is said; what still comes is thrown away


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    fd: int  # kept: a closed socket has none
    stage: _Stage
    since: float  # when its stage began
    deadline: float
    parser: h11.Connection
    is_head: bool = False  # its request wants no body
    asked: Request | None = None  # what is to be answered
    mask: int = select.EPOLLIN
    out: list[memoryview] = field(default_factory=list)  # bytes that wait to be sent, in order


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request to be answered, once, by `Http.answer`."""

    path: str  # without the query
    accept: str  # the header, "" where there is none
    connection: _Connection


class Http:
    """One listening socket and its connections. Owned by the loop's thread.

    Args:
        address: "HOST:PORT", an IPv6 host in brackets; port 0 takes any that is free.

    Raises:
        ListenError: the address cannot be listened on.
    """

    def __init__(self, address: str) -> None:
        self._listener = _listening(address)
        self._paused_until = 0.0  # when accepting goes on; 0: it does
        self._connections: dict[int, _Connection] = {}
        self._pipelined: list[_Connection] = []  # which have been sent more than one request
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        host, port, *_ = self._listener.getsockname()
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def fileno(self) -> int:
        """A descriptor that is readable when `requests` has something to do."""
        return self._poll.fileno()

    def next_deadline(self) -> float | None:
        """Return when `requests` is wanted at the latest."""
        dues = [connection.deadline for connection in self._connections.values()]
        if self._pipelined:
            dues.append(0.0)
        if self._paused_until:
            dues.append(self._paused_until)
        return min(dues, default=None)

    # --- requests --------------------------------------------------------------------------------

    def requests(self, now: float) -> Iterator[Request]:
        """Yield what is asked; send what can be sent, and drop who is out of time. Never blocks."""
        events = self._poll.poll(0, MAX_EVENTS)
        for fd, mask in events:
            connection = self._connections.get(fd)
            if connection is None:
                continue
            if mask & (select.EPOLLERR | select.EPOLLHUP):
                self._drop(connection)
            elif connection.stage is _Stage.WRITING:
                self._write(connection, now)
            else:
                yield from self._read(connection, now)
        # One of each in a turn, or few who send many would have the loop for themselves.
        pipelined, self._pipelined = self._pipelined, []
        for connection in pipelined:
            if self._connections.get(connection.fd) is connection:
                yield from self._parse(connection, now)
        self._expire(now)
        # Last of all: a new connection may have the number of one that has gone in this turn.
        if any(fd == self._listener.fileno() for fd, _ in events):
            self._accept(now)

    def _accept(self, now: float) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except OSError as exc:
                if exc.errno not in _MAY_PASS:  # no descriptor or memory is left
                    self._poll.modify(self._listener, 0)
                    self._paused_until = now + PAUSE
                return
            if len(self._connections) >= MAX_CONNECTIONS:
                self._make_room()
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # it has gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(
                sock,
                sock.fileno(),
                _Stage.READING,
                now,
                now + REQUEST_DUE,
                h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST),
            )
            self._connections[connection.fd] = connection
            self._poll.register(sock, connection.mask)

    def _make_room(self) -> None:
        """Drop whoever has been silent longest; who is being answered, only if all are."""
        being_answered = (_Stage.ASKING, _Stage.WRITING)
        self._drop(
            min(self._connections.values(), key=lambda c: (c.stage in being_answered, c.since))
        )

    def _read(self, connection: _Connection, now: float) -> Iterator[Request]:
        try:
            received = connection.sock.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        if connection.stage is _Stage.LINGERING or not received:
            if not received:
                self._drop(connection)
            return
        if connection.stage is _Stage.IDLE:
            self._enter(connection, _Stage.READING, now, REQUEST_DUE)
        connection.parser.receive_data(received)
        yield from self._parse(connection, now)

    def _parse(self, connection: _Connection, now: float) -> Iterator[Request]:
        """Take one request out of what has been received, when it is complete."""
        parser = connection.parser
        try:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                return
            if not isinstance(event, h11.Request):
                self._drop(connection)
                return
            if event.method not in {b"GET", b"HEAD"}:
                self._refuse(connection, 405, "only GET and HEAD are served", now)
            elif not isinstance(parser.next_event(), h11.EndOfMessage):
                self._refuse(connection, 413, "a request with a body is not served", now)
            else:
                connection.is_head = event.method == b"HEAD"
                self._enter(connection, _Stage.ASKING, now, ANSWER_DUE)
                path = event.target.decode("latin-1").partition("?")[0]
                accept = ",".join(
                    value.decode("latin-1") for name, value in event.headers if name == b"accept"
                )
                connection.asked = Request(path, accept, connection)
                yield connection.asked
        except h11.RemoteProtocolError as exc:
            self._refuse(connection, exc.error_status_hint, f"not a request: {exc}", now)

    def _expire(self, now: float) -> None:
        if self._paused_until and self._paused_until <= now:
            self._paused_until = 0.0
            self._poll.modify(self._listener, select.EPOLLIN)
        for connection in [c for c in self._connections.values() if c.deadline <= now]:
            if connection.stage is _Stage.READING and connection.parser.trailing_data[0]:
                self._refuse(connection, 408, "the request did not come in time", now)
            else:
                self._drop(connection)

    # --- answers ---------------------------------------------------------------------------------

    def answer(self, request: Request, answer: Answer, now: float) -> None:
        """Send an answer, unless who has asked is gone. Never blocks."""
        connection = request.connection
        if self._connections.get(connection.fd) is connection and connection.asked is request:
            connection.asked = None
            self._say(connection, answer, now)

    def _refuse(self, connection: _Connection, status: int, why: str, now: float) -> None:
        if connection.parser.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self._drop(connection)
            return
        headers = [("Connection", "close")]
        if status == 405:  # noqa: PLR2004
            headers.append(("Allow", "GET, HEAD"))
        answer = Answer(status, f"{why}\n".encode("ascii", "replace"), headers=tuple(headers))
        self._say(connection, answer, now)

    def _say(self, connection: _Connection, answer: Answer, now: float) -> None:
        parser = connection.parser
        headers = [
            ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            *answer.headers,
        ]
        head = parser.send(
            h11.Response(
                status_code=answer.status,
                reason=HTTPStatus(answer.status).phrase.encode(),
                headers=headers,
            )
        )
        connection.out = [memoryview(head or b"")]
        if not connection.is_head:
            connection.out.append(memoryview(parser.send(h11.Data(data=answer.body)) or b""))
        parser.send(h11.EndOfMessage())
        self._enter(connection, _Stage.WRITING, now, ANSWER_DUE)
        self._write(connection, now)

    def _write(self, connection: _Connection, now: float) -> None:
        try:
            while connection.out:
                sent = connection.sock.send(connection.out[0])
                connection.out[0] = connection.out[0][sent:]
                if not connection.out[0]:
                    del connection.out[0]
        except BlockingIOError:
            self._await(connection, select.EPOLLOUT)
            return
        except OSError:
            self._drop(connection)
            return
        parser = connection.parser
        if parser.our_state is h11.DONE and parser.their_state is h11.DONE:
            parser.start_next_cycle()
            self._enter(connection, _Stage.IDLE, now, IDLE_DUE)
            if parser.trailing_data[0]:
                self._enter(connection, _Stage.READING, now, REQUEST_DUE)
                self._pipelined.append(connection)
            return
        # A close with bytes unread would take our last words back.
        self._enter(connection, _Stage.LINGERING, now, LINGER_DUE)
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)

    # --- small things ----------------------------------------------------------------------------

    def _enter(self, connection: _Connection, stage: _Stage, now: float, due: float) -> None:
        connection.stage = stage
        connection.since = now
        connection.deadline = now + due
        is_heard = stage in {_Stage.IDLE, _Stage.READING, _Stage.LINGERING}
        self._await(connection, select.EPOLLIN if is_heard else 0)

    def _await(self, connection: _Connection, mask: int) -> None:
        if mask != connection.mask:
            connection.mask = mask
            self._poll.modify(connection.fd, mask)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.fd]
        connection.sock.close()  # which takes it out of the epoll, too

    def close(self) -> None:
        """Close everything; what has not been sent is not sent any more."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._poll.close()
        self._listener.close()


def _listening(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, name = found[0]
        sock = socket.socket(family, kind, protocol)  # which no other process inherits
    except OSError as exc:
        raise _unfit(address, exc) from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise _unfit(address, exc) from exc
    return sock


def _unfit(address: str, exc: OSError) -> ListenError:
    remedy = ""
    if exc.errno == errno.EADDRINUSE:
        remedy = "; another program listens there: stop it, or choose another port"
    return ListenError(f"supervisor.listen: {address}: {exc.strerror}{remedy}")
