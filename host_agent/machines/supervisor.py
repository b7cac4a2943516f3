"""Starting a mock VM's supervisor, and what is said with the scripts until the driver is theirs.

The agent's end of their descriptor 3 is a socket, the talk. When the init is ready, the talk
becomes the lifeline of the driver that the template has forked; or it is closed, and the init
starts a driver itself (init_script.py).
"""

import contextlib
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from host_agent.machines.base import MachineError, MachineSpec
from host_agent.machines.driver_template import DriverTemplate
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.init_script import Workshop
from host_agent.machines.log_tail import last_line
from host_agent.machines.syscall_filter import call_without_user_namespaces
from protocol.vocabulary import one_line

MAX_HEARD_BYTES: Final = 4096
"""What the scripts say in all: three short lines."""

SET_UP_DEADLINE_S: Final = 20.0
"""Setting up takes tens of milliseconds; a machine under memory pressure may be slow."""

READY: Final = b"\nready\n"


@dataclass(frozen=True, slots=True)
class DriverBirth:
    """How a mock VM's driver is forked, where that can be done."""

    template: DriverTemplate
    arguments: tuple[str, ...]
    """The driver's own, without those of a Python to run it."""
    driver_procs: Path


def birth_of(spec: MachineSpec, template: DriverTemplate | None) -> DriverBirth | None:
    """How a mock VM's driver is forked; None if it has to be started."""
    if template is None or not spec.driver_arguments:
        return None
    return DriverBirth(template, spec.driver_arguments, spec.driver_procs)


def start_supervisor(
    socket_dir: Path, log_path: Path, environment: Mapping[str, str], stdin: int
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start the script of the first stage, in a session of its own; with it comes the talk.

    `stdin` is as in subprocess.Popen. Raises OSError.
    """
    talk, theirs = socket.socketpair()
    with contextlib.ExitStack() as undo, theirs, log_path.open("ab") as log:
        undo.callback(talk.close)
        child = call_without_user_namespaces(
            lambda: subprocess.Popen(
                ("/bin/sh", str(Workshop.of(socket_dir).supervise_file)),
                bufsize=0,
                stdin=stdin,
                stdout=theirs.fileno(),
                stderr=log.fileno(),
                cwd="/",
                env=dict(environment),
                start_new_session=True,
            )
        )
        undo.pop_all()
    return child, talk


async def set_up(
    talk: socket.socket, what: str, log_path: Path, birth: DriverBirth | None
) -> ProcessHandle:
    """Talk until the init is ready and has a driver, or is to start one; the init.

    The talk is over then. `what` is set up, for an error's line. Raises MachineError.
    """
    with talk, contextlib.ExitStack() as undo:
        try:
            with trio.fail_after(SET_UP_DEADLINE_S):
                init = await _hear_init(talk, what, log_path)
        except trio.TooSlowError:
            raise MachineError(f"{what} was not set up in {SET_UP_DEADLINE_S:g} s") from None
        undo.callback(init.close)
        if birth is not None and await birth.template.fork(
            birth.arguments, init, birth.driver_procs, log_path, talk
        ):
            with contextlib.suppress(BrokenPipeError):
                talk.send(b"forked\n")
        undo.pop_all()
    return init


async def _hear_init(talk: socket.socket, what: str, log_path: Path) -> ProcessHandle:
    """Talk with setup until the init is ready; the init.

    Setup tells its pid and waits: so the pid is surely its own when it is opened here, however
    soon it ends. Raises MachineError with what setup said, or the last line of the log.
    """
    init: ProcessHandle | None = None
    text = b""
    stream = trio.socket.from_stdlib_socket(talk)
    with contextlib.ExitStack() as undo:
        while not text.endswith(READY) and len(text) <= MAX_HEARD_BYTES:
            more = await stream.recv(MAX_HEARD_BYTES)
            if not more:
                break
            text += more
            if init is None and text.startswith(b"pid ") and text.endswith(b"\n"):
                with contextlib.suppress(ProcessLookupError, BrokenPipeError):
                    init = ProcessHandle.of(int(text.split()[1]))
                    undo.callback(init.close)
                    await stream.send(b"go\n")
        if init is None or not text.endswith(READY):
            _, failed, why = text.decode(errors="replace").partition("failed ")
            reason = one_line(why.strip()) if failed else last_line(log_path)
            raise MachineError(f"{what} can't be started: {reason}")
        undo.pop_all()
    return init
