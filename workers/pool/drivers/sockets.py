"""What the drivers whose sockets are Python's do with a descriptor. Linux.

A descriptor's number may belong to somebody else by the time that another thread uses it, so a
connection remembers its socket by the inode, and nothing is done to any other.
"""

from __future__ import annotations

__all__ = ["identity", "is_silent", "keep_alive", "last_words", "null", "shut_down"]

import os
import select
import socket

# A peer that has vanished without a word is noticed after a minute, not after the two hours of the
# kernel's default.
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)


def identity(sock: socket.socket) -> int:
    """Return what tells this socket from every other one that is open."""
    return os.fstat(sock.fileno()).st_ino


def is_silent(sock: socket.socket) -> bool:
    """Whether there is nothing to read, the end of the connection included. Does not block."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return not poll.poll(0)


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel look after the peer, where it is TCP."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def last_words(sock: socket.socket) -> str:
    """Return what a peer that has hung up has said before; "" where it has said nothing."""
    try:
        return sock.recv(1000, socket.MSG_DONTWAIT).decode(errors="replace").strip()
    except OSError:
        return ""


def shut_down(fd: int, inode: int | None) -> None:
    """End the connection under whoever is blocked on it, from any thread.

    Raises:
        OSError: it is closed already.
    """
    # By a duplicate, so that its owner's close cannot hand the number to somebody else meanwhile;
    # by the kernel, because TLS would want to say good-bye first.
    with socket.socket(fileno=os.dup(fd)) as copy:
        if os.fstat(copy.fileno()).st_ino == inode:
            copy.shutdown(socket.SHUT_RDWR)


def null(fd: int) -> None:
    """Put /dev/null in the place of a socket that a fork's child has inherited.

    Whatever the child does to the connection then, closing it included, the parent's session hears
    nothing of it. Its number stays taken, so that it hits nobody else either.
    """
    blackhole = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(blackhole, fd, inheritable=False)
    finally:
        os.close(blackhole)
