"""A shared listening socket, as a worker sees it."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from workers.sockets import SharedSocket, SharedSockets


@pytest.fixture
def parent() -> Iterator[socket.socket]:
    """What the supervisor has bound: it listens, and does not block."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        yield sock


@pytest.fixture
def shared(parent: socket.socket) -> Iterator[SharedSocket]:
    with SharedSocket(os.dup(parent.fileno())) as sock:
        yield sock


def blocks(sock: socket.socket) -> bool:
    return not fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK


def test_it_never_makes_the_others_block(parent: socket.socket, shared: SharedSocket) -> None:
    """Whether its accept waits is its own affair: the kernel's flag belongs to all."""
    for timeout in (None, 0.0, 5.0, None):
        shared.settimeout(timeout)
        assert timeout == shared.gettimeout()
        assert not blocks(parent)
    for flag in (True, False):
        shared.setblocking(flag)
        assert flag == shared.getblocking()
        assert not blocks(parent)


def test_accept_waits_by_default(parent: socket.socket, shared: SharedSocket) -> None:
    """The connection that it returns blocks, too."""
    accepted: list[socket.socket] = []
    waiting = threading.Thread(target=lambda: accepted.append(shared.accept()[0]))
    waiting.start()
    with socket.create_connection(parent.getsockname(), 15.0):
        waiting.join(15.0)
    with accepted[0] as connection:
        assert connection.gettimeout() is None
        assert blocks(connection)


def test_accept_ends_as_it_is_told(shared: SharedSocket) -> None:
    """With a time-out it raises TimeoutError, without waiting BlockingIOError."""
    shared.settimeout(0.01)
    with pytest.raises(TimeoutError):
        shared.accept()
    shared.setblocking(False)
    with pytest.raises(BlockingIOError):
        shared.accept()


def test_listen_leaves_the_backlog_of_all_alone(
    parent: socket.socket, shared: SharedSocket
) -> None:
    """A library's listen(1) does not make the queue of every worker short."""
    shared.listen(1)
    clients = [socket.create_connection(parent.getsockname(), 15.0) for _ in range(6)]
    shared.settimeout(15.0)
    accepted = [shared.accept()[0] for _ in clients]
    for each in (*clients, *accepted):
        each.close()


def test_a_socket_is_made_when_it_is_asked_for(parent: socket.socket) -> None:
    """The same object each time; a name that the group has not says which ones it has."""
    sockets = SharedSockets({"web": os.dup(parent.fileno())})
    assert list(sockets) == ["web"]
    assert len(sockets) == 1
    with sockets["web"] as web:
        assert web is sockets["web"]
        assert parent.getsockname() == web.getsockname()
    with pytest.raises(KeyError, match=r"'wbe' is not among the sockets of this group: \['web'\]"):
        sockets["wbe"]
