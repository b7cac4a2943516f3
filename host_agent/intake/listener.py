"""A guest's private socket: who may speak on it, and the greeting.

There is one socket for each guest, in a directory that is mounted into that guest alone. Who is on
the other end is decided by the kernel: the peer's pid (SO_PEERCRED) must be in the guest's driver
cgroup. What a Hello says of itself is used to find things, never to believe them.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import trio

from host_agent.audit.frames import FrameAuditor
from host_agent.guest import Guest
from host_agent.machines.identity import ProcessHandle, pid_inside, start_ticks_of
from host_agent.quota.base import Part
from protocol.channel import Channel
from protocol.connection import Connection
from protocol.errors import ChannelBroken, ChannelError
from protocol.messages import Goodbye, Hello, Message
from protocol.vocabulary import Role, one_line

LOG = logging.getLogger("memballoon.intake")

SOCKET_NAME: Final = "channel.sock"

BACKLOG: Final = 4
"""One driver connects, perhaps again before its old connection is noticed to be dead."""

GREETING_DEADLINE_S: Final = 10.0
"""A driver says Hello right after connecting; a silent peer only holds a connection."""

FAREWELL_DEADLINE_S: Final = 1.0
"""The Goodbye to a guest at fault is a courtesy: it must not hold anything up."""

_UCRED: Final = struct.Struct("3i")
_FD: Final = struct.Struct("i")

_SO_PEERPIDFD: Final = 77
"""Linux 6.5 (include/uapi/asm-generic/socket.h); Python's socket module has no name for it."""


class HelloRefused(Exception):
    """The greeting does not fit this guest; the message says why."""


@contextlib.asynccontextmanager
async def guest_socket(directory: Path) -> AsyncIterator[trio.SocketListener]:
    """Listen on the private socket in `directory`, which is the guest's alone.

    A socket that an earlier agent left is replaced; at the end it is removed. Mode 0600: a mock
    VM's driver is root in there.
    """
    path = directory / SOCKET_NAME
    path.unlink(missing_ok=True)
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(BACKLOG)
        yield trio.SocketListener(listening)
    finally:
        listening.close()
        path.unlink(missing_ok=True)


def peer_pid(stream: trio.SocketStream) -> int:
    """Host pid of the process that connected; 0 if it is in no pid namespace below ours."""
    raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, _uid, _gid = _UCRED.unpack(raw)
    return int(pid)


def peer_process(stream: trio.SocketStream, pid: int) -> ProcessHandle:
    """The process that connected, whose `peer_pid` is `pid`; the caller closes it.

    Of a kernel before 6.5, which remembers no more than the pid, the process that has it now.
    Raises ProcessLookupError if it has ended.
    """
    try:
        raw = stream.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _FD.size)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return ProcessHandle.of(pid)
        raise ProcessLookupError(f"pid {pid} has ended") from error
    (pidfd,) = _FD.unpack(raw)
    try:
        handle = ProcessHandle(pid, start_ticks_of(pid), pidfd)
    except BaseException:
        os.close(pidfd)
        raise
    if not handle.is_alive():
        handle.close()
        raise ProcessLookupError(f"pid {pid} has ended")
    return handle


def is_driver_of(guest: Guest, pid: int) -> bool:
    """Whether the kernel has this process in the guest's driver cgroup."""
    return pid in guest.live_quota.processes(Part.DRIVER)


def open_auditor(guest: Guest, hello: Hello) -> FrameAuditor:
    """The eyes on the pseudo-process that this Hello names, once it has been found to be there.

    Blocks for a few file reads. Raises HelloRefused if the arena does not fit the guest or no
    process of its driver cgroup has that pid in its own namespace.
    """
    if hello.arena_pages != guest.assigned_pages:
        raise HelloRefused(
            f"its arena has {hello.arena_pages} pages, the guest {guest.assigned_pages}"
        )
    if hello.frame_order != guest.spec.frame_order:
        raise HelloRefused(f"its frames have order {hello.frame_order}")
    quota = guest.live_quota
    for pid in quota.processes(Part.DRIVER):
        if pid_inside(pid) == hello.pseudo_process_pid:
            try:
                return FrameAuditor(
                    pid=pid,
                    arena_address=hello.arena_address,
                    arena_pages=hello.arena_pages,
                    driver_cgroup_inode=quota.driver_inode(),
                )
            except ValueError as error:  # an arena that can't be
                raise HelloRefused(str(error)) from error
    raise HelloRefused(f"no process of its driver has pid {hello.pseudo_process_pid}")


async def receive_hello(channel: Channel) -> Hello:
    """The greeting that opens a conversation, or opens it again after a Reset.

    Raises ChannelError when the peer goes or breaks the protocol, HelloRefused when it says
    nothing for `GREETING_DEADLINE_S`.
    """
    message: Message | None = None
    with trio.move_on_after(GREETING_DEADLINE_S):
        message = await channel.receive()
    if isinstance(message, Goodbye):
        raise ChannelBroken(f"the driver said goodbye: {message.reason}")
    if not isinstance(message, Hello):
        raise HelloRefused("it did not say hello")
    return message


async def say_goodbye(channel: Channel, reason: str) -> None:
    """Tell the guest why its connection ends, if it still listens."""
    with trio.move_on_after(FAREWELL_DEADLINE_S) as scope:
        scope.shield = True
        with contextlib.suppress(ChannelError):
            await channel.send(Goodbye(one_line(reason)))


def new_channel(stream: trio.SocketStream) -> Channel:
    """The host's end of a conversation on `stream`."""
    return Channel(stream, Connection(Role.HOST))
