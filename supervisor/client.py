"""The command line's side of the control socket: ask a running supervisor, with a deadline."""

from __future__ import annotations

__all__ = ["Client"]

import contextlib
import fcntl
import glob
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from supervisor.control import client_endpoint
from supervisor.errors import NoSupervisorError, RefusedError
from supervisor.protocol import FetchEvents, FromClient, Refused, ToClient, decode, encode

ANSWER_DUE = 5.0  # seconds
LAST_WORDS_MS = 500  # how long after its end an answer of the supervisor may come
# A supervisor is trusted by its own command line: a batch of events may be large.
MAX_ANSWER = 1 << 28


class Client:
    """A conversation with the supervisor that runs in `runtime_dir`. Use as a `with` block.

    Raises:
        NoSupervisorError: none runs there, or it does not answer.
    """

    def __init__(self, runtime_dir: Path, name: str) -> None:
        self._name = name
        self.pid = self._running(runtime_dir)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as exc:
            raise self._none(runtime_dir) from exc
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.linger = 0
        self._dealer.connect(client_endpoint(runtime_dir))
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._pidfd, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._dealer.close()
        self._context.term()
        os.close(self._pidfd)

    def ask(self, request: FromClient, timeout: float | None = ANSWER_DUE) -> Any:
        """Return the answer, within `timeout` seconds (None: as long as the supervisor lives)."""
        self.send(request)
        answer = self.receive(timeout)
        if answer is None:
            raise NoSupervisorError(
                f"the supervisor {self._name!r} (pid {self.pid}) does not answer{self._excuse()}"
            )
        return answer

    def _excuse(self) -> str:
        """Say so where it has been stopped, and how it goes on."""
        from supervisor.status import is_stopped  # who gets an answer does without

        if not is_stopped(self.pid):
            return ""
        return f": it is stopped, by SIGSTOP or Ctrl-Z; `kill -CONT {self.pid}` lets it go on"

    def send(self, request: FromClient) -> None:
        """Ask without waiting for the answer; for who has several kinds of request under way."""
        self._dealer.send(encode(request))

    def receive(self, timeout: float | None) -> Any:
        """Return the next answer, None when there is none within `timeout` seconds.

        Raises:
            NoSupervisorError: the supervisor has died, and all that it has sent has been returned.
            RefusedError: the answer is a refusal.
        """
        due = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if due is None else max(0, int((due - time.monotonic()) * 1000))
            ready = dict(self._poller.poll(left))
            # What it has sent before its end may be on its way still.
            if self._dealer in ready or (self._pidfd in ready and self._dealer.poll(LAST_WORDS_MS)):
                answer: Any = decode(self._dealer.recv(), ToClient, MAX_ANSWER)  # type: ignore[arg-type]
                if isinstance(answer, Refused):
                    raise RefusedError(answer.error, answer.exit_code)
                return answer
            if self._pidfd in ready:
                raise NoSupervisorError(f"the supervisor {self._name!r} (pid {self.pid}) has died")
            if due is not None and time.monotonic() >= due:
                return None

    def events(self, *, follow: bool) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield (event, how many were missed before it); with `follow` until the last of all."""
        after = 0
        timeout: float | None = ANSWER_DUE  # for the first batch also with `follow`: there is one
        while True:
            batch = self.ask(FetchEvents(after, follow), timeout)
            timeout = None if follow else ANSWER_DUE
            missed = batch.missed
            for event in batch.events:
                yield event, missed
                missed = 0
            after = batch.last
            if batch.ended or not (follow or batch.events):
                return

    def wait_until_gone(self, deadline: float) -> bool:
        """Wait for the end of the supervisor's process; False when it is still there."""
        poller = zmq.Poller()
        poller.register(self._pidfd, zmq.POLLIN)
        return bool(poller.poll(max(0, int((deadline - time.monotonic()) * 1000))))

    def _running(self, runtime_dir: Path) -> int:
        """Return the pid of the supervisor that holds the lock."""
        try:
            lock = os.open(runtime_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise self._none(runtime_dir) from exc
        except OSError as exc:
            raise NoSupervisorError(
                f"the folder {runtime_dir} of supervisor {self._name!r}: {exc.strerror}; "
                "run this as the same user"
            ) from exc
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                raise self._none(runtime_dir)  # nobody holds it
            held_by = os.read(lock, 32).strip()
            return int(held_by) if held_by.isdigit() else 0  # whoever it is, it has not said so
        finally:
            os.close(lock)

    def _none(self, runtime_dir: Path) -> NoSupervisorError:
        other = _another_users(runtime_dir, self._name)
        remedy = (
            f"there is {other}, of uid {other.stat().st_uid}: ask as that user, or with"
            f" RUNTIME_DIRECTORY={other}"
            if other is not None
            else "start one with `supervisor start -c FILE`"
        )
        return NoSupervisorError(
            f"no supervisor named {self._name!r} runs here (looked in {runtime_dir}); {remedy}"
        )


def _another_users(runtime_dir: Path, name: str) -> Path | None:
    """Return the folder of a supervisor of that name that somebody else has, if one is to be seen.

    The default folder depends on who asks.
    """
    pattern = f"ackvisor-*-{glob.escape(name)}"
    places = [runtime_dir.parent.glob(pattern)] if runtime_dir.name.startswith("ackvisor-") else []
    places += [Path("/run/user").glob(f"*/{glob.escape(name)}")]
    for folder in itertools.chain(*places):
        with contextlib.suppress(OSError):
            if folder != runtime_dir and folder.is_dir() and folder.stat().st_uid != os.geteuid():
                return folder
    return None
