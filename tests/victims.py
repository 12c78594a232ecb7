"""The cast: good workers, and every bad one that a supervisor must cope with.

Each is a `run` for a configuration, as `run = "tests.victims:deaf"`. What they do is not simulated.
Those that are bad while they are imported are modules of their own: their sources are below.
"""

from __future__ import annotations

__all__ = ["AT_IMPORT"]

import asyncio
import atexit
import contextlib
import ctypes
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from supervisor import protocol
from workers.context import Cancelled
from workers.link import Link
from workers.pool import PoolTimeout
from workers.worker import Worker

# --- good ----------------------------------------------------------------------------------------


def idle(worker: Worker) -> None:
    """Serve, and do nothing."""
    worker.ready()
    worker.accepting.wait()


async def idle_async(worker: Worker) -> None:
    """Serve, and do nothing, in asyncio."""
    worker.ready()
    await worker.accepting


def busy(worker: Worker) -> None:
    """Have work in flight that needs `seconds` from the cancel on, and finish it."""
    with worker.job("busy") as job:
        worker.ready()
        worker.accepting.wait()
        job.ctx.wait(worker.options["seconds"])
        job.ctx.check()
    worker.log.info("victim.finished")


async def busy_async(worker: Worker) -> None:
    """Have work in flight that needs `seconds` from the cancel on, in asyncio."""
    with worker.job("busy"):
        worker.ready()
        await worker.accepting
        await asyncio.sleep(worker.options["seconds"])
    worker.log.info("victim.finished")


def endless(worker: Worker) -> None:
    """Have work in flight that ends only when its context does."""
    try:
        with worker.job("endless") as job:
            worker.ready()
            job.ctx.wait()
            job.ctx.check()
    except Cancelled as exc:
        worker.log.info("victim.aborted", cause=str(exc.cause), seen=time.monotonic())
        raise


async def endless_async(worker: Worker) -> None:
    """Have work in flight that ends only when its context does, in asyncio."""
    try:
        with worker.job("endless") as job:
            worker.ready()
            await job.ctx
            job.ctx.check()
    except Cancelled as exc:
        worker.log.info("victim.aborted", cause=str(exc.cause), seen=time.monotonic())
        raise


def in_a_thread(worker: Worker) -> None:
    """Return at once after the cancel, with a thread of its own that still has work to do."""

    def work() -> None:
        worker.accepting.wait()
        worker.ctx.wait(worker.options["seconds"])
        worker.log.info("victim.finished")

    worker.wg.go(work)
    worker.ready()
    worker.accepting.wait()


def in_a_call(worker: Worker) -> None:
    """Spend the cancel in a C call that gives the interpreter lock away, and cannot be woken."""
    worker.ready()
    libc = ctypes.CDLL(None)
    worker.log.info("victim.calling")
    for _ in range(worker.options["seconds"]):
        libc.usleep(999_999)
    worker.log.info("victim.returned")


def once(worker: Worker) -> None:
    """Have nothing more to do."""
    worker.ready()


def surroundings(worker: Worker) -> None:
    """Say what it finds around itself: what it was given, and what it inherited."""
    worker.log.info(
        "victim.surroundings",
        parent=os.getppid(),
        group=os.getpgid(0),
        title=_title(),
        environment=sorted(os.environ),
        threads=[thread.name for thread in threading.enumerate()],
        frozen=gc.get_freeze_count(),
        collecting=gc.isenabled(),
        options=dict(worker.options),
        ids=[worker.id, worker.group, worker.generation],
        modules=sorted(sys.modules),
    )
    worker.ready()
    worker.accepting.wait()


def _title() -> str:
    return Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode()


# --- those that do not end -----------------------------------------------------------------------


def deaf(worker: Worker) -> None:
    """Swallow whatever comes, in an endless loop."""
    worker.ready()
    while True:
        try:
            _spin_for_ever()
        except BaseException:
            continue


def _spin_for_ever() -> NoReturn:
    while True:
        pass


def lock_holder(worker: Worker) -> None:
    """Hold the interpreter lock for ever, in C code. `ready` has been sent by then."""
    worker.ready()
    libc = ctypes.PyDLL(None)
    if worker.accepting.wait(worker.options.get("after", 0.5)):
        return
    worker.log.info("victim.holding")
    _hold_the_lock(libc)


def _hold_the_lock(libc: ctypes.PyDLL) -> None:
    while True:  # a PyDLL's calls keep the lock, and the interval keeps it between them
        sys.setswitchinterval(3600.0)
        libc.usleep(999_999)


def mute(worker: Worker) -> None:
    """End as it should, without having answered: nobody else gets the interpreter lock."""
    worker.ready()
    if worker.accepting.wait(0.5):
        return
    worker.log.info("victim.holding")
    sys.setswitchinterval(3600.0)
    end = time.monotonic() + worker.options["seconds"]
    while time.monotonic() < end:
        pass
    os._exit(0)


def liar(worker: Worker) -> None:
    """Say that it is drained, and stay."""
    atexit.register(_stay_for_ever)
    worker.ready()
    worker.accepting.wait()


def _stay_for_ever() -> NoReturn:
    while True:
        time.sleep(3600.0)


def never_ready(worker: Worker) -> None:
    """Serve without saying so."""
    worker.accepting.wait()


def stuck_before_ready(worker: Worker) -> None:
    """Never get as far as serving, and hear nothing."""
    _stay_for_ever()


# --- those whose job hangs -----------------------------------------------------------------------


def hanging(worker: Worker) -> None:
    """Do good jobs first, and then one that never ends, in one of many ways; not before `when` is there."""
    worker.ready()
    while not os.path.exists(worker.options.get("when", "/")):
        time.sleep(0.01)
    for number in range(3):
        with worker.job(f"good {number}") as job:
            job.ctx.wait(0.01)
    if worker.accepting.done:
        return
    with worker.job(worker.options.get("name", "bad")) as job:
        worker.log.info("victim.hanging", began=time.monotonic())
        match worker.options["how"]:
            case "waiting":  # until it is told that its time is over
                job.ctx.wait()
                job.ctx.check()
            case "deaf":
                deaf_for_ever()
            case "in C":  # without the interpreter lock
                _sleep_in_c(ctypes.CDLL(None))
            case "holding":  # with the interpreter lock
                sys.setswitchinterval(3600.0)
                _sleep_in_c(ctypes.PyDLL(None))
            case "stopped":  # until somebody continues it
                os.kill(os.getpid(), signal.SIGSTOP)
                deaf_for_ever()
            case "stopping the supervisor":
                os.kill(os.getppid(), signal.SIGSTOP)
                deaf_for_ever()
            case "borrowing":
                with worker.pools["main"].acquire(job.ctx):
                    deaf_for_ever()
            case other:
                raise NotImplementedError(other)


def deaf_for_ever() -> NoReturn:
    """Swallow whatever comes."""
    while True:
        try:
            _stay_for_ever()
        except BaseException:
            continue


def _sleep_in_c(libc: ctypes.CDLL) -> NoReturn:
    while True:
        libc.usleep(999_999)


async def hanging_async(worker: Worker) -> None:
    """Have a task that waits for ever, in a job, and hear nothing of the stop."""

    async def wait_for_ever() -> None:
        with worker.job("bad"):
            await asyncio.Event().wait()

    worker.ready()
    worker.log.info("victim.hanging", began=time.monotonic())
    await asyncio.create_task(wait_for_ever(), name="stuck")


def long_but_busy(worker: Worker) -> None:
    """Have one job that takes much longer than any may, and says so; then a last one as ever."""
    worker.ready()
    with worker.job("long") as job:
        end = time.monotonic() + worker.options["seconds"]
        while time.monotonic() < end:
            worker.busy_until(worker.options["step"])
            job.ctx.wait(worker.options["step"] / 4)
    worker.log.info("victim.finished")
    worker.accepting.wait()


# --- those that leave something behind -----------------------------------------------------------


def forker(worker: Worker) -> None:
    """Leave two processes in its group that ignore every signal but SIGKILL."""
    ignore_all = "import signal,time;[signal.signal(n,1) for n in (1,2,3,15)];print(flush=True);time.sleep(3600)"
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-S", "-c", ignore_all], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    worker.ready()
    worker.accepting.wait()


def daemonizer(worker: Worker) -> None:
    """Leave orphans behind, as a daemon that starts does; they end at once."""
    for _ in range(10):
        if os.fork() == 0:
            os.fork()
            os._exit(0)  # the child at once, its own child soon: it may be an orphan by then
        os.wait()
    worker.ready()
    worker.accepting.wait()


def escapist(worker: Worker) -> None:
    """Leave processes behind that have left its group, its session and their parents.

    One by forks alone, one of another program with an emptied environment, one with a child.
    """
    _daemonize(_stay)
    _daemonize(_become_another_program)
    _daemonize(_stay_with_a_child)
    worker.ready()
    if worker.options.get("how") == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    worker.accepting.wait()


def _daemonize(run: Callable[[int], object]) -> None:
    """Do as daemon(7) says: fork, setsid, fork; return when `run` has written to its descriptor."""
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            with contextlib.suppress(OSError):
                run(writer)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    os.waitpid(middle, 0)
    os.read(reader, 1)
    os.close(reader)


def _stay(ready: int) -> NoReturn:
    os.write(ready, b".")
    _stay_for_ever()


def _become_another_program(_ready: int) -> NoReturn:
    os.execvp("env", ["env", "-i", "sleep", "3600"])  # which closes the descriptor


def _stay_with_a_child(ready: int) -> NoReturn:
    if os.fork() == 0:
        os.setsid()
        os.write(ready, b".")
    _stay_for_ever()


def fork_bomb(worker: Worker) -> None:
    """Leave a process behind that flees: its child lives on in a session of its own, and so on."""
    _daemonize(_flee_for_ever)
    worker.ready()
    worker.accepting.wait()


def _flee_for_ever(ready: int) -> NoReturn:
    os.write(ready, b".")
    end = time.monotonic() + 60.0  # should a test fail to catch it
    while time.monotonic() < end:
        if os.fork():
            os._exit(0)
        os.setsid()
    os._exit(0)


# --- those that have gone mad ---------------------------------------------------------------------


def flooder(worker: Worker) -> None:
    """Send its supervisor what it has said before, or something large, without an end."""
    link = _link_of(worker)
    worker.ready()
    if worker.options.get("what") == "large":
        message: Any = protocol.LeakFound("none", 1.0, "t", "x" * 1_000_000)
    else:
        message = protocol.Ready()
    while True:
        for _ in range(100):
            link.send(message)
        while len(link._outgoing) > 500:
            time.sleep(0.001)


def false_witness(worker: Worker) -> None:
    """Say all that it can say twice, wrong, out of order, and as somebody else."""
    link = _link_of(worker)
    hello = link._hello
    for message in (
        protocol.Acknowledged(0.0),
        protocol.Hello(worker.id, hello.token, 1),
        protocol.Hello("idle-1", hello.token, os.getpid()),
        protocol.Ready(),
        protocol.Ready(),
        protocol.Acknowledged(float("nan")),
        protocol.Usage("main", 9, 2**53, 2**53),
        protocol.Report(
            number=0,
            in_flight=7,
            jobs_done=7,
            jobs_failed=7,
            pools={"x" * 100_000: protocol.PoolStats(open=99)},
        ),
        protocol.LeakFound("nowhere", 1.0, "t", "forged"),
    ):
        link.send(message)
    worker.accepting.wait()
    for _ in range(3):
        link.send(protocol.Acknowledged(1.0))
        link.send(protocol.Drained({"nowhere": protocol.CloseReport(closed=99)}))
        link.send(protocol.Failed("too late", ""))


def false_debtor(worker: Worker) -> NoReturn:
    """End badly, and lay it at the door of a pool that it never had."""
    worker.ready()
    _link_of(worker).send(protocol.Unreachable("nowhere", "forged"))
    sys.exit(1)


def _link_of(worker: Worker) -> Any:
    """Return what a worker talks to its supervisor by, which is hidden from honest code."""
    return next(found for found in gc.get_objects() if isinstance(found, Link))


def scribbler(worker: Worker) -> None:
    """Die and leave children behind that have begun to write to the lifeline, and never end."""
    lifeline = _link_of(worker)._lifeline
    worker.ready()
    worker.accepting.wait()
    reader, writer = os.pipe()
    os.set_blocking(lifeline, True)
    if not all(os.fork() for _ in range(8)):
        end = time.monotonic() + 60.0
        for number in itertools.count():
            os.write(lifeline, b"x" * 100)
            if number == 30:
                os.write(writer, b".")
            if time.monotonic() > end:
                os._exit(0)
    os.read(reader, 1)
    os._exit(0)


# --- those that fail -----------------------------------------------------------------------------


def crasher(worker: Worker) -> None:
    """End in one of many bad ways, after `ready` has been sent."""
    worker.ready()
    if worker.accepting.wait(worker.options.get("after", 0.1)):
        return
    match worker.options["how"]:
        case "segfault":
            _touch_nothing()
        case "_exit":
            os._exit(3)
        case "exit":
            sys.exit(3)
        case "words":
            sys.exit("no disk, no work")
        case "raise":
            _reach_for_the_moon()
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "not in time":
            error = TimeoutError("the database did not answer")
            error.add_note("it never does on Mondays")
            raise error
        case "not utf-8":
            raise FileNotFoundError(os.fsdecode(b"caf\xe9.txt"))
        case "endless words":
            raise ValueError("insert into t values " + "(0), " * 1_000_000)
        case other:
            raise NotImplementedError(other)


def _touch_nothing() -> None:
    ctypes.string_at(0)


def _reach_for_the_moon() -> NoReturn:
    raise LookupError("no moon tonight")


async def crasher_async(worker: Worker) -> None:
    """Raise in asyncio."""
    worker.ready()
    await asyncio.sleep(0.1)
    _reach_for_the_moon()


def fails_in_a_thread(worker: Worker) -> None:
    """Let a thread of its WaitGroup raise, after the cancel."""

    def work() -> None:
        worker.accepting.wait()
        _reach_for_the_moon()

    worker.wg.go(work)
    worker.ready()
    worker.accepting.wait()


def fails_at_the_end(worker: Worker) -> None:
    """Raise on its way out of a stop."""
    worker.ready()
    worker.accepting.wait()
    _reach_for_the_moon()


# --- those that cannot do without their database -------------------------------------------------


def asks_first(worker: Worker) -> None:
    """Serve once its database has answered, and end when it does not answer any more."""
    _ask(worker)
    worker.ready()
    while not worker.accepting.wait(0.02):
        _ask(worker)


async def asks_first_async(worker: Worker) -> None:
    """As `asks_first`, in asyncio."""
    while not worker.accepting.done:
        async with worker.pools["main"].acquire() as conn:
            await conn.execute("select 1")
        worker.ready()
        await asyncio.sleep(0.02)


def asks_later(worker: Worker) -> None:
    """Serve at once, and end when its database does not answer."""
    worker.ready()
    while not worker.accepting.wait(0.02):
        _ask(worker)


def waits_for_an_answer(worker: Worker) -> None:
    """Wait for its database for as long as it may, and serve then."""
    with worker.pools["main"].acquire(worker.accepting, timeout=3600.0) as conn:
        conn.execute("select 1")
    worker.ready()
    worker.accepting.wait()


def gives_up_silently(worker: Worker) -> None:
    """End with a code, and without a word, when its database does not answer."""
    try:
        _ask(worker)
    except PoolTimeout:
        sys.exit(3)
    worker.ready()
    worker.accepting.wait()


def _ask(worker: Worker) -> None:
    with worker.pools["main"].acquire() as conn:
        conn.execute("select 1")


# --- those that eat ------------------------------------------------------------------------------


def memory_eater(worker: Worker) -> None:
    """Serve, and take as much memory as there is."""
    worker.ready()
    eaten = []
    while not worker.accepting.done:
        eaten.append(b"x" * (1 << 22))


not_a_function = 42

# --- those that are bad while they are imported --------------------------------------------------

_RUN = """
def run(worker):
    worker.ready()
    worker.accepting.wait()
"""

AT_IMPORT = {
    "with_thread": "import threading\n"
    'threading.Thread(target=threading.Event().wait, name="poller", daemon=True).start()\n' + _RUN,
    "with_socket": "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n" + _RUN,
    "with_zmq": "import zmq\ncontext = zmq.Context()\nsocket = context.socket(zmq.PUB)\n" + _RUN,
    "raises": "import os\n\ndef deep():\n    raise RuntimeError('no licence file')\n\ndeep()\n"
    + _RUN,
    "syntax": "def run(worker)\n    pass\n",
    "exits": "import sys\nsys.exit(5)\n" + _RUN,
    "dies": "import os\nos._exit(5)\n" + _RUN,
    "slow": "import time\nprint('importing', flush=True)\ntime.sleep(3600)\n" + _RUN,
    "writes": "import os\nos.write(3, b'what is descriptor 3?')\n" + _RUN,
    "with_helper": "import os, subprocess\n"
    "subprocess.Popen(['sleep', '3600'])\n"
    "subprocess.Popen(['setsid', 'sleep', '3600'])\n" + _RUN,
    "good": _RUN,
}
