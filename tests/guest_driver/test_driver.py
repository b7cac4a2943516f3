"""The driver against a scripted host, on a real socket and with real pages."""

import ctypes
import dataclasses
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing
from real_pages import present, require_root

from guest_driver import memory, pseudo_process
from guest_driver.driver import (
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    REPORT_PAGES,
    WELCOME_DEADLINE_S,
    Driver,
    DriverConfig,
)
from guest_driver.pseudo_process import PseudoProcess
from guest_driver.reservoir import PseudoProcessDied
from guest_driver.vitals import VitalsReader
from protocol.channel import Channel
from protocol.connection import Connection
from protocol.errors import ChannelBroken
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
from protocol.units import GIB, MIB, PAGE_BYTES, pages_of
from protocol.vocabulary import SWAP_FEATURE, RefusalReason, RejectionReason, Role, Urgency

pytestmark = pytest.mark.effects

ASSIGNED = 256 * MIB
PAGES = pages_of(ASSIGNED)
PIECE = REPORT_PAGES[0]
HANG_S = 30.0

M = TypeVar("M", bound=Message)


class Guest:
    """A driver's surroundings: its pseudo-process and the files of its workload's cgroup."""

    def __init__(self, folder: Path, process: PseudoProcess) -> None:
        self.process = process
        self.socket_path = folder / "channel.sock"
        self.workload = folder / "workload"
        self.workload.mkdir()
        self.uses(32 * MIB)
        config = DriverConfig(str(self.socket_path), str(folder), PAGES)
        self.driver = Driver(config, process)

    def uses(self, usage_bytes: int) -> None:
        """The workload uses so much anonymous memory."""
        files = {
            "memory.limit_in_bytes": ASSIGNED,
            "memory.usage_in_bytes": usage_bytes,
            "memory.stat": f"total_rss {usage_bytes}\ntotal_dirty 0\ntotal_writeback 0\n"
            f"total_cache 0\ntotal_inactive_file 0\ntotal_active_file 0\n",
            "memory.oom_control": "oom_kill 0\n",
        }
        for name, content in files.items():
            (self.workload / name).write_text(str(content))

    def can_swap(self, swap_bytes: int) -> None:
        """Its VM has so much swap, of which nothing is in use, on a machine that has 1 GiB."""
        swaps = self.workload.parent / "swaps"
        swaps.write_text(f"Filename Type Size Used Priority\n/swap file {GIB // 1024} 0 -2\n")
        (self.workload / "memory.memsw.limit_in_bytes").write_text(str(ASSIGNED + swap_bytes))
        with (self.workload / "memory.stat").open("a") as stat:
            stat.write(f"total_inactive_anon {ASSIGNED}\ntotal_active_anon 0\ntotal_swap 0\n")
        self.driver._vitals = VitalsReader(self.workload.parent, swaps_path=swaps)

    @property
    def present(self) -> PageFrames:
        return present(self.process.pid, self.process.arena_address, self.process.arena_pages)


class Host:
    """The host's side of the guest's socket."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self.channel: Channel | None = None

    async def accept(self) -> Hello:
        """The next connection's greeting; it replaces an older one."""
        stream = await self._listener.accept()
        self.channel = Channel(stream, Connection(Role.HOST))
        return await self.hear(Hello)

    async def welcome(self, claimed: PageFrames | None = None) -> Hello:
        hello = await self.accept()
        await self.say(welcome_of(hello.claimed if claimed is None else claimed))
        return hello

    async def say(self, *messages: Message) -> None:
        assert self.channel is not None
        await self.channel.send(*messages)

    async def hear(self, kind: type[M]) -> M:
        """The next message but statistics."""
        assert self.channel is not None
        while True:
            message = await self.channel.receive()
            if isinstance(message, kind):
                return message
            assert isinstance(message, Vitals), message

    async def hang_up(self) -> None:
        assert self.channel is not None
        await self.channel.aclose()

    async def reserve(
        self,
        pages: int,
        target_id: int = 0,
        actual_pages: int = 0,
        urgency: Urgency = Urgency.CALM,
    ) -> None:
        """As far as an open reservation of `pages`."""
        await self.say(Target(target_id, actual_pages + pages, urgency))
        offer = await self.hear(Offer)
        assert (offer.target_id, offer.pages) == (target_id, pages)
        await self.say(Reserve(target_id, pages, 0))

    async def inflate(self, pages: int, target_id: int = 0, actual_pages: int = 0) -> PageFrames:
        """All of it."""
        await self.reserve(pages, target_id, actual_pages)
        reports, reserved = await self.hear_reports()
        assert reserved.pages == pages
        for report in reports:
            await self.say(Claim(report.report_id, report.frames))
        for _ in reports:
            await self.hear(Dropped)
        frames = PageFrames.empty()
        for report in reports:
            frames |= report.frames
        return frames

    async def hear_reports(self) -> tuple[list[Report], Reserved]:
        """Up to the end of the reservation."""
        reports: list[Report] = []
        while True:
            message = await self.hear(Message)
            if isinstance(message, Reserved):
                return reports, message
            if isinstance(message, Report):
                reports.append(message)


NONE = PageFrames.empty()


def welcome_of(claimed: PageFrames) -> Welcome:
    return Welcome(
        version=1,
        features=(),
        assigned_pages=PAGES,
        claimed=claimed,
        vitals_interval_ms=3_600_000,
    )


@asynccontextmanager
async def listening(guest: Guest) -> AsyncIterator[Host]:
    guest.socket_path.unlink(missing_ok=True)
    raw = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await raw.bind(str(guest.socket_path))
    raw.listen(4)
    listener = trio.SocketListener(raw)
    async with listener:
        yield Host(listener)


Body = Callable[[Guest, Host], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def new_guest(tmp_path: Path) -> Iterator[Callable[[], Guest]]:
    require_root()
    processes: list[PseudoProcess] = []

    def make() -> Guest:
        processes.append(pseudo_process.start(PAGES, 0))
        return Guest(tmp_path, processes[-1])

    yield make
    for process in processes:
        process.stop()


@pytest.fixture
def run(new_guest: Callable[[], Guest]) -> Run:
    """A body with a driver that runs and a host that listens."""

    def run(body: Body) -> None:
        guest = new_guest()

        async def main() -> None:
            with trio.fail_after(HANG_S):
                async with listening(guest) as host, trio.open_nursery() as nursery:
                    nursery.start_soon(guest.driver.run)
                    await body(guest, host)
                    nursery.cancel_scope.cancel()

        trio.run(main)
        assert guest.process.exit_code is not None  # nothing outlives the driver

    return run


async def until(predicate: Callable[[], bool]) -> None:
    """Wait for `predicate` on what other processes do; `run` bounds it."""
    while not predicate():
        await trio.sleep(0.002)


def test_the_greeting_says_where_the_arena_is(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        hello = await host.accept()
        assert hello.pseudo_process_pid == guest.process.pid
        assert (hello.arena_address, hello.arena_pages) == (guest.process.arena_address, PAGES)
        assert (hello.frame_order, hello.claimed) == (0, PageFrames.empty())
        await host.say(welcome_of(PageFrames.empty()))
        assert host.channel is not None
        vitals = await host.channel.receive()
        assert isinstance(vitals, Vitals)
        assert (vitals.usage_bytes, vitals.limit_bytes) == (32 * MIB, ASSIGNED)
        assert vitals.spare_bytes is not None
        assert 0 < vitals.spare_bytes < ASSIGNED - 32 * MIB

    run(body)


def test_what_is_swapped_is_what_the_host_allows_and_the_guest_thinks_fit(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        guest.uses(ASSIGNED - 8 * MIB)
        guest.can_swap(64 * MIB)
        await host.accept()
        await host.say(dataclasses.replace(welcome_of(NONE), features=(SWAP_FEATURE,)))
        wanted = pages_of(40 * MIB)
        await host.say(Target(0, wanted, Urgency.SHORT))
        assert (await host.hear(Refusal)).detail.endswith("and its balloon may not swap")
        await host.say(Target(1, wanted, Urgency.CALM, swap_pages=wanted))
        assert (await host.hear(Refusal)).reason is RefusalReason.WORKING_SET
        await host.say(Target(2, wanted, Urgency.SHORT, swap_pages=wanted))
        offer = await host.hear(Offer)
        assert (offer.pages, offer.reason) != (0, None)
        assert 0 < offer.pages <= offer.swap_pages <= wanted
        assert offer.detail.endswith("are swapped out for it")
        await host.say(Decline(2))
        guest.uses(ASSIGNED - 8 * MIB)
        guest.can_swap(2 * MIB)
        await host.say(Target(3, wanted, Urgency.SHORT, swap_pages=wanted))
        refusal = await host.hear(Refusal)
        assert refusal.reason is RefusalReason.NO_SWAP
        assert refusal.detail.endswith("and no swap is left for it")

    run(body)


def test_what_the_host_holds_is_what_is_claimed(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        # The host knows of frames that this driver, a new one, does not.
        held = PageFrames.span(0, 1000) | PageFrames.span(5000, 1000)
        await host.welcome(held)
        target = Target(0, 2500, Urgency.CALM)
        await host.say(target)
        offer = await host.hear(Offer)
        assert offer.pages == 500
        await host.say(Reserve(0, 500, 0))
        (report,), _ = await host.hear_reports()
        assert report.frames == PageFrames.span(1000, 500)
        await host.hang_up()
        # And has given back what the driver still takes for claimed.
        hello = await host.accept()
        assert hello.claimed == held
        await host.say(welcome_of(PageFrames.span(0, 10)))
        await host.reserve(100, actual_pages=10)
        (report,), _ = await host.hear_reports()
        assert report.frames == PageFrames.span(10, 100)

    run(body)


def test_frames_are_reserved_reported_claimed_and_dropped(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        pages = 2 * PIECE + 100
        await host.reserve(pages)
        reports, reserved = await host.hear_reports()
        assert (reserved.pages, reserved.reason) == (pages, None)
        assert sorted(len(report.frames) for report in reports) == [100, PIECE, PIECE]
        assert [report.report_id for report in reports] == sorted(
            {report.report_id for report in reports}
        )
        frames = PageFrames.span(0, pages)
        assert guest.present == frames
        for report in reports:
            await host.say(Claim(report.report_id, report.frames))
        dropped = [await host.hear(Dropped) for _ in reports]
        assert {(drop.report_id, drop.frames) for drop in dropped} == {
            (report.report_id, report.frames) for report in reports
        }
        assert not guest.present
        await host.hang_up()
        assert (await host.accept()).claimed == frames

    run(body)


def test_what_the_guest_needs_is_refused_or_cut(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        guest.uses(ASSIGNED - 10 * MIB)
        await host.welcome()
        await host.say(Target(0, 1000, Urgency.CALM))
        refusal = await host.hear(Refusal)
        assert (refusal.target_id, refusal.reason) == (0, RefusalReason.WORKING_SET)
        await host.say(Target(1, 0, Urgency.SHORT))
        assert (await host.hear(Refusal)).reason is RefusalReason.AT_TARGET
        guest.uses(32 * MIB)
        await host.say(Target(2, PAGES, Urgency.SHORT))
        offer = await host.hear(Offer)
        assert offer.pages < PAGES
        assert offer.reason is not None
        await host.say(Decline(2, "no room"))
        await host.reserve(50, target_id=3, urgency=Urgency.SHORT)
        _, reserved = await host.hear_reports()
        assert reserved.pages == 50

    run(body)


def test_rejected_frames_are_the_guests_again(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        await host.reserve(1000)
        (report,), _ = await host.hear_reports()
        bad = report.frames.lowest(300)
        await host.say(
            Rejection(report.report_id, ((bad, RejectionReason.NOT_LOCKED),)),
            Claim(report.report_id, report.frames - bad),
        )
        assert (await host.hear(Dropped)).frames == report.frames - bad
        await until(lambda: not guest.present)
        # They can be given once more.
        assert await host.inflate(300, 1, actual_pages=700) == bad

    run(body)


def test_returned_frames_are_given_again(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        frames = await host.inflate(1000)
        await host.say(Return(frames.highest(400)))
        assert await host.inflate(400, 1, actual_pages=600) == frames.highest(400)
        await host.hang_up()
        assert (await host.accept()).claimed == frames

    run(body)


def test_a_new_target_ends_the_reservation_before_it_is_answered(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        pages = 4 * PIECE
        await host.reserve(pages)
        await host.say(Target(1, pages, Urgency.CALM))
        # Anything else than this order is a violation, which the connection would raise.
        reports, reserved = await host.hear_reports()
        assert reserved.target_id == 0
        assert reserved.pages == sum(len(report.frames) for report in reports)
        offer = await host.hear(Offer)
        assert offer.target_id == 1
        for report in reports:
            await host.say(Claim(report.report_id, report.frames))
        claimed = PageFrames.empty()
        for _ in reports:
            claimed |= (await host.hear(Dropped)).frames
        if reserved.pages < pages:
            assert reserved.reason is RefusalReason.BUSY
        await host.say(Decline(1, "that was all"))
        await until(lambda: not guest.present)
        await host.hang_up()
        assert (await host.accept()).claimed == claimed

    run(body)


def test_where_the_kernel_has_no_page_the_rest_is_said_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_page = 100

    def map_with_bad_page(pages: int, frame_order: int) -> memory.Arena:
        arena = memory.map_arena(pages, frame_order)
        address = ctypes.c_void_p(arena.address + bad_page * PAGE_BYTES)
        assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(PAGE_BYTES), 1) == 0
        return arena

    monkeypatch.setattr(pseudo_process, "map_arena", map_with_bad_page)

    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        await host.reserve(4 * PIECE)
        reports, reserved = await host.hear_reports()
        told = PageFrames.empty()
        for report in reports:
            told |= report.frames
        assert reserved.reason is RefusalReason.NO_MEMORY
        assert reserved.pages == len(told) < 4 * PIECE
        assert guest.present == told  # of the piece that failed nothing is kept
        # One piece is under way beside it, perhaps one more; after that it is given up.
        assert not told & (PageFrames.span(0, PIECE) | PageFrames.span(3 * PIECE, PIECE))

    run(body)


def test_a_reset_of_the_host_keeps_what_is_claimed(run: Run) -> None:
    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        claimed = await host.inflate(1000)
        await host.reserve(2000, 1, actual_pages=1000)
        await host.hear(Report)
        await host.say(Reset("begin anew"))
        hello = await host.hear(Hello)
        assert hello.claimed == claimed
        assert not guest.present  # whoever greets has released the rest
        await host.say(welcome_of(claimed))
        await host.inflate(500, 0, actual_pages=1000)

    run(body)


@pytest.mark.parametrize("says_goodbye", [False, True])
def test_a_host_that_goes_releases_what_it_has_not_claimed(run: Run, says_goodbye: bool) -> None:
    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        claimed = await host.inflate(1000)
        await host.reserve(2 * PIECE, 1, actual_pages=1000)
        await host.hear(Report)
        if says_goodbye:
            await host.say(Goodbye("the agent ends"))
        await host.hang_up()
        hello = await host.accept()
        assert hello.claimed == claimed
        assert not guest.present

    run(body)


def test_a_host_that_restarts_is_found_again(new_guest: Callable[[], Guest]) -> None:
    guest = new_guest()

    async def main() -> None:
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.driver.run)  # before anybody listens
                async with listening(guest) as host:
                    await host.welcome()
                    claimed = await host.inflate(1000)
                    await host.hang_up()
                guest.socket_path.unlink()
                await trio.sleep(2 * FIRST_BACKOFF_S)
                async with listening(guest) as host:
                    assert (await host.welcome()).claimed == claimed
                    await host.inflate(1000, 0, actual_pages=1000)
                    nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_back_off_doubles_and_is_bounded(
    new_guest: Callable[[], Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = new_guest()
    clock = trio.testing.MockClock()
    tries: list[float] = []
    open_unix_socket = trio.open_unix_socket

    async def noted(path: str) -> trio.SocketStream:
        tries.append(trio.current_time())
        return await open_unix_socket(path)

    monkeypatch.setattr(trio, "open_unix_socket", noted)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.driver.run)
            for _ in range(1200):
                await trio.testing.wait_all_tasks_blocked()
                clock.jump(0.01)
            pauses = [later - sooner for sooner, later in pairwise(tries)]
            assert pauses[0] == pytest.approx(FIRST_BACKOFF_S, abs=0.011)
            for sooner, later in pairwise(pauses):
                expected = min(2 * sooner, LONGEST_BACKOFF_S)
                assert later == pytest.approx(expected, abs=0.035)
            assert pauses[-1] == pytest.approx(LONGEST_BACKOFF_S, abs=0.011)
            # A host that is there and takes it: the pauses begin small again.
            async with listening(guest) as host:
                nursery.start_soon(_tick, clock)
                await host.welcome()
                await host.hang_up()
                left_s = trio.current_time()
                await host.accept()
                assert trio.current_time() - left_s < 5 * FIRST_BACKOFF_S
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


async def _tick(clock: trio.testing.MockClock) -> None:
    while True:
        await trio.testing.wait_all_tasks_blocked(0.001)
        clock.jump(0.01)


def test_a_host_that_does_not_answer_the_greeting_is_left(
    new_guest: Callable[[], Guest],
) -> None:
    guest = new_guest()
    clock = trio.testing.MockClock()

    async def main() -> None:
        async with listening(guest) as host, trio.open_nursery() as nursery:
            nursery.start_soon(guest.driver.run)
            await host.accept()
            # The driver waits for the answer: nothing else can happen before time goes on.
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(WELCOME_DEADLINE_S + 0.1)
            assert host.channel is not None
            with pytest.raises(ChannelBroken):
                await host.channel.receive()
            nursery.start_soon(_tick, clock)
            await host.welcome()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def test_a_host_that_breaks_the_protocol_is_left(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memballoon.driver")

    async def body(guest: Guest, host: Host) -> None:
        await host.welcome()
        claimed = await host.inflate(1000)
        assert host.channel is not None
        await host.channel._stream.send_all(b"\xff" * 8)
        assert (await host.accept()).claimed == claimed

    run(body)
    assert "the connection ended" in caplog.text


@pytest.mark.parametrize("when", ["idle", "reserving"])
def test_it_ends_with_its_pseudo_process(new_guest: Callable[[], Guest], when: str) -> None:
    guest = new_guest()

    async def main() -> None:
        with trio.fail_after(HANG_S):
            async with listening(guest) as host, trio.open_nursery() as nursery:
                ended = trio.Event()

                async def drive() -> None:
                    with pytest.raises(BaseExceptionGroup) as caught:
                        await guest.driver.run()
                    assert caught.group_contains(PseudoProcessDied)
                    ended.set()

                nursery.start_soon(drive)
                await host.welcome()
                if when == "reserving":
                    await host.reserve(pages_of(96 * MIB))
                    os.kill(guest.process.pid, signal.SIGSTOP)
                    # Commands are under way, and stay so.
                    await trio.testing.wait_all_tasks_blocked(0.02)
                os.kill(guest.process.pid, signal.SIGKILL)
                await ended.wait()

    trio.run(main)
    assert guest.process.exit_code == -signal.SIGKILL


def test_sigterm_ends_it_in_good_order(new_guest: Callable[[], Guest]) -> None:
    guest = new_guest()

    async def main() -> None:
        with trio.fail_after(HANG_S):
            async with listening(guest) as host, trio.open_nursery() as nursery:
                nursery.start_soon(guest.driver.run)
                await host.welcome()
                await host.reserve(1000)
                await host.hear_reports()
                os.kill(os.getpid(), signal.SIGTERM)
                assert (await host.hear(Goodbye)).reason == "the driver ends"

    trio.run(main)
    assert guest.process.exit_code is not None
