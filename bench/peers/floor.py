"""The floor: a bare loop of os.fork and waitpid, with nothing that a supervisor is for.

It imports the worker once, forks, starts again whoever dies, and on SIGTERM passes the signal
on and waits for everybody. On SIGHUP it replaces one after the other, the new one first, with the
code that it has. Its workers see its death as the end of a pipe.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import NoReturn

from bench.peers import worker

_TERM = {signal.SIGTERM}


class Floor:
    def __init__(self) -> None:
        self.children: set[int] = set()
        self.stopping = False
        self.life, self.own_end_of_life = os.pipe()

    def spawn(self, ready: int | None = None) -> None:
        # A SIGTERM between the fork and the note of its pid would miss the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, _TERM)
        pid = os.fork()
        if pid == 0:
            self.child(ready)
        self.children.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERM)

    def child(self, ready: int | None) -> NoReturn:
        try:
            os.close(self.own_end_of_life)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERM)
            worker.serve(self.life, ready)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def stop(self, *_: object) -> None:
        self.stopping = True
        for pid in self.children:
            os.kill(pid, signal.SIGTERM)

    def roll(self, *_: object) -> None:
        for old in list(self.children):
            told, ready = os.pipe()
            self.spawn(ready)
            os.close(ready)
            os.read(told, 1)  # until the child has closed its end
            os.close(told)
            os.kill(old, signal.SIGTERM)
            os.waitpid(old, 0)
            self.children.discard(old)

    def run(self, count: int) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGHUP, self.roll)
        for _ in range(count):
            self.spawn()
        while self.children:
            pid, status = os.waitpid(-1, 0)
            self.children.discard(pid)
            if os.waitstatus_to_exitcode(status) > 0:
                sys.exit("a worker failed")  # and would do so for ever
            if not self.stopping:
                self.spawn()


if __name__ == "__main__":
    Floor().run(int(os.environ[worker.WORKERS]))
    os._exit(0)  # the interpreter's own farewell is 30 ms that a supervisor need not spend
