"""Redis for asyncio, by redis-py's own: as the driver for threads, with its promises.

A task that is cancelled while an answer is on its way leaves it unread; redis-py then closes the
connection, and where it does not, the count of answers tells.
"""

from __future__ import annotations

__all__ = ["AsyncRedisDriver", "from_url"]

import asyncio
import socket
from functools import cache
from typing import Any

import redis.asyncio
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry

from workers.pool.drivers import sockets
from workers.pool.drivers.aio import AsyncDriver, Connect
from workers.pool.drivers.redis import (
    BUSY,
    PATIENCE,
    RedisDriver,
    Watched,
    is_listening,
    plain,
    read_options,
)


class _WatchedAsync(Watched):
    _heard: Any = None  # what the event loop has read, and the socket with what it has not
    _ear: socket.socket | None = None

    @property
    def sock(self) -> Any:
        writer = self._writer  # type: ignore[attr-defined]
        return None if writer is None else writer.get_extra_info("socket")

    async def connect(self) -> None:
        try:
            await super().connect()  # type: ignore[misc]
        except redis.ConnectionError as exc:
            if self._ear is not None:
                heard = bytes(self._heard._buffer).decode(errors="replace")  # noqa: SLF001
                farewell = (heard + sockets.last_words(self._ear)).strip().lstrip("-")
                if farewell:
                    raise redis.ConnectionError(farewell) from exc
            raise
        finally:
            if self._ear is not None:
                self._ear.close()

    async def _connect(self) -> None:
        self._dial()
        await super()._connect()  # type: ignore[misc]

    def _listen(self) -> None:
        writer = self._writer  # type: ignore[attr-defined]
        if writer.get_extra_info("ssl_object") is None:
            self._heard = self._reader  # type: ignore[attr-defined]
            self._ear = writer.get_extra_info("socket").dup()

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            response = await super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError:
            self.unread -= 1
            raise
        self.unread -= 1
        return response


class OneAsyncConnection(redis.asyncio.ConnectionPool):
    """What redis-py takes for a pool: the one connection of a lent client."""

    def __init__(self, connection_class: Any, **options: Any) -> None:
        super().__init__(connection_class=_watched(connection_class), **plain(options, Retry))
        self.link: Any = self.make_connection()  # type: ignore[no-untyped-call]
        self.free = [self.link]

    async def get_connection(self, *_args: Any, **_options: Any) -> Any:
        """Hand the connection to a command, a pipeline or a subscription.

        Raises:
            redis.RedisError: another one has it.
        """
        try:
            return self.free.pop()
        except IndexError:
            raise redis.RedisError(
                "a lent client is one connection, and a pipeline, a subscription or another task "
                "has it: borrow another one"
            ) from None

    async def release(self, connection: Any) -> None:
        """Take it back."""
        if connection is self.link and not self.free:
            self.free.append(connection)

    async def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: ARG002 (but one)
        """Close it."""
        await self.link.disconnect()


class _Knows(RedisDriver):
    """What can be known without waiting; the event loop may have read ahead."""

    def is_quiet(self, conn: Any) -> bool:
        link = conn.connection_pool.link
        reader = link._reader  # noqa: SLF001
        ahead = reader.at_eof() or bool(reader._buffer)  # noqa: SLF001
        return not ahead and sockets.is_silent(link.sock)


class AsyncRedisDriver(AsyncDriver):
    """redis.asyncio's client: unblocked on the server, cut at the socket, safe after a fork."""

    kind = _Knows
    settles = True
    knows: _Knows

    def __init__(self) -> None:
        super().__init__()
        self.tidy = self.knows.tidy

    async def adopt(self, conn: Any) -> None:
        """Bind a client that is not from `from_url` to one connection; remember its socket."""
        pool = conn.connection_pool
        if not isinstance(pool, OneAsyncConnection):
            await pool.disconnect()
            pool = OneAsyncConnection(pool.connection_class, **pool.connection_kwargs)
            await pool.link.connect()
            pool.link.changed = False
            conn.connection_pool = pool
            conn.connection = None  # a single_connection_client has one of its own
        await pool.link.send_command("CLIENT", "ID")
        self.knows.remember(conn, await pool.link.read_response())

    async def reset(self, conn: Any) -> None:
        """End a transaction; where more has been changed, RESET and repeat the handshake."""
        link = conn.connection_pool.link
        command, answer = self.knows.way_back(conn)
        await _ask(link, command, answer)
        if command == "RESET":
            await link.on_connect()
        self.knows.arrived(conn)

    async def check(self, conn: Any) -> None:
        """Ping."""
        await _ask(conn.connection_pool.link, "PING", b"PONG")

    async def cancel(self, conn: Any, seconds: float) -> None:
        """Unblock a command that blocks, over another connection; wait a moment for any other.

        Raises:
            redis.RedisError: it neither blocks nor ends, or there is no connection to spare.
        """
        pool = conn.connection_pool
        link = pool.link
        seen = link.sent
        if is_listening(pool):
            raise redis.ConnectionError("a subscription ends with its connection")
        ended = False

        async def unblock(other: Any) -> None:
            nonlocal ended
            for pause in PATIENCE:
                ended = bool(await other.client_unblock(link.number, error=True))
                if not ended:
                    await asyncio.sleep(pause)
                    ended = link.sent != seen or not link.unread
                if ended:
                    return

        if not await self.with_spare(unblock, min(seconds, BUSY)):
            raise redis.ConnectionError("all connections are lent: none is left to cancel with")
        if not ended:
            raise redis.TimeoutError("a cancelled command neither blocks nor ends")

    async def close(self, conn: Any) -> None:
        """Close it. Redis needs no good-bye."""
        self.knows.forget(conn)
        await conn.connection_pool.disconnect()


@cache
def _watched(kind: Any) -> Any:
    # Under its own name: it is what the borrower takes it for.
    return type(kind.__name__, (_WatchedAsync, kind), {"__module__": kind.__module__})


async def _ask(link: Any, command: str, wanted: bytes) -> None:
    await link.send_command(command)
    answer = await link.read_response()
    if answer not in (wanted, wanted.decode()):
        raise redis.ConnectionError(f"{command} was answered by something else")


def from_url(url: str, application_name: str | None) -> tuple[Connect, AsyncDriver]:
    """Read a Redis URL, as the driver for threads does."""
    options = read_options(url, application_name, parse_url)
    kind = options.pop("connection_class", Connection)

    async def connect() -> Any:
        pool = OneAsyncConnection(kind, **options)
        link = pool.link
        try:
            await link.connect()
        except BaseException:
            await link.disconnect(nowait=True)
            raise
        if "socket_keepalive" not in options:
            sockets.keep_alive(link.sock)
        link.changed = False
        return redis.asyncio.Redis(connection_pool=pool)

    return connect, AsyncRedisDriver()
