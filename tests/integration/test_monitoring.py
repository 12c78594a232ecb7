"""A real supervisor that is scraped: what it says agrees, never goes back, and costs nobody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.supervised import REPO, Supervised, descriptors, group, wait_until

LISTEN = 'listen = "127.0.0.1:0"'

# Does a job for each line of its inbox, and says what it has done; holds its connection meanwhile.
WORKER = """
import os, threading

def run(worker):
    seen = worker.metrics.counter("orders_seen", "Orders seen.", ["kind"])
    worker.ready()
    folder = worker.options["inbox"]
    while not worker.accepting.done:
        for name in sorted(os.listdir(folder)):
            if worker.accepting.done:
                break
            try:
                os.unlink(os.path.join(folder, name))
            except FileNotFoundError:
                continue  # another worker has it
            try:
                with worker.job(name) as job, worker.pools["main"].acquire(job.ctx) as conn:
                    conn.execute("select 1")
                    seen.labels(name.partition("-")[0]).inc()
                    if name.startswith("bad"):
                        raise ValueError(name)
                    if name.startswith("long"):
                        job.ctx.wait()
            except ValueError:
                pass
        worker.accepting.wait(0.01)
"""


class Scraped(Supervised):
    """A supervisor with a listener, and jobs to be done by its workers."""

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.event("supervisor.listening")["url"])
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def get(self, path: str, method: str = "GET") -> tuple[int, str, http.client.HTTPMessage]:
        host, port = self.address
        connection = http.client.HTTPConnection(host, port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def json(self, path: str):
        return json.loads(self.get(path)[1])

    def scrape(self) -> dict[tuple[str, frozenset[str]], float]:
        """Return (name, the labels' values) -> value."""
        status, text, _ = self.get("/metrics")
        assert status == 200
        return {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, *labels: str) -> float:
        return self.scrape()[name, frozenset(labels)]

    def put(self, *names: str) -> None:
        for name in names:
            (self.folder / "inbox" / name).touch()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Scraped]:
    (folder / "inbox").mkdir()
    options = {"inbox": str(folder / "inbox")}
    config = f'[pools.main]\nurl = "sqlite:///{folder}/db"\nmax_open = 3\nbudget = 20\n' + group(
        "web", "app:run", options, count=2, backoff="10ms", min_ready_time=0
    )
    with Scraped(folder, config, supervisor=LISTEN, modules={"app": WORKER}) as supervised:
        supervised.ready()
        yield supervised


@pytest.fixture
def scraped(tmp_path) -> Iterator[Scraped]:
    """A fresh supervisor."""
    with running(tmp_path) as supervised:
        yield supervised


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Scraped]:
    """One for the tests that leave it as it is."""
    with running(tmp_path_factory.mktemp("shared")) as supervised:
        yield supervised


def test_metrics_status_and_page_agree(scraped):
    """Jobs, pools, budgets and workers are the same figures wherever one looks."""
    scraped.put("long-1", "bad-1", "good-1", "good-2")
    wait_until(lambda: scraped.value("supervisor_jobs_total", "web", "done") == 2, "two are done")
    wait_until(lambda: scraped.value("supervisor_jobs_total", "web", "failed") == 1, "one failed")

    found, status, page = scraped.scrape(), scraped.status(), scraped.json("/status.json")
    assert page["events"][-1]["event"] == "supervisor.ready"
    for shown in (status, page):
        workers = shown["workers"]
        assert sum(w["jobs_done"] for w in workers) == 2
        assert sum(w["jobs_failed"] for w in workers) == 1
        in_flight = sum(w["in_flight"] for w in workers)
        assert in_flight == found["supervisor_jobs_in_flight", frozenset({"web"})] == 1
        pools = [w["pools"]["main"] for w in workers]
        for state, word in (("used", "in_use"), ("idle", "idle")):
            key = frozenset({"web", "main", state})
            assert found["db_client_connection_count", key] == sum(p[word] for p in pools)
        assert found["db_client_connection_max", frozenset({"web", "main"})] == 6
        for kind, figure in shown["budgets"]["main"].items():
            labels = {"main", kind}
            assert found["supervisor_budget_connections", frozenset(labels)] == figure
        assert found["supervisor_workers", frozenset({"web", "ready"})] == 2
    assert found["supervisor_job_seconds_count", frozenset({"web"})] == 3
    assert found["orders_seen_total", frozenset({"web", "good"})] == 2
    assert found["db_client_connection_use_time_seconds_count", frozenset({"web", "main"})] == 3


def test_nothing_that_was_counted_is_lost_with_its_worker(scraped):
    """Drained workers have the last word; of a killed one what it had said last stays."""
    scraped.put("good-1", "good-2", "bad-1")
    wait_until(lambda: not os.listdir(scraped.folder / "inbox"), "all are taken")
    # Nobody has scraped since: what they count comes with their last words.
    assert scraped.command("restart", "web", "--wait").returncode == 0
    found = scraped.scrape()
    assert found["supervisor_jobs_total", frozenset({"web", "done"})] == 2
    assert found["supervisor_jobs_total", frozenset({"web", "failed"})] == 1
    assert found["supervisor_job_seconds_count", frozenset({"web"})] == 3
    assert found["orders_seen_total", frozenset({"web", "good"})] == 2
    assert found["supervisor_worker_restarts_total", frozenset({"web", "rolled"})] == 2
    assert found["supervisor_drain_seconds_count", frozenset()] == 2

    scraped.put("good-3")
    wait_until(lambda: scraped.value("supervisor_jobs_total", "web", "done") == 3, "it is done")
    before = scraped.scrape()
    for pid in scraped.worker_pids().values():
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: scraped.value("supervisor_worker_restarts_total", "web", "killed") == 2, "replaced"
    )
    after = scraped.scrape()
    fallen = {
        key
        for key, value in before.items()
        if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
        and key[0] != "db_client_connection_count"
        and after[key] < value
    }
    assert not fallen
    assert after["supervisor_kills_total", frozenset({"web"})] == 0  # it was somebody else
    spawned = [event.get("reason") for event in scraped.events("worker.spawned")]
    assert spawned == [None, None, "rolled", "rolled", "killed", "killed"]


def test_reasons_of_restarts_are_told_apart(tmp_path):
    """An exit, an exception, a crash and a SIGTERM from outside are different reasons."""
    source = (
        "import os, signal\n"
        "def run(worker):\n"
        "    worker.ready()\n"
        "    how = worker.options['how'] if worker.id.endswith('-1') else ''\n"
        "    if how == 'exit': return\n"
        "    if how == 'raise': raise ValueError\n"
        "    if how == 'crash': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    worker.accepting.wait()\n"
    )
    hows = {"exit": "exited", "raise": "failed", "crash": "failed", "term": "killed"}
    config = "".join(group(how, "app:run", {"how": how}, backoff="10ms") for how in hows)
    with Scraped(tmp_path, config, supervisor=LISTEN, modules={"app": source}) as supervised:
        os.kill(supervised.event("worker.ready", worker="term-1")["pid"], signal.SIGTERM)
        for how, reason in hows.items():
            spawned = supervised.event("worker.spawned", worker=f"{how}-2")
            assert spawned["reason"] == reason
            assert supervised.value("supervisor_worker_restarts_total", how, reason) == 1


def test_readiness_follows_the_fleet_and_ends_first(scraped):
    """Ready is 200 with no reasons; a worker too few and the stop are 503, while health stays 200."""
    status, text, headers = scraped.get("/readyz")
    assert (status, json.loads(text)) == (200, {"state": "ready", "reasons": []})
    assert headers["Content-Type"] == "application/json"
    assert scraped.get("/healthz")[:2] == (200, "ok\n")
    scraped.put("long-1")  # which lasts until abort_margin before the deadline
    wait_until(lambda: scraped.value("supervisor_jobs_in_flight", "web") == 1, "it is in hand")
    scraped.signal(signal.SIGTERM)
    scraped.event("supervisor.stopping")
    status, text, _ = scraped.get("/readyz")
    answer = json.loads(text)
    assert (status, answer["state"]) == (503, "stopping")
    assert answer["reasons"][0] == "the supervisor is stopping"
    assert scraped.get("/healthz")[0] == 200
    assert scraped.json("/status.json")["outstanding"]
    draining = "supervisor_workers", frozenset({"web", "draining"})
    wait_until(lambda: scraped.scrape()[draining] == 1, "the idle one has gone")
    scraped.signal(signal.SIGQUIT)
    assert scraped.wait() in {0, 1}


def test_not_ready_says_why(tmp_path):
    """While a group starts, and when one has failed for good, the reason is in the answer."""
    config = group("slow", "never_ready") + group(
        "bad", "crasher", {"how": "raise"}, max_restarts=0
    )
    with Scraped(tmp_path, config, supervisor=LISTEN) as supervised:
        supervised.event("group.failed", group="bad")
        status, text, _ = supervised.get("/readyz")
        reasons = json.loads(text)["reasons"]
        assert status == 503
        assert reasons[0] == "group slow: 0 of 1 ready"
        assert reasons[1].startswith("group bad has failed: ")


def test_a_silent_worker_does_not_hold_up_a_scrape(scraped):
    """A stopped worker is shown with what it has said last; the others answer for themselves."""
    scraped.put("good-1", "good-2")
    wait_until(lambda: scraped.value("supervisor_jobs_total", "web", "done") == 2, "they are done")
    pid = next(iter(scraped.worker_pids().values()))
    os.kill(pid, signal.SIGSTOP)
    try:
        assert scraped.value("supervisor_jobs_total", "web", "done") == 2
    finally:
        os.kill(pid, signal.SIGCONT)


def test_many_scrapes_at_once_are_answered_and_the_loop_goes_on(shared):
    """A hundred scrapers that ask at the same moment all get an answer that is complete."""
    with contextlib.ExitStack() as stack:
        scrapers = []
        for _ in range(100):
            host, port = shared.address
            connection = http.client.HTTPConnection(host, port, timeout=30)
            stack.enter_context(contextlib.closing(connection))
            connection.request("GET", "/metrics")
            scrapers.append(connection)
        assert shared.get("/healthz")[0] == 200
        bodies = [connection.getresponse().read() for connection in scrapers]
    assert all(b"supervisor_workers{" in body for body in bodies)


def test_hostile_clients_do_not_hold_up_the_supervisor(shared):
    """Garbage, half requests and clients that never read: a killed worker is replaced all the same."""
    with contextlib.ExitStack() as stack:
        for number in range(300):
            client = stack.enter_context(socket.create_connection(shared.address, timeout=30))
            client.setblocking(False)
            sent = (
                b"GET / HT",
                b"\x00\xff\x16" * 99,
                b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50,
            )
            with contextlib.suppress(OSError):
                client.send(sent[number % 3])
        assert shared.get("/healthz")[0] == 200
        before = len(shared.events("worker.ready"))
        os.kill(next(iter(shared.worker_pids().values())), signal.SIGKILL)
        wait_until(lambda: len(shared.events("worker.ready")) > before, "it is replaced")
        assert shared.command("status").returncode == 0


def test_nobody_inherits_the_listener(scraped):
    """Neither workers nor templates have a TCP socket: it is free again when the supervisor ends."""
    listening = os.readlink(f"/proc/{scraped.pid}/fd/{_listener(scraped)}")
    for pid in [*scraped.worker_pids().values(), *scraped.templates()]:
        assert listening not in descriptors(pid).values()
    address = scraped.address
    assert scraped.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5).close()


def _listener(supervised: Scraped) -> int:
    """Return the descriptor of the supervisor's listening TCP socket."""
    port = f":{supervised.address[1]:04X} "
    with open(f"/proc/{supervised.pid}/net/tcp", encoding="ascii") as table:
        inodes = [line.split()[9] for line in table if port in line and " 0A " in line]
    held = {v: k for k, v in descriptors(supervised.pid).items()}
    return held[f"socket:[{inodes[0]}]"]


def test_an_address_in_use_is_said_at_the_start(tmp_path):
    """One sentence names key, address and remedy, the exit code is 1, and nothing runs."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        supervised = Supervised(tmp_path, group("web", "idle"), supervisor=f'listen = "{address}"')
        with supervised:
            assert supervised.wait() == 1
            wait_until(lambda: not supervised.processes(), "its template has gone, too")
            text = supervised.text()
    assert f"supervisor.listen: {address}: Address already in use; another program" in text
    assert "Traceback" not in text


def test_another_address_is_for_another_supervisor(shared):
    """A reload that changes `listen` is rejected and says so, and the old address goes on."""
    text = shared.config.read_text(encoding="utf-8")
    shared.config.write_text(text.replace(LISTEN, 'listen = ""'), encoding="utf-8")
    done = shared.command("reload")
    shared.config.write_text(text, encoding="utf-8")
    assert done.returncode == 1
    assert "supervisor.listen: is for the whole life of a supervisor" in done.stderr
    assert shared.value("supervisor_reloads_total", "rejected") == 1


def test_the_page_brings_everything_along_and_forbids_the_rest(shared):
    """One document without a foreign address, under a policy that lets no other script run."""
    status, text, headers = shared.get("/")
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"].startswith("'sha256-")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "http" not in text.replace("http-equiv", "")
    assert shared.get("/", "HEAD")[1] == ""
    assert shared.get("/nothing")[0] == 404
    assert shared.get("/", "POST")[0] == 405


def test_nobody_is_woken_as_long_as_nobody_looks(shared):
    """With the listener on, an idle supervisor sleeps: no heartbeat, no clock."""
    shared.scrape()

    def switches() -> int:
        with open(f"/proc/{shared.pid}/status", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if "voluntary_ctxt" in line)

    # The pools' leases and the last connection may have something left to do: wait for the calm.
    def is_calm() -> bool:
        before = switches()
        time.sleep(1.0)
        return switches() - before <= 1

    wait_until(is_calm, "the supervisor sleeps for a second")


def test_who_does_not_listen_loads_nothing_of_it():
    """The loop and a worker come without HTTP, the exposition, and metrics of one's own."""
    program = "import sys, supervisor.loop, workers.runtime; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True
    )
    heavy = {"h11", "prometheus_client", "supervisor.monitoring", "supervisor.http"}
    assert not (heavy | {"supervisor.metrics", "workers.metrics"}) & set(done.stdout.split())
