"""Workers whose application has set up OpenTelemetry's SDK: before the fork, with a thread, after it."""

from __future__ import annotations

import http.client
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_sockets import FREE, socket_table, where
from tests.supervised import Supervised, group, wait_until
from tests.workers.jobs.databases import SQLiteDatabase

# Each process writes a file of its own. Nothing here knows that a supervisor makes spans.
EXPORTING = """
import os
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

class ToFile(SpanExporter):
    def export(self, spans):
        with open(os.path.join(os.environ["SPANS"], str(os.getpid())), "a") as file:
            file.writelines(span.to_json(indent=None) + "\\n" for span in spans)
        return SpanExportResult.SUCCESS

def set_up(processor):
    provider = TracerProvider()
    provider.add_span_processor(processor(ToFile()))
    trace.set_tracer_provider(provider)
"""
WORK = """
def work(worker):
    worker.ready()
    with worker.job("add up") as job, worker.pools["main"].acquire(job.ctx) as conn:
        (total,) = conn.execute("select 40 + 2").fetchone()
        worker.log.info("added", total=total)
    worker.log.info("worked")
    worker.accepting.wait()

def handle(job, conn):
    with trace.get_tracer("shop").start_as_current_span("look up"):
        if job.payload == "bad":
            raise LookupError("no such order")

async def app(scope, receive, send):
    if scope["type"] == "http":
        status = 500 if scope["path"] == "/fails" else 200
        with trace.get_tracer("shop").start_as_current_span("look up"):
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"sold"})
    else:
        raise RuntimeError("no lifespan")
"""
AT_IMPORT = "from exporting import *\nset_up(SimpleSpanProcessor)\n" + WORK
WITH_A_THREAD = "from exporting import *\nset_up(BatchSpanProcessor)\n" + WORK
IN_RUN = """
def work(worker):
    import exporting
    exporting.set_up(exporting.BatchSpanProcessor)
    from at_work import work
    work(worker)
"""
IN_A_LOOP = """
from exporting import *
set_up(SimpleSpanProcessor)

async def work(worker):
    worker.ready()
    with worker.job("add up") as job:
        async with worker.pools["main"].acquire(job.ctx) as conn:
            await conn.execute("select 40 + 2")
        worker.log.info("added")
    worker.log.info("worked")
    await worker.accepting
"""
ENDLESS = """
from exporting import *
set_up(SimpleSpanProcessor)

def work(worker):
    worker.ready()
    with worker.job("report") as job, worker.pools["main"].acquire(job.ctx) as conn:
        worker.log.info("begun")
        conn.execute(
            "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
        ).fetchone()
"""
MODULES = {
    "exporting": EXPORTING,
    "at_import": AT_IMPORT,
    "with_a_thread": WITH_A_THREAD,
    "at_work": "from exporting import *\n" + WORK,
    "in_run": IN_RUN,
    "in_a_loop": IN_A_LOOP,
    "endless": ENDLESS,
}


class Traced(Supervised):
    """A supervisor whose workers write their spans."""

    def __init__(self, folder: Path, config: str, **keys: Any) -> None:
        self.spans_in = folder / "spans"
        self.spans_in.mkdir()
        pool = f'[pools.main]\nurl = "sqlite:///{folder}/jobs.db"\n'
        env = {"SPANS": str(self.spans_in)}
        super().__init__(folder, pool + config, env=env, modules=MODULES, **keys)

    def spans(self, name: str, **attributes: object) -> list[dict[str, Any]]:
        """Finished spans of that name with these attributes, of whatever process."""
        lines = [
            line
            for path in self.spans_in.iterdir()
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        ]
        spans = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            span
            for span in spans
            if span["name"] == name and attributes.items() <= span["attributes"].items()
        ]

    def span(self, name: str, **attributes: object) -> dict[str, Any]:
        """Wait for the only such span."""
        wait_until(lambda: self.spans(name, **attributes), f"a span {name} with {attributes}")
        (span,) = self.spans(name, **attributes)
        return span


def ids(span: dict[str, Any]) -> tuple[str, str]:
    return span["context"]["trace_id"], span["context"]["span_id"]


def parent(span: dict[str, Any]) -> tuple[str, str | None]:
    return span["context"]["trace_id"], span["parent_id"]


@pytest.mark.parametrize("module", ["at_import", "with_a_thread", "in_run", "in_a_loop"])
def test_jobs_are_spans_wherever_the_provider_is_set_up(tmp_path: Path, module: str) -> None:
    """Each worker has its own id in them, and what a thread has not sent yet is sent at the end."""
    config = group("shop", f"{module}:work", count=2)
    with Traced(tmp_path, config) as supervised:
        supervised.ready()
        supervised.event("worked", count=2)
        assert supervised.stop() == 0
        traces = set()
        for worker in ("shop-1", "shop-2"):
            job = supervised.span("add up", **{"ackvisor.worker.id": worker})
            acquire = supervised.span("acquire main", **{"ackvisor.worker.id": worker})
            assert job["attributes"]["ackvisor.worker.group"] == "shop"
            assert job["attributes"]["ackvisor.job.outcome"] == "done"
            assert parent(acquire) == ids(job)
            (line,) = supervised.events("added", worker=worker)
            assert ("0x" + line["trace_id"], "0x" + line["span_id"]) == ids(job)
            assert "trace_id" not in supervised.event("worked", worker=worker)
            traces.add(job["context"]["trace_id"])
        assert len(traces) == 2, "forks draw the same numbers"
        # A processor with a thread cannot be shared by forks: each worker imports it for itself.
        tainted = [line["found"] for line in supervised.events("template.tainted")]
        assert len(tainted) == (module == "with_a_thread")
        assert all("thread" in found[0] for found in tainted)


def test_a_query_that_a_stop_cancels_is_in_the_trace_of_its_job(tmp_path: Path) -> None:
    """The last that a worker does, and it is not lost."""
    keys = 'grace = "11s"\nabort_margin = "10s"'
    with Traced(tmp_path, group("r", "endless:work"), supervisor=keys) as supervised:
        supervised.event("begun")
        assert supervised.stop() == 0
        job, cancel = supervised.span("report"), supervised.span("cancel main")
        assert parent(cancel) == ids(job)
        for span in (job, cancel):
            assert span["attributes"]["ackvisor.cancel.cause"] == "stop"
        assert job["attributes"]["ackvisor.job.outcome"] == "cancelled"


def test_attempts_and_requests_say_what_they_are(tmp_path: Path) -> None:
    """A job of the table with the handler's own error; a request that goes on with its caller's trace."""
    database = SQLiteDatabase(str(tmp_path / "jobs.db"))
    database.create()
    good, bad = database.add("good", "bad")
    handler = {"handler": "at_import:handle", "max_attempts": 1, "threads": 1}
    config = group("jobs", "workers.jobs:run", handler)
    config += group("web", "at_import:app", sockets=["web"]).replace("run = ", "app = ")
    config += socket_table(FREE)
    with Traced(tmp_path, config) as supervised:
        supervised.ready()
        done = supervised.span("process jobs", **{"messaging.message.id": str(good)})
        assert done["kind"] == "SpanKind.CONSUMER"
        assert done["attributes"]["ackvisor.job.attempt"] == 1
        assert done["attributes"]["ackvisor.job.outcome"] == "done"
        failed = supervised.span("process jobs", **{"messaging.message.id": str(bad)})
        assert failed["attributes"]["ackvisor.job.outcome"] == "failed"
        assert failed["attributes"]["error.type"] == "builtins.LookupError"
        assert failed["status"]["description"] == "no such order"
        assert ids(done) in {parent(span) for span in supervised.spans("look up")}

        caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        for path, status in (("/", 200), ("/fails", 500)):
            connection = http.client.HTTPConnection(*where(supervised), timeout=30)
            headers = {"traceparent": f"00-{'-'.join(caller)}-01", "user-agent": "a test"}
            connection.request("GET", path, headers=headers)
            assert connection.getresponse().status == status
            connection.close()
            request = supervised.span("GET", **{"url.path": path})
            assert request["kind"] == "SpanKind.SERVER"
            assert parent(request) == tuple(f"0x{number}" for number in caller)
            assert request["attributes"]["http.response.status_code"] == status
            assert request["status"]["status_code"] == ("ERROR" if status == 500 else "UNSET")
            assert ids(request) in {parent(span) for span in supervised.spans("look up")}
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
