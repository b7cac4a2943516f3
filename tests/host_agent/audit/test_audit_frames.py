"""Real pages of a real process, looked at from outside."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host_agent.audit.errors import AuditorClosed, FramesHidden, ProcessGone
from host_agent.audit.frames import AuditResult, FrameAuditor
from host_agent.audit.kernel_pages import KernelPages, kernel_pages
from host_agent.audit.page_bits import KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL
from protocol.page_frames import PageFrames
from protocol.vocabulary import RejectionReason

pytestmark = pytest.mark.effects

PAGES = 4096
ALL = PageFrames.span(0, PAGES)
Child = Any
ANON, SHARED_ANON = 0x22 | 0x4000, 0x21


def auditor_of(child: Child, address: int, pages: int = PAGES) -> FrameAuditor:
    return FrameAuditor(child.pid, address, pages, child.cgroup.stat().st_ino)


def verify(child: Child, address: int, frames: PageFrames = ALL, order: int = 0) -> AuditResult:
    with auditor_of(child, address) as auditor:
        return auditor.verify(frames, order)


def reasons(result: AuditResult) -> dict[RejectionReason, PageFrames]:
    found = {reason: frames for frames, reason in result.rejected}
    assert len(found) == len(result.rejected)
    assert all(found.values())
    return found


def test_populated_and_locked_frames_are_good(child: Child) -> None:
    address = child.arena(PAGES)
    child.run(f"populate(a, {PAGES})")
    assert verify(child, address) == AuditResult(ALL, ())


def test_touched_frames_are_good_at_once(child: Child) -> None:
    # Their LRU and UNEVICTABLE flags lag behind in a per-CPU batch; MLOCKED does not.
    address = child.arena(PAGES)
    with auditor_of(child, address) as auditor:
        for pages in range(1, 60):
            child.run(f"drop(a, {PAGES}); touch(a, {pages})")
            frames = PageFrames.span(0, pages)
            assert auditor.verify(frames, 0) == AuditResult(frames, ())


def test_scattered_frames_are_told_from_absent_ones(child: Child) -> None:
    address = child.arena(PAGES)
    child.run(f"[populate(a + 8192 * i, 1) for i in range({PAGES} // 2)]")
    even = PageFrames.from_frames(np.arange(0, PAGES, 2))
    result = verify(child, address)
    assert result.good == even
    assert reasons(result) == {RejectionReason.NOT_PRESENT: ALL - even}
    assert verify(child, address, even) == AuditResult(even, ())


def test_no_frames_are_no_work(child: Child) -> None:
    address = child.arena(PAGES)
    for order in (0, 9):
        assert verify(child, address, PageFrames.empty(), order) == AuditResult(
            PageFrames.empty(), ()
        )


def test_frames_outside_the_arena(child: Child) -> None:
    address = child.arena(PAGES)
    child.run(f"populate(a, {PAGES})")
    result = verify(child, address, PageFrames.span(PAGES - 1, 3))
    assert result.good == PageFrames.span(PAGES - 1, 1)
    assert reasons(result) == {RejectionReason.OUT_OF_RANGE: PageFrames.span(PAGES, 2)}


def test_unlocked_frames(child: Child) -> None:
    address = child.arena(PAGES, locked=False)
    child.run(f"lock(a, 16); populate(a, {PAGES})")
    result = verify(child, address)
    assert result.good == PageFrames.span(0, 16)
    assert reasons(result) == {RejectionReason.NOT_LOCKED: ALL - result.good}


def test_frames_of_a_file(child: Child, tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(8 * 4096))
    address = child.arena(PAGES)
    child.run(
        f"populate(a, 16); fd = os.open({str(path)!r}, os.O_RDWR);"
        "map_pages(8, 1, fd, a); lock(a, 8); touch(a, 8)"
    )
    result = verify(child, address, PageFrames.span(0, 16))
    assert result.good == PageFrames.span(8, 8)
    assert reasons(result) == {RejectionReason.NOT_ANONYMOUS: PageFrames.span(0, 8)}


def test_frames_of_a_shared_mapping(child: Child) -> None:
    address = child.arena(PAGES)
    child.run(f"populate(a, 16); map_pages(8, {SHARED_ANON}, -1, a); lock(a, 8); touch(a, 8)")
    result = verify(child, address, PageFrames.span(0, 16))
    assert reasons(result) == {RejectionReason.NOT_ANONYMOUS: PageFrames.span(0, 8)}


def test_the_zero_page_is_no_frame(child: Child) -> None:
    address = child.arena(PAGES, locked=False)
    child.run("populate(a, 8); result = ctypes.string_at(a + 8 * 4096, 8 * 4096) and None")
    result = verify(child, address, PageFrames.span(8, 8))
    assert not result.good
    assert reasons(result) == {RejectionReason.NOT_ANONYMOUS: PageFrames.span(8, 8)}


def test_one_shared_page_mapped_twice(child: Child) -> None:
    # remap of a shared mapping (old size 0) is the one way to have a page twice in one process
    address = child.arena(PAGES)
    child.run(
        f"s = map_pages(1, {SHARED_ANON}); touch(s, 1); libc.mremap.restype = ctypes.c_void_p;"
        "libc.mremap(ctypes.c_void_p(s), ctypes.c_size_t(0), ctypes.c_size_t(4096), 3,"
        " ctypes.c_void_p(a)); "
        "libc.mremap(ctypes.c_void_p(s), ctypes.c_size_t(0), ctypes.c_size_t(4096), 3,"
        " ctypes.c_void_p(a + 4096)); touch(a, 2)"
    )
    result = verify(child, address, PageFrames.span(0, 2))
    assert not result.good
    assert reasons(result) == {RejectionReason.NOT_ANONYMOUS: PageFrames.span(0, 2)}


def test_frames_shared_with_a_fork(child: Child) -> None:
    address = child.arena(PAGES)
    child.run(f"populate(a, {PAGES})")
    # The fork writes to 16 of them: those are copied, and each side has one of its own.
    child.run(
        "r, w = os.pipe(); f = os.fork()\n"
        "if not f:\n"
        "    touch(a, 16); os.write(w, b'x'); import signal; signal.pause()\n"
        "os.read(r, 1)"
    )
    try:
        result = verify(child, address)
        assert reasons(result) == {RejectionReason.SHARED: PageFrames.span(16, PAGES - 16)}
    finally:
        child.run("os.kill(f, 9); os.waitpid(f, 0)")
    assert verify(child, address) == AuditResult(ALL, ())


def test_frames_charged_to_another_cgroup(child: Child, new_cgroup: Callable[[], Path]) -> None:
    address = child.arena(PAGES)
    other = new_cgroup()
    child.run(
        f"populate(a, 32); join({str(other / 'cgroup.procs')!r}); populate(a + 32 * 4096, 32)"
    )
    result = verify(child, address, PageFrames.span(0, 64))
    assert result.good == PageFrames.span(0, 32)
    assert reasons(result) == {RejectionReason.FOREIGN_CGROUP: PageFrames.span(32, 32)}


def test_base_frames_inside_a_huge_page_are_shared(child: Child) -> None:
    address = child.arena(PAGES, huge=True)
    child.run("populate(a, 512)")
    result = verify(child, address, PageFrames.span(5, 3))
    assert reasons(result) == {RejectionReason.SHARED: PageFrames.span(5, 3)}


def test_huge_frames_are_good(child: Child) -> None:
    address = child.arena(PAGES, huge=True)
    child.run(f"populate(a, {PAGES})")
    assert verify(child, address, order=9) == AuditResult(ALL, ())


def test_huge_frames_of_base_pages(child: Child) -> None:
    address = child.arena(PAGES, huge=True)
    child.run("populate(a, 512); advise(a + 512 * 4096, 512, 15); populate(a + 512 * 4096, 512)")
    result = verify(child, address, PageFrames.span(0, 1024), order=9)
    assert result.good == PageFrames.span(0, 512)
    assert reasons(result) == {RejectionReason.NOT_HUGE: PageFrames.span(512, 512)}


def test_huge_frames_of_smaller_folios(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    # Folios of 1 MiB that happen to lie side by side: all bits are those of a huge page, but for
    # the page in the middle, which is a head. (Making some would change settings of this machine.)
    address = child.arena(PAGES, huge=True)
    child.run(f"populate(a, {PAGES})")
    flags = KernelPages.flags

    def with_smaller_folios(self: KernelPages, plan: Any) -> Any:
        seen = flags(self, plan)
        tails = (seen & KPF_COMPOUND_TAIL) != 0
        seen[tails] ^= KPF_COMPOUND_TAIL | KPF_COMPOUND_HEAD
        return seen

    monkeypatch.setattr(KernelPages, "flags", with_smaller_folios)
    result = verify(child, address, order=9)
    assert reasons(result) == {RejectionReason.NOT_HUGE: ALL}


def test_halves_of_two_huge_pages_are_no_huge_frames(child: Child) -> None:
    # Dropping one frame would free neither page.
    address = child.arena(PAGES, huge=True)
    child.run(
        "populate(a, 1024); half = 256 * 4096; spare = a + 8 * half\n"
        "libc.mremap.restype = ctypes.c_void_p\n"
        "def move(old, new):\n"
        "    size = ctypes.c_size_t(half)\n"
        "    found = libc.mremap(ctypes.c_void_p(old), size, size, 3, ctypes.c_void_p(new))\n"
        "    assert found == new, ctypes.get_errno()\n"
        "move(a + half, spare); move(a + 3 * half, a + half); move(spare, a + 3 * half)"
    )
    result = verify(child, address, PageFrames.span(0, 1024), order=9)
    assert not result.good
    # A huge page that is mapped in pieces is locked no more, says Linux 6.1.
    [(reason, rejected)] = reasons(result).items()
    assert reason in (RejectionReason.NOT_HUGE, RejectionReason.NOT_LOCKED)
    assert rejected == PageFrames.span(0, 1024)


@pytest.mark.parametrize(("huge", "unit"), [(False, 1), (True, 512)])
def test_one_physical_page_under_two_frames(child: Child, huge: bool, unit: int) -> None:
    # No way is known to make one of anonymous pages; so pagemap is made to say it.
    address = child.arena(PAGES, huge=huge)
    child.run(f"populate(a, {PAGES})")
    with auditor_of(child, address) as auditor:
        entries = auditor._pages.entries

        def doubled(*args: Any) -> Any:
            seen = entries(*args)
            # The last unit looked at is under the first one's page: again in every look.
            seen[-unit:] = seen[:unit]
            return seen

        auditor._pages.entries = doubled  # type: ignore[method-assign]
        result = auditor.verify(PageFrames.span(0, 4 * unit), 9 if huge else 0)
    twice = PageFrames.from_ranges([0, 3 * unit], [unit, unit])
    assert reasons(result) == {RejectionReason.SHARED: twice}


def test_parts_of_huge_frames(child: Child) -> None:
    address = child.arena(PAGES, huge=True)
    child.run(f"populate(a, {PAGES})")
    result = verify(child, address, PageFrames.span(100, 1000), order=9)
    assert result.good == PageFrames.span(512, 512)
    assert reasons(result) == {
        RejectionReason.NOT_HUGE: PageFrames.span(100, 1000) - PageFrames.span(512, 512)
    }


def test_a_huge_frame_with_a_hole_is_absent_as_a_whole(child: Child) -> None:
    address = child.arena(PAGES, huge=True)
    child.run("populate(a, 1024); drop(a + 7 * 4096, 1)")
    result = verify(child, address, PageFrames.span(0, 1024), order=9)
    assert result.good == PageFrames.span(512, 512)
    assert reasons(result) == {RejectionReason.NOT_PRESENT: PageFrames.span(0, 512)}


def test_unlocked_and_foreign_huge_frames(child: Child, new_cgroup: Callable[[], Path]) -> None:
    address = child.arena(PAGES, huge=True, locked=False)
    child.run(f"lock(a, 512); populate(a, 1024); join({str(new_cgroup() / 'cgroup.procs')!r})")
    child.run("populate(a + 1024 * 4096, 512)")
    result = verify(child, address, PageFrames.span(0, 1536), order=9)
    assert result.good == PageFrames.span(0, 512)
    assert reasons(result) == {
        RejectionReason.NOT_LOCKED: PageFrames.span(512, 512),
        RejectionReason.FOREIGN_CGROUP: PageFrames.span(1024, 512),
    }


def test_every_reason_in_one_report_adds_up(child: Child) -> None:
    address = child.arena(PAGES, locked=False)
    child.run(f"lock(a, 8); populate(a, 16); map_pages(4, {SHARED_ANON}, -1, a); touch(a, 4)")
    asked = PageFrames.from_ranges([0, PAGES - 4], [20, 8])
    result = verify(child, address, asked)
    parts = [result.good, *(frames for frames, _ in result.rejected)]
    assert sum(len(part) for part in parts) == len(asked)
    assert result.good == PageFrames.span(4, 4)
    assert set(reasons(result)) == {
        RejectionReason.NOT_ANONYMOUS,
        RejectionReason.NOT_LOCKED,
        RejectionReason.NOT_PRESENT,
        RejectionReason.OUT_OF_RANGE,
    }


def test_gone_tells_what_is_still_there_in_both_ways(child: Child) -> None:
    address = child.arena(PAGES)
    asked = PageFrames.from_ranges([0, 100, 2000], [50, 800, 2000])
    with auditor_of(child, address) as auditor:
        assert not auditor.gone(asked)
        child.run("[populate(a + i * 4096, n) for i, n in ((0, 10), (60, 60), (3000, 1000))]")
        there = asked & PageFrames.from_ranges([0, 60, 3000], [10, 60, 1000])
        assert auditor.gone(asked) == there
        assert auditor._present_by_pagemap(asked) == there
        try:
            assert auditor._present_by_scan(asked) == there
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
        child.run(f"drop(a, {PAGES})")
        assert not auditor.gone(asked)
        assert not auditor._present_by_pagemap(asked)
        assert not auditor.gone(PageFrames.span(PAGES, 5))


def test_both_ways_agree_on_many_regions(child: Child) -> None:
    pages = 3 * 8192
    address = child.arena(pages)
    child.run(f"[populate(a + 8192 * i, 1) for i in range({pages} // 2)]")
    even = PageFrames.from_frames(np.arange(0, pages, 2))
    with auditor_of(child, address, pages) as auditor:
        every = PageFrames.span(0, pages)
        assert auditor.gone(every) == even == auditor._present_by_pagemap(every)


def test_huge_frames_are_gone_whole(child: Child) -> None:
    address = child.arena(PAGES, huge=True)
    child.run(f"populate(a, {PAGES}); drop(a, 1024)")
    with auditor_of(child, address) as auditor:
        assert auditor.gone(ALL) == ALL - PageFrames.span(0, 1024)


def test_a_dead_process(new_child: Callable[..., Child]) -> None:
    child = new_child()
    address = child.arena(PAGES)
    child.run("populate(a, 64)")
    with auditor_of(child, address) as auditor:
        child.end()
        with pytest.raises(ProcessGone, match=str(child.pid)):
            auditor.verify(ALL, 0)
        with pytest.raises(ProcessGone):
            auditor.gone(ALL)
    with pytest.raises(ProcessGone):
        FrameAuditor(child.pid, address, PAGES, 1)


def test_a_process_that_became_another_program(new_child: Callable[..., Child]) -> None:
    child = new_child()
    address = child.arena(PAGES)
    child.run("populate(a, 64)")
    with auditor_of(child, address) as auditor:
        with pytest.raises(RuntimeError):
            child.run("os.execvp('sh', ['sh', '-c', 'echo changed; exec sleep 60'])")
        with pytest.raises(ProcessGone):
            auditor.verify(ALL, 0)


@pytest.mark.parametrize(
    ("address", "pages"),
    [(0, 1), (4095, 1), (-4096, 1), (4096, 0), (4096, 2**33), (2**56 - 4096, 2), (2**64, 1)],
)
def test_impossible_arenas_are_refused(address: int, pages: int) -> None:
    with pytest.raises(ValueError, match="can't"):
        FrameAuditor(os.getpid(), address, pages, 1)


def test_an_arena_outside_of_user_space_holds_nothing(child: Child) -> None:
    with auditor_of(child, 2**55) as auditor:
        assert reasons(auditor.verify(ALL, 0)) == {RejectionReason.NOT_PRESENT: ALL}
        assert not auditor.gone(ALL)


def test_without_the_capability_frames_are_hidden(child: Child) -> None:
    address = child.arena(PAGES)
    child.run("populate(a, 64)")
    # A process without CAP_SYS_ADMIN looks: in a fork, since rights can't be had back.
    reader = os.fork()
    if not reader:
        code = 1
        try:
            kernel_pages()
            drop_sys_admin()
            with auditor_of(child, address) as auditor:
                auditor.verify(ALL, 0)
        except FramesHidden as error:
            code = 0 if "CAP_SYS_ADMIN" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


def drop_sys_admin() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    # Keep CAP_SYS_PTRACE (19), which opening another's pagemap asks for.
    data = (ctypes.c_uint32 * 6)(1 << 19, 1 << 19, 0, 0, 0, 0)
    assert ctypes.CDLL(None).capset(header, data) == 0


def test_closing_during_a_look_leaves_the_files_open_until_its_end(child: Child) -> None:
    address = child.arena(PAGES)
    child.run(f"populate(a, {PAGES})")
    auditor = auditor_of(child, address)
    pause, seen = threading.Event(), threading.Event()
    entries = auditor._pages.entries

    def slow_entries(*args: Any) -> Any:
        seen.set()
        assert pause.wait(10)
        return entries(*args)

    auditor._pages.entries = slow_entries  # type: ignore[method-assign]
    results: list[AuditResult] = []
    thread = threading.Thread(target=lambda: results.append(auditor.verify(ALL, 0)))
    thread.start()
    assert seen.wait(10)
    auditor.close()
    auditor.close()
    pause.set()
    thread.join(10)
    assert results == [AuditResult(ALL, ())]
    with pytest.raises(AuditorClosed):
        auditor.verify(ALL, 0)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(auditor._pages._pagemap_fd)


def test_a_page_that_moved_between_the_reads_is_looked_at_again(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = child.arena(PAGES)
    child.run(f"populate(a, {PAGES})")
    flags = KernelPages.flags
    wrong = [True]

    def once_wrong(self: KernelPages, plan: Any) -> Any:
        seen = flags(self, plan)
        return np.zeros_like(seen) if wrong and wrong.pop() else seen

    monkeypatch.setattr(KernelPages, "flags", once_wrong)
    assert verify(child, address) == AuditResult(ALL, ())
    assert not wrong


@pytest.mark.parametrize(("huge", "target_ms_per_gib"), [(False, 60), (True, 15)])
def test_speed_is_printed(child: Child, huge: bool, target_ms_per_gib: int) -> None:
    pages = 4 * 8192
    address = child.arena(pages, huge=huge)
    child.run(f"populate(a, {pages})")
    order = 9 if huge else 0
    chunk = PageFrames.span(0, 8192)
    with auditor_of(child, address, pages) as auditor:
        times_ms, gone_ms = [], []
        for chunk in list(PageFrames.span(0, pages).chunks(8192)) * 3:
            began = time.perf_counter()
            result = auditor.verify(chunk, order)
            times_ms.append((time.perf_counter() - began) * 1e3)
            assert result.good == chunk
            began = time.perf_counter()
            assert auditor.gone(chunk) == chunk
            gone_ms.append((time.perf_counter() - began) * 1e3)
    median_ms = sorted(times_ms)[len(times_ms) // 2]
    print(
        f"\n32 MiB in frames of order {order}: verified in {median_ms:.2f} ms (median), "
        f"{median_ms * 32:.0f} ms a GiB, aim {target_ms_per_gib}; "
        f"gone in {sorted(gone_ms)[len(gone_ms) // 2]:.2f} ms"
    )
