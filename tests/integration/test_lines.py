"""What a line of the log tells: of whose life it is the end, in which job it was written, how often."""

from __future__ import annotations

import subprocess
import sys
import urllib.request

from tests.supervised import Supervised, group

LIVES = """
import contextlib, logging, threading

def threads(worker):
    logging.getLogger("lib").warning("no job yet")
    with contextlib.suppress(ValueError), worker.job("fails"):
        worker.log.info("first", n=1)
        with worker.job("within"):
            logging.getLogger("lib").warning("inner")
        worker.log.info("second", n=1)
        raise ValueError
    worker.log.info("no job left")
    both = threading.Barrier(2)
    def work(name):
        with worker.job(name):
            both.wait(20)
            worker.log.info("said", by=name)
            both.wait(20)
    for name in ("a", "b"):
        worker.wg.go(work, name)
    with worker.pools["main"].acquire() as conn:
        conn.execute("SELECT 1")
    begun = threading.Barrier(3)
    def end(name, wait):
        with worker.job(name) as job:
            begun.wait(20)
            wait(job)
    worker.wg.go(end, "finishes", lambda job: worker.accepting.wait())
    worker.wg.go(end, "aborted", lambda job: (job.ctx.wait(), job.ctx.check()))
    begun.wait(20)
    worker.ready()
    worker.accepting.wait()
"""
TASKS = """
import asyncio, threading

async def tasks(worker):
    async def inner(name):
        worker.log.info("child", by=name)
    async def work(name, turn):
        with worker.job(name):
            await turn.wait()
            worker.log.info("said", by=name)
            with worker.job(f"{name} within"):
                await asyncio.sleep(0)
                worker.log.info("said", by=f"{name} within")
            worker.log.info("said", by=name)
            await asyncio.gather(inner(name))
            await asyncio.to_thread(worker.log.info, "said", by=name)
            late.append(asyncio.ensure_future(after(turns["end"])))
    async def after(turn):
        await turn.wait()
        worker.log.info("job over")
    late = []
    turns = {"begin": asyncio.Event(), "end": asyncio.Event()}
    both = [asyncio.ensure_future(work(name, turns["begin"])) for name in ("a", "b")]
    await asyncio.sleep(0)
    worker.log.info("no task of a job")
    turns["begin"].set()
    await asyncio.gather(*both)
    for number in range(3):
        with worker.job("one of many"):
            pass
    turns["end"].set()
    await asyncio.gather(*late)
    worker.ready()
    await worker.accepting
"""
WEB = """
import logging

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    logging.getLogger("site").warning("begun")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})
    logging.getLogger("site").warning("answered")

def wsgi(environ, start_response):
    logging.getLogger("site").warning("in a thread")
    start_response("200 OK", [])
    return [b"x"]
"""
QUEUE = """
def handle(job, conn):
    import logging
    logging.getLogger("handler").warning("handling %s", job.payload)
    if job.attempts == 1:
        raise ValueError
"""
FLOOD = """
def flood(worker):
    for number in range(1000):
        with worker.job("job"):
            worker.log.warning("the cache is slow", where="here")
            worker.log.info("a record")
            worker.log.warning("another each time", number=number)
            if number < 15:
                try:
                    raise KeyError(number % 2)
                except KeyError:
                    worker.log.exception("it raised")
    worker.ready()
    worker.accepting.wait()
"""


def test_the_end_of_a_life_and_of_a_stop_are_told_in_one_line_each(tmp_path):
    """Durations, jobs, pools, size; and what became of the work that a stop has found."""
    config = '[pools.main]\nurl = "sqlite:///x.db"\n' + group("t", "lives:threads")
    with Supervised(
        tmp_path,
        config,
        supervisor='grace = "4s"\nabort_margin = "3.5s"',
        modules={"lives": LIVES},
    ) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    (exited,) = supervised.events("worker.exited")
    assert exited["code"] == 0
    assert exited["cancel_cause"] == "stop"
    assert exited["jobs"] == {"done": 4, "failed": 1, "cancelled": 1, "abandoned": 0}
    assert exited["in_stop"] == {"finished": 1, "aborted": 1}
    main = exited["pools"]["main"]
    assert (main["acquires"], main["timeouts"], main["closed"], main["leaked"]) == (1, 0, 1, 0)
    assert exited["max_rss_bytes"] > 1 << 20
    assert 0 < exited["cpu_seconds"] < 60
    parts = [exited[f"{part}_seconds"] for part in ("ready", "serving", "drain", "exit")]
    assert abs(sum(parts) - exited["uptime_seconds"]) < 1e-3
    (stopped,) = supervised.events("supervisor.stopped")
    assert stopped["cause"] == "SIGTERM"
    assert stopped["grace_seconds"] == 4.0
    assert (stopped["acknowledged"], stopped["drained"], stopped["killed"]) == (1, 1, [])
    assert stopped["jobs"] == {"finished": 1, "aborted": 1}
    assert stopped["connections"] == {"closed": 1, "leaked": 0}
    assert stopped["seconds"] >= exited["drain_seconds"]

    first, second, inner = (supervised.events(name)[0] for name in ("first", "second", "inner"))
    assert (first["job"], first["job_id"]) == ("fails", "t-1.1")
    assert (second["job"], second["job_id"]) == ("fails", "t-1.1")
    assert (inner["job"], inner["job_id"]) == ("within", "t-1.2")
    for name in ("no job yet", "no job left"):
        assert "job" not in supervised.events(name)[0]
    said = supervised.events("said")
    assert len(said) == 2
    assert all(line["job"] == line["by"] for line in said)


def test_tasks_do_not_mix_up_their_jobs(tmp_path):
    """Nor do the tasks and threads that these start; a job that is over is nobody's."""
    with Supervised(tmp_path, group("t", "app:tasks"), modules={"app": TASKS}) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    lines = supervised.events("said") + supervised.events("child")
    assert len(lines) == 10
    assert [line["by"] for line in lines] == [line["job"] for line in lines]
    assert len({line["job_id"] for line in lines}) == 4
    assert len(supervised.events("job over")) == 2
    for name in ("job over", "no task of a job"):
        assert not [line for line in supervised.events(name) if "job" in line]


def test_a_request_has_the_id_that_it_comes_with_or_one_of_its_own(tmp_path):
    """The same in all of its lines, and never what is no id."""
    config = (
        '[sockets.web]\nlisten = "127.0.0.1:0"\n[sockets.old]\nlisten = "127.0.0.1:0"\n'
        '[workers.w]\napp = "site_:app"\nsockets = ["web"]\n'
        '[workers.o]\napp = "site_:wsgi"\nsockets = ["old"]\n'
    )
    with Supervised(tmp_path, config, modules={"site_": WEB}) as supervised:
        supervised.ready()
        for line in supervised.events("socket.listening"):
            for told in ("abc-123", 'x" evil="1', "y" * 200, None):
                request = urllib.request.Request(f"http://{line['address']}/path")
                if told is not None:
                    request.add_header("X-Request-Id", told)
                assert urllib.request.urlopen(request, timeout=20).read() == b"x"
        assert supervised.stop() == 0
    begun, answered = supervised.events("begun"), supervised.events("answered")
    old = supervised.events("in a thread")
    assert [line["request_id"] for line in begun] == [line["request_id"] for line in answered]
    for lines in (begun, old):
        assert {line["job"] for line in lines} == {"GET /path"}
        first, *others = [line["request_id"] for line in lines]
        assert first == "abc-123"
        assert len(set(others)) == 3
        assert all(len(each) == 16 and each.isalnum() for each in others)


def test_a_handlers_lines_have_the_id_of_its_job_in_the_queue_and_the_attempt(tmp_path):
    """Also those of libraries that know nothing of it."""
    config = '[pools.main]\nurl = "sqlite:///q.db"\n' + group(
        "q", "workers.jobs:run", {"handler": "handler:handle"}
    )
    with Supervised(tmp_path, config, modules={"handler": QUEUE}) as supervised:
        add = [sys.executable, "-m", "workers.jobs", "add", "-c", str(supervised.config), "x"]
        subprocess.run(add, check=True, cwd=supervised.cwd, timeout=30, capture_output=True)
        lines = [supervised.event("handling x", count=count) for count in (1, 2)]
        assert supervised.stop() == 0
    lines = supervised.events("handling x")
    assert [line["attempt"] for line in lines] == [1, 2]
    assert {(line["job"], line["job_id"]) for line in lines} == {("job 1", 1)}


def test_a_warning_that_is_repeated_is_summed_up_and_nothing_else_is(tmp_path):
    """Records, lines that differ and errors raised elsewhere or otherwise are all written."""
    with Supervised(tmp_path, group("f", "app:flood"), modules={"app": FLOOD}) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    slow = supervised.events("the cache is slow")
    sums = supervised.events("log.repeated", line="the cache is slow")
    assert len(supervised.events("a record")) == 1000
    assert len(supervised.events("another each time")) == 1000
    assert len(supervised.events("it raised")) == 15
    assert sum(line["times"] for line in sums) + len(slow) == 1000
    assert len(slow) <= 10 * (len(sums) + 1)
    assert {(line["level"], line["worker"]) for line in sums} == {("warning", "f-1")}
    assert all(line["first"] <= line["last"] for line in sums)
    assert not [line for line in sums if "job" in line]
