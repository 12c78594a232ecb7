"""Whether the code on disk can still be the code that a generation has loaded.

SIGHUP means "load what is on disk". Only where it can be shown that the code there is what runs
already may a reload leave the workers in place; every doubt is a roll. So what counts is not what
is likely: a file that was touched without a change, a folder too large to be looked through in a
moment, a clock that was set, code that the template has not imported, all of them are "changed".
"""

from __future__ import annotations

__all__ = ["Sources"]

import os
import time
from collections.abc import Iterable, Sequence

# A look must not hold up the loop: what is larger, or takes longer, is not looked through.
MAX_ENTRIES = 5_000
MAX_SECONDS = 0.5
# The kernel stamps files with the time of its last tick, which may be this long ago.
TICK = 0.02
CLOCK_WAS_SET = 0.5  # seconds that the wall clock may gain or lose against the monotonic one

_CODE = (".py", ".so", ".pth")
_NOT_OURS = frozenset({"__pycache__", "node_modules", "site-packages"})


class Sources:
    """The code of one generation at the moment before it is loaded.

    Args:
        path: the folders that are put on the workers' sys.path; looked through with all below them.
    """

    def __init__(self, path: Sequence[str]) -> None:
        self._path = tuple(path)
        self._places = [_place(folder) for folder in path]
        self._loaded_at = time.time()
        self._offset = self._loaded_at - time.monotonic()

    def doubt(self, folders: Iterable[str]) -> str:
        """Return why the code there may be another one by now; "" when it is the same.

        Args:
            folders: others that code was imported from; what is below them is not looked at.
        """
        if abs(time.time() - time.monotonic() - self._offset) > CLOCK_WAS_SET:
            return "the clock was set, so the age of files says nothing"
        if [_place(folder) for folder in self._path] != self._places:
            return "a folder of path is another one"
        look = _Look(self._loaded_at - TICK)
        for folder in self._path:
            look.through(folder)
        for folder in folders:
            look.into(folder)
        return look.found


class _Look:
    """One look at folders, ended by the first doubt."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._entries = 0
        self._until = time.monotonic() + MAX_SECONDS
        self._seen: set[str] = set()
        self.found = ""

    def through(self, folder: str) -> None:
        """Look at a folder and all below it; links to folders are followed, each folder once."""
        waiting = [folder]
        while waiting and not self.found:
            real = os.path.realpath(waiting.pop())
            if real not in self._seen:
                waiting += self.into(real)

    def into(self, folder: str) -> list[str]:
        """Look at the files of a folder; return the folders in it."""
        self._seen.add(folder)
        below: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._entries += 1
                    if self._entries > MAX_ENTRIES or time.monotonic() > self._until:
                        self.found = f"{folder} holds too much to be looked through"
                    elif entry.name.endswith(_CODE):
                        self._judge(entry)
                    elif _may_hold_code(entry):
                        below.append(entry.path)
                    if self.found:
                        return []
        except FileNotFoundError:
            pass
        except NotADirectoryError:  # an archive
            if _changed_at(os.stat(folder)) > self._since:
                self.found = f"{folder} has changed"
        except OSError as exc:
            self.found = f"{folder} cannot be looked at: {exc.strerror}"
        return below

    def _judge(self, entry: os.DirEntry[str]) -> None:
        try:
            status = entry.stat()
        except FileNotFoundError:
            return  # an editor's file that came and went
        if _changed_at(status) > self._since:
            self.found = f"{entry.path} has changed"


def _may_hold_code(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.name not in _NOT_OURS and entry.is_dir()


def _changed_at(status: os.stat_result) -> float:
    # Who unpacks an archive sets the time of the contents, and cannot set that of the change.
    return max(status.st_ctime, status.st_mtime)


def _place(folder: str) -> tuple[str, int, int] | None:
    """Return what a folder is: a release that is switched by a link is another one."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return os.path.realpath(folder), status.st_dev, status.st_ino
