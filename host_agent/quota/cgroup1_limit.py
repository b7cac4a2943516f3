"""The limit of one cgroup of version 1, and the limit of memory and swap together beside it.

`memory.memsw.limit_in_bytes` bounds the sum, so it has to move with the limit: a cgroup whose swap
is to be S bytes has `memsw = limit + S`. The kernel refuses a limit above memsw with EINVAL; hence
memsw goes first upwards and last downwards. With S = 0 both are equal, and the kernel then meets
memsw first and reclaims without swapping.

That holds S for what the cgroup swaps at its limit. What the whole machine swaps out, being short
of memory itself, leaves the sum as it is: `memory.swappiness` 0 spares a VM without swap that.

Kernel's Documentation/admin-guide/cgroup-v1/memory.rst, sections 2.4 and 5.3.
"""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from host_agent.quota.base import UNLIMITED_BYTES, Part, SwapReading
from host_agent.quota.cgroup_tree import subtree
from host_agent.quota.control_file import ControlFile
from host_agent.quota.errors import LimitRefused, QuotaError

LIMIT: Final = "memory.limit_in_bytes"
USAGE: Final = "memory.usage_in_bytes"
MEMSW_LIMIT: Final = "memory.memsw.limit_in_bytes"
MEMSW_USAGE: Final = "memory.memsw.usage_in_bytes"
SWAPPINESS: Final = "memory.swappiness"

RAISE_TRIES: Final = 20
"""A shrink that is about to give up may lower memsw once or twice more under a raise."""


class Cgroup1Limit:
    """Both limits of one cgroup, with descriptors of their own."""

    def __init__(self, directory: Path, swap_bytes: int) -> None:
        self._swap_bytes = swap_bytes
        with ExitStack() as opened:
            self.memory = _opened(opened, directory / LIMIT)
            # Absent where the kernel doesn't account for swap.
            accounted = (directory / MEMSW_LIMIT).exists()
            self.memsw = _opened(opened, directory / MEMSW_LIMIT) if accounted else None
            self._usage = _opened(opened, directory / USAGE, writable=False)
            self._memsw_usage = (
                _opened(opened, directory / MEMSW_USAGE, writable=False) if accounted else None
            )
            self._files = opened.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def read_bytes_count(self) -> int:
        """The limit of memory."""
        return self.memory.read_bytes_count()

    def read_swap(self) -> SwapReading | None:
        """Two differences, of four reads."""
        if self.memsw is None or self._memsw_usage is None:
            return None
        memsw_bytes, limit_bytes = self.memsw.read_bytes_count(), self.memory.read_bytes_count()
        used_bytes = self._memsw_usage.read_bytes_count() - self._usage.read_bytes_count()
        unlimited = memsw_bytes >= UNLIMITED_BYTES
        return SwapReading(
            used_bytes=max(0, used_bytes),
            limit_bytes=UNLIMITED_BYTES if unlimited else max(0, memsw_bytes - limit_bytes),
        )

    def raise_to(self, limit_bytes: int) -> None:
        """Memsw, then the limit. Raises QuotaError."""
        sum_bytes = self.sum_bytes(limit_bytes)
        for tries_left in reversed(range(RAISE_TRIES)):
            try:
                if self.memsw is not None and self.memsw.read_bytes_count() < sum_bytes:
                    self.memsw.write(sum_bytes)
                self.memory.write(limit_bytes)
            except OSError as error:
                if error.errno == errno.EINVAL and tries_left:
                    continue
                raise QuotaError(
                    f"cannot raise {self.memory.path} to {limit_bytes}: {error}"
                ) from error
            return

    def lower_to(self, limit_bytes: int) -> None:
        """The limit, then memsw; both or none. OSError (EBUSY) where usage does not fit."""
        old_bytes = self.memory.read_bytes_count()
        self.memory.write(limit_bytes)
        try:
            self.lower_sum(limit_bytes)
        except OSError:
            self.memory.write(old_bytes)
            raise

    def lower_sum(self, limit_bytes: int, swap_bytes: int | None = None) -> None:
        """Memsw for a limit that is in force, or for one step of a shrink. OSError (EBUSY)."""
        if self.memsw is not None:
            self.memsw.write(self.sum_bytes(limit_bytes, swap_bytes))

    def sum_bytes(self, limit_bytes: int, swap_bytes: int | None = None) -> int:
        """What memsw has to be for a limit."""
        own_bytes = self._swap_bytes if swap_bytes is None else swap_bytes
        return min(limit_bytes + own_bytes, UNLIMITED_BYTES)

    def restore_sum(self) -> None:
        """Memsw where it belongs, wherever it stands. Raises LimitRefused."""
        if self.memsw is None:
            return
        try:
            self.lower_sum(self.memory.read_bytes_count())
        except OSError as error:
            raise LimitRefused(
                f"cannot set {self.memsw.path} ({error.strerror}): more is swapped out than the "
                f"{self._swap_bytes} bytes of swap that the VM has"
            ) from error


def set_swappiness(vm: Path, swap_bytes: int) -> None:
    """For a VM of which nothing but `vm` may have cgroups made yet, or all of them.

    The VM's own directory says how its workload is meant to be, and stays so while room is made.
    """
    wanted = "0\n" if swap_bytes == 0 else (vm.parent / SWAPPINESS).read_text()
    for path, value in ((vm, wanted), (vm / Part.WORKLOAD, wanted), (vm / Part.DRIVER, "0\n")):
        with suppress(FileNotFoundError):
            (path / SWAPPINESS).write_text(value)


def restore_swappiness(vm: Path, swap_bytes: int) -> None:
    """After an agent that may have died while room was made."""
    interrupted = list(_held_at_zero(vm / Part.WORKLOAD)) if swap_bytes else []
    set_swappiness(vm, swap_bytes)
    for path in interrupted:
        # A nested cgroup may go at any time, and its pages with it.
        with suppress(OSError):
            (path / SWAPPINESS).write_text((vm / SWAPPINESS).read_text())


def _held_at_zero(workload: Path) -> Iterator[Path]:
    """Cgroups below a workload that were set to 0 with it. Its own comes last when put back, so
    a workload that is not at 0 was not interrupted, and what is at 0 below is its engine's wish."""
    try:
        if int((workload / SWAPPINESS).read_text()) != 0:
            return
    except FileNotFoundError:
        return
    for path in subtree(workload):
        with suppress(OSError):
            if path != workload and int((path / SWAPPINESS).read_text()) == 0:
                yield path


def _opened(opened: ExitStack, path: Path, *, writable: bool = True) -> ControlFile:
    file = ControlFile(path, writable=writable)
    opened.callback(file.close)
    return file
