"""TCP proxies: one that goes deaf (keeps every connection and passes nothing on, or only one way), a
slow one."""

from __future__ import annotations

__all__ = ["Proxy", "SlowProxy"]

import contextlib
import random
import selectors
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with an RST, not with a FIN


class Proxy:
    """Forwards 127.0.0.1:port to another port, in a thread of its own, until it is closed."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._peers: dict[socket.socket, socket.socket] = {}
        self._near: set[socket.socket] = set()  # those of the clients
        self._deaf: frozenset[str] = frozenset()  # to whom: "clients", "server"
        self._inbox: list[str] = []
        self._bell, self._ear = socket.socketpair()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def deafen(self, *to: str) -> None:
        """Pass nothing on from now on, on old and new connections; none is closed.

        Args:
            to: "clients" or "server": be deaf to what these send only.
        """
        self._tell("deafen " + " ".join(to or ("clients", "server")))

    def hear(self) -> None:
        """Pass on what was said meanwhile, and what comes."""
        self._tell("deafen")

    def cut(self) -> None:
        """Hear again, and close every connection there is."""
        self._tell("cut")

    def reset(self) -> None:
        """Reset every connection there is, as a firewall does that has forgotten them."""
        self._tell("reset")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._tell("stop")
        self._thread.join()
        for sock in (*self._peers, self._listener, self._bell, self._ear):
            sock.close()

    def _tell(self, what: str) -> None:
        self._done.clear()
        self._inbox.append(what)
        self._bell.send(b".")
        assert self._done.wait(10)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._ear, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._ear:
                        if self._obey(selector):
                            return
                    elif sock is self._listener:
                        self._accept(selector)
                    elif sock in self._peers:
                        self._pump(selector, sock)

    def _obey(self, selector: selectors.BaseSelector) -> bool:
        self._ear.recv(1)
        what, *to = self._inbox.pop(0).split()
        if what == "deafen":
            self._deaf = frozenset(to)
            for sock in self._peers:
                self._heed(selector, sock)
        elif what == "reset":
            for sock in self._peers:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        elif what == "cut":
            self._deaf = frozenset()
        if what in {"cut", "reset"}:
            while self._peers:
                self._drop(selector, next(iter(self._peers)))
        self._done.set()
        return what == "stop"

    def _heed(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        """Read from a socket, or not, as it is now."""
        wanted = ("clients" if sock in self._near else "server") not in self._deaf
        if wanted and sock not in selector.get_map():
            selector.register(sock, selectors.EVENT_READ)
        elif not wanted and sock in selector.get_map():
            selector.unregister(sock)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            near.close()
            return
        self._peers[near], self._peers[far] = far, near
        self._near.add(near)
        self._heed(selector, near)
        self._heed(selector, far)

    def _pump(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        try:
            piece = sock.recv(65536)
            if piece:
                self._peers[sock].sendall(piece)
                return
        except OSError:
            pass
        self._drop(selector, sock)

    def _drop(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        for end in (sock, self._peers.pop(sock, None)):
            if end is not None:
                self._peers.pop(end, None)
                self._near.discard(end)
                with contextlib.suppress(KeyError):  # deaf: it is not registered
                    selector.unregister(end)
                end.close()


class SlowProxy(socketserver.ThreadingTCPServer):
    """Passes each answer on up to `slowest` seconds later; no connection waits for another's."""

    allow_reuse_address = True

    def __init__(self, target: int, slowest: float) -> None:
        super().__init__(("127.0.0.1", 0), _SlowWay)
        self.target = target
        self.slowest = slowest
        self.chance = random.Random(11)
        self.port: int = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="proxy")
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()  # waits for the ways, whose clients have hung up


class _SlowWay(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, SlowProxy)
        with socket.create_connection(("127.0.0.1", server.target)) as far:
            forth = threading.Thread(target=self._pass_on, args=(self.request, far, lambda: 0.0))
            forth.start()
            self._pass_on(far, self.request, lambda: server.chance.random() * server.slowest)
            forth.join()

    def _pass_on(
        self, source: socket.socket, sink: socket.socket, delay: Callable[[], float]
    ) -> None:
        with contextlib.suppress(OSError):  # one of the two has hung up
            while piece := source.recv(65536):
                time.sleep(delay())
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
