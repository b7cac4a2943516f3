"""Quotas in memory, with a model of a guest behind them: for tests where the kernel is no subject.

The model keeps what the contract promises and what the kernel does at its edges: cache is evicted
before anything else, anonymous memory goes to the VM's swap as far as it has some, an armed
workload hangs at its limit and goes on after a raise, an unarmed one is killed. It has no time:
nothing blocks. The dry event is a real descriptor, so an event loop can wait for it.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from host_agent.quota.base import (
    DEATH_TIMEOUT_S,
    MAKE_ROOM_TIMEOUT_S,
    SETTLE_TIMEOUT_S,
    SWAP_MIN_BYTES,
    DryState,
    Part,
    QuotaBackend,
    QuotaReading,
    SwapReading,
    VmQuota,
    check_limit,
    check_name,
    check_within,
)
from host_agent.quota.errors import LimitRefused, NoRoom, StillBusy, VmExists, VmGone
from host_agent.quota.phases import ShrinkPhases

FAKE_ROOT = Path("/nonexistent/memballoon")
_inodes = count(1000)


def _no_pids() -> dict[Part, set[int]]:
    return {part: set() for part in Part}


@dataclass(slots=True)
class FakeVm:
    """What the kernel would know of one VM; bytes. Tests read and write it freely."""

    vm_limit_bytes: int
    workload_limit_bytes: int
    anon_bytes: int = 0
    cache_bytes: int = 0
    driver_bytes: int = 0
    swap_limit_bytes: int = 0
    swapped_bytes: int = 0
    wanted_bytes: int = 0  # an allocation that hangs
    wanting_pid: int | None = None  # whose it is; None: everybody's
    held_bytes: dict[int, int] = field(default_factory=dict)  # the part of anon_bytes of each pid
    protected_bytes: int = 0
    armed: bool = False
    kills_total: int = 0
    inode: int = field(default_factory=lambda: next(_inodes))
    pids: dict[Part, set[int]] = field(default_factory=_no_pids)
    event_fd: int | None = None

    @property
    def usage_bytes(self) -> int:
        """What is charged to the workload."""
        return self.anon_bytes + self.cache_bytes

    @property
    def swap_left_bytes(self) -> int:
        """What it may still swap out."""
        return max(0, self.swap_limit_bytes - self.swapped_bytes)

    def allocate(self, size_bytes: int, pid: int | None = None) -> None:
        """The workload touches new memory; it may hang or be killed for it."""
        self.wanted_bytes += size_bytes
        self.wanting_pid = pid
        self.settle()

    def fill_cache(self, size_bytes: int) -> None:
        """The workload reads a file: cache never takes more than there is room for."""
        self.cache_bytes += min(size_bytes, self.workload_limit_bytes - self.usage_bytes)

    def settle(self) -> None:
        """A hung allocation tries again, as it does after each change of a limit."""
        excess_bytes = self.usage_bytes + self.wanted_bytes - self.workload_limit_bytes
        evicted_bytes = min(max(excess_bytes, 0), self.cache_bytes)
        self.cache_bytes -= evicted_bytes
        if 0 < excess_bytes - evicted_bytes <= self.swap_left_bytes:
            self.swap_out(excess_bytes - evicted_bytes)
        if self.usage_bytes + self.wanted_bytes <= self.workload_limit_bytes:
            self.anon_bytes += self.wanted_bytes
            if self.wanting_pid is not None:
                held_bytes = self.held_bytes.get(self.wanting_pid, 0)
                self.held_bytes[self.wanting_pid] = held_bytes + self.wanted_bytes
            self.wanted_bytes = 0
            return
        if self.event_fd is not None:
            os.eventfd_write(self.event_fd, 1)
        if not self.armed:
            self.kills_total += 1
            self._kill_one()

    def _kill_one(self) -> None:
        """Whoever wants more than there is, as it is the largest in most tests."""
        if self.wanting_pid is None:
            return self.die()
        self.anon_bytes -= min(self.anon_bytes, self.held_bytes.pop(self.wanting_pid, 0))
        self.wanted_bytes = 0
        self.pids[Part.WORKLOAD].discard(self.wanting_pid)

    def swap_out(self, size_bytes: int) -> None:
        """Anonymous memory, or what is to become such, goes to swap."""
        self.swapped_bytes += size_bytes
        self.wanted_bytes -= size_bytes - min(size_bytes, self.anon_bytes)
        self.anon_bytes -= min(size_bytes, self.anon_bytes)

    def die(self) -> None:
        """Every process of the workload ends."""
        self.anon_bytes = self.wanted_bytes = self.swapped_bytes = 0
        self.held_bytes.clear()
        self.pids[Part.WORKLOAD].clear()


class FakeVmQuota(VmQuota):
    """One VM of the model; `failures` makes the next call of a method raise, once."""

    def __init__(
        self, backend: "FakeBackend", name: str, overhead_bytes: int, swap_bytes: int = 0
    ) -> None:
        super().__init__(backend.root / name, overhead_bytes, swap_bytes)
        self._backend = backend
        self._closed = False
        self.failures: dict[str, Exception] = {}

    @property
    def vm(self) -> FakeVm:
        """The model. Raises VmGone as the kernel's files would."""
        vm = self._backend.vms.get(self.name)
        if vm is None or self._closed:
            raise VmGone(f"{self.directory} is gone: was the VM removed?")
        return vm

    def read(self) -> QuotaReading:
        """The model's figures."""
        vm = self._ask("read")
        return QuotaReading(
            vm_limit_bytes=vm.vm_limit_bytes,
            workload_limit_bytes=vm.workload_limit_bytes,
            workload_usage_bytes=vm.usage_bytes,
            driver_usage_bytes=vm.driver_bytes,
        )

    def read_swap(self) -> SwapReading:
        """The model's figures."""
        vm = self._ask("read_swap")
        return SwapReading(used_bytes=vm.swapped_bytes, limit_bytes=vm.swap_limit_bytes)

    def restore_swap(self) -> None:
        """The limit alone: nothing else of swap is in the model."""
        vm = self._ask("restore_swap")
        vm.swap_limit_bytes = self.swap_bytes
        if vm.swapped_bytes > self.swap_bytes:
            raise LimitRefused(f"the workload of {self.name} has swapped more than it may")

    def raise_quota(self, quota_bytes: int, workload_bytes: int | None = None) -> None:
        """Both limits; a hung allocation goes on."""
        vm = self._ask("raise_quota")
        vm_limit_bytes = check_limit(quota_bytes) + self.overhead_bytes
        limit_bytes = check_within(workload_bytes, quota_bytes)
        if vm_limit_bytes < vm.vm_limit_bytes:
            raise ValueError(f"{vm_limit_bytes} would lower {self.name}")
        vm.vm_limit_bytes = vm_limit_bytes
        vm.workload_limit_bytes = max(limit_bytes, vm.workload_limit_bytes)
        vm.settle()

    def raise_workload(self, limit_bytes: int) -> None:
        """W alone; a hung allocation goes on."""
        vm = self._ask("raise_workload")
        check_within(check_limit(limit_bytes), vm.vm_limit_bytes - self.overhead_bytes)
        vm.workload_limit_bytes = max(limit_bytes, vm.workload_limit_bytes)
        vm.settle()

    def make_room(
        self, limit_bytes: int, timeout_s: float = MAKE_ROOM_TIMEOUT_S, swap_bytes: int = 0
    ) -> ShrinkPhases:
        """Evicts cache, then swaps what is allowed, as much as is needed and no more."""
        vm = self._ask("make_room")
        if check_limit(limit_bytes) >= vm.workload_limit_bytes:
            return ShrinkPhases()
        more_bytes = min(swap_bytes, vm.swap_left_bytes)
        if more_bytes < SWAP_MIN_BYTES:
            more_bytes = 0
        too_many_bytes = max(0, vm.anon_bytes - limit_bytes)
        if too_many_bytes > more_bytes or vm.wanted_bytes:
            raise NoRoom(f"{self.name} cannot do with {limit_bytes} bytes; ask for less")
        vm.swap_out(too_many_bytes)
        vm.cache_bytes = min(vm.cache_bytes, limit_bytes - vm.anon_bytes)
        vm.workload_limit_bytes = limit_bytes
        return ShrinkPhases()

    def lower_quota(self, quota_bytes: int, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """The VM's limit, if everything fits."""
        vm = self._ask("lower_quota")
        vm_limit_bytes = check_limit(quota_bytes) + self.overhead_bytes
        if vm.workload_limit_bytes > quota_bytes:
            raise LimitRefused(f"the workload of {self.name} may use more: make room first")
        if vm.workload_limit_bytes + vm.driver_bytes > vm_limit_bytes:
            raise LimitRefused(f"the driver of {self.name} uses more than its overhead")
        vm.vm_limit_bytes = vm_limit_bytes

    def protect(self, reservation_bytes: int) -> None:
        """Kept for whoever asks."""
        self._ask("protect").protected_bytes = check_limit(reservation_bytes)

    @property
    def protected_bytes(self) -> int | None:
        """What was asked for last."""
        return self.vm.protected_bytes

    def arm_dry_events(self) -> int:
        """A real eventfd."""
        vm = self._ask("arm_dry_events")
        if vm.event_fd is None:
            vm.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.rearm()
        return vm.event_fd

    def dry_state(self) -> DryState:
        """Dry while an allocation hangs."""
        vm = self._ask("dry_state")
        if vm.event_fd is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(vm.event_fd)
        return DryState(under_oom=vm.wanted_bytes > 0, kills_total=vm.kills_total)

    def let_kernel_decide(self) -> None:
        """Whoever hangs is killed."""
        vm = self._ask("let_kernel_decide")
        vm.armed = False
        if vm.wanted_bytes:
            vm.settle()

    def rearm(self) -> None:
        """From now on an allocation at the limit hangs."""
        self._ask("rearm").armed = True

    @property
    def oom_kills_total(self) -> int:
        """The model's count."""
        return self.vm.kills_total

    def processes(self, part: Part) -> tuple[int, ...]:
        """Whatever pids the test has put there."""
        return tuple(sorted(self._ask("processes").pids[part]))

    def driver_inode(self) -> int:
        """A number of its own for each VM."""
        return self._ask("driver_inode").inode

    def kill_all(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """Everybody dies at once, and their anonymous memory with them."""
        self._raise_planned("kill_all")
        with suppress(VmGone):
            self.vm.die()
            self.vm.pids[Part.DRIVER].clear()
            self.vm.driver_bytes = 0

    def remove(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """Gone from the model, unless it has processes."""
        self._raise_planned("remove")
        vm = self._backend.vms.get(self.name)
        if vm is None or self._closed:
            return
        if any(vm.pids.values()):
            raise StillBusy(f"cannot remove {self.directory}: kill what is in it first")
        del self._backend.vms[self.name]
        self._close(vm)

    def close(self) -> None:
        """The VM stays in the model."""
        if not self._closed and (vm := self._backend.vms.get(self.name)) is not None:
            self._close(vm)

    def _close(self, vm: FakeVm) -> None:
        self._closed = True
        if vm.event_fd is not None:
            os.close(vm.event_fd)
            vm.event_fd = None

    def _ask(self, method: str) -> FakeVm:
        self._raise_planned(method)
        return self.vm

    def _raise_planned(self, method: str) -> None:
        if method in self.failures:
            raise self.failures.pop(method)


class FakeBackend(QuotaBackend):
    """All VMs of the model; they outlive the objects that an "agent" opens on them."""

    cgroup_version = 1

    def __init__(self, root: Path = FAKE_ROOT) -> None:
        super().__init__(root)
        self.vms: dict[str, FakeVm] = {}

    def prepare(self) -> None:
        """Nothing to do."""

    def create(
        self, name: str, quota_bytes: int, overhead_bytes: int, swap_bytes: int = 0
    ) -> FakeVmQuota:
        """A VM with no processes and no use."""
        if check_name(name) in self.vms:
            raise VmExists(f"{self.root / name} exists: remove that VM first")
        vm_limit_bytes = check_limit(quota_bytes) + check_limit(overhead_bytes)
        self.vms[name] = FakeVm(
            vm_limit_bytes, quota_bytes, swap_limit_bytes=check_limit(swap_bytes)
        )
        return FakeVmQuota(self, name, overhead_bytes, swap_bytes)

    def open_existing(
        self,
        name: str,
        overhead_bytes: int,
        swap_bytes: int = 0,
        directory: Path | None = None,
    ) -> FakeVmQuota:
        """Another handle on the same VM; nothing here has a place of its own."""
        if check_name(name) not in self.vms:
            raise VmGone(f"{self.root / name} is not there")
        return FakeVmQuota(self, name, overhead_bytes, swap_bytes)

    def names(self) -> tuple[str, ...]:
        """All VMs, sorted."""
        return tuple(sorted(self.vms))

    def remove_root(self) -> None:
        """Nothing to do but to refuse while VMs are there."""
        if self.vms:
            raise StillBusy(f"{self.root} still has VMs: {', '.join(self.names())}")
