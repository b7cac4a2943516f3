"""How much of the guest's memory is in use: sampled from the accessed bits of its page tables.

ESX takes away the mappings of a few random pages each period and counts those that the guest
touches again. Linux lets a process look at the accessed bits of another one of its own user: each
period this reads how much of the workload's mapped memory was referenced since the period before
(`Referenced` in smaps_rollup), then clears the bits (`1` into clear_refs). All pages are looked at,
where ESX estimates from a hundred; the averages over time are the policy's.

It reaches the processes that the driver sees and may read: those of a mock VM that is a process
tree, and of a container that runs the driver itself as the same user; an engine has put them into a
cgroup below the workload's. Where those it reaches hold less than half of the guest's anonymous
memory, nothing is known.

Clearing has a price: for the kernel's own reclaim a page is young again only when it is touched
again. So nothing is cleared while the guest refaults or swaps, when reclaim needs the bits. It
takes 10 to 15 us for each MiB, reading 17 to 30 us (one processor, base pages), in a thread of its
own, and the rests are so long that both never take more than WORK_SHARE of a processor. That is
reckoned in time on the processor: how long others had it, on a busy machine, says nothing about the
work.

While its bits are cleared a process has page faults wait: the kernel holds the lock of its mappings
for writing. So that is less than WORK_SHARE of the time as well, and some 15 ms at most in one go
(more only where the clearing itself has to wait for a processor): a process of more than
MOST_RESIDENT_BYTES is not looked at, and counts as one that can't be read.

A page that the processor has in its TLB is seen a moment late: right after clearing, 2 of 32 MiB
that were written anew were missing, a second later none, also of a loop over 2 MiB.

What it is not: memory.stat's active and inactive lists. A page that is touched for the first time
goes on the inactive list and stays there until something is reclaimed: a guest that writes all of
its anonymous memory five times a second has none of it on the active one (Linux 6.18). Idle page
tracking (/sys/kernel/mm/page_idle) is the host's, and rarely compiled in.

Sources: Waldspurger, OSDI 2002, section 5.3; Documentation/filesystems/proc.rst, "clear_refs".
"""

import contextlib
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from guest_driver.demand import working_set_bytes
from guest_driver.vitals import GuestMemory
from protocol.units import GIB, KIB, PAGE_BYTES

PERIOD_S: Final = 10.0
"""At least so long from sample to sample: a third of ESX's, for demonstrations of a minute."""

WORK_SHARE: Final = 0.001
"""Of one processor, at most: 40 ms for a GiB of base pages are followed by 40 s of rest."""

SEEN_SHARE: Final = 0.5
"""Of the guest's anonymous memory: what is seen of less says nothing about the rest."""

MOST_RESIDENT_BYTES: Final = GIB
"""Of one process: clearing the bits of so much has its page faults wait for 15 ms."""

MOST_CGROUPS: Final = 256
"""At and below the workload's: a guest makes as many as it likes. systemd makes some 50."""

_PROC: Final = Path("/proc")

_FIELDS: Final = {b"Rss:": "resident_bytes", b"Referenced:": "referenced_bytes"}


@dataclass(frozen=True, slots=True)
class Touched:
    """What the workload's processes have mapped, and how much of it was touched in a period."""

    referenced_bytes: int
    resident_bytes: int


class ActivitySampler:
    """Samples the processes of the workload whose cgroup is at `workload_path`.

    Errors: none. A process that is gone, or that may not be looked at, is left out.
    """

    def __init__(self, workload_path: Path | str, *, proc_path: Path = _PROC) -> None:
        self._workload = Path(workload_path)
        self._proc = proc_path
        self._is_first = True
        self.took_s = 0.0
        """Time on the processor that the last sample took, seconds; 0 after `skip`."""

    def sample(self) -> Touched | None:
        """What was touched since the last sample; None for the first one. Blocks for 45 ms/GiB."""
        began_s = time.thread_time()
        referenced = resident = 0
        for pid in self._pids():
            here = self._proc / pid
            with contextlib.suppress(OSError):
                if _resident_bytes((here / "statm").read_bytes()) > MOST_RESIDENT_BYTES:
                    continue
                one = _sizes((here / "smaps_rollup").read_bytes())
                (here / "clear_refs").write_bytes(b"1")
                referenced += one.referenced_bytes
                resident += one.resident_bytes
        first, self._is_first = self._is_first, False
        self.took_s = time.thread_time() - began_s
        return None if first else Touched(referenced, resident)

    def skip(self) -> None:
        """Leave the bits alone this time: the next sample would be of too long a period."""
        self._is_first = True
        self.took_s = 0.0

    def _pids(self) -> set[str]:
        found: set[str] = set()
        for folder, _, _ in islice(os.walk(self._workload), MOST_CGROUPS):
            with contextlib.suppress(OSError):  # gone since the walk
                found.update(Path(folder, "cgroup.procs").read_text(encoding="ascii").split())
        return found


def active_fraction(touched: Touched | None, memory: GuestMemory) -> float | None:
    """The part of the guest's limit that is in use, 0 to 1; None where too little was seen.

    Anonymous memory counts as far as mapped memory was touched, page cache as far as the kernel
    thinks that it is active, the kernel's own memory wholly.
    """
    working_set = working_set_bytes(memory)
    whole_bytes = memory.limit_bytes or memory.usage_bytes
    anon_bytes = memory.anon_bytes
    if touched is None or working_set is None or anon_bytes is None or not whole_bytes:
        return None
    if not touched.resident_bytes or touched.resident_bytes < SEEN_SHARE * anon_bytes:
        return None
    idle_share = max(0.0, 1 - touched.referenced_bytes / touched.resident_bytes)
    active_bytes = working_set - idle_share * anon_bytes
    return min(max(active_bytes / whole_bytes, 0.0), 1.0)


def pause_s(took_s: float) -> float:
    """How long to rest after a sample that took so much time on the processor."""
    return max(PERIOD_S, took_s / WORK_SHARE)


def _resident_bytes(statm: bytes) -> int:
    """The second number of it, in pages: it costs nothing, unlike a look at all pages."""
    return int(statm.split()[1]) * PAGE_BYTES


def _sizes(rollup: bytes) -> Touched:
    """Lines like `Referenced:  32 kB`, after one that names the address range."""
    found = dict.fromkeys(_FIELDS.values(), 0)
    for line in rollup.splitlines():
        words = line.split()
        if words and words[0] in _FIELDS:
            found[_FIELDS[words[0]]] = int(words[1]) * KIB
    return Touched(**found)
