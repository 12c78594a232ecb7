"""Fuzzing of both control sockets: `python -m tests.fuzz.wire --seconds 60 --seed 1`.

Clients and workers of a real supervisor send what is nearly right: messages of every direction with
any value in each field, damaged, doubled, cut in frames, from one connection that goes on and from
ones that come and go. The supervisor has to answer others throughout, to believe nothing, and to stop
as it should. The seed is printed; the same seed sends the same frames in the same order.
"""

from __future__ import annotations

__all__ = ["Fuzzer", "fuzz"]

import argparse
import random
import select
import socket
import tempfile
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from supervisor import protocol
from supervisor.errors import WireError
from tests.supervised import Supervised, group

UNIONS: list[Any] = [
    protocol.ToTemplate,
    protocol.FromTemplate,
    protocol.ToWorker,
    protocol.FromWorker,
    protocol.ToClient,
    protocol.FromClient,
]
MESSAGES: list[type[Any]] = [kind for union in UNIONS for kind in typing.get_args(union)]
# A valid one of these does what it says, and the test would be about that.
DOES = (protocol.Stop, protocol.Reload, protocol.Restart, protocol.Scale)
DUE = 10.0  # seconds in which the supervisor has read what was sent
ROUND = 200  # frames between two looks at the supervisor
INTEGERS = (0, 1, -1, 255, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1)
FLOATS = (0.0, -0.0, 1.5, -1.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "idle-1", "idle", "main", "\x00", "é\u202e", "\x1b[2J", "x" * 5000, "../../etc")


class Fuzzer:
    """Makes frames. The same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, kind: Any) -> Any:
        """Return anything that a field of that type may hold on our side of the wire."""
        pick = self.random
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin in {typing.Union, types.UnionType}:
            return self.value(pick.choice(inner))
        if origin is typing.Literal:
            return pick.choice((*inner, "", "x"))
        if origin is tuple and inner[-1] is not Ellipsis:
            return tuple(map(self.value, inner))
        if origin in {tuple, list}:
            return origin(self.value(inner[0]) for _ in range(pick.choice((0, 1, 3, 40))))
        if origin is dict:
            return {
                self.value(inner[0]): self.value(inner[1]) for _ in range(pick.choice((0, 1, 3)))
            }
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.message(kind)
        if kind is Any:
            return self.value(pick.choice((int, float, str, bool, type(None), list[str])))
        simple: dict[Any, tuple[Any, ...]] = {
            int: INTEGERS,
            float: FLOATS,
            str: TEXTS,
            bool: (True, False),
            type(None): (None,),
        }
        return pick.choice(simple[kind])

    def message(self, kind: type[Any]) -> Any:
        """Return a message of that kind, with anything in its fields."""
        hints = typing.get_type_hints(kind)
        return kind(**{name: self.value(hints[name]) for name in kind.__struct_fields__})

    def frame(self) -> bytes:
        """Return one frame: a message, mostly damaged."""
        frame = bytearray(protocol.encode(self.message(self.random.choice(MESSAGES))))
        for _ in range(self.random.choice((0, 0, 1, 1, 2, 5))):
            at = self.random.randrange(len(frame) + 1)
            match self.random.randrange(4):
                case 0 if at < len(frame):
                    frame[at] = self.random.randrange(256)
                case 1:
                    del frame[at : at + self.random.randrange(1, 20)]
                case 2:
                    frame[at:at] = self.random.randbytes(self.random.randrange(1, 20))
                case _:
                    frame += frame[at:]
        return bytes(frame)

    def frames(self) -> Iterator[list[bytes]]:
        """Yield what is sent at once: one frame mostly."""
        while True:
            count = self.random.choice((1, 1, 1, 1, 1, 1, 2, 5))
            frames = [self.frame() for _ in range(count)]
            if count > 1 or not _does_something(frames[0]):
                yield frames


def _does_something(frame: bytes) -> bool:
    """Tell whether a frame decodes to a request that is carried out; only WireError may be raised."""
    found = []
    for union in UNIONS:
        try:
            found.append(protocol.decode(frame, union))
        except WireError:
            continue
    return any(isinstance(message, DOES) for message in found)


class Peer:
    """A DEALER on a plain socket, as RFC 23 (ZMTP 3.0) has it.

    libzmq's own ends the process that sends a message of several frames while its connection is cut
    (an assertion, `!more`): which is what this is about.
    """

    GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DUE)
        self.socket.connect(str(path))
        self.socket.sendall(self.GREETING)
        self._exactly(len(self.GREETING))
        self.socket.sendall(bytes((4, len(self.READY))) + self.READY)
        _, size = self._exactly(2)
        self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "it has cut the connection in the handshake"
            data += more
        return data

    def send(self, frames: list[bytes]) -> bool:
        """Send one message; False when the supervisor has cut the connection."""
        data = b""
        for number, frame in enumerate(frames, 1):
            flags = 2 | (number < len(frames))  # long, and more to come
            data += bytes((flags,)) + len(frame).to_bytes(8, "big") + frame
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Wait for an answer, or not."""
        select.select([self.socket], [], [], seconds)

    def close(self) -> None:
        """Leave, without a word."""
        self.socket.close()


def fuzz(supervised: Supervised, seconds: float, seed: int) -> int:
    """Send frames to a supervisor that is ready, for so long; return how many it got.

    Raises:
        AssertionError: it has done anything but drop or answer them.
    """
    fuzzer = Fuzzer(seed)
    frames = fuzzer.frames()
    before = supervised.worker_pids()
    sent = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in ("workers.sock", "control.sock"):
            peer = Peer(supervised.runtime_dir / name)
            try:
                for _ in range(ROUND):
                    while not peer.send(next(frames)):  # too large: it has been cut off
                        peer.close()
                        peer = Peer(supervised.runtime_dir / name)
                    sent += 1
                # Half of it may be on its way still when the connection is closed.
                peer.wait(fuzzer.random.choice((0.0, 0.001, 0.05)))
            finally:
                peer.close()
        status = supervised.status()
        assert status["state"] == "ready", status
        assert status["groups"]["idle"]["ready"] == len(before), status
    assert supervised.worker_pids() == before
    assert not supervised.events("worker.failed")
    return sent


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="ackvisor-fuzz-") as folder,
        Supervised(Path(folder), group("idle", "idle", count=2)) as supervised,
    ):
        supervised.ready()
        sent = fuzz(supervised, arguments.seconds, arguments.seed)
        assert supervised.stop() == 0
    print(f"{sent} sent; the supervisor has answered throughout, and stopped as it should")


if __name__ == "__main__":
    main()
