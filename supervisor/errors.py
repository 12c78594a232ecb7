"""The supervisor's errors, by whose fault they are. A leaf: it imports nothing of ours."""

from __future__ import annotations

__all__ = [
    "AlreadyRunningError",
    "ConfigError",
    "InvariantError",
    "ListenError",
    "NoSupervisorError",
    "Problem",
    "ProgramError",
    "RefusedError",
    "SpawnError",
    "SupervisorError",
    "UsageError",
    "WireError",
]

from dataclasses import dataclass


class SupervisorError(Exception):
    """What a user is shown as one sentence, and the exit code that goes with it."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a configuration file: where, what, and the remedy."""

    key: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        """Read as `line 7: workers.jobs.cuont: unknown key; did you mean "count"?`."""
        place = f"line {self.line}: " if self.line is not None else ""
        return f"{place}{self.key}: {self.message}" if self.key else f"{place}{self.message}"


class ConfigError(SupervisorError):
    """The operator's configuration is wrong, missing or unreadable. Holds every problem."""

    exit_code = 78

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class UsageError(SupervisorError):
    """The command line is wrong, or names a group or worker that does not exist."""

    exit_code = 2


class NoSupervisorError(SupervisorError):
    """No supervisor answers under that name."""

    exit_code = 69


class RefusedError(SupervisorError):
    """The supervisor has refused a command, and says why."""

    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class AlreadyRunningError(SupervisorError):
    """A supervisor already runs under that name."""

    exit_code = 69


class SpawnError(SupervisorError):
    """The operating system refused a process, a descriptor or a socket."""


class ProgramError(SupervisorError):
    """A command's program could not be started, or has failed: one sentence, and its last lines."""

    def __init__(self, why: str, last_lines: str = "", exit_code: int = 1) -> None:
        super().__init__(why)
        self.last_lines = last_lines
        self.exit_code = exit_code


class ListenError(SupervisorError):
    """An address cannot be listened on; that may pass, so it is no mistake of the file's."""


class WireError(SupervisorError):
    """A peer sent what this version does not understand. Never fatal: counted and dropped."""


class InvariantError(SupervisorError):
    """A bug of ours. Crashes loudly, because a wrong ledger is worse than none."""
