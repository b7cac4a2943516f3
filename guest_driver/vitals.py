"""The guest's own view of its memory: the files of its workload's cgroup, and nothing else.

This module owns the names of the kernel's statistics, on cgroup v1 and v2, and their units. It
decides nothing: demand.py estimates, balloon.py decides. It never reads what belongs to the host
(`/proc/meminfo`, `/proc/pressure/memory`), since a guest that knew the host's shortage would not
be a guest. The one exception is `/proc/swaps`: swap space is shared by all cgroups, and how much
of it is left bounds what this guest could swap.

The files are kept open and read with pread, because this runs several times a second in every
guest. A cgroup that goes away and comes back under the same name is found again.

Sources: Documentation/admin-guide/cgroup-v1/memory.rst, section 5.2, and cgroup-v2.rst,
"Memory Interface Files"; the v1 names as printed by Linux 6.18.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from protocol.units import PAGE_BYTES

WORKLOAD_NAME: Final = "workload"
"""The workload's cgroup, below the VM's."""

_READ_BYTES: Final = 16 * 1024
"""One pread gets a whole file: memory.stat is 1 KiB on v1 and 1.5-2 KiB on v2."""

_UNLIMITED_BYTES: Final = 1 << 62
"""v1 says "no limit" with 2**63 rounded down to a page; anything this large is no limit."""

_V1_FILES: Final = {
    "limit": "memory.limit_in_bytes",
    "usage": "memory.usage_in_bytes",
    "stat": "memory.stat",
    "kernel": "memory.kmem.usage_in_bytes",
    "events": "memory.oom_control",
    "swap_limit": "memory.memsw.limit_in_bytes",
    "pressure": "memory.pressure",  # no v1 kernel has it today
}
_V2_FILES: Final = {
    "limit": "memory.max",
    "wall": "memory.high",
    "usage": "memory.current",
    "stat": "memory.stat",
    "events": "memory.events",
    "swap_limit": "memory.swap.max",
    "swap_usage": "memory.swap.current",
    "pressure": "memory.pressure",
}

# total_*: the cgroup and those below it, as the limit counts them. v2's memory.stat is
# hierarchical already.
_V1_STAT: Final = {
    "anon": b"total_rss",
    "shmem": b"total_shmem",
    "file": b"total_cache",
    "mapped_file": b"total_mapped_file",
    "dirty": b"total_dirty",
    "writeback": b"total_writeback",
    "inactive_anon": b"total_inactive_anon",
    "active_anon": b"total_active_anon",
    "inactive_file": b"total_inactive_file",
    "active_file": b"total_active_file",
    "unevictable": b"total_unevictable",
    "swap": b"total_swap",
    "refault_file": b"total_workingset_refault_file",
    "refault_anon": b"total_workingset_refault_anon",
    "major_faults": b"total_pgmajfault",
}
_V2_STAT: Final = {
    "anon": b"anon",
    "shmem": b"shmem",
    "file": b"file",
    "mapped_file": b"file_mapped",
    "dirty": b"file_dirty",
    "writeback": b"file_writeback",
    "inactive_anon": b"inactive_anon",
    "active_anon": b"active_anon",
    "inactive_file": b"inactive_file",
    "active_file": b"active_file",
    "unevictable": b"unevictable",
    "kernel": b"kernel",  # since Linux 5.18
    "refault_file": b"workingset_refault_file",
    "refault_anon": b"workingset_refault_anon",
    "major_faults": b"pgmajfault",
}
_V2_KERNEL_PARTS: Final = (b"kernel_stack", b"pagetables", b"percpu", b"slab")
"""What `kernel` sums up, for kernels that don't print the sum."""


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """One look at the workload's memory. Bytes; None means that the kernel does not tell.

    `limit_bytes` is None also where no limit is set. `wall_bytes` is where the kernel begins to
    reclaim and to slow the guest, below its limit; None on v1, which has no such thing.
    `file_bytes` contains `shmem_bytes` (as the
    kernel counts it), which only swap could free; the `*_file_bytes` of the LRU lists don't.
    Totals count since the cgroup was made. Pressures are percentages of the last 10 s; the
    total is how long some task waited for memory in all.
    """

    limit_bytes: int | None = None
    wall_bytes: int | None = None
    usage_bytes: int | None = None
    anon_bytes: int | None = None
    shmem_bytes: int | None = None
    file_bytes: int | None = None
    mapped_file_bytes: int | None = None
    inactive_file_bytes: int | None = None
    active_file_bytes: int | None = None
    inactive_anon_bytes: int | None = None
    active_anon_bytes: int | None = None
    dirty_bytes: int | None = None
    writeback_bytes: int | None = None
    unevictable_bytes: int | None = None
    kernel_bytes: int | None = None
    refault_bytes_total: int | None = None
    refault_anon_bytes_total: int | None = None
    major_faults_total: int | None = None
    swap_used_bytes: int | None = None
    swap_free_bytes: int | None = None
    pressure_some_avg10: float | None = None
    pressure_full_avg10: float | None = None
    pressure_some_total_s: float | None = None
    oom_kills_total: int | None = None


class VitalsReader:
    """Reads one workload's cgroup again and again.

    `cgroup_path` is the directory under which the guest sees the cgroups of its VM;
    `workload_name` is the one of the workload below it ("." when the workload's own directory is
    what is mounted there, as in a container).

    Resources: a file descriptor for each statistics file, opened at the first `read` and closed
    by `close` (or the end of a `with` block). A closed reader may be read again.

    Errors: none for a statistic that is missing or unreadable; its field is None. A cgroup that
    does not exist (yet, or any more) gives a GuestMemory of which all fields of it are None.
    """

    def __init__(
        self,
        cgroup_path: Path | str,
        workload_name: str = WORKLOAD_NAME,
        *,
        swaps_path: Path | str = "/proc/swaps",
    ) -> None:
        self._directory = Path(cgroup_path) / workload_name
        self._swaps_path = Path(swaps_path)
        self._descriptors: dict[str, int] = {}
        self._version: int | None = None

    def __enter__(self) -> "VitalsReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def version(self) -> int | None:
        """1 or 2, by the files that were there at the last read; None where there were none."""
        return self._version

    def close(self) -> None:
        """Close the files. Harmless when they are closed already."""
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors.clear()
        self._version = None

    def read(self) -> GuestMemory:
        """Read all there is to know now. About 50 us; does not block on reclaim."""
        if self._version is None:
            self._open()
        usage = self._text("usage")
        if usage is None and self._version is not None:
            # The cgroup was removed under the open files (ENODEV): is there a new one?
            self.close()
            self._open()
            usage = self._text("usage")
        if self._version is None:
            return GuestMemory()
        read = self._read_v1 if self._version == 1 else self._read_v2
        return read(_number(usage))

    def _open(self) -> None:
        for version, files in ((2, _V2_FILES), (1, _V1_FILES)):
            if (self._directory / files["usage"]).exists():
                self._version = version
                break
        else:
            return
        paths = {name: self._directory / file for name, file in files.items()}
        for name, path in {**paths, "swaps": self._swaps_path}.items():
            with contextlib.suppress(OSError):
                self._descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _text(self, name: str) -> bytes | None:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            return None
        try:
            return os.pread(descriptor, _READ_BYTES, 0)
        except OSError:  # ENODEV: removed; EOPNOTSUPP: PSI switched off at boot
            return None

    def _read_v1(self, usage_bytes: int | None) -> GuestMemory:
        stat = _pairs(self._text("stat"))
        # memsw limits memory and swap together: what it is above the limit is the guest's swap.
        allowed = _difference(_limit(self._text("swap_limit")), _limit(self._text("limit")))
        room = _difference(allowed, _value(stat, _V1_STAT["swap"]))
        return self._compose(
            stat,
            _V1_STAT,
            usage_bytes,
            kernel_bytes=_number(self._text("kernel")),
            swap_used_bytes=_value(stat, _V1_STAT["swap"]),
            swap_room_bytes=room,
        )

    def _read_v2(self, usage_bytes: int | None) -> GuestMemory:
        stat = _pairs(self._text("stat"))
        kernel_bytes = _value(stat, _V2_STAT["kernel"])
        if kernel_bytes is None:
            parts = [_value(stat, part) for part in _V2_KERNEL_PARTS]
            known = [part for part in parts if part is not None]
            kernel_bytes = sum(known) if known else None
        swap_used_bytes = _number(self._text("swap_usage"))
        return self._compose(
            stat,
            _V2_STAT,
            usage_bytes,
            kernel_bytes=kernel_bytes,
            swap_used_bytes=swap_used_bytes,
            swap_room_bytes=_difference(_limit(self._text("swap_limit")), swap_used_bytes),
        )

    def _compose(
        self,
        stat: Mapping[bytes, bytes],
        names: Mapping[str, bytes],
        usage_bytes: int | None,
        *,
        kernel_bytes: int | None,
        swap_used_bytes: int | None,
        swap_room_bytes: int | None,
    ) -> GuestMemory:
        pressures = _pressures(self._text("pressure"))
        swap_free_bytes = _swap_free_bytes(self._text("swaps"))
        if swap_free_bytes is not None and swap_room_bytes is not None:
            swap_free_bytes = min(swap_free_bytes, swap_room_bytes)
        return GuestMemory(
            limit_bytes=_limit(self._text("limit")),
            wall_bytes=_limit(self._text("wall")),
            usage_bytes=usage_bytes,
            anon_bytes=_value(stat, names["anon"]),
            shmem_bytes=_value(stat, names["shmem"]),
            file_bytes=_value(stat, names["file"]),
            mapped_file_bytes=_value(stat, names["mapped_file"]),
            inactive_file_bytes=_value(stat, names["inactive_file"]),
            active_file_bytes=_value(stat, names["active_file"]),
            inactive_anon_bytes=_value(stat, names["inactive_anon"]),
            active_anon_bytes=_value(stat, names["active_anon"]),
            dirty_bytes=_value(stat, names["dirty"]),
            writeback_bytes=_value(stat, names["writeback"]),
            unevictable_bytes=_value(stat, names["unevictable"]),
            kernel_bytes=kernel_bytes,
            refault_bytes_total=_pages(stat, names["refault_file"]),
            refault_anon_bytes_total=_pages(stat, names["refault_anon"]),
            major_faults_total=_value(stat, names["major_faults"]),
            swap_used_bytes=swap_used_bytes,
            swap_free_bytes=swap_free_bytes,
            pressure_some_avg10=pressures.some_avg10,
            pressure_full_avg10=pressures.full_avg10,
            pressure_some_total_s=pressures.some_total_s,
            oom_kills_total=_value(_pairs(self._text("events")), b"oom_kill"),
        )


def _number(text: bytes | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _limit(text: bytes | None) -> int | None:
    limit_bytes = _number(text)  # v2's "max" is no number
    return None if limit_bytes is None or limit_bytes >= _UNLIMITED_BYTES else limit_bytes


def _pairs(text: bytes | None) -> dict[bytes, bytes]:
    words = iter((text or b"").split())
    return dict(zip(words, words, strict=False))


def _value(stat: Mapping[bytes, bytes], name: bytes) -> int | None:
    return _number(stat.get(name))


def _pages(stat: Mapping[bytes, bytes], name: bytes) -> int | None:
    pages = _value(stat, name)  # the workingset_* are counted in pages, all others in bytes
    return None if pages is None else pages * PAGE_BYTES


def _difference(whole_bytes: int | None, part_bytes: int | None) -> int | None:
    if whole_bytes is None or part_bytes is None:
        return None
    return max(0, whole_bytes - part_bytes)


@dataclass(frozen=True, slots=True)
class _Pressures:
    some_avg10: float | None = None
    full_avg10: float | None = None
    some_total_s: float | None = None


def _pressures(text: bytes | None) -> _Pressures:
    """Lines like `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`; the total is in us."""
    found: dict[tuple[bytes, bytes], float] = {}
    for line in (text or b"").splitlines():
        words = line.split()
        for word in words[1:]:
            key, _, value = word.partition(b"=")
            with contextlib.suppress(ValueError):
                found[words[0], key] = float(value)
    total_us = found.get((b"some", b"total"))
    return _Pressures(
        some_avg10=found.get((b"some", b"avg10")),
        full_avg10=found.get((b"full", b"avg10")),
        some_total_s=None if total_us is None else total_us / 1e6,
    )


def _swap_free_bytes(text: bytes | None) -> int | None:
    """Free bytes over all swap areas. An empty table is knowledge: there is no swap, hence 0.

    Columns: Filename, Type, Size, Used, Priority; sizes in KiB, counted from the line's end
    because a file name may contain spaces.
    """
    if text is None:
        return None
    free_bytes = 0
    for line in text.splitlines()[1:]:
        words = line.rsplit(None, 3)
        try:
            free_bytes += (int(words[1]) - int(words[2])) * 1024
        except (IndexError, ValueError):
            return None
    return free_bytes
