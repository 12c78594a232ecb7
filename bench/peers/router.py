"""The floor of a broadcast: one ROUTER, bare DEALERs in forked processes, no supervisor.

Says on standard output how many seconds passed from the first `cancel` sent to the last
acknowledgement received, the first time it is done: a fleet is cancelled once in its life.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import NoReturn

import zmq

from bench.peers import worker

_DEADLINE_MS = 10_000
_CANCEL = b"cancel until 1234567.890123456 because stop"
_ACKNOWLEDGED = b"acknowledged"


def child(endpoint: str) -> NoReturn:
    try:
        dealer = zmq.Context().socket(zmq.DEALER)
        dealer.rcvtimeo = _DEADLINE_MS
        dealer.connect(endpoint)
        dealer.send(b"hello")
        dealer.recv()
        dealer.send(_ACKNOWLEDGED)
        dealer.recv()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def broadcast(count: int, endpoint: str) -> float:
    # No context before the forks: its threads and sockets do not survive them.
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            child(endpoint)
        pids.append(pid)
    try:
        router = zmq.Context().socket(zmq.ROUTER)
        router.linger = 1_000
        router.rcvtimeo = _DEADLINE_MS
        router.router_mandatory = 1
        router.bind(endpoint)
        peers = [router.recv_multipart()[0] for _ in range(count)]
        time.sleep(0.2)  # idle, as a fleet is when it is told to stop
        begun = time.monotonic()
        for peer in peers:
            router.send_multipart([peer, _CANCEL])
        for _ in range(count):
            router.recv_multipart()
        elapsed_s = time.monotonic() - begun
        for peer in peers:
            router.send_multipart([peer, b"bye"])
    except BaseException:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for pid in pids:
            os.waitpid(pid, 0)
    return elapsed_s


if __name__ == "__main__":
    sys.stdout.write(f"{broadcast(int(os.environ[worker.WORKERS]), sys.argv[1])}\n")
