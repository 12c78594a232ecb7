"""How long systemd waits for the end of a stop, read from a unit's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.unit import DEFAULT, stop_timeout, time_span, unit_of


def timeout(folder: Path, unit: str, files: dict[str, str]) -> float | None:
    """Return the stop time-out of a unit that is made of these files."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folders = [str(folder / each) for each in ("etc/system", "lib/system")]
    return stop_timeout(unit, folders, [str(folder / "etc")])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"lib/system/a.service": "[Service]\nExecStart=/x\n"}, DEFAULT),
        ({"lib/system/a.service": "[Service]\nTimeoutStopSec=45s\n"}, 45.0),
        ({"lib/system/a.service": "[Service]\nTimeoutSec=5\nTimeoutStopSec=45\n"}, 45.0),
        ({"lib/system/a.service": "[Service]\nTimeoutStopSec = 45\nTimeoutSec=5\n"}, 5.0),
        ({"lib/system/a.service": "#TimeoutStopSec=45\nTimeoutStopSec=0\n"}, float("inf")),
        ({"lib/system/a.service": "TimeoutStopSec=soon\n"}, None),
        (  # the administrator's file hides the vendor's
            {
                "lib/system/a.service": "TimeoutStopSec=45\n",
                "etc/system/a.service": "TimeoutStopSec=46\n",
            },
            46.0,
        ),
        (  # drop-ins come after it, in the order of their names, whatever folder they are in
            {
                "etc/system/a.service": "TimeoutStopSec=45\n",
                "lib/system/a.service.d/20.conf": "TimeoutStopSec=20\n",
                "etc/system/a.service.d/10.conf": "TimeoutStopSec=10\n",
                "etc/system/a.service.d/30": "TimeoutStopSec=30\n",
            },
            20.0,
        ),
        (  # one of the same name hides the other, an empty value takes back
            {
                "etc/system/a.service": "TimeoutStopSec=45\n",
                "lib/system/a.service.d/20.conf": "TimeoutStopSec=20\n",
                "etc/system/a.service.d/20.conf": "TimeoutStopSec=\n",
                "etc/system.conf": "[Manager]\nDefaultTimeoutStopSec=15s\n",
                "etc/system.conf.d/x.conf": "[Manager]\nDefaultTimeoutStopSec=16s\n",
            },
            16.0,
        ),
        ({"lib/system/a.service": "\n", "lib/system/service.d/x.conf": "TimeoutSec=7\n"}, 7.0),
    ],
)
def test_the_files_are_read_as_systemd_reads_them(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    """The unit, then its drop-ins, then the manager's default."""
    assert timeout(tmp_path, "a.service", files) == expected


def test_an_instance_is_its_template_with_drop_ins_of_both(tmp_path: Path) -> None:
    """The instance's drop-in hides the template's of the same name."""
    files = {
        "lib/system/a@.service": "TimeoutStopSec=45\n",
        "lib/system/a@.service.d/1.conf": "TimeoutStopSec=1\n",
    }
    assert timeout(tmp_path, "a@x.service", files) == 1.0
    files["lib/system/a@x.service.d/1.conf"] = "TimeoutStopSec=2\n"
    assert timeout(tmp_path, "a@x.service", files) == 2.0
    assert timeout(tmp_path, "a@y.service", files) == 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45", 45.0),
        ("1min 30s", 90.0),
        ("1h2min3s", 3723.0),
        ("1.5 min", 90.0),
        ("250ms", 0.25),
        ("infinity", float("inf")),
        ("", None),
        ("soon", None),
        ("5 parsecs", None),
        ("-1", None),
    ],
)
def test_time_spans(text: str, seconds: float | None) -> None:
    """As systemd.time(7) has them; what is not understood is nothing."""
    assert time_span(text) == seconds


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/system.slice/supervisor.service\n", "supervisor.service"),
        ("0::/system.slice/system-supervisor.slice/supervisor@a.service\n", "supervisor@a.service"),
        ("0::/system.slice/docker.service/below\n", "docker.service"),
        ("12:pids:/user.slice\n1:name=systemd:/user.slice/session-3.scope\n0::/\n", ""),
        ("0::/../..\n", ""),
        ("", ""),
    ],
)
def test_the_service_of_a_control_group(cgroups: str, unit: str) -> None:
    """The innermost one."""
    assert unit_of(cgroups) == unit
