"""The arena, on real pages: what is populated, locked and dropped, as the kernel shows it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_pages import ANON, MLOCKED, THP, all_have, flags, none_has, present, require_root

from guest_driver import memory
from guest_driver.memory import Arena, map_arena, map_shared
from protocol import units
from protocol.page_frames import PageFrames

PAGES = 8192

LIGHT_IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import guest_driver.pseudo_process
print(*sys.modules)
"""


@pytest.fixture
def mapped() -> Iterator[Callable[[int], Arena]]:
    require_root()
    arenas = []

    def make(frame_order: int, pages: int = PAGES) -> Arena:
        arenas.append(map_arena(pages, frame_order))
        return arenas[-1]

    yield make
    for arena in arenas:
        arena.unmap()


def present_in(arena: Arena) -> PageFrames:
    return present(os.getpid(), arena.address, arena.pages)


def mappings_of(arena: Arena) -> list[tuple[int, int]]:
    stop = arena.address + arena.pages * units.PAGE_BYTES
    bounds = [
        tuple(int(bound, 16) for bound in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    return [(low, high) for low, high in bounds if low < stop and high > arena.address]


def test_units_agree() -> None:
    assert memory.PAGE_BYTES == units.PAGE_BYTES
    assert memory.PAGES_PER_HUGE_PAGE == units.PAGES_PER_HUGE_PAGE
    assert memory.FRAME_ORDERS == (0, units.HUGE_FRAME_ORDER)


def test_what_the_fork_imports_stays_light() -> None:
    root = Path(memory.__file__).parent.parent
    command = [sys.executable, "-I", "-S", "-c", LIGHT_IMPORTS, str(root)]
    modules = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    heavy = {"typing", "numpy", "trio", "msgpack", "asyncio", "dataclasses", "logging", "pathlib"}
    assert not heavy & set(modules)


@pytest.mark.parametrize(("pages", "order"), [(0, 0), (-1, 0), (2**32 + 1, 0), (512, 1), (512, 10)])
def test_impossible_arenas_are_refused(pages: int, order: int) -> None:
    with pytest.raises(ValueError, match=r"pages|order"):
        map_arena(pages, order)


def test_shared_states_start_free_and_reach_a_fork() -> None:
    states = map_shared(10)
    assert states[:] == bytes(10)
    pid = os.fork()
    if pid == 0:
        states[3:5] = b"\x07\x08"
        os._exit(0)
    os.waitpid(pid, 0)
    assert states[:] == b"\0\0\0\x07\x08\0\0\0\0\0"
    states.close()


@pytest.mark.effects
class TestFrames:
    def test_a_new_arena_is_aligned_and_empty(self, mapped: Callable[..., Arena]) -> None:
        for pages in (PAGES, PAGES + 1, 1):
            arena = mapped(0, pages)
            assert arena.address % units.HUGE_PAGE_BYTES == 0
            assert not present_in(arena)
            stop = arena.address + pages * units.PAGE_BYTES
            assert mappings_of(arena) == [(arena.address, stop)]

    def test_only_what_was_populated_has_pages(self, mapped: Callable[..., Arena]) -> None:
        arena = mapped(0)
        arena.populate(100, 1000)
        arena.populate(PAGES - 1, 1)
        assert present_in(arena) == PageFrames.from_ranges([100, PAGES - 1], [1000, 1])
        arena.drop(500, 100)
        assert present_in(arena) == PageFrames.from_ranges([100, 600, PAGES - 1], [400, 500, 1])
        arena.drop(0, PAGES)
        assert not present_in(arena)

    def test_small_frames_are_locked_and_anonymous(self, mapped: Callable[..., Arena]) -> None:
        arena = mapped(0)
        arena.populate(0, 1024)
        found = flags(os.getpid(), arena.address, PageFrames.span(0, 1024))
        assert all_have(found, MLOCKED)
        assert all_have(found, ANON)
        assert none_has(found, THP)

    def test_huge_frames_are_huge_and_locked(self, mapped: Callable[..., Arena]) -> None:
        arena = mapped(9)
        arena.populate(512, 1024)
        assert present_in(arena) == PageFrames.span(512, 1024)
        assert all_have(flags(os.getpid(), arena.address, PageFrames.span(512, 1024)), THP)
        # Of a huge page the flag of the lock stands at its first frame alone.
        heads = PageFrames.from_frames([512, 1024])
        assert all_have(flags(os.getpid(), arena.address, heads), MLOCKED)
        arena.drop(1024, 512)
        assert present_in(arena) == PageFrames.span(512, 512)

    def test_scattered_frames_never_split_the_mapping(self, mapped: Callable[..., Arena]) -> None:
        arena = mapped(0)
        for pfn in range(0, PAGES, 16):
            arena.populate(pfn, 1)
        for pfn in range(0, PAGES, 32):
            arena.drop(pfn, 1)
        assert len(mappings_of(arena)) == 1
        assert present_in(arena) == PageFrames.from_frames(range(16, PAGES, 32))

    @pytest.mark.parametrize(
        ("order", "start", "count"),
        [(0, -1, 2), (0, PAGES, 1), (0, PAGES - 1, 2), (0, 0, 0), (9, 0, 511), (9, 256, 512)],
    )
    def test_ranges_outside_or_in_part_are_refused(
        self, mapped: Callable[..., Arena], order: int, start: int, count: int
    ) -> None:
        arena = mapped(order)
        for call in (arena.populate, arena.drop):
            with pytest.raises(ValueError, match=r"arena"):
                call(start, count)
        assert not present_in(arena)

    def test_a_fork_gets_no_part_of_the_arena(self, mapped: Callable[..., Arena]) -> None:
        arena = mapped(0)
        arena.populate(0, 16)
        pid = os.fork()
        if pid == 0:
            os._exit(len(mappings_of(arena)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
