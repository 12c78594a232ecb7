"""The drivers: what each kind of connection can and cannot do, behind one small adapter.

A driver is a module beside this one with a class and a `from_url(url, application_name)`. It is
imported when it is needed, and only then is its package.
"""

from __future__ import annotations

__all__ = ["Driver", "driver_of", "from_url", "kind_of"]

from collections.abc import Callable
from importlib import import_module
from typing import Any

from workers.pool.drivers.base import Driver

# Module and class of each driver; the schemes of its URLs; the packages that the classes of its
# connections and errors come from.
_DRIVERS = {
    "sqlite": "SQLiteDriver",
    "postgresql": "PostgreSQLDriver",
    "mysql": "MySQLDriver",
    "redis": "RedisDriver",
}
_SCHEMES = {
    "sqlite": "sqlite",
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
}
_PACKAGES = {
    "sqlite3": "sqlite",
    "psycopg": "postgresql",
    "psycopg_binary": "postgresql",
    "pymysql": "mysql",
    "redis": "redis",
}


def from_url(url: str, application_name: str | None) -> tuple[Callable[[float], Any], Driver]:
    """Return what dials (given its time-out in seconds) and the driver, for a URL.

    Raises:
        ValueError: the URL is not one. The message never shows more of it than its scheme.
        MissingDriverError: the driver is not installed.
    """
    dialler: tuple[Callable[[float], Any], Driver]
    dialler = import_module(f"{__name__}.{kind_of(url)}").from_url(url, application_name)
    return dialler


def kind_of(url: str) -> str:
    """Return which driver a URL is for; raises ValueError as `from_url`."""
    scheme, separator, _ = url.partition("://")
    kind = _SCHEMES.get(scheme.partition("+")[0].lower()) if separator else None
    if kind is None:
        what = f"a URL that begins with {scheme}://" if separator else "a text that is no URL"
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(f"a pool knows no driver for {what}; it knows {known}")
    return kind


def driver_of(thing: object) -> Driver | None:
    """Return the driver for a connection, or for an error, by the class it is of; None: unknown."""
    for cls in type(thing).__mro__:
        kind = _PACKAGES.get(cls.__module__.partition(".")[0])
        if kind is not None:
            driver = getattr(import_module(f"{__name__}.{kind}"), _DRIVERS[kind])()
            assert isinstance(driver, Driver)
            return driver
    return None
