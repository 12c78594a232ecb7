"""The handler that ships: the same digest as sha256sum's, and an end to every file."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from workers.context import Cancelled, Context
from workers.jobs import Job, sha256


def digest(path, ctx=None):
    """Return what the handler returns for a file."""
    return sha256(Job(1, str(path), 1, ctx or Context.background().with_timeout(20.0)), None)


@pytest.mark.parametrize("size", [0, 1, 63, 64, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 3_000_001])
def test_digest_is_that_of_sha256sum(tmp_path, size):
    """Files of every size around the handler's chunk have the digest that sha256sum prints."""
    path = tmp_path / "Ein Name ☃.bin"
    path.write_bytes(os.urandom(size))
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert digest(path) == printed.stdout.split()[0]


def test_link_is_followed(tmp_path):
    """A symbolic link stands for its file, as for sha256sum."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert digest(tmp_path / "link") == digest(tmp_path / "file")


def test_missing_file_is_named(tmp_path):
    """The error names the file."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        digest(tmp_path / "nowhere")


def test_missing_relative_path_says_where_it_was_looked_up():
    """A relative path is the worker's, and the error says which directory that was."""
    with pytest.raises(FileNotFoundError) as caught:
        digest("nowhere/at all")
    assert os.getcwd() in caught.value.__notes__[0]


def test_fifo_does_not_keep_the_worker(tmp_path):
    """What is no regular file is refused at once: a FIFO has no end, nor a beginning."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            digest(path)


def test_directory_is_an_error(tmp_path):
    """A directory has no digest."""
    with pytest.raises((IsADirectoryError, ValueError)):
        digest(tmp_path)


def test_large_file_is_left_when_there_is_no_time(tmp_path):
    """The handler looks at its context as it goes."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: an hour's work
    ctx = Context.background().with_cancel()
    timer = threading.Timer(0.1, ctx.cancel, ["stop"])
    timer.start()
    with pytest.raises(Cancelled):
        digest(path, ctx)
    timer.join()
