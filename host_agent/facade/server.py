"""An ASGI application on a private Unix socket.

Owns the socket's file: made with mode 0600 before anybody can connect, refused when a living agent
answers there, replaced when it is a dead one's, removed at the end if it is still this server's.
Knows nothing of what is served.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve as serve_asgi

from host_agent.errors import BadRequest, MissingRight, SocketInUse

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE_S: Final = 2.0
"""How long requests in progress may go on when the server is cancelled."""

MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path of unix(7), without its closing NUL."""

_BACKLOG: Final = 64
_LOG: Final = logging.getLogger("memballoon.control")


async def serve(
    app: "FastAPI",
    socket_path: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` at `socket_path` until cancelled; started once the socket accepts.

    On cancellation no new connection is taken, requests in progress have GRACE_S to end, and the
    socket's file is removed.

    Raises:
        SocketInUse: a living server answers there.
        BadRequest: the path is too long, or something there is no socket.
        MissingRight: the socket can't be made there.
    """
    with _listening(socket_path) as listener:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_set_when_cancelled, stop)
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as server:
                    await server.start(_serve_on, app, listener, stop)
                    task_status.started()
            nursery.cancel_scope.cancel()


async def _set_when_cancelled(stop: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


async def _serve_on(
    app: "FastAPI",
    listener: socket.socket,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    descriptor = listener.detach()  # the ASGI server closes it
    config = ServerConfig()
    config.bind = [f"fd://{descriptor}"]
    config.backlog = _BACKLOG
    config.accesslog = None
    config.errorlog = _LOG
    _LOG.setLevel(logging.WARNING)  # the ASGI server's greeting is no news to the agent's log
    config.graceful_timeout = GRACE_S
    config.include_server_header = False
    application: Any = app
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_asgi, application, config, shutdown_trigger=stop.wait))
        # The ASGI server marks it inheritable, for worker processes that it doesn't have here;
        # a mock VM must not inherit it.
        os.set_inheritable(descriptor, False)
        task_status.started()


@contextmanager
def _listening(socket_path: Path) -> Iterator[socket.socket]:
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
        raise BadRequest(
            f"{socket_path}: longer than the {MAX_SOCKET_PATH_BYTES} bytes of a socket's path",
            what_to_do="choose a shorter --run-dir",
        )
    try:
        socket_path.parent.mkdir(parents=True, exist_ok=True)
        listener = _bind(socket_path)
    except PermissionError as error:
        raise MissingRight(f"{socket_path}: {error.strerror}", what_to_do="run as root") from error
    except OSError as error:
        raise BadRequest(f"{socket_path}: {error.strerror}") from error
    inode = socket_path.lstat().st_ino
    try:
        yield listener
    finally:
        listener.close()
        # Somebody may have removed ours and put theirs in its place.
        try:
            if socket_path.lstat().st_ino == inode:
                socket_path.unlink()
        except FileNotFoundError:
            pass


def _bind(socket_path: Path) -> socket.socket:
    # The lock is held only while the file changes hands: two agents that start at once must not
    # each take the other's new socket for a stale one. The kernel drops it with its holder.
    with _locked(socket_path.parent):
        _remove_stale(socket_path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(socket_path))
            # Nobody can connect before listen(), so there is no moment with a wider mode.
            socket_path.chmod(0o600)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        return listener


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(socket_path: Path) -> None:
    try:
        mode = socket_path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadRequest(f"{socket_path} is there and is no socket", what_to_do="remove it")
    if is_answered(socket_path):
        raise SocketInUse(socket_path)
    socket_path.unlink()


def is_answered(socket_path: Path) -> bool:
    """Whether a process listens at `socket_path`, also one too busy to accept now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(socket_path))
        except BlockingIOError:
            return True  # its backlog is full
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return False
            raise
        return True
