"""The server that chaos runs on, where it is not SQLite."""

from __future__ import annotations

__all__ = ["postgresql"]

from tests.servers import postgresql
