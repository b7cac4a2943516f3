"""One mock VM at run time: what the agent keeps of it beside the ledger.

Owns no decision. The books are the ledger's, the limits the kernel's; here is what ties them
together: the quota's handle, the machine, the session, and what the driver last said.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, Final

import trio

from host_agent.facade.port import VmSpec
from protocol.messages import Vitals
from protocol.units import MIB, PAGE_BYTES, pages_of
from protocol.vocabulary import Urgency

if TYPE_CHECKING:
    from host_agent.intake.session import GuestSession
    from host_agent.machines.base import Machine
    from host_agent.quota.base import VmQuota

BASE_OVERHEAD_BYTES: Final = 40 * MIB
"""For the driver and the pseudo-process (20 MiB), the VM's init, kernel memory that is charged to
them, and the counters' slack of 64 pages a CPU."""

ARENA_OVERHEAD_DIVISOR: Final = 256
"""Page tables of the arena are 1/512 of it and stay when frames are dropped; as much again for the
frame states and other bookkeeping by the page."""


class Phase(StrEnum):
    """Where in its life a mock VM is."""

    PENDING = "pending"
    """Waits for memory; no cgroup yet."""
    STARTING = "starting"
    """Cgroups and processes are being made; its quota stands still."""
    RUNNING = "running"
    STOPPING = "stopping"


@dataclass(slots=True, eq=False)
class Guest:
    """One mock VM of this agent."""

    spec: VmSpec
    phase: Phase = Phase.PENDING
    quota: "VmQuota | None" = None
    machine: "Machine | None" = None
    session: "GuestSession | None" = None
    vitals: Vitals | None = None
    vitals_s: float = 0.0
    """When the vitals came, on the agent's clock."""
    pinned_pages: int | None = None
    maximum_bytes: int | None = field(init=False)
    """The most that a policy gives it now; None for its assigned size."""
    target_pages: int | None = None
    """The quota that the last plan wants for it."""
    wanted_since_s: float | None = None
    """Since when it should have more than it has."""
    stalled_since_s: float | None = None
    """Since when it should give memory and has given none."""
    last_reason: str | None = None
    """Why its driver last gave less than was wanted."""
    refused_until_s: float = 0.0
    """After a refusal it is not asked again before this, unless matters become urgent."""
    refused_urgency: Urgency | None = None
    """How urgent the matter was when it was last asked."""
    refusals: int = 0
    planned_demand_pages: int | None = None
    """Its demand when it last caused a plan."""
    connections: int = 0
    """Of its driver, open now."""
    fault_s: float = -math.inf
    """When a connection of it was last ended for a fault."""
    stranger_s: float = -math.inf
    """When a stranger at its socket was last told of."""
    stuck_times: int = 0
    """In a row."""
    stuck_s: float = -math.inf
    """When it was last found to be stuck."""
    dry: bool = False
    """It waits for memory right now."""
    dry_s: float = -math.inf
    """When it last ran dry."""
    dry_total: int = 0
    oom_kills: int = 0
    shrinking: Lock = field(default_factory=Lock)
    """Held by the thread that lowers its workload's limit: one at a time, also where an attempt
    was given up while its thread is still in the kernel."""
    connected: trio.Event = field(default_factory=trio.Event)
    quota_changed: trio.Event = field(default_factory=trio.Event)
    launching: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Around its whole launch, from the wait for memory on; cancelled by a stop alone."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Around its life in the kernel."""
    ended: trio.Event = field(default_factory=trio.Event)
    ended_with: str = ""
    """How its command ended, once it has."""
    taking_down: trio.Lock = field(default_factory=trio.Lock)
    failure: str | None = None
    """Why it could not be taken down: it has ended, but what the kernel holds of it is still there
    and its quota and its name are not free."""

    def __post_init__(self) -> None:
        """It begins with the maximum that it was launched with."""
        self.maximum_bytes = self.spec.maximum_bytes

    def stop(self) -> None:
        """Let it end, wherever in its life it is; `ended` is set when it has."""
        self.phase = Phase.STOPPING
        self.launching.cancel()
        self.scope.cancel()

    def tell_quota_changed(self) -> None:
        """Wake whoever waits for `quota_changed`; the next change has an event of its own."""
        self.quota_changed.set()
        self.quota_changed = trio.Event()

    @property
    def name(self) -> str:
        """Its name, which is also the name of its cgroup."""
        return self.spec.name

    @property
    def assigned_pages(self) -> int:
        """Its size as a VM, in pages."""
        return pages_of(self.spec.assigned_bytes)

    @property
    def frame_pages(self) -> int:
        """How many pages a frame of its balloon has: it gives and gets no less."""
        return 1 << self.spec.frame_order

    @property
    def overhead_bytes(self) -> int:
        """What its limit is above its quota: for the balloon's own processes."""
        return overhead_of(self.spec.assigned_bytes)

    @property
    def balloon_swap_pages(self) -> int:
        """What its balloon may have it swap out in all."""
        return pages_of(self.spec.swap_bytes) if self.spec.balloon_may_swap else 0

    @property
    def live_quota(self) -> "VmQuota":
        """The quota's handle of a guest that has its cgroups."""
        if self.quota is None:
            raise RuntimeError(f"{self.name} has no cgroups")
        return self.quota


def overhead_of(assigned_bytes: int) -> int:
    """Overhead of a mock VM of this size, in bytes, whole pages."""
    arena_bytes = assigned_bytes // ARENA_OVERHEAD_DIVISOR
    return BASE_OVERHEAD_BYTES + -(-arena_bytes // PAGE_BYTES) * PAGE_BYTES
