"""How much of a guest's memory is in use: from made-up files, and from a real process."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_driver.activity import (
    MOST_CGROUPS,
    MOST_RESIDENT_BYTES,
    PERIOD_S,
    WORK_SHARE,
    ActivitySampler,
    Touched,
    active_fraction,
    pause_s,
)
from guest_driver.vitals import GuestMemory
from protocol.units import KIB, MIB, PAGE_BYTES

MEMORY = GuestMemory(limit_bytes=200 * MIB, usage_bytes=100 * MIB, anon_bytes=80 * MIB)
"""20 MiB are cache or the kernel's."""


@pytest.mark.parametrize(
    ("touched_mib", "active_mib"),
    [
        (80, 100),
        (0, 20),
        (40, 60),  # 20 + 80 * 40 / 80
        (81, 100),  # read while it changed
    ],
)
def test_anonymous_memory_counts_as_far_as_it_was_touched(
    touched_mib: int, active_mib: int
) -> None:
    touched = Touched(touched_mib * MIB, 80 * MIB)
    assert active_fraction(touched, MEMORY) == pytest.approx(active_mib / 200)


def test_idle_cache_is_idle_and_without_a_limit_usage_is_the_whole() -> None:
    memory = GuestMemory(
        usage_bytes=100 * MIB,
        anon_bytes=40 * MIB,
        file_bytes=60 * MIB,
        inactive_file_bytes=50 * MIB,
        active_file_bytes=10 * MIB,
    )
    # 100 - 50 of idle cache - half of 40
    assert active_fraction(Touched(20 * MIB, 40 * MIB), memory) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("touched", "memory"),
    [
        (None, MEMORY),
        (Touched(39 * MIB, 39 * MIB), MEMORY),  # less than half of what there is
        (Touched(0, 0), GuestMemory(limit_bytes=MIB, usage_bytes=MIB, anon_bytes=0)),
        (Touched(MIB, 80 * MIB), GuestMemory(limit_bytes=MIB, anon_bytes=80 * MIB)),
        (Touched(MIB, 80 * MIB), GuestMemory(limit_bytes=MIB, usage_bytes=80 * MIB)),
    ],
)
def test_unknown_is_none(touched: Touched | None, memory: GuestMemory) -> None:
    assert active_fraction(touched, memory) is None


@given(*[st.none() | st.integers(0, 2**64 - 1)] * 4, st.integers(0, 2**64), st.integers(0, 2**64))
def test_it_is_a_fraction_whatever_the_kernel_says(
    limit: int | None,
    usage: int | None,
    anon: int | None,
    inactive_file: int | None,
    referenced: int,
    resident: int,
) -> None:
    memory = GuestMemory(
        limit_bytes=limit, usage_bytes=usage, anon_bytes=anon, inactive_file_bytes=inactive_file
    )
    found = active_fraction(Touched(referenced, resident), memory)
    assert found is None or 0 <= found <= 1


def test_a_sample_that_takes_long_is_followed_by_a_long_rest() -> None:
    assert pause_s(0.001) == PERIOD_S
    assert pause_s(1.0) == pytest.approx(1 / WORK_SHARE)


class MadeUpProc:
    """A cgroup of processes 1, 2, ... and their files."""

    def __init__(self, folder: Path, *processes: tuple[int, int]) -> None:
        self.cgroup, self.proc = folder / "workload", folder / "proc"
        self.cgroup.mkdir()
        pids = range(1, len(processes) + 1)
        (self.cgroup / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
        for pid, sizes in zip(pids, processes, strict=True):
            (self.proc / str(pid)).mkdir(parents=True)
            self.set(pid, *sizes)

    def set(self, pid: int, resident_kib: int, referenced_kib: int) -> None:
        text = f"00400000-7ffd2 ---p 0 00:00 0    [rollup]\nRss:  {resident_kib} kB\nPss: 7 kB\n"
        (self.proc / str(pid) / "smaps_rollup").write_text(
            text + f"Referenced:  {referenced_kib} kB\nAnonymous:  3 kB\n"
        )
        resident_pages = resident_kib * KIB // PAGE_BYTES
        (self.proc / str(pid) / "statm").write_text(f"99999 {resident_pages} 1 1 0 1 0\n")

    def sampler(self) -> ActivitySampler:
        return ActivitySampler(self.cgroup, proc_path=self.proc)

    def cleared(self) -> list[str]:
        return sorted(path.parent.name for path in self.proc.glob("*/clear_refs"))


def test_the_first_sample_only_clears(tmp_path: Path) -> None:
    made = MadeUpProc(tmp_path, (100, 60), (50, 5))
    sampler = made.sampler()
    assert sampler.sample() is None
    assert made.cleared() == ["1", "2"]
    made.set(1, 100, 40)
    assert sampler.sample() == Touched(45 * KIB, 150 * KIB)
    sampler.skip()
    assert sampler.sample() is None, "of too long a period"
    assert sampler.sample() == Touched(45 * KIB, 150 * KIB)


def test_what_is_gone_or_may_not_be_read_is_left_out_and_not_cleared(tmp_path: Path) -> None:
    made = MadeUpProc(tmp_path, (100, 60), (50, 5))
    (made.proc / "2" / "smaps_rollup").unlink()
    sampler = made.sampler()
    sampler.sample()
    assert made.cleared() == ["1"]
    assert sampler.sample() == Touched(60 * KIB, 100 * KIB)
    assert ActivitySampler(tmp_path / "nothing").sample() is None


def test_a_container_has_its_processes_in_cgroups_below(tmp_path: Path) -> None:
    made = MadeUpProc(tmp_path, (100, 60), (50, 5), (20, 1))
    below = made.cgroup / "3f0c"
    for folder, pids in ((made.cgroup, "1\n"), (below, "2\n0\n"), (below / "init.scope", "3\n")):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.procs").write_text(pids)
    sampler = made.sampler()
    sampler.sample()
    assert made.cleared() == ["1", "2", "3"]
    assert sampler.sample() == Touched(66 * KIB, 170 * KIB)


def test_a_guest_can_make_more_cgroups_than_are_looked_at(tmp_path: Path) -> None:
    made = MadeUpProc(tmp_path, *[(100, 60)] * (MOST_CGROUPS + 9))
    (made.cgroup / "cgroup.procs").write_text("")
    for pid in range(1, MOST_CGROUPS + 10):
        folder = made.cgroup / f"x{pid}"
        folder.mkdir()
        (folder / "cgroup.procs").write_text(f"{pid}\n")
    made.sampler().sample()
    assert len(made.cleared()) == MOST_CGROUPS - 1


def test_a_process_that_would_stand_still_for_long_is_left_alone(tmp_path: Path) -> None:
    most_kib = MOST_RESIDENT_BYTES // KIB
    made = MadeUpProc(tmp_path, (most_kib, 4), (most_kib + 4, 4))
    sampler = made.sampler()
    sampler.sample()
    assert made.cleared() == ["1"]
    sample = sampler.sample()
    assert sample == Touched(4 * KIB, MOST_RESIDENT_BYTES)
    # What is left says nothing where most was left alone.
    assert active_fraction(sample, GuestMemory(limit_bytes=1 << 40, anon_bytes=1 << 32)) is None


def test_a_sample_takes_what_it_takes_of_the_processor_however_busy_that_is(tmp_path: Path) -> None:
    made = MadeUpProc(tmp_path, (100, 60))
    slow = made.proc / "1" / "smaps_rollup"
    slow.unlink()
    os.mkfifo(slow)
    writer = threading.Timer(0.5, slow.write_text, (f"Rss: {MIB} kB\n",))
    sampler = made.sampler()
    began_s = time.monotonic()
    writer.start()
    try:
        sampler.sample()
        waited_s = time.monotonic() - began_s
    finally:
        writer.join()
    assert waited_s > 0.4
    assert 0 < sampler.took_s < waited_s / 4
    sampler.skip()
    assert sampler.took_s == 0


HALF = """
import sys
block = memoryview(bytearray(64 << 20))
for line in sys.stdin:
    for at in range(0, int(line) << 20, 4096):
        block[at] = 1
    print("done", flush=True)
"""


@pytest.fixture
def process() -> "Iterator[subprocess.Popen[str]]":
    """Holds 64 MiB, and touches as many as it is told."""
    child = subprocess.Popen(
        [sys.executable, "-c", HALF], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()


def test_a_real_process_is_seen_to_touch_its_memory(
    process: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    if not os.access(f"/proc/{process.pid}/smaps_rollup", os.R_OK):
        pytest.skip("this kernel has no smaps_rollup")
    (tmp_path / "cgroup.procs").write_text(f"{process.pid}\n")
    sampler = ActivitySampler(tmp_path)

    def touch(mib: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{mib}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    touch(64)
    sampler.sample()
    found = []
    for mib in (32, 64, 0):
        touch(mib)
        sample = sampler.sample()
        assert sample is not None
        assert sample.resident_bytes >= 64 * MIB
        found.append(sample.referenced_bytes)
    # The interpreter's own pages come on top. The bits of pages that the processor still has in its
    # TLB, up to 12 MiB of them, are set a moment later.
    assert 16 * MIB <= found[0] < 60 * MIB
    assert found[1] >= 48 * MIB
    assert found[2] < 32 * MIB
