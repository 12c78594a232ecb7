"""ASGI and WSGI applications as workers, with real requests, stops and rolls."""

from __future__ import annotations

import functools
import http.client
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.integration.test_sockets import FREE, rewrite, socket_table, where
from tests.supervised import Supervised, group, wait_until

ASGI = """
import asyncio

async def answer(send, text, status=200):
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})

async def lifespan(scope, receive, send):
    worker = scope["state"]["worker"]
    assert (await receive())["type"] == "lifespan.startup"
    worker.log.info("app.started")
    scope["state"]["greeting"] = "hello"
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    worker.log.info("app.stopped", in_flight=len(worker.jobs.in_flight()))
    await send({"type": "lifespan.shutdown.complete"})

async def socket(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"].upper()})
    scope["state"]["worker"].log.info("app.left", code=message["code"])

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(scope, receive, send)
    if scope["type"] == "websocket":
        return await socket(scope, receive, send)
    worker, job = scope["state"]["worker"], scope["state"]["job"]
    path = scope["path"].removeprefix(scope["root_path"])
    if path == "/until-cancel":  # needs a while longer than the cancel
        worker.log.info("app.slow")
        await worker.accepting
        await asyncio.sleep(0.3)
        await answer(send, "slow but answered")
    elif path == "/for-ever":
        worker.log.info("app.slow")
        try:
            await asyncio.sleep(600)
        finally:
            worker.log.info("app.interrupted", job=job.name, cause=str(job.ctx.cause))
    elif path == "/raises":
        raise ValueError("raised on purpose")
    else:
        greeting = scope["state"]["greeting"]
        await answer(send, f"{greeting} {worker.id} {worker.generation} {scope['path']}")
"""
WSGI = """
import time

def app(environ, start_response):
    worker, job = environ["ackvisor.worker"], environ["ackvisor.job"]
    if environ["PATH_INFO"] == "/until-cancel":
        worker.log.info("app.slow")
        worker.accepting.wait()
    elif environ["PATH_INFO"] == "/for-ever":
        worker.log.info("app.slow")
        with worker.pools["main"].acquire(job.ctx):
            job.ctx.wait()
            job.ctx.check()
    elif environ["PATH_INFO"] == "/deaf":
        worker.log.info("app.slow")
        time.sleep(600)
    with worker.pools["main"].acquire(job.ctx) as conn:
        (row,) = conn.execute("select 6 * 7").fetchone()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{worker.id} {row} {environ['wsgi.input'].read().decode()}".encode()]
"""
FAILS = """
async def app(scope, receive, send):
    await receive()
    {how}
"""


def site(
    folder: Path,
    source: str = ASGI,
    options: dict[str, Any] | None = None,
    /,
    *,
    grace: str = "10s",
    more: str = "",
    **keys: Any,
) -> Supervised:
    keys = {"sockets": ["web"], "min_ready_time": "0", **keys}
    table = group("web", "shop:app", options, **keys).replace('run = "', 'app = "', 1)
    return Supervised(
        folder,
        table + socket_table(FREE) + more,
        modules={"shop": source},
        supervisor=f'grace = "{grace}"',
    )


class Asking:
    """One request in a thread of its own; `answer` waits for status, body and headers."""

    def __init__(self, address: tuple[str, int], path: str) -> None:
        self._connection = http.client.HTTPConnection(address[0], address[1], timeout=30)
        self._connection.request("GET", path)
        self._result: list[Any] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            response = self._connection.getresponse()
            self._result = [response.status, response.read().decode(), dict(response.getheaders())]
        except Exception as exc:
            self._result = [0, repr(exc), {}]
        finally:
            self._connection.close()

    def answer(self) -> tuple[int, str, dict[str, str]]:
        self._thread.join()
        status, body, headers = self._result
        return status, body, headers


def get(address: tuple[str, int], path: str = "/") -> tuple[int, str]:
    return Asking(address, path).answer()[:2]


# --- ASGI --------------------------------------------------------------------------------------


def test_a_slow_request_is_answered_across_a_stop(tmp_path: Path) -> None:
    """It gets its answer, which closes the connection; the lifespan ends after it; exit code 0."""
    with site(tmp_path).start().ready() as supervised:
        address = where(supervised)
        slow = Asking(address, "/until-cancel")
        supervised.event("app.slow")
        (worker,) = supervised.status()["workers"]
        assert worker["in_flight"] == 1
        assert supervised.stop() == 0
        status, body, headers = slow.answer()
        assert (status, body, headers["connection"]) == (200, "slow but answered", "close")
        assert supervised.event("app.stopped")["in_flight"] == 0
        assert (supervised.life("web-1")) == [
            "spawned",
            "ready",
            "cancelled",
            "acknowledged",
            "drained",
            "exited",
        ]


def test_a_slow_request_is_answered_across_a_roll(tmp_path: Path) -> None:
    """It is answered by the old worker, while the new one serves already."""
    with site(tmp_path).start().ready() as supervised:
        address = where(supervised)
        slow = Asking(address, "/until-cancel")
        supervised.event("app.slow")
        supervised.signal(signal.SIGHUP)
        supervised.event("reload.done")
        assert slow.answer()[:2] == (200, "slow but answered")
        assert get(address) == (200, "hello web-2 2 /")
        assert supervised.stop() == 0


def test_what_is_in_flight_at_abort_at_is_cancelled(tmp_path: Path) -> None:
    """It is interrupted with the cause of the stop, and answered with 503; nothing is killed."""
    with site(tmp_path, grace="2s").start().ready() as supervised:
        address = where(supervised)
        slow = Asking(address, "/for-ever")
        supervised.event("app.slow")
        assert supervised.stop() == 0
        status, _, headers = slow.answer()
        assert (status, headers["connection"]) == (503, "close")
        interrupted = supervised.event("app.interrupted")
        assert (interrupted["job"], interrupted["cause"]) == ("GET /for-ever", "stop")
        assert supervised.events("worker.drained")


def test_no_request_on_kept_connections_fails_in_a_roll(tmp_path: Path) -> None:
    """Clients that keep their connection, and dial again when told so, see no failure."""
    failures: list[str] = []
    seen: set[str] = set()
    over = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection(address[0], address[1], timeout=30)
        while not over.is_set():
            try:
                connection.request("GET", "/")
                response = connection.getresponse()
                seen.add(response.read().decode().split()[2])
            except Exception as exc:
                failures.append(repr(exc))
                connection.close()
        connection.close()

    def has_answered(generation: str) -> bool:
        return generation in seen or bool(failures)

    with site(tmp_path, count=2).start().ready() as supervised:
        address = where(supervised)
        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        for generation in ("2", "3"):
            supervised.signal(signal.SIGHUP)
            supervised.event("reload.done", generation=int(generation))
            wait_until(functools.partial(has_answered, generation), "the new one answers")
        over.set()
        for client in clients:
            client.join()
        assert failures == []
        assert supervised.stop() == 0


def test_who_has_just_connected_is_answered_in_a_stop(tmp_path: Path) -> None:
    """A request that is on its way when the cancel comes is not cut off."""
    with site(tmp_path).start().ready() as supervised:
        address = where(supervised)
        assert get(address)[0] == 200
        with socket.create_connection(address, 15.0) as late:
            late.sendall(b"GET /late HTTP/1.1\r\n")
            supervised.signal(signal.SIGTERM)
            supervised.event("worker.acknowledged")
            late.sendall(b"host: here\r\n\r\n")
            answer = b""
            while more := late.recv(4096):
                answer += more
        assert b"200 OK" in answer
        assert b"connection: close" in answer
        assert supervised.wait() == 0


def test_an_exception_is_one_failed_job(tmp_path: Path) -> None:
    """The client gets a 500, the log the traceback, and the worker goes on."""
    with site(tmp_path).start().ready() as supervised:
        address = where(supervised)
        assert get(address, "/raises")[0] == 500
        assert get(address)[0] == 200
        line = supervised.event("Exception in ASGI application\n")
        assert "raised on purpose" in line["exception"]
        assert (line["worker"], line["logger"]) == ("web-1", "uvicorn.error")
        (worker,) = supervised.status()["workers"]
        assert (worker["jobs_failed"], worker["jobs_done"]) == (1, 1)
        assert supervised.stop() == 0


def test_a_lifespan_that_fails_is_a_failed_worker(tmp_path: Path) -> None:
    """Whether it raises or says so: worker.failed with what it was; a reload to it is rolled back."""
    raises = FAILS.format(how="raise LookupError('no database')")
    says = FAILS.format(how="await send({'type': 'lifespan.startup.failed', 'message': 'no key'})")
    with site(tmp_path).start().ready() as supervised:
        for source, error in ((raises, "no database"), (says, "no key")):
            (tmp_path / "shop.py").write_text(source)
            done = supervised.command("reload", "--wait")
            assert done.returncode == 1
            assert error in done.stderr
        failed = supervised.events("worker.failed")
        assert failed[0]["error"] == "LookupError: no database"
        assert "shop.py" in failed[0]["traceback"]
        assert get(where(supervised)) == (200, "hello web-1 1 /")
        assert supervised.stop() == 0


def test_a_websocket_is_closed_with_1012(tmp_path: Path) -> None:
    """A stop tells both sides of a websocket that the service restarts."""
    with site(tmp_path).start().ready() as supervised:
        host, port = where(supervised)
        with connect(f"ws://{host}:{port}/") as client:
            client.send("hello")
            assert client.recv(timeout=15) == "HELLO"
            supervised.signal(signal.SIGTERM)
            try:
                client.recv(timeout=15)
            except ConnectionClosed as exc:
                assert exc.rcvd is not None
                assert exc.rcvd.code == 1012
        assert supervised.event("app.left")["code"] == 1012
        assert supervised.wait() == 0


def test_options_of_the_server(tmp_path: Path) -> None:
    """root_path and the access log are uvicorn's; the access log is off where it is not asked for."""
    with site(tmp_path).start().ready() as supervised:
        assert get(where(supervised), "/quiet")[0] == 200
        options = '[workers.web.options]\nroot_path = "/api"\naccess_log = true\n[sockets.web]'
        rewrite(supervised, "[sockets.web]", options)
        assert supervised.command("reload", "--wait").returncode == 0
        assert get(where(supervised), "/there") == (200, "hello web-2 2 /api/there")
        wait_until(lambda: "/api/there HTTP/1.1" in supervised.text(), "it is logged")
        assert "/quiet" not in supervised.text()
        assert supervised.stop() == 0


def test_no_app_is_told_with_its_type(tmp_path: Path) -> None:
    """What is neither ASGI nor WSGI fails its worker with a sentence."""
    with site(tmp_path, "def app(request): ...\n", max_restarts=0) as supervised:
        failed = supervised.event("worker.failed")
        assert "neither an ASGI application" in failed["error"]
        assert "(request)" in failed["error"]


# --- WSGI --------------------------------------------------------------------------------------

POOL = '[pools.main]\nurl = "sqlite:///web.db"\n'


def test_wsgi_has_its_worker_and_its_pools(tmp_path: Path) -> None:
    """It runs in a thread, reads its body, borrows from a pool, and is answered across a stop."""
    with site(tmp_path, WSGI, more=POOL).start().ready() as supervised:
        address = where(supervised)
        connection = http.client.HTTPConnection(address[0], address[1], timeout=30)
        connection.request("POST", "/", body="a body")
        assert connection.getresponse().read() == b"web-1 42 a body"
        connection.close()
        slow = Asking(address, "/until-cancel")
        supervised.event("app.slow")
        assert supervised.stop() == 0
        assert slow.answer()[:2] == (200, "web-1 42 ")


def test_wsgi_is_cancelled_by_its_context(tmp_path: Path) -> None:
    """At abort_at the job's context ends, the connection comes back, the client gets a 503."""
    with site(tmp_path, WSGI, more=POOL, grace="2s").start().ready() as supervised:
        slow = Asking(where(supervised), "/for-ever")
        supervised.event("app.slow")
        assert supervised.stop() == 0
        assert slow.answer()[0] == 503
        (report,) = [line["reports"]["main"] for line in supervised.events("worker.drained")]
        assert report["leaked"] == []


def test_wsgi_that_heeds_no_context_is_abandoned_by_name(tmp_path: Path) -> None:
    """Nobody can end its thread but with the process: the client is told, and so is the operator."""
    with site(tmp_path, WSGI, more=POOL, grace="2s").start().ready() as supervised:
        slow = Asking(where(supervised), "/deaf")
        supervised.event("app.slow")
        assert supervised.stop() == 0
        assert slow.answer()[:2] == (503, "Service Unavailable\n")
        supervised.event("request.abandoned", job="GET /deaf")
        assert "Exception in ASGI application" not in supervised.text()
        (drained,) = supervised.events("worker.drained")
        assert drained["worker"] == "web-1"


def test_a_dead_supervisor_frees_the_port_at_once(tmp_path: Path) -> None:
    """The old workers stop accepting; a new supervisor serves while they finish what they have."""
    with site(tmp_path).start().ready() as supervised:
        host, port = where(supervised)
        rewrite(supervised, FREE, f"{host}:{port}")
        slow = Asking((host, port), "/until-cancel")
        supervised.event("app.slow")
        os.kill(supervised.pid, signal.SIGKILL)
        supervised.wait()
        supervised.start()
        supervised.event("supervisor.ready", count=2)
        assert slow.answer()[:2] == (200, "slow but answered")
        assert get((host, port))[0] == 200
        assert supervised.stop() == 0
