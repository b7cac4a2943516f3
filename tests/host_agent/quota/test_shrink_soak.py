"""Shrinks by the hundred, against workloads that allocate as fast as the machine can.

Counted: processes that the OOM killer has killed, and lost moves. A move is lost if a shrink said
yes and the limit is not what was asked for, or said no and left anything other than it was.
"""

import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from quota_rigs import CgroupRig, ProcessTenant, readable, wait_for

from host_agent.quota.base import Part, VmQuota
from host_agent.quota.cgroup2 import soft_wall_bytes
from host_agent.quota.errors import NoRoom
from host_agent.quota.phases import ShrinkPhases
from protocol.units import MIB

pytestmark = pytest.mark.effects

ASSIGNED_MIB = 192
LOAN_BYTES = 8 * MIB
PAUSE_MAX_S = 0.04
LIFE_MAX_S = 0.12
"""Of a round of the workload, before a shrink and after it: some rounds meet the new limit."""

# Whole MiB at a time, so that the kernel's speed counts and not Python's. With version 1 a system
# call fails in a dry guest (ENOMEM), where it is not a page fault: then it is tried again.
RUSH = """
import mmap, os, random, sys
least, most = int(sys.argv[1]), int(sys.argv[2])
chunk = bytes(1 << 20)
os.write(1, b"done")
while True:
    size = random.randint(least, most)
    try:
        memory = mmap.mmap(-1, size << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(size):
            memory.write(chunk)
        memory.close()
    except (OSError, MemoryError):
        pass
"""
READ = """
import os, sys
file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
size = int(sys.argv[1]) << 20
for _ in range(size >> 20):
    os.write(file, bytes(1 << 20))
os.fsync(file)
os.write(1, b"done")
buffer, at = bytearray(1 << 16), 0
while True:
    try:
        at = (at + os.preadv(file, [buffer], at)) % size
    except OSError:
        pass
"""


def read(rig: CgroupRig, quota: VmQuota, mib: int) -> ProcessTenant:
    """A process that reads a file again and again, for ever."""
    procs = quota.procs_path(Part.WORKLOAD)
    return rig.start(procs, READ, str(mib), str(rig.scratch / "stream"))


def rush(rig: CgroupRig, quota: VmQuota, least_mib: int, most_mib: int) -> ProcessTenant:
    """A process that takes and gives back so much at full speed, for ever."""
    procs = quota.procs_path(Part.WORKLOAD)
    return rig.start(procs, RUSH, str(least_mib), str(most_mib))


@dataclass
class Answers:
    """The agent's part: whoever runs dry is given memory, 8 MiB at a time."""

    quota: VmQuota
    raised_to: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False

    @contextmanager
    def given(self) -> Iterator[None]:
        event = self.quota.arm_dry_events()
        thread = threading.Thread(target=self._run, args=(event,))
        thread.start()
        try:
            yield
        finally:
            self.ended = True
            thread.join()

    def _run(self, event: int) -> None:
        while not self.ended:
            readable(event, 0.02)
            with self.lock:
                if self.quota.dry_state().under_oom:
                    now = self.quota.read().workload_limit_bytes
                    lent = min(now + LOAN_BYTES, ASSIGNED_MIB * MIB)
                    self.quota.raise_workload(lent)
                    self.raised_to.append(lent)


@dataclass
class Tally:
    """What came of the shrinks."""

    done: list[ShrinkPhases] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.done)} done, {len(self.refused)} refused, {len(self.lost)} lost moves"
        if not self.done:
            return text
        for name in ("total_s", "settle_s", "frozen_s"):
            times_ms = [getattr(phases, name) * 1000 for phases in self.done]
            text += f"; {name} median {statistics.median(times_ms):.2f} ms"
            text += f", longest {max(times_ms):.2f} ms"
        return text


def side_state(workload: Path) -> dict[str, str]:
    """What a shrink changes for its own purposes, on either version."""
    names = ("memory.swappiness", "memory.swap.max")
    return {name: (workload / name).read_text() for name in names if (workload / name).exists()}


def shrink_once(quota: VmQuota, limit_bytes: int, answers: Answers | None, tally: Tally) -> None:
    workload = quota.directory / Part.WORKLOAD
    before_bytes, before_state = quota.read().workload_limit_bytes, side_state(workload)
    raises = len(answers.raised_to) if answers else 0
    expected = limit_bytes
    try:
        tally.done.append(quota.make_room(limit_bytes))
    except NoRoom as error:
        tally.refused.append(str(error))
        expected = before_bytes
    with answers.lock if answers else threading.Lock():
        found = {"limit": str(quota.read().workload_limit_bytes), **side_state(workload)}
        if answers and len(answers.raised_to) > raises:
            expected = max(expected, answers.raised_to[-1])
        wanted = {"limit": str(expected), **before_state}
        if (workload / "memory.high").exists():
            # A dry workload may be held: then it is not the shrink that froze it.
            if not quota.dry_state().under_oom:
                found["frozen"] = (workload / "cgroup.freeze").read_text().strip()
                wanted["frozen"] = "0"
            found["high"] = (workload / "memory.high").read_text().strip()
            wanted["high"] = str(soft_wall_bytes(expected)) if answers else "max"
    if found != wanted:
        tally.lost.append(f"asked for {limit_bytes}, had {before_bytes}: {found}, not {wanted}")


def answered_shrinks(rig: CgroupRig, shrinks: int) -> Tally:
    """A guest that streams through a file and takes what it can get, with an agent that answers."""
    quota = rig.create(quota_mib=ASSIGNED_MIB, overhead_mib=24)
    answers, tally, dice = Answers(quota), Tally(), random.Random(shrinks)
    with answers.given():
        tenants = [rush(rig, quota, 48, 112), read(rig, quota, 64)]
        wait_for(lambda: all(tenant.done() for tenant in tenants), "both are under way")
        for _ in range(shrinks):
            with answers.lock:
                quota.raise_workload(ASSIGNED_MIB * MIB)
            time.sleep(dice.random() * PAUSE_MAX_S)  # anywhere in the workload's round
            shrink_once(quota, dice.randrange(40, ASSIGNED_MIB) * MIB, answers, tally)
            time.sleep(dice.random() * LIFE_MAX_S)  # it lives with that, or runs dry
        quota.raise_workload(ASSIGNED_MIB * MIB)
        assert [tenant.process.poll() for tenant in tenants] == [None, None]
        print(f"{len(answers.raised_to)} loans; {tally}")
    assert quota.oom_kills_total == 0
    assert tally.lost == []
    assert len(tally.done) + len(tally.refused) == shrinks
    assert len(tally.done) > shrinks / 4
    return tally


def unanswered_shrinks(rig: CgroupRig, shrinks: int) -> Tally:
    """Nobody would answer a dry guest: now a limit that it fits under, now one that it doesn't."""
    quota = rig.create(quota_mib=96)
    tally, dice = Tally(), random.Random(shrinks)
    tenant = rush(rig, quota, 64, 64)
    wait_for(tenant.done, "it swings")
    for number in range(shrinks):
        fits = bool(number % 2)
        limit_mib = dice.randrange(80, 96) if fits else dice.randrange(24, 56)
        refused = len(tally.refused)
        shrink_once(quota, limit_mib * MIB, None, tally)
        while fits and "cannot be frozen" in "".join(tally.refused[refused:]):
            # It was slowed at the wall of the shrink before, and sleeps that off.
            tally.refused.pop()
            shrink_once(quota, limit_mib * MIB, None, tally)
        assert len(tally.refused) == refused + (not fits), (limit_mib, tally.refused[refused:])
        quota.raise_workload(96 * MIB)
    assert tenant.alive()
    print(tally)
    assert quota.oom_kills_total == 0
    assert tally.lost == []
    return tally


def test_shrinks_kill_nobody_and_none_is_lost(real_rig: CgroupRig) -> None:
    answered_shrinks(real_rig, 60)


def test_unanswered_shrinks_kill_nobody(rig2: CgroupRig) -> None:
    unanswered_shrinks(rig2, 12)


@pytest.mark.soak
def test_a_thousand_shrinks_kill_nobody_and_none_is_lost(real_rig: CgroupRig) -> None:
    answered_shrinks(real_rig, 1000)


@pytest.mark.soak
def test_a_hundred_unanswered_shrinks_kill_nobody(rig2: CgroupRig) -> None:
    unanswered_shrinks(rig2, 100)
