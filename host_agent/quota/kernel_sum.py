"""The kernel's own sum of all quotas, without asking the ledger: for whoever audits it.

Each VM counts with max(W, VM's limit - overhead); one that has no limit yet and nobody in it
counts nothing. The limits of many VMs can't be read at one instant, and memory that moves from a
guest already read to one read later would be seen twice. So a pass is repeated until two in a row
are equal: then each limit had its value throughout the time between them, and their sum was true at
that time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from host_agent.quota.base import UNLIMITED_BYTES, Part
from host_agent.quota.cgroup_tree import child_directories, pids_below
from host_agent.quota.control_file import ControlFile
from host_agent.quota.errors import VmGone

PASSES_MAX: Final = 20
_LIMIT_NAMES: Final = ("memory.limit_in_bytes", "memory.max")


@dataclass(frozen=True, slots=True)
class KernelSumReading:
    """`stable` is False if limits moved during every pass: then the sum is of no one instant."""

    sum_bytes: int
    quota_bytes: Mapping[str, int]
    stable: bool


class KernelSum:
    """Reads all limits below one root again and again."""

    def __init__(self, root: Path, overhead_bytes: int | Mapping[str, int]) -> None:
        """`overhead_bytes` for all VMs, or for each; a VM that is not named counts in full."""
        self._root = root
        self._overhead_bytes = overhead_bytes
        self._files: dict[str, tuple[ControlFile, ControlFile]] = {}

    def read(self) -> KernelSumReading:
        """The sum now. A VM that comes or goes meanwhile counts as a change."""
        before = self._pass()
        for _ in range(PASSES_MAX):
            now = self._pass()
            if now == before:
                return KernelSumReading(sum(now.values()), now, stable=True)
            before = now
        return KernelSumReading(sum(before.values()), before, stable=False)

    def close(self) -> None:
        """Close all files."""
        for name in list(self._files):
            self._forget(name)

    def _pass(self) -> dict[str, int]:
        quotas: dict[str, int] = {}
        names = [child.name for child in child_directories(self._root)]
        for name in set(self._files).difference(names):
            self._forget(name)
        for name in names:
            try:
                quotas[name] = self._quota_bytes(name)
            except VmGone:  # or still being made: nobody is in it yet
                self._forget(name)
        return quotas

    def _quota_bytes(self, name: str) -> int:
        if name not in self._files:
            vm = _limit_file(self._root / name)
            try:
                self._files[name] = (vm, _limit_file(self._root / name / Part.WORKLOAD))
            except VmGone:
                vm.close()
                raise
        vm_limit, workload_limit = self._files[name]
        overhead_bytes = (
            self._overhead_bytes
            if isinstance(self._overhead_bytes, int)
            else self._overhead_bytes.get(name, 0)
        )
        workload_bytes, vm_bytes = workload_limit.read_bytes_count(), vm_limit.read_bytes_count()
        if workload_bytes >= UNLIMITED_BYTES and not pids_below(self._root / name):
            # Just made, its limits not set yet. With nobody in it, it can use nothing.
            return 0
        return max(workload_bytes, vm_bytes - overhead_bytes)

    def _forget(self, name: str) -> None:
        for file in self._files.pop(name, ()):
            file.close()


def _limit_file(directory: Path) -> ControlFile:
    for limit_name in _LIMIT_NAMES:
        if (directory / limit_name).exists():
            return ControlFile(directory / limit_name)
    raise VmGone(f"{directory} has no limit: it is gone or no memory cgroup")
