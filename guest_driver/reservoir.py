"""The driver's trio side of the pseudo-process: frames in, outcomes out.

The reservoir splits frame lists into commands, keeps a few of them under way at once so that both
of the pseudo-process's workers have something to do, and matches replies by their id. It knows what
a command is; why frames are reserved or dropped is the balloon's business.

Errors, for the caller of `reserve` and `release`:

    ReservoirError
    ├── NoRoom              the kernel had no page: nothing was reserved
    ├── PseudoProcessDied   it ended by itself: every frame is the guest's again
    └── ReservoirClosed     you closed it, or cancelled `run`
"""

import errno
import itertools
import math
import os
import signal
from contextlib import suppress

import trio

from guest_driver.frame_states import FrameState, FrameStates
from guest_driver.pseudo_process import (
    COMMAND,
    NO_BUFFER_WAIT_S,
    RELEASE,
    REPLY,
    RESERVE,
    PseudoProcess,
)
from protocol.page_frames import PageFrames

COMMAND_PAGES = {0: 4096, 9: 8192}
"""Pages of one command by frame order: 16 and 32 MiB, 3 to 6 ms each. Small enough to stop soon,
large enough that the round trip (0.1 ms) does not show."""

RESERVES_UNDER_WAY = 4
"""Two for each worker, so that none waits for the driver; the other callers' commands pass soon."""

REAP_TIMEOUT_S = 10.0
"""A killed process with a large arena takes a while (0.1 s a GiB) to be gone."""


class ReservoirError(Exception):
    """Base of the errors above."""


class NoRoom(ReservoirError):
    """The kernel had no page for a reservation; everything that it had given was given back."""

    def __init__(self, code: int) -> None:
        super().__init__(f"no room for the frames: {errno.errorcode.get(code, code)}")
        self.code = code


class PseudoProcessDied(ReservoirError):
    """The pseudo-process ended by itself. `exit_code` is negative for a signal, None if unknown."""

    def __init__(self, exit_code: int | None) -> None:
        reason = "for a reason unknown" if exit_code is None else f"with exit code {exit_code}"
        if exit_code == -signal.SIGKILL:
            reason = "by SIGKILL (the kernel's OOM killer takes it first)"
        elif exit_code is not None and exit_code < 0:
            reason = f"by signal {-exit_code}"
        super().__init__(f"the pseudo-process ended {reason}")
        self.exit_code = exit_code


class ReservoirClosed(ReservoirError):
    """The reservoir was closed, or its `run` cancelled, before or while you used it."""

    def __init__(self) -> None:
        super().__init__("the reservoir is closed")


class _Request:
    """A command under way. `undo` is set before `done` when its success was not wanted any more."""

    __slots__ = ("code", "done", "frames", "operation", "undo", "unwanted")

    def __init__(self, operation: int, frames: PageFrames) -> None:
        self.operation = operation
        self.frames = frames
        self.done = trio.Event()
        self.code: int | None = None
        """None: no reply (yet). 0: success, else errno."""
        self.unwanted = False
        self.undo: _Request | None = None


class Reservoir:
    """The balloon's frames. Takes over `process` and its shared states; `aclose` ends both.

    Start `run` in a nursery first. Any number of tasks may use it at once, for frames that don't
    overlap. A cancelled call leaves nothing half done: see each of them.
    """

    def __init__(self, process: PseudoProcess) -> None:
        self._process = process
        self.states = FrameStates(process.states)
        self.busy_s = 0.0
        """Seconds that the pseudo-process's workers spent on commands so far, all in all."""
        self._requests: dict[int, _Request] = {}
        self._ids = itertools.count(1)
        self._slots = trio.Semaphore(RESERVES_UNDER_WAY)
        self._outbox, self._to_send = trio.open_memory_channel[bytes](math.inf)
        self._failure: ReservoirError | None = None
        self._closing = False

    @property
    def frame_order(self) -> int:
        """Order of the arena's frames, 0 or 9."""
        return self._process.frame_order

    @property
    def is_busy(self) -> bool:
        """Commands are under way, those of cancelled calls included. Never once it is over."""
        return bool(self._requests)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry commands and replies. Returns after `aclose`; raises PseudoProcessDied.

        However it ends, whoever waits in `reserve` or `release` is woken with the error.
        """
        self._process.connection.setblocking(False)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_commands)
                task_status.started()
                await self._receive_replies()
                nursery.cancel_scope.cancel()
            if not self._closing:
                with trio.move_on_after(REAP_TIMEOUT_S):
                    await self._wait_ended()
                    self._process.reap()
                self._failure = PseudoProcessDied(self._process.exit_code)
                raise self._failure
        finally:
            self._fail_all(self._failure or ReservoirClosed())

    async def reserve(self, frames: PageFrames, frame_order: int) -> None:
        """Populate and lock `frames`, all FREE; they are RESERVED afterwards, or all FREE again.

        Raises NoRoom when the kernel had no page for one of them (after all were given back),
        ValueError for frames that are not FREE, outside the arena, or not of the arena's order.
        Cancelled, it returns at once and gives back behind your back what was populated; until
        then these frames are PENDING or RESERVED, so nobody else is offered them.
        """
        self._require(frames, FrameState.FREE)
        if frame_order != self.frame_order:
            raise ValueError(f"frames of order {frame_order} in an arena of {self.frame_order}")
        self.states.mark(frames, FrameState.PENDING)
        requests: list[_Request] = []
        chunks = list(frames.chunks(COMMAND_PAGES[self.frame_order]))
        try:
            for chunk in chunks:
                await self._slots.acquire()
                if self._failure is not None or any(request.code for request in requests):
                    self._slots.release()
                    break
                requests.append(self._submit(RESERVE, chunk, FrameState.RESERVED))
            for request in requests:
                await request.done.wait()
        finally:
            # Also when cancelled; nothing here waits.
            done = sum(request.code == 0 for request in requests)
            if done < len(chunks):
                self._take_back(requests, chunks[len(requests) :])
        if done == len(chunks):
            return
        for request in requests:
            await request.done.wait()
            if request.undo is not None:
                await request.undo.done.wait()
        if self._failure is not None:
            raise self._failure
        raise NoRoom(next(request.code for request in requests if request.code))

    async def release(self, frames: PageFrames, state: FrameState) -> None:
        """Drop the physical pages of `frames`, all RESERVED or REPORTED.

        They are in `state`, FREE or CLAIMED, when this returns. Raises ValueError for other frames
        or states. Cancelled, it returns at once and the frames are dropped all the same.
        """
        if state not in (FrameState.FREE, FrameState.CLAIMED):
            raise ValueError(f"a frame can't be dropped into {state.name}")
        self._require(frames, FrameState.RESERVED, FrameState.REPORTED)
        self.states.mark(frames, FrameState.PENDING)
        chunks = frames.chunks(COMMAND_PAGES[self.frame_order])
        requests = [self._submit(RELEASE, chunk, state) for chunk in chunks]
        for request in requests:
            await request.done.wait()
        if any(request.code is None for request in requests):
            raise self._failure or ReservoirClosed()

    async def aclose(self) -> None:
        """End the pseudo-process, reap it and unmap the states. Idempotent.

        Not cancelled by the caller's scope, so that no zombie is left; bounded by REAP_TIMEOUT_S.
        """
        self._closing = True
        self._process.kill()
        with trio.move_on_after(REAP_TIMEOUT_S) as scope:
            scope.shield = True
            await self._wait_ended()
        if scope.cancelled_caught:
            raise ReservoirError(f"pid {self._process.pid} outlives SIGKILL")
        if self._process.connection.fileno() >= 0:
            trio.lowlevel.notify_closing(self._process.connection)
        self._process.stop()
        self._fail_all(ReservoirClosed())
        self.states.close()

    async def _wait_ended(self) -> None:
        if self._process.exit_code is not None:
            return
        # A copy: trio lets one task wait for a descriptor, and `run` and `aclose` both may.
        pidfd = os.dup(self._process.pidfd)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def _require(self, frames: PageFrames, *states: FrameState) -> None:
        if self._failure is not None:
            raise self._failure
        if not self.states.all_in(frames, *states):
            wanted = " or ".join(state.name for state in states)
            raise ValueError(f"{frames!r}: not all of these frames are {wanted}")
        frame_pages = 1 << self.frame_order
        if (frames.starts % frame_pages).any() or (frames.counts % frame_pages).any():
            raise ValueError(f"{frames!r}: these are no whole frames of order {self.frame_order}")

    def _submit(self, operation: int, frames: PageFrames, new_state: FrameState) -> _Request:
        request_id = next(self._ids)
        request = _Request(operation, frames)
        self._requests[request_id] = request
        self._outbox.send_nowait(COMMAND.pack(request_id, operation, new_state) + frames.to_wire())
        return request

    def _take_back(self, requests: list[_Request], unasked: list[PageFrames]) -> None:
        """Undo a reservation that was asked for in `requests`, and not yet for `unasked`."""
        if self._failure is not None:
            return
        for chunk in unasked:
            self.states.mark(chunk, FrameState.FREE)
        for request in requests:
            request.unwanted = True
            if request.code == 0:
                self._undo(request)

    def _undo(self, request: _Request) -> None:
        self.states.mark(request.frames, FrameState.PENDING)
        request.undo = self._submit(RELEASE, request.frames, FrameState.FREE)

    async def _send_commands(self) -> None:
        """Until cancelled, or the connection ends: the receiving side sees that too, and tells."""
        connection = self._process.connection
        async for command in self._to_send:
            sent = False
            while not sent:
                if connection.fileno() < 0:
                    return
                try:
                    connection.send(command)
                    sent = True
                except BlockingIOError:
                    with suppress(trio.ClosedResourceError):
                        await trio.lowlevel.wait_writable(connection)
                except (BrokenPipeError, ConnectionResetError):
                    return
                except OSError as error:
                    # The message's buffer is charged to the driver's cgroup: at its limit there
                    # is none, and nothing to wait for but the host.
                    if error.errno != errno.ENOBUFS:
                        raise
                    await trio.sleep(NO_BUFFER_WAIT_S)

    async def _receive_replies(self) -> None:
        """Until the pseudo-process has ended, or `aclose` was called."""
        while True:
            try:
                reply = self._process.connection.recv(REPLY.size)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._process.connection)
                except trio.ClosedResourceError:
                    return
                continue
            except OSError:
                return  # reset (it died with commands unread) or closed by `aclose`
            if not reply:
                return
            request_id, code, _, busy_s = REPLY.unpack(reply)
            self.busy_s += busy_s
            self._settle(self._requests.pop(request_id), code)

    def _settle(self, request: _Request, code: int) -> None:
        request.code = code
        if request.operation == RESERVE:
            self._slots.release()
            if code == 0 and request.unwanted:
                self._undo(request)
        request.done.set()

    def _fail_all(self, failure: ReservoirError) -> None:
        """Wake everybody with `failure`; their requests keep the code None."""
        self._failure = self._failure or failure
        requests, self._requests = self._requests, {}
        for request in requests.values():
            if request.operation == RESERVE:
                # Whoever waits for a slot gets one in turn, sees the failure and passes it on.
                self._slots.release()
            request.done.set()
