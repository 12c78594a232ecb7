"""`app = "module:app"`: serves an ASGI or WSGI application on the group's sockets, through uvicorn.

A request in flight is a job, so it is counted, has a context, and is waited for. How a stop goes:

    cancel      the sockets are closed: the other workers take what comes. Requests in flight go on,
                their responses say `Connection: close`; websockets are closed with 1012
    abort_at    requests in flight are cancelled; who has no response yet gets a 503
    half of the time that is left then: WSGI requests whose threads go on are abandoned, likewise
    then        the application's lifespan ends, and the worker drains as any other

The application finds its worker in `scope["state"]["worker"]` (ASGI, lifespan included) or
`environ["ackvisor.worker"]` (WSGI), and the job of a request beside it, as `job`. The pools of an ASGI
application are awaited (`AsyncPool`), those of a WSGI application block; hand either `job.ctx`.
"""

from __future__ import annotations

__all__ = ["LOOP", "Interface", "interface_of", "serve"]

import asyncio
import contextlib
import inspect
import logging
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Literal

try:
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        f'an app needs {exc.name}, which is not installed: pip install "ackvisor[web]"'
    ) from exc

from workers.context import Cancelled, Context
from workers.correlation import bind
from workers.worker import Job, Worker

# No other loop: that would set the backlog of all workers' sockets to its own.
LOOP = asyncio.SelectorEventLoop

# Who has just connected, or got a response, may have a request on its way, which a close would lose:
# a connection is closed once it has been idle for this long, in seconds.
LINGER = 1.0
TICK = 1.0  # seconds; how old the Date of a response may be
LOOK_AGAIN = 0.01  # seconds; while connections are waited for
TURNS = 5  # of the event loop; from an accept to the protocol it takes three
LAST_MOMENT = 0.25  # seconds for what has been cancelled
MAX_NAME = 200  # characters of a job's name
# Of a request that somebody before us has named. Anything else could write what it likes into the log.
_SANE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:+/=@-]{0,127}")

Interface = Literal["asgi", "wsgi"]

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_Asgi = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


def serve(
    worker: Worker, *, app: Any, interface: Interface, closing: Context
) -> Coroutine[Any, Any, None]:
    """Serve an application until the worker is cancelled and its requests have been answered.

    Args:
        worker: whose sockets and options are used.
        app: the application.
        interface: how it is called.
        closing: ends when nothing may be waited for any more.

    Raises:
        Exception: what its lifespan raised.
    """
    return _Site(worker, app, interface, closing).run()


def interface_of(app: Any) -> Interface:
    """Tell what kind of application this is, by how it is called.

    Raises:
        TypeError: that does not tell.
    """
    called = app if inspect.isroutine(app) or inspect.isclass(app) else type(app).__call__
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(called):
        return "asgi"
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) == 3:  # noqa: PLR2004
        return "asgi"
    if len(needed) == 2:  # noqa: PLR2004
        return "wsgi"
    raise TypeError(
        "the app is neither an ASGI application, called with (scope, receive, send), nor a WSGI one, "
        f"called with (environ, start_response): it is of type {type(app).__name__} and takes "
        f'({", ".join(needed)}); where it is one nevertheless, say so: interface = "asgi" or '
        '"wsgi" in the options'
    )


class _Site:
    """One application on its sockets, from its lifespan's start to its end."""

    def __init__(self, worker: Worker, app: Any, interface: Interface, closing: Context) -> None:
        self._worker = worker
        self._closing = closing
        self._sockets = [worker.sockets[name] for name in worker.sockets]
        self._state: dict[str, Any] = {"worker": worker}
        is_wsgi = interface == "wsgi"
        asgi = _as_asgi(worker, app) if is_wsgi else app
        self._lifespan = None if is_wsgi else _Lifespan(worker, app, self._state)
        self._requests = _Requests(worker, asgi, may_interrupt=not is_wsgi)
        self._server = _server(worker, self._requests)
        self._server.lifespan.state = self._state

    async def run(self) -> None:
        """Serve."""
        if self._lifespan is not None:
            async with self._worker.accepting.with_cancel():
                await self._lifespan.start()
        await self._server.startup(sockets=self._sockets)
        self._worker.ready()
        await self._serve()
        await self._wind_down()
        if self._lifespan is not None:
            async with self._closing.with_cancel():
                await self._lifespan.stop()

    async def _serve(self) -> None:
        stopping = asyncio.ensure_future(_ended(self._worker.accepting))
        while not stopping.done():
            await self._server.on_tick(0)  # the date
            await asyncio.wait({stopping}, timeout=TICK)

    async def _wind_down(self) -> None:
        """Take nothing new, and wait for what is in flight; abort_at ends that."""
        # Not closed at once: asyncio drops a connection that it has accepted when its server is
        # closed before the protocol is made, two turns of the loop later.
        for each in self._sockets:
            asyncio.get_running_loop().remove_reader(each)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        for listener in self._server.servers:
            listener.close()
        for each in self._sockets:
            each.close()
        state = self._server.server_state
        for connection in list(state.connections):
            connection.shutdown()
        # uvicorn has no event for the last of them; a stop lasts seconds at most.
        while (state.connections or state.tasks) and not self._closing.done:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_AGAIN)
        self._requests.abandon()
        for _ in range(TURNS):
            await asyncio.sleep(0)
        for connection in list(state.connections):
            connection.transport.abort()


async def _ended(ctx: Context) -> None:
    await ctx


def _server(worker: Worker, app: _Asgi) -> uvicorn.Server:
    """Return uvicorn's server, with everything that is ours taken out of its hands."""
    options = worker.options
    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",  # ours tells failures
        http=_connection_class(worker),
        log_config=None,
        access_log=options.get("access_log", False),
        root_path=options.get("root_path", ""),
        forwarded_allow_ips=options.get("forwarded_allow_ips"),
        limit_concurrency=options.get("limit_concurrency"),
        timeout_keep_alive=options.get("keep_alive", 5),
        backlog=1,  # accept one at a time, and leave the others to the other workers
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    return server


def _connection_class(worker: Worker) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP connection, with a stop that loses no request."""
    base: Any = AutoHTTPProtocol

    class Connection(base):  # type: ignore[misc]
        """An HTTP connection that is closed when it has been idle for a while, not before."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.idle_since = self.loop.time()
            if worker.accepting.done:  # it had been accepted just before
                self.shutdown()

        def on_response_complete(self) -> None:
            self.idle_since = self.loop.time()
            super().on_response_complete()
            if worker.accepting.done:  # and the response had begun before, or it would be closed
                self.shutdown()

        def shutdown(self) -> None:
            if self.transport.is_closing() or not (
                self.cycle is None or self.cycle.response_complete
            ):
                return  # its response says that it closes, or comes here when it is complete
            left = self.idle_since + LINGER - self.loop.time()
            if left > 0:
                self.loop.call_later(left, self.shutdown)
            else:
                super().shutdown()

    return Connection


def _as_asgi(worker: Worker, app: Any) -> _Asgi:
    """Return a WSGI application as an ASGI one; it runs in threads."""
    from a2wsgi import WSGIMiddleware

    def with_worker(environ: dict[str, Any], start_response: Any) -> Any:
        job = environ["ackvisor.job"] = environ["asgi.scope"]["state"]["job"]
        environ["ackvisor.worker"] = worker
        job.ctx.check()  # it may have waited for a thread until it was too late
        return app(environ, start_response)

    return WSGIMiddleware(with_worker, workers=worker.options.get("threads", 10))  # type: ignore[return-value, arg-type]


class _Identity:
    """What names a request in the lines of the log: an id of its own, once somebody wants it."""

    __slots__ = ("_fields", "_scope")

    def __init__(self, scope: _Scope) -> None:
        self._scope = scope
        self._fields: dict[str, str] = {}

    def __call__(self) -> dict[str, str]:
        if not self._fields:
            told = dict(reversed(self._scope["headers"])).get(b"x-request-id", b"")
            is_sane = _SANE_ID.fullmatch(told) is not None
            self._fields = {"request_id": told.decode() if is_sane else os.urandom(8).hex()}
        return self._fields


class _Requests:
    """The application with a job around each request.

    Args:
        worker: whose jobs they are.
        app: the application.
        may_interrupt: whether the application runs in the task that is cancelled; a thread is not
            interrupted, but its pools are, by `job.ctx`.
    """

    def __init__(self, worker: Worker, app: _Asgi, *, may_interrupt: bool) -> None:
        self._worker = worker
        self._app = app
        self._may_interrupt = may_interrupt
        self._in_threads: set[asyncio.Task[Any]] = set()

    def abandon(self) -> None:
        """Wait no longer for requests that are in threads: these end with the process."""
        for task in self._in_threads:
            task.cancel()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    async def _websocket(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve a websocket. It is no job: it lasts. What it does for a message may be one."""
        if self._worker.accepting.done:
            await send({"type": "websocket.close", "code": 1012})
            return
        with contextlib.suppress(Cancelled):
            async with self._worker.ctx.with_cancel():
                await self._app(scope, receive, send)

    def _job_for(self, name: str, scope: _Scope) -> Job:
        tracing = self._worker.tracing
        if tracing is None:
            return self._worker.job(name)
        return tracing.request(self._worker, name, scope)

    async def _request(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        accepting = self._worker.accepting
        tracing = self._worker.tracing
        has_started = False

        async def sending(message: _Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if accepting.done:
                    message = {**message, "headers": _with_close(message.get("headers", ()))}
                if tracing is not None:
                    tracing.answered(job, message["status"])
            await send(message)

        name = f"{scope['method']} {scope['path']}"[:MAX_NAME]
        try:
            with self._job_for(name, scope) as job:
                bind(job, _Identity(scope))
                scope["state"]["job"] = job
                if self._may_interrupt:
                    async with job.ctx.with_cancel():
                        await self._app(scope, receive, sending)
                else:
                    await self._in_thread(scope, receive, sending)
        except Cancelled as exc:
            self._worker.log.warning("request.cancelled", job=name, cause=str(exc.cause))
        except _AbandonedError:
            self._worker.log.warning("request.abandoned", job=name)
        else:
            return
        if not has_started:
            await _answer_unavailable(sending)

    async def _in_thread(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve a request in a thread, as long as that may take."""
        task = asyncio.current_task()
        assert task is not None  # uvicorn makes one for each request
        self._in_threads.add(task)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            raise _AbandonedError from None
        finally:
            self._in_threads.discard(task)


class _AbandonedError(BaseException):
    """A request's thread goes on, and nobody waits for it any more. No failure of the job's."""


def _with_close(headers: Any) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"connection"]
    return [*kept, (b"connection", b"close")]


async def _answer_unavailable(send: _Send) -> None:
    body = b"Service Unavailable\n"
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Lifespan:
    """The application's own start and end, as ASGI has them.

    An application that raises before it has asked what there is does not know of lifespans, as the
    specification allows. One that has asked and then raises has failed to start, and that is told.
    """

    def __init__(self, worker: Worker, app: _Asgi, state: dict[str, Any]) -> None:
        self._worker = worker
        self._app = app
        self._state = state
        self._has_asked = False
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._failure: str | None = None
        self._task: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Return when the application has started, or does not know of lifespans.

        Raises:
            Exception: what it raised.
        """
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
        self._task = asyncio.ensure_future(
            self._app({**scope, "state": self._state}, self._receive, self._send)
        )
        await self._until(self._started)
        if self._started.is_set() and self._failure is None:
            return
        await self._conclude("startup")

    async def stop(self) -> None:
        """Tell the application that it ends, and return when it has.

        Raises:
            Exception: what it raised.
        """
        if self._task is None or not self._started.is_set():
            return
        self._stopping.set()
        await self._until(self._stopped)
        await self._conclude("shutdown")

    async def _until(self, event: asyncio.Event) -> None:
        """Wait for what the application says, or for its end."""
        assert self._task is not None
        waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait({self._task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    async def _conclude(self, phase: str) -> None:
        assert self._task is not None
        await asyncio.wait(
            {self._task}, timeout=LAST_MOMENT
        )  # most frameworks tell, and then raise
        if self._task.done() and (raised := self._task.exception()) is not None and self._has_asked:
            raise raised
        if self._failure is not None:
            raise RuntimeError(f"the application's lifespan {phase} failed: {self._failure}")

    async def _receive(self) -> _Message:
        if not self._has_asked:
            self._has_asked = True
            return {"type": "lifespan.startup"}
        await self._stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: _Message) -> None:
        if message["type"].endswith(".failed"):
            self._failure = message.get("message") or "it gave no reason"
        (self._stopped if message["type"].startswith("lifespan.shutdown") else self._started).set()
