"""Runs the plain loop (plain_loop.py) in a cgroup of its own, as often as it is asked."""

import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from subprocess import PIPE

import trio

from host_agent.agent import Agent
from host_agent.errors import AgentError
from host_agent.quota.cgroup_tree import remove_tree

PLAIN_LOOP = Path(__file__).with_name("plain_loop.py")
REMOVAL_DEADLINE_S = 10.0


class Yardstick:
    """A plain loop that waits for its turns."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._heard = b""

    async def turn(self) -> float:
        """Populate and lock the whole size once; seconds."""
        if self._process.stdin is None:
            raise AgentError("the plain loop has no input")
        await self._process.stdin.send_all(b"\n")
        return float(await self.line())

    async def line(self) -> bytes:
        """The next line that it prints."""
        while b"\n" not in self._heard:
            chunk = (
                b"" if self._process.stdout is None else await self._process.stdout.receive_some()
            )
            if not chunk:
                raise AgentError("the plain loop ended: it may not lock memory here")
            self._heard += chunk
        line, _, self._heard = self._heard.partition(b"\n")
        return line


@contextlib.asynccontextmanager
async def yardstick(agent: Agent, size_bytes: int, frame_bytes: int) -> AsyncIterator[Yardstick]:
    """A plain loop of this size and frame, in a cgroup of its own.

    It is below the agent's root, where the watchdog finds it if this process is killed; with
    neither part of a VM in it nobody takes it for one.
    """
    cgroup = agent.quotas.root / f"plain-{secrets.token_hex(4)}"
    try:
        cgroup.mkdir()
        procs = cgroup / "cgroup.procs"
        command = [sys.executable, str(PLAIN_LOOP), str(procs), str(size_bytes), str(frame_bytes)]
        process = await trio.lowlevel.open_process(command, stdin=PIPE, stdout=PIPE)
        try:
            loop = Yardstick(process)
            await loop.line()
            yield loop
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    finally:
        # In a thread, as it waits for the kernel to have taken down what was killed.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(
                remove_tree, cgroup, time.monotonic() + REMOVAL_DEADLINE_S
            )
