"""The agent's side of the watchdog: start it, beat, and say goodbye.

Either `async with Watchdog(...)` around the agent's work, or `await nursery.start(dog.run)` and
`dog.dismiss()` at the end. It beats from the event loop that answers dry guests, so a heartbeat
proves that this loop still runs.

Goodbye is said only after `dismiss`, or when the block comes to its end without an exception:
the guests that are left, if any, must not be armed then. After a crash or a cancellation the pipe
just closes, and the watchdog does what it was started for.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import trio

from host_agent.errors import AgentError

LOG = logging.getLogger("memballoon.watchdog")

WATCHDOG_FILE: Final = Path(__file__).with_name("watchdog.py")
GRACE_S: Final = 2.0
BEAT_INTERVAL_S: Final = 0.5
"""A quarter of the grace: three beats may be late before guests are released for nothing."""

START_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 5.0

MOST_RESTARTS: Final = 5
"""In a row; then something is wrong with this machine, and nobody must be held any more."""

RESTART_PAUSE_S: Final = 0.1
"""Before the second restart in a row; it doubles with each."""

STEADY_S: Final = 10.0
"""A watchdog that lived so long does not count as one that can't be started."""


OnDeath = Literal["release", "remove"]
"""What the watchdog does when the agent dies: free hung guests, or also clear everything away."""


class WatchdogLost(AgentError):
    """The watchdog does not start (any more): guests must not be armed without it."""

    kind = "watchdog-lost"


class Watchdog:
    """One watchdog process for one agent's root directory."""

    def __init__(
        self,
        root: Path,
        links: Path | None = None,
        *,
        on_death: OnDeath = "release",
        remove_paths: Sequence[Path] = (),
        grace_s: float = GRACE_S,
        beat_interval_s: float = BEAT_INTERVAL_S,
        on_released: Callable[[], None] | None = None,
    ) -> None:
        """`links`: a directory of links to guests' cgroups that need not be below the root.

        `grace_s`: how long dry guests wait for an agent that stands still, or the next one.

        `on_released` is called in the event loop when the watchdog may have released all guests.
        That is when the agent was stopped or stalled for `grace_s`, and when the watchdog has
        ended by itself and another one watches: arm them again there.
        """
        self._command = [
            *(sys.executable, "-I", "-S", str(WATCHDOG_FILE)),
            *("--root", str(root)),
            *("--grace-s", str(grace_s)),
            *("--on-death", on_death),
        ]
        if links is not None:
            self._command += ["--links", str(links)]
        for path in remove_paths:
            self._command += ["--remove-path", str(path)]
        self._beat_interval_s = beat_interval_s
        self._on_released = on_released
        self._dismissed = trio.Event()
        self._scope = trio.CancelScope()
        self.pid: int | None = None

    def dismiss(self) -> None:
        """No guest is armed any more: `run` says goodbye and returns."""
        self._dismissed.set()

    async def __aenter__(self) -> Self:
        """Start it; `run` goes on in the background of the block."""
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        try:
            await self._nursery.start(self._run_in_scope)
        except BaseException:
            await self._leave()
            raise
        # A block that is cancelled may take long to end its guests in order, and is not dead yet.
        self._scope.shield = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Goodbye if the block came to its end; if it failed or was cancelled, as if we died."""
        if kind is None:
            self.dismiss()
        else:
            self._scope.cancel()
        await self._leave()

    async def _run_in_scope(self, *, task_status: trio.TaskStatus[int]) -> None:
        with self._scope:
            await self.run(task_status=task_status)

    async def _leave(self) -> None:
        try:
            await self._manager.__aexit__(None, None, None)
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1 and isinstance(group.exceptions[0], WatchdogLost):
                raise group.exceptions[0] from None
            raise

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the process and beat until `dismiss`; started with the pid once it watches.

        A watchdog that ends by itself, or is killed, is started again. Raises WatchdogLost if the
        first does not start, or if MOST_RESTARTS in a row were in vain.
        """
        restarts = 0
        while True:
            started_s = trio.current_time()
            watches = False

            def ready(pid: int, is_first: bool = self.pid is None) -> None:
                nonlocal watches
                watches = True
                self.pid = pid
                if is_first:
                    task_status.started(pid)
                elif self._on_released is not None:
                    self._on_released()

            try:
                await self._watch_once(ready)
            except WatchdogLost as lost:
                if self.pid is None:
                    raise
                if watches and trio.current_time() - started_s > STEADY_S:
                    restarts = 0
                if restarts == MOST_RESTARTS:
                    raise
                LOG.warning("%s: it is started again", lost)
            else:
                return
            if restarts:
                await trio.sleep(RESTART_PAUSE_S * 2**restarts)
            restarts += 1

    async def _watch_once(self, ready: Callable[[int], None]) -> None:
        """One process, until `dismiss`. Raises WatchdogLost if it does not start, or ends."""
        try:
            process = await self._open_process()
        except OSError as error:
            raise WatchdogLost(f"the watchdog can't be started: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with trio.move_on_after(START_TIMEOUT_S) as starting:
                if await process.stdout.receive_some(64) != b"ready\n":
                    raise WatchdogLost("the watchdog did not start; what it said is on stderr")
            if starting.cancelled_caught:
                raise WatchdogLost(f"the watchdog was not ready after {START_TIMEOUT_S} s")
            ready(process.pid)
            await self._beat_and_listen(process.stdin, process.stdout)
        finally:
            await self._end(process)

    async def _open_process(self) -> trio.Process:
        return await trio.lowlevel.open_process(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a ^C at the terminal is for the agent alone
            env={"PATH": os.defpath},
            cwd="/",
        )

    async def _beat_and_listen(
        self, beats: trio.abc.SendStream, words: trio.abc.ReceiveStream
    ) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, words)
                await self._beat(beats)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if group.split(WatchdogLost)[1] is not None:
                raise  # a fault in `on_released`, or the agent is being cancelled
            raise WatchdogLost("the watchdog has ended") from group

    async def _beat(self, pipe: trio.abc.SendStream) -> None:
        try:
            while not self._dismissed.is_set():
                await pipe.send_all(b"\n")
                with trio.move_on_after(self._beat_interval_s):
                    await self._dismissed.wait()
        except trio.BrokenResourceError as broken:
            raise WatchdogLost("the watchdog does not read any more") from broken

    async def _listen(self, pipe: trio.abc.ReceiveStream) -> None:
        while said := await pipe.receive_some(4096):
            if b"released" in said:
                LOG.warning("this agent stood still: the watchdog had let all guests go")
                if self._on_released is not None:
                    self._on_released()
        raise WatchdogLost("the watchdog does not speak any more")

    async def _end(self, process: trio.Process) -> None:
        """Goodbye if dismissed, then close the pipe; the process ends by itself and is reaped.

        Without a goodbye it stays, until another agent has come or `grace_s` are over.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        with trio.CancelScope(shield=True):
            with trio.move_on_after(END_TIMEOUT_S):
                if self._dismissed.is_set():
                    with suppress(trio.BrokenResourceError):
                        await process.stdin.send_all(b"bye\n")
                await process.stdin.aclose()
                if self._dismissed.is_set():
                    await process.wait()
            process.poll()
            await process.stdout.aclose()
