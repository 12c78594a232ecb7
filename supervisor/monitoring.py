"""What is answered over HTTP: metrics, health and the status page. It only reads.

What needs the workers' own words (`/metrics`, `/status.json`) waits for an inquiry, and whoever asks
while one is under way waits for the next one: its answer is never older than its question. Health is
answered at once, from what the supervisor knows itself.
"""

from __future__ import annotations

__all__ = ["Monitoring"]

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from supervisor.core.snapshot import FleetSnapshot
from supervisor.health import readiness
from supervisor.http import Answer, Http, Request
from supervisor.metrics import Metrics
from supervisor.protocol import Report

# Of the loop's time, answers that take work have a fifth at most, however often they are asked for.
REST = 4.0
MAX_EVENTS = 30  # shown on the page
MAX_DETAIL = 300  # characters

_ASKING = ("/metrics", "/status.json")  # what workers are asked for
_OPENMETRICS = "application/openmetrics-text"
_PLAIN = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"))
_FATES = {
    "exited": "had ended",
    "failed": "had failed",
    "killed": "had been killed from outside",
    "hung": "hung",
    "recycled": "is due for it",
    "rolled": "is rolled over",
}
# Fields of an event that say in words what it is about; the first one that it has is shown.
_DETAILS = ("why", "error", "reason", "cause", "pool", "target", "outcome")


class Monitoring:
    """The listener of one supervisor, and what it has counted. Owned by the loop's thread.

    Args:
        address: where to listen.
        snapshot: returns the fleet as it is now.
        inquire: asks the workers, and soon calls what it is given with the status that comes of it.
        newest: returns so many of the last life-cycle events, oldest first.
        max_idle: returns the pools of each group and their `max_idle`, as configured.
        complain: told of a metric of the application's own that is not shown as declared, and why.

    Raises:
        ListenError: the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        *,
        snapshot: Callable[[], FleetSnapshot],
        inquire: Callable[[Callable[[dict[str, Any]], object]], object],
        newest: Callable[[int], list[dict[str, Any]]],
        max_idle: Callable[[], Mapping[str, Mapping[str, int]]],
        complain: Callable[[str, str], object],
    ) -> None:
        self._http = Http(address)
        self._snapshot = snapshot
        self._inquire = inquire
        self._newest = newest
        self._max_idle = max_idle
        self._metrics = Metrics(complain)
        self._waiting: list[Request] = []  # for the next inquiry
        self._asked: list[Request] = []  # for the one under way
        self._began = 0.0  # in the thread's own time: what the work is measured by
        self._rests_until = 0.0
        self._readiness: Answer | None = None  # in this turn
        self._page: Answer | None = None
        self.url = self._http.url

    # --- what the supervisor tells -------------------------------------------------------------------

    def event(self, event: Mapping[str, Any]) -> None:
        """Count a life-cycle event."""
        self._metrics.event(event["event"], event)
        if event["event"] == "supervisor.ready":
            # The first scrape would wait for this import, and so would the start, were it earlier.
            from supervisor import exposition  # noqa: F401

    def heard(self, worker: str, report: Report) -> None:
        """Take what a worker has reported."""
        self._metrics.heard(worker, report)

    # --- one turn of the loop ------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to do."""
        return self._http.fileno()

    def next_deadline(self) -> float | None:
        """Return when `turn` is wanted at the latest."""
        dues = [due for due in (self._http.next_deadline(),) if due is not None]
        if self._waiting and not self._asked:
            dues.append(self._rests_until)
        return min(dues, default=None)

    def turn(self, now: float) -> None:
        """Answer what can be answered, and ask the workers for the rest. Never blocks."""
        self._readiness = None
        for request in self._http.requests(now):
            if request.path in _ASKING:
                self._waiting.append(request)
            else:
                self._http.answer(request, self._answer(request.path), now)
        if self._waiting and not self._asked and self._rests_until <= now:
            self._asked, self._waiting = self._waiting, []
            self._began = time.thread_time()
            self._inquire(self._inquired)

    def _answer(self, path: str) -> Answer:
        match path:
            case "/healthz":
                return Answer(200, b"ok\n", headers=_PLAIN)
            case "/readyz":
                if self._readiness is None:
                    is_ready, why = readiness(self._snapshot())
                    self._readiness = _json(why, 200 if is_ready else 503)
                return self._readiness
            case "/":
                self._page = self._page or _page()
                return self._page
            case _:
                known = ", ".join(("/", "/healthz", "/readyz", *_ASKING))
                return Answer(404, f"there is {known}\n".encode(), headers=_PLAIN)

    def _inquired(self, status: dict[str, Any]) -> None:
        """Answer who has waited for this status; what several want is made once."""
        now = time.monotonic()
        asked, self._asked = self._asked, []
        made: dict[str, Answer] = {}
        for request in asked:
            wanted = request.path
            if wanted == "/metrics" and _OPENMETRICS in request.accept:
                wanted = _OPENMETRICS
            if wanted not in made:
                made[wanted] = self._made(wanted, status)
            self._http.answer(request, made[wanted], now)
        self._rests_until = now + REST * (time.thread_time() - self._began)

    def _made(self, wanted: str, status: dict[str, Any]) -> Answer:
        if wanted == "/status.json":
            events = [_shown(event) for event in self._newest(MAX_EVENTS)]
            return _json({**status, "events": events}, 200)
        from supervisor.exposition import exposition

        families = self._metrics.families(status, self._max_idle())
        text, media_type = exposition(families, wanted)
        return Answer(200, text, media_type, _PLAIN)

    def close(self) -> None:
        """Listen no more."""
        self._http.close()


def _json(value: Any, status: int) -> Answer:
    return Answer(status, f"{json.dumps(value)}\n".encode(), "application/json", _PLAIN)


def _shown(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return of an event what one line of the page has room for: no stacks, no reports."""
    short = {k: event[k] for k in ("time", "event", "worker", "group", "generation") if k in event}
    if event["event"] == "worker.spawned" and event.get("reason"):
        return {**short, "detail": f"in place of one that {_FATES[event['reason']]}"}
    detail = next((str(event[name]) for name in _DETAILS if event.get(name)), "")
    if not detail:
        how = [
            f"{name} {event[name]}" for name in ("code", "signal") if event.get(name) is not None
        ]
        if not how and "seconds" in event:
            how = [f"after {event['seconds']:.3g} s"]
        detail = ", ".join(how)
    return {**short, "detail": detail[:MAX_DETAIL]}


def _page() -> Answer:
    """Return the page. Its own script and style are the only ones that a browser will take."""
    html = Path(__file__).with_name("page.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_digests('script', html)}",
        f"style-src {_digests('style', html)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = (
        *_PLAIN,
        ("Content-Security-Policy", "; ".join(policy)),
        ("Referrer-Policy", "no-referrer"),
    )
    return Answer(200, html, "text/html; charset=utf-8", headers)


def _digests(tag: str, html: bytes) -> str:
    pattern = rf"<{tag}>(.*?)</{tag}>".encode()
    digests: Iterable[bytes] = (
        hashlib.sha256(text).digest() for text in re.findall(pattern, html, re.DOTALL)
    )
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
