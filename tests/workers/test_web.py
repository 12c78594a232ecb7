"""What kind of application it is, by how it is called; and what says that the extra is missing."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest

from supervisor.config import load
from supervisor.imports import check_entry_points
from workers.web import interface_of


async def asgi(scope, receive, send): ...


def wsgi(environ, start_response): ...


def wrapped(scope, receive, send):
    return asgi(scope, receive, send)


class Asgi:
    async def __call__(self, scope, receive, send): ...


class Wsgi:
    def __call__(self, environ, start_response): ...

    def method(self, environ, start_response): ...


class AsgiPerRequest:
    def __init__(self, scope, receive, send): ...


class WsgiPerRequest:
    def __init__(self, environ, start_response): ...


def decorated(*args, **kwargs): ...


@pytest.mark.parametrize("app", [asgi, wrapped, Asgi(), AsgiPerRequest, functools.partial(asgi)])
def test_asgi_applications(app: Any) -> None:
    """Coroutine functions, and what takes three arguments."""
    assert interface_of(app) == "asgi"


@pytest.mark.parametrize(
    "app",
    [
        wsgi,
        Wsgi(),
        Wsgi().method,
        WsgiPerRequest,
        functools.wraps(wsgi)(decorated),
        functools.partial(lambda extra, environ, start_response: None, 1),
    ],
)
def test_wsgi_applications(app: Any) -> None:
    """What takes two arguments."""
    assert interface_of(app) == "wsgi"


@pytest.mark.parametrize("app", [lambda: asgi, lambda scope: None, lambda *args: None, print])
def test_what_cannot_be_told_is_refused(app: Any) -> None:
    """A factory, ASGI 2, or anything: the sentence says what it is and what to do."""
    with pytest.raises(TypeError, match=r'neither an ASGI .* nor a WSGI .* interface = "asgi"'):
        interface_of(app)


def test_check_says_which_extra_is_missing(tmp_path, monkeypatch) -> None:
    """Without uvicorn on the path an app cannot be served, and `check` names the extra."""
    config = tmp_path / "web.toml"
    config.write_text(
        '[sockets.web]\nlisten = "127.0.0.1:0"\n[workers.web]\napp = "hello:app"\nsockets = ["web"]\n'
    )
    (tmp_path / "hello.py").write_text("app = 1\n")
    settings = load(config, env={}, uid=0)
    assert check_entry_points(settings) == []
    monkeypatch.setattr(sys, "path", [each for each in sys.path if "site-packages" not in each])
    (problem,) = check_entry_points(settings)
    assert (problem.key, problem.line) == ("workers.web.app", 4)
    assert "needs uvicorn and a2wsgi" in problem.message
    assert 'pip install "ackvisor[web]"' in problem.message
