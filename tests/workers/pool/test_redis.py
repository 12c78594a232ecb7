"""The pool on a real Redis: protocol, cancel, restart, deaf and slow peers, a full server, forks."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.servers_mysql_redis import RedisServer, own_redis, redis_server
from tests.workers.pool.fake import eventually, in_thread
from tests.workers.pool.proxy import Proxy, SlowProxy
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.pool import ConnectError, ForkedPoolError, Pool, PoolTimeout

redis = pytest.importorskip("redis")
__all__ = ["own_redis", "redis_server"]  # fixtures are taken by name


@pytest.fixture
def pool(redis_server: RedisServer) -> Iterator[Pool]:
    """A pool on the server, by its Unix socket."""
    with Pool.from_url(redis_server.url(), max_open=8, application_name="pool-test") as pool:
        yield pool


@pytest.fixture
def watcher(redis_server: RedisServer) -> Iterator[Any]:
    """A client of the test's own, to see what the server sees."""
    with redis_server.connect() as client:
        yield client
        client.flushall()


def sessions(watcher: Any, name: str = "pool-test") -> list[dict[str, str]]:
    """Return the connections of this name that the server knows of."""
    return [client for client in watcher.client_list() if client["name"] == name]


def blocked(watcher: Any) -> int:
    """Count the connections that a blocking command holds."""
    return int(watcher.info("clients")["blocked_clients"])


# -- what is lent


def test_what_is_lent_is_a_ready_client(pool, watcher):
    """redis-py's own client, bound to one connection, used again by the next borrower."""
    with pool.acquire() as client:
        assert isinstance(client, redis.Redis)
        client.set("key", "value")
        assert client.get("key") == b"value"
        assert len(sessions(watcher)) == 1
    with pool.acquire() as again:
        assert again is client
        assert again.get("key") == b"value"


def test_a_url_holds_all_that_redis_py_needs(redis_server):
    """Database and options of the URL are the session's."""
    with (
        Pool.from_url(f"redis://127.0.0.1:{redis_server.port}/3?decode_responses=1") as pool,
        pool.acquire() as client,
    ):
        client.set("where", "three")
        assert client.get("where") == "three"
        client.delete("where")
        assert client.client_info()["db"] == 3


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_are_spoken(redis_server, protocol):
    """A blocked command is unblocked in RESP2 and in RESP3 alike."""
    url = f"{redis_server.url()}&protocol={protocol}"
    with Pool.from_url(url, max_open=2) as pool:
        with pool.acquire() as client:
            assert client.echo("hello") == b"hello"
        ctx = Context.background().with_timeout(0.05)
        with pytest.raises(DeadlineExceeded), pool.acquire(ctx) as again:
            again.blpop(["nothing"], timeout=5)
        with pool.acquire() as again:
            assert again is client


def test_pipelines_and_transactions_work(pool):
    """A pipeline has the loan's connection while it needs it; WATCH sees changes."""
    with pool.acquire() as client:
        with client.pipeline() as pipe:
            assert pipe.set("n", 1).incr("n").execute() == [True, 2]
        with client.pipeline(transaction=False) as pipe:
            assert pipe.incr("n").get("n").execute() == [3, b"3"]
        assert client.transaction(lambda pipe: pipe.multi() or pipe.incr("n"), "n") == [4]
        with pytest.raises(redis.ResponseError):
            client.pipeline().set("s", "x").incr("s").execute()
    assert pool.stats().broken_closed == 0
    with pool.acquire() as again:
        assert again is client


def test_a_second_user_of_a_lent_client_is_refused(pool):
    """Two threads, or a command beside an open transaction, never share one conversation."""
    with pool.acquire() as client:
        pipe = client.pipeline()
        pipe.watch("key")
        with pytest.raises(redis.RedisError, match="one connection"):
            client.get("key")
        pipe.reset()
        assert client.get("key") is None
    assert pool.stats().broken_closed == 0


@pytest.mark.parametrize("single", [False, True])
def test_any_redis_client_is_known(redis_server, watcher, single):
    """A pool of somebody's own `redis.Redis` is one connection each, and cancels."""
    with Pool(
        lambda: redis.Redis(
            unix_socket_path=redis_server.socket,
            client_name="own",
            single_connection_client=single,
        ),
        max_open=2,
    ) as pool:
        with pool.acquire() as client:
            assert client.ping()
            assert len(sessions(watcher, "own")) == 1
        with (
            pytest.raises(DeadlineExceeded),
            pool.acquire(Context.background().with_timeout(0.05)) as again,
        ):
            again.blpop(["nothing"], timeout=5)
        with pool.acquire() as again:
            assert again is client
    eventually(lambda: not sessions(watcher, "own"), "their end")


# -- giving back


def test_a_changed_session_does_not_reach_the_next_borrower(pool, watcher):
    """Database, name, an open transaction, watched keys: all is as it was."""
    with pool.acquire() as client:
        client.select(5)
        client.client_setname("other")
    with pool.acquire() as again:
        assert again is client
        assert again.client_info()["db"] == 0
        assert again.client_getname() == "pool-test"
        again.execute_command("MULTI")
        again.execute_command("SET", "key", "unwanted")
    with pool.acquire() as again:
        assert again is client
        assert again.get("key") is None
        again.execute_command("WATCH", "key")
    watcher.set("key", "changed")
    with pool.acquire() as again:
        assert again is client
        assert again.pipeline().get("key").execute() == [b"changed"]
    assert pool.stats().broken_closed == 0


def test_what_is_clean_goes_back_without_a_round_trip(pool, watcher):
    """Plain commands and whole transactions leave nothing to take back."""
    with pool.acquire() as client:
        client.ping()
    before = watcher.info("stats")["total_commands_processed"]
    for _ in range(10):
        with pool.acquire() as client:
            client.set("a", 1)
            client.pipeline().get("a").execute()
    after = watcher.info("stats")["total_commands_processed"]
    assert after - before == 10 * 4 + 1  # SET, MULTI, GET, EXEC; and the first INFO


def test_a_connection_in_the_middle_of_something_is_replaced(pool):
    """Closed, in an open transaction of a pipeline, or subscribed: it is not lent again."""
    with pool.acquire() as client:
        client.connection_pool.disconnect()
    with pool.acquire() as client:
        pipe = client.pipeline()
        pipe.watch("key")
    with pool.acquire() as client:
        subscription = client.pubsub()
        subscription.subscribe("news")
    with pool.acquire() as client:
        assert client.get("key") is None
    assert pool.stats().broken_closed == 3
    with pytest.raises(redis.ConnectionError):
        subscription.subscribe("more")


def test_an_unread_answer_is_never_the_next_borrowers(pool):
    """Interrupted between question and answer: the connection is closed, whatever it says."""
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), pool.acquire() as client:
            client.connection_pool.link.send_command("ECHO", "secret")
            raise KeyboardInterrupt
        with pool.acquire() as again:
            assert again is not client
            assert again.echo("mine") == b"mine"
    assert pool.stats().broken_closed == 3


def test_a_lent_client_does_not_reconnect(pool, watcher):
    """Its session is the one that it was lent: a new one would be unknown to the pool."""
    with pytest.raises(redis.ConnectionError, match="not replaced"), pool.acquire() as client:
        watcher.client_kill_filter(_id=str(client.client_id()))
        with pytest.raises(redis.ConnectionError):
            client.get("key")
        client.get("key")
    assert pool.stats().broken_closed == 1


def test_what_setup_says_is_kept(redis_server):
    """A session that setup has changed is not reset but replaced, so that it is set up again."""
    with Pool.from_url(redis_server.url(), setup=lambda client: client.select(7)) as pool:
        with pool.acquire() as client:
            assert client.client_info()["db"] == 7
        with pool.acquire() as again:
            assert again is client
            again.select(0)
        with pool.acquire() as another:
            assert another.client_info()["db"] == 7
        assert pool.stats().broken_closed == 1


# -- cancel


def test_the_end_of_a_context_unblocks_a_blocked_command(pool, watcher):
    """The block raises the context's error with the driver's as cause; the connection lives on."""
    ctx = Context.background().with_cancel()
    seen: list[Any] = []

    def work() -> None:
        with pool.acquire(ctx) as client:
            seen.append(client)
            client.blpop(["queue"], timeout=60)

    worker = in_thread(work)
    eventually(lambda: blocked(watcher) == 1, "the command")
    ctx.cancel("stop")
    with pytest.raises(Cancelled) as caught:
        worker.result()
    assert caught.value.cause == "stop"
    assert isinstance(caught.value.__cause__, redis.ResponseError)
    assert "UNBLOCKED" in str(caught.value.__cause__)
    assert blocked(watcher) == 0
    with pool.acquire() as client:
        assert client is seen[0]
        assert client.echo("mine") == b"mine"


def test_a_subscription_ends_with_its_context(pool):
    """Listening cannot be unblocked: its connection is cut, and its thread is free."""
    ctx = Context.background().with_cancel()
    listening = threading.Event()

    def work() -> None:
        with pool.acquire(ctx) as client, client.pubsub() as subscription:
            subscription.subscribe("news")
            for _ in subscription.listen():
                listening.set()

    worker = in_thread(work)
    assert listening.wait(10)
    ctx.cancel("stop")
    with pytest.raises(Cancelled):
        worker.result()
    assert pool.stats().broken_closed == 1


def test_with_all_connections_lent_it_is_cut(redis_server, watcher):
    """None is left to cancel with: the connection is given up; the server ends what it holds."""
    ctx = Context.background().with_cancel()
    with Pool.from_url(redis_server.url(), max_open=1) as pool:

        def work() -> None:
            with pool.acquire(ctx) as client:
                client.blpop(["queue"], timeout=60)

        worker = in_thread(work)
        eventually(lambda: blocked(watcher) == 1, "the command")
        ctx.cancel("stop")
        with pytest.raises(Cancelled):
            worker.result()
        eventually(lambda: blocked(watcher) == 0, "its end on the server")
        assert pool.stats().broken_closed == 1


def test_a_command_that_neither_blocks_nor_ends_is_cut(pool, watcher):
    """A script that computes holds the whole server, but not its caller."""
    script = "local t = redis.call('time')[1] while redis.call('time')[1] - t < 2 do end"
    ctx = Context.background().with_cancel()
    began = time.monotonic()

    def work() -> None:
        with pool.acquire(ctx) as client:
            started.set()
            client.eval(script, 0)

    started = threading.Event()
    worker = in_thread(work)
    assert started.wait(10)
    ctx.cancel("stop")
    with pytest.raises(Cancelled):
        worker.result()
    assert time.monotonic() - began < 10
    eventually(watcher.ping, "the script's end")


def test_a_cancel_never_hits_the_next_borrower(redis_server, watcher):
    """300 cancels on a slow way, each racing the end of its command: none hits what runs later."""
    chance = random.Random(7)
    with Pool.from_url(redis_server.url(), max_open=2) as pool:
        cancel = pool._driver.cancel

        def cancel_late(conn: Any, timeout: float) -> None:
            time.sleep(chance.random() * 0.003)
            cancel(conn, timeout)

        pool._driver.cancel = cancel_late  # type: ignore[method-assign]
        hits = cancelled = 0
        for turn in range(300):
            ctx = Context.background().with_cancel()
            canceller = threading.Timer(chance.random() * 0.004, ctx.cancel)
            canceller.start()
            try:
                with pool.acquire(ctx) as client:
                    client.blpop(["nothing"], timeout=0.003)
            except Cancelled:
                cancelled += 1
            try:
                with pool.acquire() as client:
                    hits += client.blpop(["nothing"], timeout=0.003) is not None
                    hits += client.echo(f"turn {turn}") != f"turn {turn}".encode()
            except redis.RedisError:
                hits += 1
            canceller.join()
        assert hits == 0
        assert cancelled > 0
        assert pool.stats().open <= 2
        assert pool.stats().broken_closed <= 3, "an unblocked connection is used again"


def test_no_answer_on_its_way_is_ever_somebody_elses(redis_server, watcher, monkeypatch):
    """300 cancels while answers are on a slow way (CVE-2023-28858): each gets its own, or none."""
    monkeypatch.setattr("workers.pool.drivers.redis.PATIENCE", (0.0005,))
    for key in range(10):
        watcher.set(f"key {key}", f"value {key}")
    chance = random.Random(13)
    with (
        SlowProxy(redis_server.port, slowest=0.008) as proxy,
        Pool.from_url(redis_server.url(port=proxy.port), max_open=3) as pool,
    ):
        hits = cancelled = 0
        for turn in range(300):
            ctx = Context.background().with_cancel()
            canceller = threading.Timer(chance.random() * 0.006, ctx.cancel)
            try:
                with pool.acquire() as client:  # so that none is dialled under the context
                    pass
                canceller.start()
                with pool.acquire(ctx) as client:
                    hits += client.get(f"key {turn % 10}") != f"value {turn % 10}".encode()
            except Cancelled:
                cancelled += 1
            with pool.acquire() as client:
                hits += client.get(f"key {turn % 7}") != f"value {turn % 7}".encode()
            canceller.join()
        assert hits == 0
        assert cancelled > 0
        assert pool.stats().broken_closed > 0, "some were cut in the middle"


# -- servers that go away


def test_a_restart_costs_each_thread_one_command_at_most(own_redis):
    """Eight threads, a restart: at most what was in flight fails, and all go on by themselves."""
    failed: list[BaseException] = []
    good: list[float] = []
    end = threading.Event()
    with Pool.from_url(own_redis.url(), max_open=8, acquire_timeout=20.0) as pool:

        def work() -> None:
            while not end.is_set():
                try:
                    with pool.acquire() as client:
                        client.ping()
                        good.append(time.monotonic())
                except (redis.RedisError, PoolTimeout) as exc:
                    failed.append(exc)

        crew = [in_thread(work) for _ in range(8)]
        eventually(lambda: len(good) > 200, "work")
        own_redis.stop()
        own_redis.start()
        up = time.monotonic()
        eventually(lambda: good[-1] > up, "work again")
        end.set()
        for member in crew:
            member.result()
        assert len(failed) <= 8
        assert not any(isinstance(exc, PoolTimeout) for exc in failed)
        assert next(at for at in good if at > up) - up < 1.0


def test_a_connection_that_the_server_has_ended_is_not_handed_out(pool, watcher):
    """Five at rest, all killed: not one borrower sees a dead one."""
    for client in [pool.get() for _ in range(5)]:
        pool.put(client)
    for session in sessions(watcher):
        watcher.client_kill_filter(_id=session["id"])
    idle_since = time.monotonic()
    eventually(lambda: time.monotonic() > idle_since + 0.01, "a time worth a look")
    for _ in range(5):
        with pool.acquire() as client:
            assert client.ping()
    assert pool.stats().timeouts == 0


def test_a_server_that_only_reads_from_now_on_is_left(own_redis):
    """After a fail-over the write's error closes the connection: a new dial may go elsewhere."""
    with own_redis.connect() as watcher, Pool.from_url(own_redis.url()) as pool:
        with pool.acquire() as client:
            client.set("key", 1)
        watcher.replicaof("127.0.0.1", 1)
        with pytest.raises(redis.ReadOnlyError), pool.acquire() as client:
            client.set("key", 2)
        assert pool.stats().broken_closed == 1


def test_a_deaf_peer_is_found_within_a_second(redis_server):
    """A proxy that keeps the connections and passes nothing on costs one check, not ten."""
    with (
        Proxy(redis_server.port) as proxy,
        Pool.from_url(
            redis_server.url(port=proxy.port), max_open=5, validate_after_idle=0.0
        ) as pool,
    ):
        for client in [pool.get() for _ in range(5)]:
            pool.put(client)
        proxy.deafen()
        with pytest.raises(PoolTimeout):
            pool.get(timeout=2.0)
        eventually(lambda: pool.stats().broken_closed == 1, "the first's end")
        assert pool.stats().idle == 0, "the others of its time went with it"
        proxy.cut()
        with pool.acquire(timeout=10.0) as client:
            assert client.ping()


def test_a_dial_to_a_deaf_peer_is_bounded(redis_server):
    """A server that accepts and says nothing holds a dial no longer than connect_timeout."""
    with (
        Proxy(redis_server.port) as proxy,
        Pool.from_url(redis_server.url(port=proxy.port), connect_timeout=0.2) as pool,
    ):
        proxy.deafen()
        with pytest.raises(PoolTimeout, match="Timeout reading"):
            pool.get(timeout=0.6)


def test_a_full_server_is_named_in_the_timeout(own_redis):
    """The server's refusal is what the borrower reads, and room is used as it comes."""
    with own_redis.connect() as watcher:
        watcher.config_set("maxclients", 3)
        pool = Pool.from_url(own_redis.url(), max_open=4)
        clients = [pool.get() for _ in range(2)]
        with pytest.raises(PoolTimeout, match="max number of clients reached") as caught:
            pool.get(timeout=0.3)
        assert isinstance(caught.value.__cause__, redis.ConnectionError)
        third = in_thread(lambda: pool.get(timeout=10.0))
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        pool.put(clients.pop(), broken=True)
        pool.put(third.result())
        pool.put(clients.pop())
        pool.close(0)


def test_a_wrong_password_is_told_at_once_and_never_shown(own_redis):
    """What waiting does not change does not wait, and no text has the password."""
    with own_redis.connect() as watcher:
        watcher.config_set("requirepass", "other")
    url = f"redis://:s3cr3t@127.0.0.1:{own_redis.port}/0"
    pool = Pool.from_url(url, acquire_timeout=10.0)
    with pytest.raises(ConnectError, match="invalid username-password") as caught:
        pool.get()
    texts = [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(pool)]
    assert not any("s3cr3t" in text for text in texts)
    pool.close()
    with pytest.raises(ValueError, match="does not understand") as refused:
        Pool.from_url("redis://:s3cr3t@host/0?socket_timeout=s3cr3t")
    assert "s3cr3t" not in str(refused.value)


def test_a_missing_driver_names_its_extra():
    """One clear sentence says what to install."""
    program = """
import sys
sys.modules["redis"] = None
from workers.pool import MissingDriverError, Pool
try:
    Pool.from_url("redis://")
except MissingDriverError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True
    )
    assert 'pip install "ackvisor[redis]"' in done.stdout


# -- fork and close


def test_a_forked_child_cannot_hurt_the_parents_connections(pool, watcher):
    """Whatever the child does to what it inherited, the parent's session hears nothing of it."""
    lent = pool.get()
    lent.ping()
    idle = pool.get()
    pool.put(idle)
    child = os.fork()
    if child == 0:
        try:
            pool.get()
        except ForkedPoolError:
            for client in (lent, idle):
                with contextlib.suppress(redis.RedisError):
                    client.set("child", 1)
                client.connection_pool.disconnect()
            os._exit(7)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert lent.echo("lent") == b"lent"
    pool.put(lent)
    with pool.acquire() as client:
        assert client.echo("again") == b"again"
    assert len(sessions(watcher)) == 2
    assert watcher.get("child") is None
    assert pool.stats().broken_closed == 0


def test_close_with_three_borrowed(redis_server, watcher):
    """One in a command, one in a transaction, one forgotten: each is named, none stays open."""
    pool = Pool.from_url(redis_server.url(), max_open=3, application_name="closing")
    first = pool.get()
    waiting = in_thread(lambda: first.blpop(["queue"], timeout=60))
    eventually(lambda: blocked(watcher) == 1, "the command")
    second = pool.get()
    second.execute_command("MULTI")
    third = pool.get()
    began = time.monotonic()
    report = pool.close(0.2)
    assert time.monotonic() - began >= 0.2
    with pytest.raises(redis.RedisError):
        waiting.result()
    assert len(report.leaked) == 3
    assert all("cut off from the server" in leak.outcome for leak in report.leaked)
    eventually(lambda: not sessions(watcher, "closing"), "the end of the sessions")
    for client in (first, second, third):
        pool.put(client)
    assert pool.stats().open == 0


def test_sixty_four_threads(redis_server):
    """64 threads on 8 connections: all are served, and every answer is the asker's own."""
    with Pool.from_url(redis_server.url(), max_open=8, acquire_timeout=20.0) as pool:

        def work(number: int) -> int:
            good = 0
            for turn in range(10):
                with pool.acquire() as client:
                    good += client.echo(f"{number} {turn}") == f"{number} {turn}".encode()
            return good

        crew = [in_thread(partial(work, number)) for number in range(64)]
        assert [member.result() for member in crew] == [10] * 64
        assert pool.stats().open <= 8
