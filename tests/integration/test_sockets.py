"""Listening sockets with real processes: shared, kept over reloads, passed by systemd, cleaned up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.supervised import Supervised, descriptors, group, wait_until

ECHO = """
def run(worker):
    (name,) = worker.sockets
    listener = worker.sockets[name]
    listener.settimeout(0.02)
    worker.ready()
    while not worker.accepting.done:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with worker.job("echo"), connection:
            connection.settimeout(10.0)
            if word := connection.recv(1024):  # else somebody has looked whether we listen
                connection.sendall(b"%s %d %s" % (worker.group.encode(), worker.generation, word))
"""
BROKEN = "def run(worker):\n    raise RuntimeError('broken')\n"
FREE = "127.0.0.1:0"
KEYS = {"count": 2, "min_ready_time": "0", "sockets": ["web"]}
# What systemd does: descriptors from 3 on, and LISTEN_PID is who is started.
ACTIVATE = """
import fcntl, os, sys
names, *words = sys.argv[1:]
given = [int(each) for each in os.environ.pop("GIVEN").split(",")]
kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in given]
for index, fd in enumerate(kept):
    os.dup2(fd, 3 + index)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)), LISTEN_FDNAMES=names)
os.execvp(words[0], words)
"""


def socket_table(listen: str, name: str = "web", **keys: Any) -> str:
    lines = [f'{key} = "{value}"' for key, value in keys.items()]
    return "\n".join([f"[sockets.{name}]", f'listen = "{listen}"', *lines]) + "\n"


def echo(folder: Path, listen: str, *, sockets: str = "", **options: Any) -> Supervised:
    """A supervisor with two echo workers on one socket."""
    config = group("echo", "echo:run", **KEYS) + socket_table(listen) + sockets
    return Supervised(folder, config, modules={"echo": ECHO}, supervisor='grace = "5s"', **options)


def rewrite(supervised: Supervised, old: str, new: str) -> None:
    text = supervised.config.read_text()
    assert old in text
    supervised.config.write_text(text.replace(old, new))


def where(supervised: Supervised, name: str = "web", count: int = 1) -> tuple[str, int]:
    """Where a TCP socket listens, as the log tells."""
    told = supervised.event("socket.listening", socket=name, count=count)["address"]
    host, _, port = told.rpartition(":")
    return host.strip("[]"), int(port)


def asked(address: Any, word: str = "hello") -> list[str]:
    """Send a word on a connection of its own; return the answer's words."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if not isinstance(address, str) and ":" in address[0]:
        family = socket.AF_INET6
    with socket.socket(family) as connection:
        connection.settimeout(15.0)
        connection.connect(address)
        connection.sendall(word.encode())
        answer = b""
        while more := connection.recv(1024):
            answer += more
    assert answer.endswith(word.encode()), answer
    return answer.decode().split()


def refuses(address: tuple[str, int]) -> bool:
    with socket.socket() as connection:
        connection.settimeout(15.0)
        return connection.connect_ex(address) != 0


def end_of_start(supervised: Supervised) -> tuple[int, str]:
    """Exit code and words of a start that comes to nothing, when its spare template has gone, too."""
    code = supervised.wait()
    wait_until(lambda: not supervised.processes(), "nothing is left")
    return code, supervised.text()


class Clients:
    """Four clients that ask in a loop, until the block is left."""

    def __init__(self, address: Any) -> None:
        self._address = address
        self._over = threading.Event()
        self.failures: list[str] = []
        self.answers: Counter[str] = Counter()  # by generation
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(4)]

    def _ask(self, number: int) -> None:
        turn = 0
        while not self._over.is_set():
            turn += 1
            try:
                _, generation, _ = asked(self._address, f"{number}.{turn}")
            except Exception as exc:
                self.failures.append(repr(exc))
            else:
                self.answers[generation] += 1

    def wait_for(self, generation: str) -> None:
        """Return when this generation has answered often, or somebody has not been answered."""
        wait_until(
            lambda: self.answers[generation] >= 20 or self.failures,
            f"generation {generation} answers",
        )

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def listening(family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Iterator[Any]:
    """A socket of the test's own, as systemd would have it."""
    with socket.socket(family, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        yield sock


def activated(folder: Path, listen: str, names: str, *given: socket.socket) -> Supervised:
    """A supervisor that is started as systemd would start it; `start` has been called."""
    supervised = echo(
        folder,
        listen,
        through=[sys.executable, "-c", ACTIVATE, names],
        env={"GIVEN": ",".join(str(each.fileno()) for each in given)},
    )
    supervised.start(pass_fds=[each.fileno() for each in given])
    return supervised


# --- a roll ------------------------------------------------------------------------------------


def roll_three_times(supervised: Supervised, address: Any) -> None:
    with Clients(address) as clients:
        for generation in ("1", "2", "3", "4"):
            if generation != "1":
                supervised.signal(signal.SIGHUP)
                supervised.event("reload.done", generation=int(generation))
            clients.wait_for(generation)
    assert clients.failures == []
    assert {"1", "2", "3", "4"} == set(clients.answers)


def test_no_connection_is_lost_in_three_rolls(tmp_path: Path) -> None:
    """Four clients in a loop see no refused and no reset connection, and every generation."""
    with echo(tmp_path, FREE).start().ready() as supervised:
        roll_three_times(supervised, where(supervised))
        assert len(supervised.events("socket.listening")) == 1
        assert supervised.stop() == 0


def test_no_connection_is_lost_with_socket_activation(tmp_path: Path) -> None:
    """The same on a socket that systemd has passed."""
    with listening() as passed:
        with activated(tmp_path, "systemd:http", "other:http", passed, passed) as supervised:
            supervised.ready()
            roll_three_times(supervised, passed.getsockname())
            assert supervised.stop() == 0
        # The socket is systemd's: who connects now waits for the next supervisor.
        assert not refuses(passed.getsockname())


def test_a_worker_that_is_killed_costs_no_other_connection(tmp_path: Path) -> None:
    """A connection that nobody has accepted is not the dead worker's."""
    with echo(tmp_path, FREE).start().ready() as supervised:
        for count in range(1, 4):
            victim = supervised.event("worker.ready", count=count + 1)
            os.kill(victim["pid"], signal.SIGKILL)
            for turn in range(10):
                assert ["echo", "1", str(turn)] == asked(where(supervised), str(turn))
            supervised.event("worker.exited", count=count)


# --- addresses ---------------------------------------------------------------------------------


def test_ipv6(tmp_path: Path) -> None:
    """An address in brackets is IPv6."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        probe.close()
        with echo(tmp_path, "[::1]:0").start().ready() as supervised:
            assert where(supervised)[0] == "::1"
            assert asked(where(supervised)) == ["echo", "1", "hello"]
        return
    pytest.skip("this machine has no IPv6")


def test_a_unix_socket_has_its_mode_and_is_removed_at_the_end(tmp_path: Path) -> None:
    """It is made with the configured mode, relative to the file, and gone after the stop."""
    path = tmp_path / "web.sock"
    supervised = echo(tmp_path, "unix:web.sock", sockets='mode = "0606"\n')
    with supervised.start().ready():
        assert stat.S_IMODE(path.stat().st_mode) == 0o606
        assert asked(str(path)) == ["echo", "1", "hello"]
        rewrite(supervised, "0606", "0600")
        assert supervised.command("reload", "--wait").returncode == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert asked(str(path)) == ["echo", "2", "hello"]
        assert supervised.stop() == 0
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_unix_socket_has_its_owner(tmp_path: Path) -> None:
    """The file belongs to whom the configuration says."""
    with echo(tmp_path, "unix:web.sock", sockets='owner = "7:9"\n').start().ready():
        found = (tmp_path / "web.sock").stat()
        assert (found.st_uid, found.st_gid) == (7, 9)


def test_a_stale_unix_socket_is_reused(tmp_path: Path) -> None:
    """What a killed supervisor has left does not keep the next one from starting."""
    path = tmp_path / "web.sock"
    with echo(tmp_path, "unix:web.sock").start().ready() as supervised:
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        assert path.exists()
        supervised.start()  # at once, while the old workers are about to leave
        supervised.event("supervisor.ready", count=2)
        assert asked(str(path)) == ["echo", "1", "hello"]
        assert supervised.stop() == 0
    assert not path.exists()


def test_a_live_socket_is_nobody_elses(tmp_path: Path) -> None:
    """A supervisor of another name does not take over a socket that is served: exit code 69."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    path = f"unix:{tmp_path}/web.sock"
    with echo(tmp_path / "one", path).start().ready():
        with echo(tmp_path / "two", path) as second:
            code, text = end_of_start(second)
        assert code == 69
        assert f"sockets.web.listen: another process listens at {tmp_path}/web.sock" in text
        assert asked(str(tmp_path / "web.sock")) == ["echo", "1", "hello"]


def test_an_address_in_use_is_named(tmp_path: Path) -> None:
    """One sentence with the key and its line, and exit code 69: it may pass."""
    with listening() as other:
        host, port = other.getsockname()
        with echo(tmp_path, f"{host}:{port}") as supervised:
            code, text = end_of_start(supervised)
            (line,) = text.splitlines()
            assert code == 69
            assert f"sockets.web.listen: another process listens at {host}:{port}" in line
            assert "line " in line


@pytest.mark.parametrize(
    ("listen", "sentence"),
    [
        ("203.0.113.7:80", "no interface of this machine has that address"),
        ("unix:file", "exists and is not a socket"),
        ("unix:missing/web.sock", "the folder {}/missing cannot be opened"),
        ("systemd:web", "systemd passed no sockets (LISTEN_PID and LISTEN_FDS are not set)"),
    ],
)
def test_an_address_that_cannot_be_had(tmp_path: Path, listen: str, sentence: str) -> None:
    """One sentence that names the key, and exit code 78."""
    (tmp_path / "file").write_text("precious")
    with echo(tmp_path, listen) as supervised:
        code, text = end_of_start(supervised)
        (line,) = text.splitlines()
        assert code == 78
        assert "sockets.web.listen: " in line
        assert sentence.format(tmp_path) in line
    assert (tmp_path / "file").read_text() == "precious"


# --- passed by systemd -------------------------------------------------------------------------


def test_systemd_must_have_passed_that_name(tmp_path: Path) -> None:
    """A name that was not passed, or twice, or is no listening socket, is told."""
    with listening() as passed, listening(kind=socket.SOCK_DGRAM) as datagrams:
        for listen, names, given, sentence in (
            ("systemd:web", "http", [passed], 'no socket named "web", but http'),
            ("systemd:a", "a:a", [passed, passed], 'systemd passed 2 sockets named "a"'),
            ("systemd:a", "a", [datagrams], "does not accept connections"),
        ):
            with activated(tmp_path, listen, names, *given) as supervised:
                code, text = end_of_start(supervised)
            assert code == 78
            assert sentence in text


def test_what_systemd_says_never_reaches_a_worker(tmp_path: Path) -> None:
    """LISTEN_* is not in the environment of a worker or a template."""
    with (
        listening() as passed,
        activated(tmp_path, "systemd:http", "http", passed) as supervised,
    ):
        supervised.ready()
        for pid in [*supervised.worker_pids().values(), *supervised.templates()]:
            assert b"LISTEN_" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert supervised.stop() == 0


# --- who holds it ------------------------------------------------------------------------------


def holders(pids: list[int], inode: str) -> list[int]:
    return [pid for pid in pids if f"socket:[{inode}]" in descriptors(pid).values()]


def listening_inode(port: int) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
            return fields[9]
    raise AssertionError(port)


def test_a_socket_is_held_by_its_groups_only(tmp_path: Path) -> None:
    """Two groups share one; other groups and the template do not have it, nor do subprocesses."""
    config = group("one", "echo:run", **KEYS) + group("two", "echo:run", **KEYS)
    config += group("none", "idle") + group("other", "echo:run", **{**KEYS, "sockets": ["b"]})
    config += socket_table(FREE) + socket_table(FREE, "b")
    supervised = Supervised(tmp_path, config, modules={"echo": ECHO})
    with supervised.start().ready():
        address = where(supervised)
        answered: set[str] = set()
        wait_until(
            lambda: answered.add(asked(address)[0]) or answered == {"one", "two"},  # type: ignore[func-returns-value]
            "both groups answer",
        )
        pids = supervised.worker_pids()
        inode = listening_inode(address[1])
        sharing = {worker for worker, pid in pids.items() if holders([pid], inode)}
        assert {"one-1", "one-2", "two-1", "two-2"} == sharing
        assert holders(supervised.templates(), inode) == []
        assert [supervised.pid] == holders([supervised.pid], inode)
        assert supervised.stop() == 0


def test_a_stop_refuses_who_comes_after_it(tmp_path: Path) -> None:
    """While a worker drains nobody listens any more, instead of a queue that nobody serves."""
    config = group("busy", "busy", {"seconds": 20.0}, sockets=["web"]) + socket_table(FREE)
    config += group("echo", "echo:run", **KEYS)
    config = config.replace('sockets = ["web"]\n[workers.busy', "[workers.busy")
    supervised = Supervised(tmp_path, config, modules={"echo": ECHO}, supervisor='grace = "20s"')
    with supervised.start().ready():
        address = where(supervised)
        assert not refuses(address)
        supervised.signal(signal.SIGTERM)
        wait_until(lambda: refuses(address), "it refuses")
        assert supervised.worker_pids()


# --- reload ------------------------------------------------------------------------------------


def test_a_reload_moves_to_a_new_address(tmp_path: Path) -> None:
    """The new one listens before the roll, the old one is closed after it."""
    with listening() as reserved:
        new = reserved.getsockname()
    with echo(tmp_path, FREE).start().ready() as supervised:
        old = where(supervised)
        rewrite(supervised, FREE, f"{new[0]}:{new[1]}")
        assert supervised.command("reload", "--wait").returncode == 0
        assert asked(new) == ["echo", "2", "hello"]
        names = [line["event"] for line in supervised.lines()]
        assert names.index("reload.started") > len(names) - 1 - names[::-1].index(
            "socket.listening"
        )
        wait_until(lambda: refuses(old), "the old address is closed")
        assert supervised.stop() == 0


def test_a_reload_to_an_address_in_use_is_rejected(tmp_path: Path) -> None:
    """Nothing is started, and the old socket is served on; what was bound for it is closed."""
    with listening() as other, echo(tmp_path, FREE).start().ready() as supervised:
        old = where(supervised)
        taken = "{}:{}".format(*other.getsockname())
        rewrite(supervised, FREE, taken)
        text = supervised.config.read_text()
        extra = socket_table(f"unix:{tmp_path}/extra.sock", "extra")
        supervised.config.write_text(
            text.replace('sockets = ["web"]', 'sockets = ["web", "extra"]') + extra
        )
        done = supervised.command("reload", "--wait")
        assert done.returncode == 1
        assert f"another process listens at {taken}" in done.stderr
        assert supervised.events("reload.started") == []
        assert asked(old) == ["echo", "1", "hello"]
        assert not (tmp_path / "extra.sock").exists()
        assert supervised.stop() == 0


def test_a_roll_back_closes_the_new_address(tmp_path: Path) -> None:
    """Code that fails takes its socket with it; the old one is served all the time."""
    with echo(tmp_path, FREE).start().ready() as supervised:
        old = where(supervised)
        rewrite(supervised, FREE, "unix:new.sock")
        (tmp_path / "echo.py").write_text(BROKEN)
        assert supervised.command("reload", "--wait").returncode == 1
        supervised.event("reload.rolled_back")
        wait_until(lambda: not (tmp_path / "new.sock").exists(), "the new socket is removed")
        assert asked(old) == ["echo", "1", "hello"]
        assert supervised.stop() == 0
