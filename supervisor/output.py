"""Standard output that cannot be written, for every command of ours. A leaf."""

from __future__ import annotations

__all__ = ["unwritable"]

import os

from supervisor.errors import SupervisorError


def unwritable(exc: OSError) -> SupervisorError:
    """Give up standard output after this error; return what to say of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in its buffer can't be written
    return SupervisorError(f"the output cannot be written: {exc.strerror}")
