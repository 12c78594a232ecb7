"""The worker's link to its supervisor: a DEALER, and the lifeline. One thread owns both.

It carries what others have declared and decides nothing: what a message means is the runtime's
business. Any thread may `send`; only the link's thread touches the socket.
"""

from __future__ import annotations

__all__ = ["Link"]

import os
import time
from _thread import allocate_lock, start_new_thread
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import zmq
from zmq import backend

from supervisor import log
from supervisor.errors import WireError
from supervisor.protocol import (
    Acknowledged,
    Allowance,
    Cancel,
    Death,
    Drained,
    EndSessions,
    Examine,
    Farewell,
    FromWorker,
    Hello,
    Inquire,
    Message,
    ToWorker,
    Tune,
    decode,
    encode,
)

# What lies under pyzmq's own classes (`backend`) and a bare thread under threading's: those touch
# half a megabyte of Python objects that a forked worker otherwise shares, and take a millisecond.
# So do its enums.
_DEALER = int(zmq.DEALER)
_LINGER = int(zmq.LINGER)
_ROUTING_ID = int(zmq.ROUTING_ID)
_POLLIN = int(zmq.POLLIN)
_DONTWAIT = int(zmq.DONTWAIT)
_FOR_EVER = -1  # milliseconds


class Handler(Protocol):
    """What the link tells, always on its own thread."""

    def cancelled(self, message: Cancel) -> None:
        """A cancel has come, and its receipt has been sent."""

    def inquired(self, number: int) -> None:
        """The supervisor asks for a report with this number."""

    def examined(self, number: int) -> None:
        """The supervisor asks for all that is in hand, under this number."""

    def allowed(self, message: Allowance) -> None:
        """A pool's part in a budget has changed."""

    def tuned(self, message: Tune) -> None:
        """Settings have changed that a running worker can take."""

    def ending(self, message: EndSessions) -> None:
        """Another worker was killed, and has left sessions behind."""

    def bereaved(self, message: Death) -> None:
        """Another worker of the group has ended with jobs in flight."""

    def orphaned(self) -> None:
        """The supervisor has died."""


class Link:
    """The connection to one supervisor, from `start` to the end of the process.

    Args:
        endpoint: of the supervisor's ROUTER.
        hello: the first message; its worker id and token make up the routing id.
        lifeline: a descriptor that ends when the supervisor does.
        handler: what is told.
    """

    def __init__(self, endpoint: str, hello: Hello, lifeline: int, handler: Handler) -> None:
        self._endpoint = endpoint
        self._hello = hello
        self._lifeline = lifeline
        self._handler = handler
        self._outgoing: deque[FromWorker] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._timers: list[tuple[float, Callable[[], object]]] = []
        self._context = backend.Context()
        self._orphaned = False
        self._over = False
        self._has_ended = False  # written by the link's thread, last of all
        self._running = allocate_lock()  # held by the link's thread until then

    def start(self) -> None:
        """Connect and say hello. Called once."""
        self._running.acquire()
        start_new_thread(self._serve, ())

    @property
    def has_ended(self) -> bool:
        """Whether the link's thread has served, and serves no more. One that is to start has not."""
        return self._has_ended

    def send(self, message: FromWorker) -> None:
        """Send in order, soon. Never blocks. Any thread, and signal handlers."""
        self._outgoing.append(message)
        os.eventfd_write(self._wake, 1)

    def call_at(self, when: float, action: Callable[[], object]) -> None:
        """Run `action` on the link's thread at a monotonic time. Any thread."""
        self._timers.append((when, action))
        os.eventfd_write(self._wake, 1)

    def finish(self, last: FromWorker, timeout: float) -> None:
        """Send the last message; return on its receipt, or after `timeout` seconds without one."""
        self.send(last)
        self.call_at(time.monotonic() + timeout, self._end)
        self._running.acquire(True, timeout + 1.0)

    # --- the link's thread ----------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._turn(self._connected())
        finally:
            self._has_ended = True
            self._running.release()

    def _connected(self) -> backend.Socket:
        """Connect and say hello."""
        dealer = backend.Socket(self._context, _DEALER)
        dealer.set(_LINGER, 0)  # what matters has a receipt
        # Never used twice, so no other worker's messages can reach this one.
        dealer.set(_ROUTING_ID, f"{self._hello.worker}/{self._hello.token[:8]}".encode())
        dealer.connect(self._endpoint)
        dealer.send(encode(self._hello))
        self._dealer = dealer  # never closed: the process ends, and nothing is left to be sent
        return dealer

    def _turn(self, dealer: backend.Socket) -> None:
        sources: list[tuple[Any, int]] = [
            (readable, _POLLIN) for readable in (dealer, self._wake, self._lifeline)
        ]
        while not self._over:
            ready = [source for source, _ in backend.zmq_poll(sources, self._until_next_timer())]
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if dealer in ready:
                self._receive(dealer)
            while self._outgoing:
                message = self._outgoing.popleft()
                if not self._orphaned:
                    dealer.send(encode(message))
                elif isinstance(message, Drained):
                    return  # nobody is there to give a receipt
            if self._lifeline in ready and _has_ended(self._lifeline):
                sources.remove((self._lifeline, _POLLIN))
                self._orphaned = True
                self._handler.orphaned()
            self._run_timers()

    def _receive(self, dealer: backend.Socket) -> None:
        try:
            message: Message = decode(dealer.recv(_DONTWAIT), ToWorker)  # type: ignore[arg-type]
        except (zmq.Again, WireError) as exc:
            log.get_logger().warning("link.dropped", error=str(exc))
            return
        if isinstance(message, Cancel):
            dealer.send(encode(Acknowledged(message.deadline)))  # the receipt comes first
            self._handler.cancelled(message)
        elif isinstance(message, Inquire):
            self._handler.inquired(message.number)
        elif isinstance(message, Examine):
            self._handler.examined(message.number)
        elif isinstance(message, Allowance):
            self._handler.allowed(message)
        elif isinstance(message, Tune):
            self._handler.tuned(message)
        elif isinstance(message, EndSessions):
            self._handler.ending(message)
        elif isinstance(message, Death):
            self._handler.bereaved(message)
        elif isinstance(message, Farewell):
            self._end()

    def _end(self) -> None:
        self._over = True

    def _until_next_timer(self) -> int:
        if not self._timers:
            return _FOR_EVER
        left = min(when for when, _ in self._timers) - time.monotonic()
        return max(0, round(left * 1000 + 0.5))

    def _run_timers(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        for timer in due:
            self._timers.remove(timer)
            timer[1]()


def _has_ended(lifeline: int) -> bool:
    """Tell whether the supervisor's end is closed; it never sends anything."""
    try:
        return not os.read(lifeline, 64)
    except BlockingIOError:
        return False
    except ConnectionResetError:  # closed before it had read all that we wrote
        return True
