"""gunicorn: the application. Imported by each worker, or with --preload by the arbiter, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.peers import worker  # noqa: F401 - the application's imports are the worker's


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    del environ
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok\n"]
