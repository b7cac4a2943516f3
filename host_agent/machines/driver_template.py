"""The driver template: one process of the agent's, from which the drivers of its mock VMs are
forked in milliseconds, instead of each starting a Python and importing the same half a second long.

What it does when it is asked is in guest_driver/template.py, which this only knows as a command
line. It has the rights that entering a mock VM's namespaces takes and no others, and it ends with
the agent, however that ends: its socket does.

Nothing depends on it. A driver that it did not make, or made in vain, is started by its VM's own
process 1, which has the other end of the lifeline (init_script.py): so all that a lost template
costs is time, and one line in the log.
"""

import array
import logging
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from host_agent.machines.environment import ENVIRONMENT
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.syscall_filter import call_without_user_namespaces
from protocol.vocabulary import one_line

LOG = logging.getLogger("memballoon.template")

RIGHTS: Final = (
    *("setpriv", "--inh-caps=-all", "--ambient-caps=-all", "--clear-groups", "--no-new-privs"),
    # To enter namespaces, to give up rights, and what a driver keeps.
    "--bounding-set=-all,+sys_admin,+sys_chroot,+setpcap,+ipc_lock",
    "--",
)

ANSWER_DEADLINE_S: Final = 30.0
"""A fork takes milliseconds; but the first request may come while it still imports, on a machine
that is busy."""

ANSWER_BYTES: Final = 4096
FORKED: Final = b"forked"

FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 60.0
STEADY_S: Final = 10.0
"""One that lived so long is started again as if it were the first."""


class DriverTemplate:
    """One agent's template. `run` keeps it running from when it is first wanted."""

    def __init__(self, command: Sequence[str]) -> None:
        """`command` is a Python that has guest_driver/template.py."""
        self._command = (*RIGHTS, *command)
        self._wanted = trio.Event()
        self._asking = trio.Lock()
        self._requests: trio.socket.SocketType | None = None
        self._process: ProcessHandle | None = None

    @property
    def pid(self) -> int | None:
        """The template's; None while there is none."""
        return None if self._process is None else self._process.pid

    def want(self) -> None:
        """There will be drivers: from now on it is worth its memory."""
        self._wanted.set()

    async def run(self) -> None:
        """Keep a template running until cancelled; nothing is left of it then."""
        await self._wanted.wait()
        pause_s = FIRST_PAUSE_S
        while True:
            began_s = trio.current_time()
            try:
                await self._live()
                why = "it ended"
            except OSError as error:
                why = str(error)
            if trio.current_time() - began_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            if pause_s == FIRST_PAUSE_S:
                LOG.warning("no driver template (%s): drivers start by themselves, slower", why)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    async def fork(
        self,
        arguments: Sequence[str],
        init: ProcessHandle,
        driver_procs: Path,
        log_path: Path,
        lifeline: socket.socket,
    ) -> bool:
        """Have a driver forked into the namespaces of `init` and the cgroup of `driver_procs`.

        `lifeline` is open as long as the driver runs, once the caller has closed it. False if there
        is no template, or it failed: then the driver has to be started some other way.
        """
        message = "".join(f"{argument}\0" for argument in arguments).encode()
        # Answers come in the order of the requests; so one that was sent is waited for.
        async with self._asking:
            if self._requests is None:
                return False
            answer = b""
            with trio.CancelScope(shield=True), trio.move_on_after(ANSWER_DEADLINE_S) as scope:
                try:
                    answer = await _ask(
                        self._requests, message, init, driver_procs, log_path, lifeline
                    )
                except (OSError, trio.ClosedResourceError) as error:
                    LOG.debug("the driver template is gone: %s", error)
            if scope.cancelled_caught and self._process is not None:
                LOG.warning("the driver template has not answered in %g s", ANSWER_DEADLINE_S)
                self._process.send(signal.SIGKILL)
        if answer not in (b"", FORKED):
            LOG.warning("the driver template: %s", one_line(answer.decode(errors="replace")))
        return answer == FORKED

    async def _live(self) -> None:
        """The life of one template. Raises OSError if it can't be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                child = await trio.to_thread.run_sync(self._spawn, theirs)
            process, requests = ProcessHandle.of(child.pid), trio.socket.from_stdlib_socket(ours)
            try:
                self._process, self._requests = process, requests
                await process.wait_ended()
            finally:
                self._process = self._requests = None
                child.kill()
                requests.close()  # who waits for an answer is told
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(child.wait)
                process.close()

    def _spawn(self, requests: socket.socket) -> "subprocess.Popen[bytes]":
        return call_without_user_namespaces(
            lambda: subprocess.Popen(
                self._command,
                stdin=requests.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        )


async def _ask(
    requests: trio.socket.SocketType,
    message: bytes,
    init: ProcessHandle,
    driver_procs: Path,
    log_path: Path,
    lifeline: socket.socket,
) -> bytes:
    """The template's answer; empty if it has ended. Raises OSError."""
    with driver_procs.open("wb", buffering=0) as procs, log_path.open("ab") as log:
        fds = array.array("i", (init.fileno(), procs.fileno(), log.fileno(), lifeline.fileno()))
        await requests.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    return await requests.recv(ANSWER_BYTES)
