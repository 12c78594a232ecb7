"""The command `supervisor`, also as `python -m supervisor`.

A start launches its template's interpreter before anything else, so that it boots on another core
while the command line and the configuration are read. If these are wrong, it ends unused.
"""

from __future__ import annotations

__all__ = ["main"]

import sys


def main() -> None:
    """Run one command and exit with its code."""
    spare = None
    if sys.argv[1:2] == ["start"] and "--help" not in sys.argv:
        from supervisor.launch import launch_template

        spare = launch_template()
    from supervisor.cli import run

    run(spare)


if __name__ == "__main__":
    main()
