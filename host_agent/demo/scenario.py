"""The numbers of the demonstration: a host of 120 GB with ten VMs of 16 GB each, at 1:100."""

from dataclasses import dataclass
from typing import Final, Self

from protocol.units import MIB


@dataclass(frozen=True, slots=True)
class Appetite:
    """What a workload wants to hold, in bytes: anonymous memory, and page cache of real files."""

    anon_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.anon_bytes + self.cache_bytes


@dataclass(frozen=True, slots=True)
class Scenario:
    """One play. Sizes in bytes; every VM has the same assigned size."""

    pool_bytes: int
    reserve_bytes: int
    vms: int
    assigned_bytes: int
    reservation_bytes: int
    startup_bytes: int
    calm: Appetite
    grown: Appetite
    """What one VM grows to in the first act."""
    crowded: Appetite
    """What all of them ask for at once in the third."""
    step_deadline_s: float = 60.0
    """An act that has not ended by then has failed."""

    @property
    def overcommit_ratio(self) -> float:
        """Assigned memory to the pool, with the VMs that there are at the start."""
        return self.vms * self.assigned_bytes / self.pool_bytes

    def shares_of(self, number: int) -> int:
        """Shares of the VM with this number, from 1: the second has double, the newcomer half."""
        if number == 2:
            return 2000
        return 500 if number > self.vms else 1000

    @classmethod
    def full(cls) -> Self:
        """The well-known case: 1200 MiB for ten VMs of 160 MiB, overcommitted 1.33 times."""
        return cls(
            pool_bytes=1200 * MIB,
            reserve_bytes=60 * MIB,
            vms=10,
            assigned_bytes=160 * MIB,
            reservation_bytes=80 * MIB,
            startup_bytes=96 * MIB,
            calm=Appetite(40 * MIB, 40 * MIB),
            grown=Appetite(80 * MIB, 70 * MIB),
            crowded=Appetite(60 * MIB, 80 * MIB),
        )

    @classmethod
    def small(cls) -> Self:
        """The same with four VMs of 144 MiB, for a test or a quick look."""
        return cls(
            pool_bytes=476 * MIB,
            reserve_bytes=20 * MIB,
            vms=4,
            assigned_bytes=144 * MIB,
            reservation_bytes=64 * MIB,
            startup_bytes=76 * MIB,
            calm=Appetite(24 * MIB, 20 * MIB),
            grown=Appetite(60 * MIB, 60 * MIB),
            crowded=Appetite(40 * MIB, 70 * MIB),
        )


SCENARIOS: Final = {"full": Scenario.full, "small": Scenario.small}
