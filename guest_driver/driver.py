"""The balloon driver: the trio shell between the channel, the balloon's decisions and the frames.

It connects out to the host's private socket, with bounded back-off, and listens on nothing. What
it gives is decided in balloon.py from the guest's own view of its memory; what it holds stands in
the frame states that it shares with the pseudo-process. Claimed frames outlive any connection; what
was only reserved is released when the connection ends. When the pseudo-process dies, the frames
are gone with it, so the driver ends as well and the guest's init starts a new one, which learns
from the Welcome what the host holds.
"""

import contextlib
import logging
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from guest_driver.activity import ActivitySampler, Touched, active_fraction, pause_s
from guest_driver.balloon import Decision, Wish, decide, most_to_give_bytes
from guest_driver.demand import DemandEstimate, next_estimate
from guest_driver.frame_states import FrameState
from guest_driver.pseudo_process import PseudoProcess
from guest_driver.reservoir import NoRoom, PseudoProcessDied, Reservoir, ReservoirClosed
from guest_driver.vitals import WORKLOAD_NAME, GuestMemory, VitalsReader
from protocol.channel import Channel
from protocol.connection import Connection
from protocol.errors import ChannelError
from protocol.messages import (
    Claim,
    Decline,
    Dropped,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Reset,
    Return,
    Target,
    Vitals,
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of, pages_of
from protocol.vocabulary import (
    OLDEST_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    SUPPORTED_FEATURES,
    RefusalReason,
    Role,
    one_line,
)

LOG = logging.getLogger("memballoon.driver")

SOFTWARE: Final = "memballoon guest driver"

FIRST_BACKOFF_S: Final = 0.05
LONGEST_BACKOFF_S: Final = 2.0
"""An agent that restarts is found again within two seconds; until then nobody can ask anyway."""

WELCOME_DEADLINE_S: Final = 10.0

FAREWELL_DEADLINE_S: Final = 0.5
"""The Goodbye is a courtesy: a host that does not read must not hold the end up."""

REPORT_PAGES: Final = {0: pages_of(32 * MIB), 9: pages_of(128 * MIB)}
"""Pages of one report by frame order: 7 to 15 ms of reserving, so that the host verifies one
report while the next is being reserved, and the last one is not waited for long."""

REPORTS_UNDER_WAY: Final = 2
"""Reports reserved at once: the pseudo-process is never without work between two of them."""


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """What a driver is started with."""

    socket_path: str
    cgroup_path: str
    assigned_pages: int


class Driver:
    """One guest's balloon driver. `run` is all of its life."""

    def __init__(self, config: DriverConfig, process: PseudoProcess) -> None:
        self._config = config
        self._process = process
        self._reservoir = Reservoir(process)
        self._vitals = VitalsReader(config.cgroup_path)
        self._memory = GuestMemory()
        self._estimate: DemandEstimate | None = None
        self._activity = ActivitySampler(Path(config.cgroup_path) / WORKLOAD_NAME)
        self._touched: Touched | None = None

    async def run(self) -> None:
        """Drive the balloon until SIGTERM or SIGINT. Raises PseudoProcessDied."""
        with self._vitals:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._reservoir.run)
                    nursery.start_soon(self._stop_on_signal, nursery.cancel_scope)
                    nursery.start_soon(self._sample_activity)
                    await self._keep_connected()
            finally:
                await self._reservoir.aclose()

    async def _stop_on_signal(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                scope.cancel()
                return

    async def _keep_connected(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                stream = await trio.open_unix_socket(self._config.socket_path)
            except OSError as error:
                LOG.debug("no connection: %s", error)
            else:
                async with Channel(stream, Connection(Role.GUEST)) as channel:
                    conversation = Conversation(self._config, self._process, self._reservoir, self)
                    try:
                        await conversation.run(channel)
                    except* ChannelError as errors:
                        LOG.info("the connection ended: %s", errors.exceptions[0])
                    finally:
                        await self.release_unclaimed()
                if conversation.was_welcome:
                    backoff_s = FIRST_BACKOFF_S
            await trio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)

    async def release_unclaimed(self) -> None:
        """Whatever the host has not claimed is the guest's again."""
        with trio.CancelScope(shield=True):
            states = self._reservoir.states
            # A command that is under way ends within milliseconds, in one state or the other. Not
            # by the states: what was PENDING when the pseudo-process died stays so for ever.
            while self._reservoir.is_busy:
                await trio.sleep(0.001)
            for state in (FrameState.RESERVED, FrameState.REPORTED):
                frames = states.frames_in(state)
                if frames:
                    with contextlib.suppress(PseudoProcessDied, ReservoirClosed):
                        await self._reservoir.release(frames, FrameState.FREE)

    # The guest's own view

    async def _sample_activity(self) -> None:
        while True:
            estimate = self._estimate
            if estimate is not None and (estimate.is_refaulting or estimate.is_swapping):
                self._activity.skip()
                self._touched = None
            else:
                self._touched = await trio.to_thread.run_sync(
                    self._activity.sample, abandon_on_cancel=True
                )
            await trio.sleep(pause_s(self._activity.took_s))

    def active_fraction(self) -> float | None:
        """How much of the guest's memory was in use lately, as of the last look."""
        return active_fraction(self._touched, self._memory)

    def look(self) -> tuple[GuestMemory, DemandEstimate]:
        """Read the guest's statistics and bring the estimate up to date."""
        self._memory = self._vitals.read()
        self._estimate = next_estimate(
            self._estimate,
            self._memory,
            time.monotonic(),
            bytes_of(self._config.assigned_pages),
        )
        return self._memory, self._estimate


@dataclass(slots=True)
class _Attempt:
    """How far one reservation has come."""

    reported_pages: int = 0
    reason: RefusalReason | None = None
    detail: str = ""


@dataclass(slots=True)
class _Reserving:
    """A reservation under way; `ended` once the host is told so before anything else."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Conversation:
    """One connection: from Hello to its end. A Reset begins it anew on the same connection."""

    def __init__(
        self, config: DriverConfig, process: PseudoProcess, reservoir: Reservoir, driver: Driver
    ) -> None:
        self._config = config
        self._process = process
        self._reservoir = reservoir
        self._driver = driver
        self._report_id = 0
        self.was_welcome = False
        """Whether the host took this driver: the next attempt to connect need not wait long."""

    async def run(self, channel: Channel) -> None:
        """Converse until the channel ends; that raises ChannelError."""
        try:
            while True:
                interval_s = await self._greet(channel)
                self._outbox, outgoing = trio.open_memory_channel[Message](math.inf)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, channel, outgoing)
                    nursery.start_soon(self._send_vitals, channel, interval_s)
                    await self._listen(channel, nursery)
                    nursery.cancel_scope.cancel()
                await self._driver.release_unclaimed()
        finally:
            # Cancelled: a nursery wraps it, so there is no exception to look for.
            if trio.current_effective_deadline() == -math.inf:
                await self._say_goodbye(channel)

    async def _say_goodbye(self, channel: Channel) -> None:
        with trio.move_on_after(FAREWELL_DEADLINE_S) as scope, contextlib.suppress(ChannelError):
            scope.shield = True
            await channel.send(Goodbye("the driver ends"))

    def _say(self, message: Message) -> None:
        """Tell the host soon, and in order: nothing can come between, not even a cancellation."""
        self._outbox.send_nowait(message)

    async def _write(self, channel: Channel, outgoing: trio.MemoryReceiveChannel[Message]) -> None:
        async for message in outgoing:
            await channel.send(message)

    async def _greet(self, channel: Channel) -> float:
        """Hello and Welcome; returns the interval of the vitals in seconds."""
        states = self._reservoir.states
        await channel.send(
            Hello(
                version_min=OLDEST_PROTOCOL_VERSION,
                version_max=PROTOCOL_VERSION,
                features=SUPPORTED_FEATURES,
                software=SOFTWARE,
                pseudo_process_pid=self._process.pid,
                arena_address=self._process.arena_address,
                arena_pages=self._process.arena_pages,
                frame_order=self._process.frame_order,
                claimed=states.frames_in(FrameState.CLAIMED),
            )
        )
        message: Message | None = None
        with trio.move_on_after(WELCOME_DEADLINE_S):
            message = await channel.receive()
        match message:
            case Welcome():
                # What the host holds is what is claimed; both directions have to be put right.
                ours = states.frames_in(FrameState.CLAIMED)
                states.mark(ours - message.claimed, FrameState.FREE)
                states.mark(message.claimed - ours, FrameState.CLAIMED)
                self.was_welcome = True
                return message.vitals_interval_ms / 1000
            case Goodbye():
                raise ChannelError(f"the host said goodbye: {message.reason}")
            case _:
                raise ChannelError("the host did not answer the greeting")

    async def _listen(self, channel: Channel, nursery: trio.Nursery) -> None:
        """Answer the host until it resets."""
        states = self._reservoir.states
        reserving: _Reserving | None = None
        while True:
            message = await channel.receive()
            match message:
                case Target():
                    # A new target replaces the old one: what is not reserved yet won't be, and the
                    # host hears of the end of that before it hears another offer.
                    if reserving is not None:
                        reserving.scope.cancel()
                        await reserving.ended.wait()
                        reserving = None
                    self._answer_target(message)
                case Reserve():
                    reserving = _Reserving()
                    nursery.start_soon(self._reserve, message, reserving)
                case Claim():
                    nursery.start_soon(self._drop, message)
                case Rejection():
                    rejected = message.frames
                    nursery.start_soon(self._reservoir.release, rejected, FrameState.FREE)
                case Return():
                    states.mark(message.frames, FrameState.FREE)
                case Decline():
                    LOG.debug("declined: %s", message.detail)
                case Reset():
                    LOG.info("the host starts anew: %s", message.reason)
                    return
                case Goodbye():
                    LOG.info("the host said goodbye: %s", message.reason)

    def _answer_target(self, target: Target) -> None:
        memory, estimate = self._driver.look()
        actual_pages = self._reservoir.states.count(FrameState.CLAIMED)
        decision = decide(
            Wish(target.balloon_pages, actual_pages, target.urgency, target.swap_pages),
            memory,
            estimate,
            bytes_of(self._config.assigned_pages),
        )
        self._say(_answer(target, decision, self._process.frame_order))

    # Frames

    async def _reserve(self, order: Reserve, reserving: _Reserving) -> None:
        """Reserve what the host made room for, and report it piece by piece."""
        attempt = _Attempt()
        with reserving.scope:
            frames = self._reservoir.states.lowest_free(order.pages, order.frame_order)
            under_way = trio.Semaphore(REPORTS_UNDER_WAY)
            async with trio.open_nursery() as nursery:
                for piece in frames.chunks(REPORT_PAGES[order.frame_order]):
                    await under_way.acquire()
                    if attempt.reason is not None:
                        break
                    nursery.start_soon(self._reserve_piece, order, piece, attempt, under_way)
        if reserving.scope.cancelled_caught:
            attempt.reason = RefusalReason.BUSY
        elif attempt.reported_pages < order.pages and attempt.reason is None:
            attempt.reason = RefusalReason.AT_TARGET
        self._say(
            Reserved(
                order.target_id, attempt.reported_pages, attempt.reason, one_line(attempt.detail)
            )
        )
        reserving.ended.set()

    async def _reserve_piece(
        self,
        order: Reserve,
        frames: PageFrames,
        attempt: _Attempt,
        under_way: trio.Semaphore,
    ) -> None:
        try:
            await self._reservoir.reserve(frames, order.frame_order)
        except NoRoom as error:
            attempt.reason, attempt.detail = RefusalReason.NO_MEMORY, str(error)
            return
        finally:
            under_way.release()
        # From here on the host must hear of them, whatever else happens: no checkpoint before.
        self._reservoir.states.mark(frames, FrameState.REPORTED)
        attempt.reported_pages += frames.page_count
        self._report_id += 1
        self._say(Report(order.target_id, self._report_id, frames))

    async def _drop(self, claim: Claim) -> None:
        await self._reservoir.release(claim.frames, FrameState.CLAIMED)
        self._say(Dropped(claim.report_id, claim.frames))

    # Statistics

    async def _send_vitals(self, channel: Channel, interval_s: float) -> None:
        while True:
            memory, estimate = self._driver.look()
            actual_pages = self._reservoir.states.count(FrameState.CLAIMED)
            assigned_bytes = bytes_of(self._config.assigned_pages)
            could_give = most_to_give_bytes(memory, estimate, actual_pages, assigned_bytes)
            active = self._driver.active_fraction()
            await channel.send(_vitals(memory, estimate, could_give, active))
            await trio.sleep(interval_s)


def _answer(target: Target, decision: Decision, frame_order: int) -> Offer | Refusal:
    """The decision as a message; a guest with huge frames offers whole ones."""
    pages = decision.pages - decision.pages % (1 << frame_order)
    detail = one_line(decision.detail)
    if pages:
        swap_pages = max(0, decision.swap_pages - (decision.pages - pages))
        return Offer(target.target_id, pages, decision.reason, detail, swap_pages)
    return Refusal(target.target_id, decision.reason or RefusalReason.WORKING_SET, detail)


def _vitals(
    memory: GuestMemory, estimate: DemandEstimate, spare_bytes: int, active: float | None
) -> Vitals:
    return Vitals(
        clock_s=estimate.clock_s,
        limit_bytes=memory.limit_bytes,
        usage_bytes=memory.usage_bytes,
        anon_bytes=memory.anon_bytes,
        file_bytes=memory.file_bytes,
        inactive_file_bytes=memory.inactive_file_bytes,
        active_file_bytes=memory.active_file_bytes,
        dirty_bytes=memory.dirty_bytes,
        unevictable_bytes=memory.unevictable_bytes,
        kernel_bytes=memory.kernel_bytes,
        refault_bytes_total=memory.refault_bytes_total,
        refault_anon_bytes_total=memory.refault_anon_bytes_total,
        major_faults_total=memory.major_faults_total,
        swap_used_bytes=memory.swap_used_bytes,
        swap_free_bytes=memory.swap_free_bytes,
        pressure_some_avg10=memory.pressure_some_avg10,
        pressure_full_avg10=memory.pressure_full_avg10,
        pressure_some_total_s=memory.pressure_some_total_s,
        oom_kills_total=memory.oom_kills_total,
        working_set_bytes=estimate.working_set_bytes,
        demand_bytes=estimate.demand_bytes,
        spare_bytes=spare_bytes,
        active_fraction=active,
    )
