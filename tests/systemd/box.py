"""A real systemd for tests: this machine's own, booted as process 1 of new namespaces.

It sees `/` copy on write, and a /run, /tmp, /dev and /etc/systemd of its own; what it and its
services do is gone with it. It needs root, namespaces, overlayfs, cgroup2 and the package systemd.
"""

from __future__ import annotations

__all__ = ["Box", "missing", "refused", "shown"]

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from tests.supervised import DUE, REPO, children, wait_until

MANAGER = "/lib/systemd/systemd"
TIED = ("setpriv", "--pdeathsig", "KILL")  # whoever is killed takes the box along
USER, UID = "ackvisor", 61183  # below the range of systemd's dynamic users

# Its own mounts are in a namespace of its own; it waits for the box and removes its control group.
OUTER = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs $W
mkdir $W/root $W/up $W/work $W/cgroup
mount -t cgroup2 cgroup2 $W/cgroup
G=$W/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
[ -d "$G" ] || G=$W/cgroup
for old in "$G"/ackvisor-test-*; do # of boxes that were killed
  [ ! -d "$old" ] || [ -e "/proc/${old##*-}" ] || find "$old" -depth -type d -exec rmdir {} + || :
done
G=$G/ackvisor-test-$$
mkdir "$G"
(
  echo "$BASHPID" >"$G/cgroup.procs"
  exec setpriv --pdeathsig KILL \
    unshare --mount --pid --fork --kill-child --cgroup --uts --ipc --net \
    bash -c "$INNER" inner "$@"
) || :
for _ in $(seq 100); do
  find "$G" -depth -type d -exec rmdir {} + 2>/dev/null && exit 0
  [ -d "$G" ] || exit 0
  sleep 0.05
done
"""

# Process 1 before it becomes systemd; what it is called with is shown at the same place, read-only.
INNER = r"""
set -eu
R=$W/root
mount -t overlay -o lowerdir=/,upperdir=$W/up,workdir=$W/work overlay $R
mount -t proc -o nosuid,nodev,noexec proc $R/proc
for path in sys sysrq-trigger; do
  [ -e $R/proc/$path ] || continue
  mount --bind $R/proc/$path $R/proc/$path
  mount -o remount,bind,ro $R/proc/$path
done
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs $R/sys 2>/dev/null || {
  mount --bind /sys $R/sys
  mount -o remount,bind,ro $R/sys
}
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 $R/sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid tmpfs $R/dev
mknod -m 666 $R/dev/null c 1 3
mknod -m 666 $R/dev/zero c 1 5
mknod -m 666 $R/dev/full c 1 7
mknod -m 666 $R/dev/random c 1 8
mknod -m 666 $R/dev/urandom c 1 9
mknod -m 666 $R/dev/tty c 5 0
mknod -m 600 $R/dev/console c 1 3
ln -s /proc/self/fd $R/dev/fd
ln -s pts/ptmx $R/dev/ptmx
mkdir -m 755 $R/dev/pts $R/dev/mqueue
mkdir -m 1777 $R/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts $R/dev/pts
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs $R/run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs $R/tmp
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs $R/var/tmp
mount -t tmpfs -o mode=755 tmpfs $R/etc/systemd
mkdir -p $R/etc/systemd/system/sockets.target.wants $R/etc/systemd/system/sysinit.target.wants
units=/lib/systemd/system
for unit in systemd-journald.socket systemd-journald-dev-log.socket; do
  ln -s $units/$unit $R/etc/systemd/system/sockets.target.wants/
done
ln -s $units/systemd-journald.service $R/etc/systemd/system/sysinit.target.wants/
for unit in tmp.mount systemd-tmpfiles-setup.service systemd-journal-flush.service \
    systemd-udevd.service systemd-journald-audit.socket; do
  ln -s /dev/null $R/etc/systemd/system/$unit
done
printf '[Manager]\nDumpCore=no\nDefaultLimitCORE=0\n' >$R/etc/systemd/system.conf
printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\nReadKMsg=no\n' >$R/etc/systemd/journald.conf
for folder in $R/usr/lib/systemd/system/*.wants $R/usr/lib/systemd/*-generators; do
  mount -t tmpfs -o ro,mode=755 tmpfs "$folder"
done
rm -rf $R/etc/machine-id $R/etc/hostname $R/etc/fstab $R/var/lib/systemd $R/var/log/journal
mkdir -p $R/var/lib/systemd
tr -d - </proc/sys/kernel/random/uuid >$R/etc/machine-id
: >$R/etc/fstab
hostname box
for path; do
  mkdir -p "$R$path"
  mount --rbind "$path" "$R$path"
  mount -o remount,bind,ro "$R$path" 2>/dev/null || :
done
cd $R
mkdir .old
pivot_root . .old
cd /
umount -l /.old
mount --make-rshared /
bounds=-sys_module,-sys_rawio,-sys_time,-syslog,-mac_admin,-mac_override,-sys_boot
exec setpriv --bounding-set $bounds env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  container=other /lib/systemd/systemd --system --log-target=journal --unit=basic.target \
  </dev/null >/dev/null 2>&1
"""


def missing() -> str:
    """Return what a box needs and is not installed here; "" for nothing."""
    for program in (MANAGER, "systemctl", "journalctl", "unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


def refused() -> str:
    """Return why this process may not boot a box; "" where it may."""
    if os.geteuid() != 0:
        return "only root can boot a systemd in namespaces"
    mounts = "mount -t tmpfs tmpfs /mnt && mkdir /mnt/c && mount -t cgroup2 c /mnt/c"
    tried = subprocess.run(
        [
            "unshare",
            *["--mount", "--pid", "--fork", "--net", "--cgroup", "--uts", "--ipc", "sh", "-c"],
            mounts,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=DUE,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def shown() -> list[str]:
    """Return the folders that the product runs from, none of them inside another."""
    found: list[str] = []
    for path in sorted({str(REPO), sys.prefix, sys.base_prefix}):
        is_inside = any(path == each or path.startswith(f"{each}/") for each in found)
        if path != "/usr" and not is_inside:
            found.append(path)
    return found


def _hidden() -> str:
    """Return a folder that the box may cover for itself: nothing that it shows is in there."""
    folders = ("/mnt", "/media", "/srv")
    return next(each for each in folders if not any(p.startswith(f"{each}/") for p in shown()))


class Box:
    """One systemd. Use as a `with` block, which leaves nothing behind."""

    def __init__(self) -> None:
        self._outer: subprocess.Popen[bytes] | None = None
        self.pid = 0  # systemd's, as seen from outside

    def __enter__(self) -> Self:
        self._outer = subprocess.Popen(
            [*TIED, "unshare", "--mount", "bash", "-c", OUTER, "outer", *shown()],
            env={**os.environ, "INNER": INNER, "W": _hidden()},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            wait_until(self._is_booted, "systemd has booted")
            with self.path("/etc/passwd").open("a") as passwd:
                passwd.write(f"{USER}:x:{UID}:{UID}::/nonexistent:/usr/sbin/nologin\n")
            with self.path("/etc/group").open("a") as groups:
                groups.write(f"{USER}:x:{UID}:\n")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._outer is not None
        inside = self._process_1() if self._outer.poll() is None else 0
        if inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(inside, signal.SIGKILL)  # the kernel kills all the others with it
        try:
            self._outer.wait(DUE)
        finally:
            if self._outer.poll() is None:
                os.killpg(self._outer.pid, signal.SIGKILL)
                self._outer.wait(DUE)
            assert self._outer.stderr is not None
            self._outer.stderr.close()

    def _process_1(self) -> int:
        assert self._outer is not None
        unshare = next(iter(children(self._outer.pid)), 0)
        return next(iter(children(unshare)), 0) if unshare else 0

    def _is_booted(self) -> bool:
        assert self._outer is not None
        if self._outer.poll() is not None:
            assert self._outer.stderr is not None
            raise AssertionError(f"the box did not boot: {self._outer.stderr.read().decode()}")
        self.pid = self._process_1()
        if not self.pid or not os.path.exists(f"/proc/{self.pid}/root/run/systemd/private"):
            return False
        return self.run("systemctl", "is-active", "--quiet", "basic.target").returncode == 0

    def path(self, inside: str) -> Path:
        """Return where a file of the box is, seen from outside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the box, and the folders above it."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)

    def words(self, *words: str) -> list[str]:
        """Return the words of a command that runs in the box, as root."""
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd=/"]
        return ["nsenter", f"--target={self.pid}", *spaces, "--", *words]

    def run(self, *words: str, due: float = DUE) -> subprocess.CompletedProcess[str]:
        """Run a command in the box."""
        return subprocess.run(
            self.words(*words),
            capture_output=True,
            text=True,
            timeout=due,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER": "", "LANG": "C.UTF-8"},
        )

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return what `systemctl show` says of a unit."""
        done = self.run("systemctl", "show", unit, *(f"--property={each}" for each in properties))
        assert done.returncode == 0, done.stderr
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    def shows(self, unit: str, **wanted: str) -> dict[str, str]:
        """Wait until a unit has all of these properties, and return them."""
        seen: dict[str, str] = {}

        def has_come() -> bool:
            seen.update(self.show(unit, *wanted))
            return seen == wanted

        try:
            wait_until(has_come, "")
        except AssertionError:
            told = f"{unit}: {wanted} is wanted, and is {seen}\n{self.journal(unit)[-3000:]}"
            raise AssertionError(told) from None
        return seen

    def journal(self, unit: str) -> str:
        """Return what a unit and its manager have logged."""
        return self.run("journalctl", "--no-pager", "--output=short-precise", "-u", unit).stdout

    def entries(self, unit: str) -> list[dict[str, Any]]:
        """Return the entries of the journal that a unit's own processes have written."""
        import json

        done = self.run("journalctl", "--no-pager", "--output=json", f"_SYSTEMD_UNIT={unit}")
        return [json.loads(line) for line in done.stdout.splitlines()]
