"""Passwords of pools' URLs: in the workers that use them, and nowhere where anybody looks."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.supervised import Supervised, group

CANARY = "c4n4ry-p4ssw0rd"
# Nobody listens there: every way to fail is gone through, with the driver's own words.
URLS = {
    "pg": f"postgresql://app:{CANARY}@127.0.0.1:1/orders",
    "query": f"postgresql:///orders?host=127.0.0.1&port=1&user=app&password={CANARY}",
    "my": f"mysql://app:{CANARY}@127.0.0.1:1/orders",
    "red": f"redis://app:{CANARY}@127.0.0.1:1/0",
}
USER = """
def run(worker):
    worker.ready()
    for name in sorted(worker.pools):
        try:
            with worker.pools[name].acquire():
                pass
        except Exception as exc:
            worker.log.exception("no.connection", pool=name)
            last = exc
    worker.log.info("tried", pools=repr(worker.pools), options=repr(worker.options))
    raise last
"""


def test_a_password_is_written_nowhere(tmp_path):
    """Log, events, status, stacks, titles, environments, the runtime folder: after every failure."""
    secret = tmp_path / "secret"
    secret.write_text(URLS["pg"])
    secret.chmod(0o600)
    lines = ['[pools.file]\nurl_file = "secret"\nacquire_timeout = "50ms"\n']
    lines += [
        f'[pools.{name}]\nurl = "{url}"\nacquire_timeout = "50ms"\n' for name, url in URLS.items()
    ]
    config = (
        "".join(lines)
        + group("user", "user:run", count=2, max_restarts=1, backoff="10ms")
        + group("idle", "idle", pools=[])
    )
    supervised = Supervised(tmp_path, config, modules={"user": USER})
    supervised.config.chmod(0o600)
    shown = [supervised.command("check", "--import")]
    with supervised:
        supervised.event("worker.failed", group="user", count=2)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            supervised.signal(number)
        supervised.event("supervisor.status")
        shown += [supervised.command("status", "--json")]
        assert processes_that_show_it(supervised) == []
        supervised.event("group.waiting", group="user")
        shown += [supervised.command("events")]
        supervised.stop()
    for done in shown:
        assert CANARY not in done.stdout + done.stderr
    tried = supervised.events("tried")
    assert tried
    written = [
        str(path)
        for path in tmp_path.rglob("*")
        if path.is_file()
        and path not in {secret, supervised.config}
        and CANARY.encode() in path.read_bytes()
    ]
    assert written == []


OLD_REDIS = """
import socket, threading
def run(worker):
    server = socket.create_server(("127.0.0.1", worker.options["port"]))
    server.settimeout(0.05)
    worker.ready()
    while not worker.accepting.done:
        try:
            conn, _ = server.accept()
        except TimeoutError:
            continue
        said = conn.recv(4096).decode().split()
        quoted = ", ".join(f"`{word}`" for word in said if word[0] not in "*$")
        conn.sendall(f"-ERR unknown command, with args beginning with: {quoted}\\r\\n".encode())
        conn.close()
"""
ASKS = """
def run(worker):
    try:
        with worker.pools["red"].acquire():
            pass
    except Exception as exc:
        worker.log.exception("refused", also=str(exc))
        worker.log.info("own.words", url="amqp://guest:%s@mq:5672/%%2F" % worker.options["word"])
        raise RuntimeError(f"cannot use postgres://u:{worker.options['word']}@h/d") from exc
"""


def test_what_servers_and_users_quote_is_written_without_passwords(tmp_path):
    """An old Redis repeats the command that it does not know: with the password in it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = (
        f'[pools.red]\nurl = "redis://app:{CANARY}@127.0.0.1:{port}/0"\nacquire_timeout = "5s"\n'
        + group("server", "old_redis:run", {"port": port}, pools=[])
        + group("user", "asks:run", {"word": f"{CANARY}-2"}, max_restarts=1, backoff="300ms")
    )
    modules = {"old_redis": OLD_REDIS, "asks": ASKS}
    with Supervised(tmp_path, config, modules=modules) as supervised:
        supervised.event("own.words")
        failed = supervised.event("worker.failed", group="user")
        shown = supervised.command("events").stdout + supervised.command("status", "--json").stdout
        supervised.stop()
    assert "postgres://u:***@h/d" in failed["error"]
    assert "amqp://guest:***@mq:5672" in supervised.text()
    assert "args beginning with" in supervised.text()
    assert "***" in supervised.events("refused")[0]["also"]
    assert CANARY not in shown + supervised.text()


def processes_that_show_it(supervised: Supervised) -> list[str]:
    """Name what of the supervisor's processes anybody can see a password in."""
    found = []
    for pid in supervised.processes():
        for place in ("cmdline", "environ", "comm"):
            try:
                text = Path(f"/proc/{pid}/{place}").read_bytes()
            except OSError:
                continue  # it has ended
            if CANARY.encode() in text:
                found.append(f"{place} of {pid}")
    return found


def test_a_groups_environment_is_not_seen_in_another_groups(tmp_path):
    """`env` is in the memory of its own group's workers, and in no other process's environment."""
    config = group("a", "surroundings", count=2) + group("b", "surroundings")
    config = config.replace("[workers.b]", f'env = {{ API_KEY = "{CANARY}" }}\n[workers.b]')
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        has_it = {
            line["ids"][1]
            for line in supervised.events("victim.surroundings")
            if "API_KEY" in line["environment"]
        }
        assert has_it == {"a"}
        assert processes_that_show_it(supervised) == []
        assert supervised.stop() == 0
        assert CANARY not in supervised.text()


@pytest.mark.parametrize(
    ("mode", "written", "words"),
    [
        (0o644, "url", "use url_file"),
        (0o640, "url", ""),
        (0o644, "url_file", "may be read by everybody"),
        (0o600, "url_file", ""),
        (0o644, "reference", ""),
    ],
)
def test_check_warns_of_a_password_that_everybody_can_read(tmp_path, mode, written, words):
    """In the configuration or in a url_file; and says nothing where there is nothing to say."""
    secret = tmp_path / "secret"
    secret.write_text(URLS["pg"])
    value = {
        "url": f'url = "{URLS["pg"]}"',
        "url_file": 'url_file = "secret"',
        "reference": 'url = "postgresql://app:${PASSWORD}@/orders"',
    }[written]
    supervised = Supervised(
        tmp_path, f"[pools.main]\n{value}\n" + group("idle", "idle"), env={"PASSWORD": CANARY}
    )
    supervised.config.chmod(mode if written != "url_file" else 0o644)
    secret.chmod(mode)
    done = supervised.command("check")
    assert done.returncode == 0
    assert bool(done.stderr) == bool(words)
    assert words in done.stderr
    assert CANARY not in done.stdout + done.stderr


def test_a_mistake_in_a_url_does_not_show_it(tmp_path):
    """Nor does the problem that names it, whatever part of the URL is wrong."""
    for wrong in (
        f"postgres//app:{CANARY}@host/orders",
        f"postgresql://app:{CANARY}@host:port/orders",
        f"oracle://app:{CANARY}@host/orders",
        f"postgresql://app:{CANARY}@ho st/orders",
    ):
        supervised = Supervised(
            tmp_path, f'[pools.main]\nurl = "{wrong}"\n' + group("idle", "idle")
        )
        done = supervised.command("check")
        assert CANARY not in done.stdout + done.stderr, wrong
