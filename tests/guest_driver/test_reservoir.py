"""The reservoir with a real pseudo-process: nothing lost, nothing half done, every end noticed."""

import ctypes
import errno
import os
import random
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from real_pages import CGROUP_V1, present, require_root, wait_until

from guest_driver import memory, pseudo_process
from guest_driver.frame_states import FrameState
from guest_driver.pseudo_process import PseudoProcess
from guest_driver.reservoir import (
    COMMAND_PAGES,
    RESERVES_UNDER_WAY,
    NoRoom,
    PseudoProcessDied,
    Reservoir,
    ReservoirClosed,
    ReservoirError,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, PAGE_BYTES

pytestmark = pytest.mark.effects

PAGES = 32_768  # 128 MiB: eight commands of order 0
FREE, RESERVED, REPORTED = FrameState.FREE, FrameState.RESERVED, FrameState.REPORTED
CLAIMED, PENDING = FrameState.CLAIMED, FrameState.PENDING
DEADLINE_S = 60.0

Body = Callable[[Reservoir, PseudoProcess], Awaitable[None]]


@pytest.fixture
def with_reservoir() -> Iterator[Callable[..., None]]:
    """Runs a body with a reservoir of its own, and ends what is left of it."""
    require_root()
    processes: list[PseudoProcess] = []

    def run(body: Body, pages: int = PAGES, order: int = 0) -> None:
        process = pseudo_process.start(pages, order)
        processes.append(process)

        async def main() -> None:
            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    reservoir = Reservoir(process)
                    await nursery.start(reservoir.run)
                    await body(reservoir, process)
                    await reservoir.aclose()

        trio.run(main)

    yield run
    for process in processes:
        process.stop()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB."""
    require_root()
    if not (CGROUP_V1 / "memory.limit_in_bytes").exists():
        pytest.skip("needs a cgroup v1 memory controller at /sys/fs/cgroup/memory")
    path = CGROUP_V1 / f"mbtest-reservoir-{secrets.token_hex(4)}"
    path.mkdir()
    (path / "memory.limit_in_bytes").write_text(str(64 * MIB))
    yield path
    # Whoever hangs at the limit is let go first.
    (path / "memory.limit_in_bytes").write_text("-1")
    for pid in (path / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)

    def removed() -> bool:
        try:
            path.rmdir()
        except OSError:
            return False
        return True

    wait_until(removed, f"{path} is empty")


def present_in(process: PseudoProcess) -> PageFrames:
    return present(process.pid, process.arena_address, process.arena_pages)


async def until(predicate: Callable[[], bool]) -> None:
    """Wait for `predicate` on shared bytes, which wake nobody; the caller's deadline bounds it."""
    while not predicate():
        await trio.sleep(0.001)


@pytest.mark.parametrize("order", [0, 9])
def test_the_life_of_frames(with_reservoir: Callable[..., None], order: int) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        states = reservoir.states
        frames = states.lowest_free(20_480, order)
        assert frames == PageFrames.span(0, 20_480)
        await reservoir.reserve(frames, order)
        assert present_in(process) == frames == states.frames_in(RESERVED)
        states.mark(frames, REPORTED)
        await reservoir.release(frames.lowest(10_240), CLAIMED)
        assert present_in(process) == frames.highest(10_240) == states.frames_in(REPORTED)
        assert states.frames_in(CLAIMED) == frames.lowest(10_240)
        assert states.lowest_free(PAGES, order).starts[0] == 20_480
        states.mark(frames.lowest(10_240), FREE)
        await reservoir.release(frames.highest(10_240), FREE)
        assert not present_in(process)
        assert states.count(FREE) == PAGES
        assert reservoir.busy_s > 0

    with_reservoir(body, PAGES, order)


def test_scattered_frames(with_reservoir: Callable[..., None]) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        frames = PageFrames.from_frames(range(1, PAGES, 2))
        await reservoir.reserve(frames, 0)
        assert present_in(process) == frames == reservoir.states.frames_in(RESERVED)
        await reservoir.release(frames, CLAIMED)
        assert not present_in(process)
        assert reservoir.states.frames_in(CLAIMED) == frames

    with_reservoir(body)


def test_many_tasks_lose_nothing(with_reservoir: Callable[..., None]) -> None:
    tasks, rounds = 8, 12

    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        kept: dict[int, PageFrames] = {}

        async def use(number: int) -> None:
            chance = random.Random(number)
            for turn in range(rounds):
                frames = reservoir.states.lowest_free(chance.randrange(1, PAGES // tasks), 0)
                await reservoir.reserve(frames, 0)
                assert reservoir.states.all_in(frames, RESERVED)
                if turn == rounds - 1:
                    frames, rest = frames.lowest(500), frames - frames.lowest(500)
                    kept[number] = frames
                    frames = rest
                await reservoir.release(frames, FREE)

        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(use, number)
        expected = PageFrames.empty()
        for frames in kept.values():
            assert not expected.overlaps(frames)
            expected = expected | frames
        assert reservoir.states.frames_in(RESERVED) == expected == present_in(process)
        assert reservoir.states.count(FREE) == PAGES - expected.page_count

    with_reservoir(body)


def test_frames_under_way_are_nobody_elses(with_reservoir: Callable[..., None]) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        frames = PageFrames.span(0, 30_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reservoir.reserve, frames, 0)
            await until(lambda: not reservoir.states.all_in(frames, FREE))
            assert not reservoir.states.lowest_free(PAGES, 0).overlaps(frames)
            with pytest.raises(ValueError, match="not all of these frames are FREE"):
                await reservoir.reserve(PageFrames.span(29_999, 2), 0)
        assert present_in(process) == frames

    with_reservoir(body)


def test_a_cancelled_reservation_is_taken_back(with_reservoir: Callable[..., None]) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        for delay in range(6):  # cancelled at different stages
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(reservoir.reserve, PageFrames.span(0, PAGES), 0)
                    await until(
                        lambda d=delay: reservoir.states.count(RESERVED) >= d * 4096  # type: ignore[misc]
                    )
                    scope.cancel()
            await until(lambda: reservoir.states.count(FREE) == PAGES)
            assert not present_in(process)
        await reservoir.reserve(PageFrames.span(0, PAGES), 0)  # no slot was lost
        assert present_in(process).page_count == PAGES

    with_reservoir(body)


def test_a_cancelled_release_happens_all_the_same(with_reservoir: Callable[..., None]) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        frames = PageFrames.span(0, PAGES)
        await reservoir.reserve(frames, 0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await reservoir.release(frames, CLAIMED)
        assert scope.cancelled_caught
        await until(lambda: reservoir.states.count(CLAIMED) == PAGES)
        assert not present_in(process)

    with_reservoir(body)


def test_wrong_frames_are_refused_before_anything_is_done(
    with_reservoir: Callable[..., None],
) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        whole = PageFrames.span(0, 512)
        refused: list[Callable[[], Awaitable[None]]] = [
            lambda: reservoir.reserve(PageFrames.span(PAGES - 1, 2), 9),
            lambda: reservoir.reserve(PageFrames.span(0, 256), 9),
            lambda: reservoir.reserve(PageFrames.span(256, 512), 9),
            lambda: reservoir.reserve(whole, 0),
            lambda: reservoir.release(whole, FREE),
        ]
        for call in refused:
            with pytest.raises(ValueError, match="frames"):
                await call()
        await reservoir.reserve(whole, 9)
        for state in (RESERVED, REPORTED, PENDING):
            with pytest.raises(ValueError, match="can't be dropped into"):
                await reservoir.release(whole, state)
        assert reservoir.states.frames_in(RESERVED) == whole == present_in(process)
        assert reservoir.states.count(FREE) == PAGES - 512

    with_reservoir(body, PAGES, 9)


@pytest.mark.parametrize("order", [0, 9])
def test_without_room_everything_is_given_back(
    with_reservoir: Callable[..., None], monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """The kernel refuses 16 MiB in the second of eight commands: they can't be written to."""
    pages = 8 * COMMAND_PAGES[order]
    bad = PageFrames.span(pages // 4 - 4096, 4096)

    def map_with_bad_part(pages: int, frame_order: int) -> memory.Arena:
        arena = memory.map_arena(pages, frame_order)
        bad_bytes = bad.page_count * PAGE_BYTES
        address = arena.address + int(bad.starts[0]) * PAGE_BYTES
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(bad_bytes), 1) == 0
        return arena

    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        kept = PageFrames.span(0, 1024)
        await reservoir.reserve(kept, order)
        wanted = PageFrames.span(1024, pages - 1024)
        for _ in range(RESERVES_UNDER_WAY + 1):  # no slot may be lost
            with pytest.raises(NoRoom) as raised:
                await reservoir.reserve(wanted, order)
            assert raised.value.code in errno.errorcode
            assert reservoir.states.frames_in(RESERVED) == kept == present_in(process)
            assert reservoir.states.frames_in(FREE) == wanted
        await reservoir.reserve(wanted - bad, order)
        assert present_in(process) == kept | (wanted - bad)

    monkeypatch.setattr(pseudo_process, "map_arena", map_with_bad_part)
    with_reservoir(body, pages, order)


def test_at_the_limit_it_waits_for_room_and_goes_on(
    with_reservoir: Callable[..., None], cgroup: Path
) -> None:
    """With the OOM killer off. Refused or not: in the end pages and states say the same."""

    def is_dry() -> bool:
        return "under_oom 1" in (cgroup / "memory.oom_control").read_text()

    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        (cgroup / "memory.oom_control").write_text("1")
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        refused = 0
        ended = trio.Event()

        async def use(frames: PageFrames) -> None:
            nonlocal refused
            try:
                await reservoir.reserve(frames, 0)
            except NoRoom:
                refused += 1
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, PageFrames.span(0, PAGES))
            await until(lambda: ended.is_set() or is_dry())
            (cgroup / "memory.limit_in_bytes").write_text(str(512 * MIB))
        expected = PageFrames.empty() if refused else PageFrames.span(0, PAGES)
        assert reservoir.states.frames_in(RESERVED) == expected == present_in(process)
        assert reservoir.states.count(FREE) == PAGES - expected.page_count
        await reservoir.reserve(PageFrames.span(0, PAGES) - expected, 0)
        assert present_in(process).page_count == PAGES

    with_reservoir(body)


@pytest.fixture
def dying() -> Iterator[PseudoProcess]:
    require_root()
    process = pseudo_process.start(PAGES, 0)
    yield process
    process.stop()


def run_until_it_dies(process: PseudoProcess, body: Body) -> PseudoProcessDied:
    """What `run` raised, with `body` beside it; `aclose` comes afterwards, as in a driver.

    The body goes on when `run` has raised: nobody may be left waiting.
    """

    async def go_on(reservoir: Reservoir) -> None:
        with trio.fail_after(DEADLINE_S) as scope:
            scope.shield = True
            await body(reservoir, process)

    async def main() -> list[BaseException]:
        reservoir = Reservoir(process)
        try:
            with trio.fail_after(DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(go_on, reservoir)
                    nursery.start_soon(reservoir.run)
        except BaseExceptionGroup as group:
            return list(group.exceptions)
        finally:
            await reservoir.aclose()
        return []

    (error,) = trio.run(main)
    assert isinstance(error, PseudoProcessDied)
    return error


def test_the_oom_killer_is_noticed(dying: PseudoProcess, cgroup: Path) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        with pytest.raises(PseudoProcessDied, match="SIGKILL"):
            await reservoir.reserve(PageFrames.span(0, PAGES), 0)

    assert run_until_it_dies(dying, body).exit_code == -signal.SIGKILL


def test_death_wakes_everybody_and_stays(dying: PseudoProcess) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        woken: list[ReservoirError] = []

        async def wait(start: int, count: int) -> None:
            with pytest.raises(PseudoProcessDied) as raised:
                await reservoir.reserve(PageFrames.span(start, count), 0)
            woken.append(raised.value)

        os.kill(process.pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            for number in range(10):  # more than there are slots
                nursery.start_soon(wait, number * 3000, 3000)
            await until(lambda: reservoir.states.count(PENDING) == 30_000)
            os.kill(process.pid, signal.SIGKILL)
        assert len(woken) == 10
        with pytest.raises(PseudoProcessDied):
            await reservoir.release(PageFrames.span(0, 1), FREE)

    assert run_until_it_dies(dying, body).exit_code == -signal.SIGKILL


def test_an_idle_one_is_missed_at_once(dying: PseudoProcess) -> None:
    async def body(reservoir: Reservoir, process: PseudoProcess) -> None:
        process.kill()

    assert run_until_it_dies(dying, body).exit_code == -signal.SIGKILL


def test_closing_wakes_everybody_and_reaps(dying: PseudoProcess) -> None:
    async def main() -> None:
        reservoir = Reservoir(dying)

        async def wait() -> None:
            with pytest.raises(ReservoirClosed):
                await reservoir.reserve(PageFrames.span(0, PAGES), 0)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(reservoir.run)
                os.kill(dying.pid, signal.SIGSTOP)
                nursery.start_soon(wait)
                await until(lambda: reservoir.states.count(PENDING) > 0)
                await reservoir.aclose()
            await reservoir.aclose()
            with pytest.raises(ReservoirClosed):
                await reservoir.reserve(PageFrames.span(0, 1), 0)

    trio.run(main)
    assert dying.states.closed
    with pytest.raises(ProcessLookupError):
        os.kill(dying.pid, 0)


def test_closing_while_commands_wait_to_be_sent(dying: PseudoProcess) -> None:
    async def main() -> None:
        reservoir = Reservoir(dying)
        dying.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is

        async def drop() -> None:
            with pytest.raises(ReservoirClosed):
                await reservoir.release(PageFrames.span(0, PAGES), FREE)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(reservoir.run)
                await reservoir.reserve(PageFrames.span(0, PAGES), 0)
                os.kill(dying.pid, signal.SIGSTOP)
                nursery.start_soon(drop)
                await trio.testing.wait_all_tasks_blocked()
                await reservoir.aclose()

    trio.run(main)


def test_closing_what_never_ran(dying: PseudoProcess) -> None:
    async def main() -> None:
        reservoir = Reservoir(dying)
        await reservoir.aclose()
        with pytest.raises(ReservoirClosed):
            await reservoir.reserve(PageFrames.span(0, 1), 0)

    trio.run(main)


def test_closing_leaves_no_zombie_when_cancelled(dying: PseudoProcess) -> None:
    async def main() -> None:
        reservoir = Reservoir(dying)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(reservoir.run)
                scope.cancel()
                await reservoir.aclose()

    trio.run(main)
    with pytest.raises(ProcessLookupError):
        os.kill(dying.pid, 0)
