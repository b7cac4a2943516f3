"""What the agent may ask of the kernel for one mock VM, whichever controller is underneath.

    <root>/<vm>            limit = quota + overhead
      workload             limit W <= quota
      driver               no limit of its own; its use is the VM's overhead

A VM whose container is systemd's has the same inside that container's scope (`enter_scope`).

This module owns the contract; `cgroup1`, `cgroup2` and `fake` keep it, and one suite of tests
holds all three to it. It must not know of ledgers, policies or channels.

Which calls block: `raise_quota`, `raise_workload`, `read`, `dry_state`, `let_kernel_decide` and
`protect` take microseconds and belong on the event loop: a guest that runs dry is answered by them.
All the others may wait for reclaim, for writeback or for dying processes: call them in a thread.

Two calls for one VM may run at once in this single way: a raise (from the event loop) while
`make_room` runs in a thread. Then the raise wins: `make_room` gives up with NoRoom and puts the
limit where the raise had it.

Swap. A VM has as much swap of its own as its maker says, none by default, and the kernel keeps it
to that: W moves, the swap beside it stays the same. Making room swaps nothing out, unless it is
told how much it may.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from host_agent.quota.errors import QuotaError
from host_agent.quota.phases import ShrinkPhases
from protocol.units import MIB, PAGE_BYTES

UNLIMITED_BYTES: Final = (1 << 63) - PAGE_BYTES
"""How "no limit" reads: what the kernel's version 1 files show; "max" is read as the same."""

MAKE_ROOM_TIMEOUT_S: Final = 10.0
"""300 MiB of dirty cache took 0.2 s to write back; a slow disk may need fifty times as long."""

SETTLE_TIMEOUT_S: Final = 0.25
"""For counters that lag by 64 pages a CPU: they come right within milliseconds."""

SWAP_MIN_BYTES: Final = 1 * MIB
"""Less is within the error of the kernel's counters."""

DEATH_TIMEOUT_S: Final = 10.0
"""A killed process that holds gigabytes needs a while to give them back."""

_CGROUP_PATH = re.compile(r"/?(?:[\w@:\\-][\w.@:\\-]*/)*[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class Part(StrEnum):
    """The two halves of a VM; the value is the directory's name."""

    WORKLOAD = "workload"
    DRIVER = "driver"


@dataclass(frozen=True, slots=True)
class QuotaReading:
    """The kernel's own figures for one VM, in bytes; read one after the other, no snapshot."""

    vm_limit_bytes: int
    workload_limit_bytes: int
    workload_usage_bytes: int
    driver_usage_bytes: int


@dataclass(frozen=True, slots=True)
class SwapReading:
    """The workload's swap as the kernel has it, in bytes; `limit_bytes` may be UNLIMITED_BYTES."""

    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class DryState:
    """What stands behind a dry event.

    `under_oom`: the workload needs memory now and can't get it (it is hung or throttled).
    `kills_total`: processes of this VM that the kernel's OOM killer has killed so far.
    """

    under_oom: bool
    kills_total: int


class VmQuota(ABC):
    """The kernel's limits of one mock VM, kept open.

    Every method raises VmGone once the directories are gone, except `kill_all`, `remove` and
    `close`, which may be called again at any time.
    """

    def __init__(self, directory: Path, overhead_bytes: int, swap_bytes: int = 0) -> None:
        check_limit(overhead_bytes)
        self.directory = directory
        self.overhead_bytes = overhead_bytes
        self.swap_bytes = check_limit(swap_bytes)

    @property
    def name(self) -> str:
        """The VM's name: its directory below the agent's root."""
        return self.directory.name

    def procs_path(self, part: Part) -> Path:
        """The file into which a starter writes its pid to become part of the VM."""
        return self.directory / part / "cgroup.procs"

    @abstractmethod
    def read(self) -> QuotaReading:
        """Limits and usage as the kernel has them; about 5 us."""

    @abstractmethod
    def read_swap(self) -> SwapReading | None:
        """What the workload has swapped and may swap; None where the kernel does not account.

        Takes microseconds.
        """

    @abstractmethod
    def restore_swap(self) -> None:
        """Put everything about swap where it belongs, whatever a dead agent has left.

        Raises LimitRefused where more than the VM's swap is in use already.
        """

    @abstractmethod
    def raise_quota(self, quota_bytes: int, workload_bytes: int | None = None) -> None:
        """Raise the VM's limit to quota + overhead, then the workload's to the quota.

        `workload_bytes` instead for the workload where room is kept for frames on their way; a W
        that is higher already stays. Never blocks. ValueError if it would lower the VM's limit,
        or if W would pass the quota.
        """

    @abstractmethod
    def raise_workload(self, limit_bytes: int) -> None:
        """Give back room that was made and not used: W up to `limit_bytes`, at most the quota.

        A W that is higher already stays. Never blocks. ValueError if W would pass the quota.
        """

    @abstractmethod
    def make_room(
        self, limit_bytes: int, timeout_s: float = MAKE_ROOM_TIMEOUT_S, swap_bytes: int = 0
    ) -> ShrinkPhases:
        """Lower W to `limit_bytes`; the guest's kernel gives up what it can give up cheaply.

        Never kills, and swaps at most `swap_bytes` out, as far as the VM has swap left; less than
        SWAP_MIN_BYTES counts as nothing. May block: the deadline is looked at between steps of
        reclaim. Does nothing where W is that low already. Gives what its phases took. Raises
        NoRoom with the old W (or the one that a raise set meanwhile) in force, and everything else
        as it was; what was swapped out by then stays so.
        """

    @abstractmethod
    def lower_quota(self, quota_bytes: int, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """After a claim: lower the VM's limit to quota + overhead.

        Waits up to `timeout_s` for the kernel's lagging counters. Raises LimitRefused with the
        old limit in force, also where W is above `quota_bytes` (make room first).
        """

    @abstractmethod
    def protect(self, reservation_bytes: int) -> None:
        """Have the kernel leave so much of the workload alone when the host is short of memory.

        In force until the next call, whatever the quota is meanwhile, also across agents. Never
        blocks. Does nothing where the kernel knows no such thing (version 1).
        """

    @property
    @abstractmethod
    def protected_bytes(self) -> int | None:
        """What the kernel protects of the workload, which may be less; None if it never does."""

    @abstractmethod
    def arm_dry_events(self) -> int:
        """Hold a dry workload instead of letting the kernel kill, and tell on a descriptor.

        Returns a file descriptor, owned by this object, that becomes readable when the workload
        may be dry; `dry_state()` makes it unreadable again. Calling it again arms again and
        gives the same descriptor. Whoever arms must answer: see watchdog.py.
        """

    @abstractmethod
    def dry_state(self) -> DryState:
        """Clear the event, then look: nothing that happens in between is lost."""

    @abstractmethod
    def let_kernel_decide(self) -> None:
        """There is nothing to give: hand the decision to the guest's kernel, which may kill."""

    @abstractmethod
    def rearm(self) -> None:
        """Hold a dry workload again, after `let_kernel_decide` or the watchdog's release."""

    @property
    @abstractmethod
    def oom_kills_total(self) -> int:
        """Processes of this VM killed by the OOM killer so far, at all three levels."""

    @abstractmethod
    def processes(self, part: Part) -> tuple[int, ...]:
        """Pids in this part and below it, ascending."""

    @abstractmethod
    def driver_inode(self) -> int:
        """Inode of the driver's directory: what /proc/kpagecgroup shows for its pages."""

    @abstractmethod
    def kill_all(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """SIGKILL to every process of the VM until there is none. Raises StillBusy."""

    @abstractmethod
    def remove(self, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """Close everything and remove the directories, which must have no process left.

        Raises StillBusy. Doing it twice is no error.
        """

    def enter_scope(
        self, scope: Path, quota_bytes: int, workload_bytes: int, size_bytes: int
    ) -> None:
        """Go on inside an engine's scope, with these limits in force: see cgroup2_scope.py.

        `size_bytes` is the VM's size, as its container is to read it. Whatever is in the scope by
        then is moved into the workload; it has to stand still meanwhile. Raises QuotaError.
        """
        raise QuotaError(f"{self.name} can't enter {scope}: only version 2 has what that needs")

    @abstractmethod
    def close(self) -> None:
        """Let go of the descriptors and leave the VM as it is (an agent that stops)."""


class QuotaBackend(ABC):
    """All VMs below one root directory.

    `base` is what the root stands in, directly or not, and is not the agent's: the hierarchy's own
    top, or what was delegated to the agent. What is between the two is made and removed with it.
    """

    cgroup_version: int
    """1 or 2: for people and for those who look into the directories themselves."""

    def __init__(self, root: Path, base: Path | None = None) -> None:
        self.root = root
        self.base = root.parent if base is None else base

    @property
    def between(self) -> tuple[Path, ...]:
        """Directories below the base and above the root, from the top down."""
        inner = len(self.root.relative_to(self.base).parts) - 1
        return tuple(reversed(self.root.parents[:inner]))

    @abstractmethod
    def prepare(self) -> None:
        """Make the root and whatever it needs. Raises QuotaUnavailable with what to do."""

    @abstractmethod
    def create(
        self, name: str, quota_bytes: int, overhead_bytes: int, swap_bytes: int = 0
    ) -> VmQuota:
        """Make a VM's directories, with all limits in force before any process is there.

        All or nothing: what was made is removed again on failure. Raises VmExists, QuotaError;
        the latter also for swap that this kernel can't keep to a limit.
        """

    @abstractmethod
    def open_existing(
        self,
        name: str,
        overhead_bytes: int,
        swap_bytes: int = 0,
        directory: Path | None = None,
    ) -> VmQuota:
        """Take over the directories of an agent that ended. Raises VmGone.

        `directory` is where they are if not below the root: see `VmQuota.enter_scope`.
        Changes nothing: see `VmQuota.restore_swap`.
        """

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """VMs that have directories below the root, sorted."""

    @abstractmethod
    def remove_root(self) -> None:
        """Remove the root, and what is empty then below the base, if no VM is left.

        Raises StillBusy; twice is no error.
        """


def check_limit(limit_bytes: int) -> int:
    """The limit itself, or ValueError: the kernel counts pages and would round in silence."""
    if limit_bytes < 0 or limit_bytes % PAGE_BYTES:
        raise ValueError(f"a limit is a whole number of {PAGE_BYTES}-byte pages: {limit_bytes}")
    return limit_bytes


def check_within(workload_bytes: int | None, quota_bytes: int) -> int:
    """W for a quota: the quota itself unless a smaller W is named. Raises ValueError."""
    if workload_bytes is None:
        return quota_bytes
    if check_limit(workload_bytes) > quota_bytes:
        raise ValueError(f"the workload's limit {workload_bytes} is above quota {quota_bytes}")
    return workload_bytes


def check_cgroup_path(path: str) -> str:
    """The path itself, or ValueError: of the agent's root, from the top (`/`) or from its base."""
    if not _CGROUP_PATH.fullmatch(path):
        raise ValueError(
            f"{path!r} is not the path of a cgroup: names of letters, digits, '_', '.' or '-' "
            f"between slashes"
        )
    return path


def check_name(name: str) -> str:
    """The name itself, or ValueError: it becomes a directory, and must stay below the root."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a VM's name has 1 to 63 letters, digits, '_', '.' or '-', "
            f"beginning with a letter or digit: {name!r}"
        )
    return name
