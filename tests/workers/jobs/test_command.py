"""`python -m workers.jobs`, as a user types it: what it prints, where, and its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.supervised import REPO, wait_until

CONFIG = """
[supervisor]
runtime_dir = "/run/nobody-makes-it"
[pools.main]
url = "{url}"
[workers.jobs]
run = "workers.jobs:run"
[workers.jobs.options]
handler = "workers.jobs:sha256"
[workers.web]
run = "myapp:serve"
"""


@pytest.fixture
def config(bare, tmp_path):
    """A configuration with one group of jobs and another one, on a database without tables."""
    path = tmp_path / "app.toml"
    path.write_text(CONFIG.format(url=bare.url), encoding="utf-8")
    return path


@pytest.fixture
def local(on_sqlite, tmp_path):
    """The same where one database is enough: that of `on_sqlite`."""
    path = tmp_path / "app.toml"
    path.write_text(CONFIG.format(url=on_sqlite.url), encoding="utf-8")
    return path


def words(command, config, *more):
    return [sys.executable, "-m", "workers.jobs", command, "-c", str(config), *more]


def jobs(command, config, *more, stdin=b""):
    """Run a command; return its exit code, its output and its errors."""
    done = subprocess.run(
        words(command, config, *more),
        input=stdin,
        capture_output=True,
        timeout=30,
        cwd=REPO,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def counted(queued=0, running=0, done=0, failed=0):
    """Return what `counts` prints."""
    return f"queued  {queued}\nrunning {running}\ndone    {done}\nfailed  {failed}\n"


def test_add_creates_the_table_and_adds_each_payload(config, bare):
    """Payloads on the command line become jobs, in their order."""
    assert jobs("counts", config) == (0, counted(), "")
    assert jobs("add", config, "a", "b c", "") == (0, "added 3 jobs, numbers 1 to 3\n", "")
    assert jobs("add", config, "--", "-d") == (0, "added 1 job, number 4\n", "")
    assert bare.rows("SELECT payload FROM jobs ORDER BY id") == [("a",), ("b c",), ("",), ("-d",)]
    assert jobs("counts", config) == (0, counted(queued=4), "")


def test_add_takes_lines_from_standard_input(local, on_sqlite):
    """Each line is a payload, as it is; empty lines are none; the last may lack its end."""
    code, output, _ = jobs("add", local, stdin=b"a\n\n b\r\n" + "käse".encode())
    assert (code, output) == (0, "added 3 jobs, numbers 1 to 3\n")
    assert on_sqlite.rows("SELECT payload FROM jobs ORDER BY id") == [("a",), (" b\r",), ("käse",)]


def test_add_of_nothing(local):
    """No line is no job, and no error."""
    assert jobs("add", local) == (0, "added no jobs\n", "")
    assert jobs("counts", local) == (0, counted(), "")


def test_add_of_many_lines(local, on_sqlite):
    """A stream is added as it comes, in order, whatever its chunks cut in two."""
    lines = [f"{number} {'ü' * (number % 50)}" for number in range(20_000)]
    stdin = "".join(f"{line}\n" for line in lines).encode()
    assert jobs("add", local, stdin=stdin)[1] == "added 20000 jobs, numbers 1 to 20000\n"
    assert [line for (line,) in on_sqlite.rows("SELECT payload FROM jobs ORDER BY id")] == lines


def test_line_that_comes_alone_is_added_at_once(local, on_sqlite):
    """A slow stream need not end before its first line is a job."""
    with subprocess.Popen(
        words("add", local), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"first\n")
        process.stdin.flush()
        wait_until(
            lambda: b"queued  1" in subprocess.run(
                words("counts", local), capture_output=True, cwd=REPO, check=True
            ).stdout,
            "the first line is a job",
        )  # fmt: skip
        output, _ = process.communicate(b"second\n")
    assert output == b"added 2 jobs, numbers 1 to 2\n"
    assert on_sqlite.counts()["queued"] == 2


def test_interrupted_add_says_what_it_has_added(local):
    """Ctrl-C keeps what has been committed, and says how much that is."""
    with subprocess.Popen(
        words("add", local),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPO,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"first\n")
        process.stdin.flush()
        wait_until(lambda: jobs("counts", local)[1] == counted(queued=1), "the first is a job")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, b"added 1 job, number 1\n")
    assert b"Traceback" not in errors


def test_payload_that_is_no_text_is_refused(local):
    """On the command line nothing is added; on standard input the other lines are."""
    code, output, errors = jobs("add", local, "good", os.fsdecode(b"caf\xe9"))
    assert (code, output) == (2, "")
    assert "nothing was added" in errors
    code, output, errors = jobs("add", local, stdin=b"a\ncaf\xe9\nb\0b\nc\n" + b"\xff\n" * 20)
    assert (code, output) == (1, "added 2 jobs, numbers 1 to 2\n")
    assert r"jobs: line 2: no text in UTF-8, left out: b'caf\xe9'" in errors
    assert (
        r"jobs: line 3: it holds a NUL, which no text in a database may, left out: b'b\x00b'"
        in errors
    )
    assert "and 12 more" in errors


def test_retry_queues_failed_jobs_again(config, bare):
    """All of them, or the named ones; what can't be retried is named, with 1."""
    assert jobs("retry", config) == (0, "queued again: 0\n", "")
    assert jobs("retry", config, "7") == (1, "", "jobs: there is no job 7\n")
    jobs("add", config, "a", "b", "c", "d")
    bare.change("UPDATE jobs SET state = 'failed', error = 'e' WHERE id < 4")
    assert jobs("retry", config, "2", "4", "9") == (
        1,
        "queued again: job 2\n",
        "jobs: job 4 is queued, not failed; there is no job 9\n",
    )
    assert jobs("retry", config) == (0, "queued again: 2\n", "")
    assert jobs("counts", config) == (0, counted(queued=4), "")


@pytest.mark.parametrize(
    ("command", "more", "code", "message"),
    [
        ("add", ["--group", "wbe", "x"], 2, "there is no group wbe; there are: jobs, web"),
        ("add", ["--grupp", "web"], 2, "No such option"),
        ("retry", ["first"], 2, "'first' is not a valid integer"),
        ("drop", [], 2, "No such command 'drop'"),
    ],
)
def test_wrong_usage(local, command, more, code, message):
    """Wrong usage is one sentence and 2."""
    found, output, errors = jobs(command, local, *more)
    assert (found, output) == (code, "")
    assert message in errors


def test_no_payload_on_a_terminal_is_wrong_usage(local):
    """Where nothing is piped in, waiting for lines would look like hanging."""
    master, slave = os.openpty()
    try:
        done = subprocess.run(
            words("add", local), stdin=slave, capture_output=True, timeout=30, cwd=REPO, check=False
        )
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 2
    assert b"no PAYLOAD" in done.stderr


def test_wrong_configuration(tmp_path):
    """A wrong configuration is told as the supervisor tells it, with 78."""
    missing = tmp_path / "missing.toml"
    assert jobs("counts", missing)[0] == 78
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[pools.main]\nurll = 'x'\n", encoding="utf-8")
    code, _, errors = jobs("add", wrong, "x")
    assert code == 78
    assert 'did you mean "url"' in errors


def test_group_must_be_named_where_there_are_several(local):
    """Which table is meant must be plain: several groups with jobs, or none, ask for --group."""
    more = (
        '[pools.other]\nurl = "sqlite:///other.db"\n[workers.{}]\nrun = "{}"\npools = ["other"]\n'
    )
    text = local.read_text()
    local.write_text(text + more.format("mail", "workers.jobs:run"))
    code, _, errors = jobs("add", local, "x")
    assert code == 2
    assert "2 groups run workers.jobs:run; name one with --group: jobs, mail" in errors
    assert jobs("add", local, "--group", "mail", "x")[0] == 0
    assert jobs("counts", local, "--group", "jobs")[1] == counted()
    assert jobs("counts", local, "--group", "mail")[1] == counted(queued=1)
    local.write_text(text.replace("workers.jobs:run", "myapp:run"))
    code, _, errors = jobs("counts", local)
    assert code == 2
    assert "no group runs workers.jobs:run; name one with --group: jobs, web" in errors


def test_database_that_cannot_be_had_is_one_sentence(tmp_path):
    """What the database says is told with the pool's name and no password, and 1."""
    config = tmp_path / "app.toml"
    url = "postgresql://app:secret@127.0.0.1:1/nowhere"
    config.write_text(CONFIG.format(url=url), encoding="utf-8")
    code, output, errors = jobs("counts", config)
    assert (code, output) == (1, "")
    assert "pools.main (postgresql://app:***@127.0.0.1:1/nowhere): " in errors
    assert "secret" not in errors


def test_database_that_others_have_locked_is_waited_for(local, tmp_path):
    """`add` waits for a writer that takes its time."""
    import sqlite3

    jobs("add", local, "x")
    holder = sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with subprocess.Popen(words("add", local, "y"), stdout=subprocess.PIPE, cwd=REPO) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        holder.execute("COMMIT")
        assert process.communicate(timeout=20)[0] == b"added 1 job, number 2\n"
    holder.close()


@pytest.mark.parametrize(
    ("command", "through", "code", "said"),
    [
        ("counts", '"$@" >/dev/full', 1, "jobs: the output cannot be written: No space left"),
        ("add", '"$@" x >/dev/full', 1, "jobs: the output cannot be written: No space left"),
        ("counts", '"$@" | true', 0, ""),
        ("counts", '"$@" >&-', 0, ""),
        ("add", '"$@" <&-', 2, "no PAYLOAD"),
    ],
)
def test_streams_that_are_full_or_closed(local, command, through, code, said):
    """A sentence at most, never a traceback."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", through, "sh", *words(command, local)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=REPO,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr == "" or said
