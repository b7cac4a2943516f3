"""What a policy sees: the host and its guests at one instant, frozen.

All sizes are in pages of 4 KiB. Absent knowledge is None, never 0: a guest that has not said what
it needs is not a guest that needs nothing.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Observation:
    """What the agent knows of a guest beside the books."""

    demand_pages: int | None = None
    """What it needs to run without pressure: the driver's estimate."""
    working_set_pages: int | None = None
    """Memory in recent use: the driver's estimate."""
    spare_pages: int | None = None
    """What it could give up of its quota if it had to: the driver's estimate."""
    movable: bool = True
    """False for a guest whose quota the policy can't change: no driver connected, or stuck."""
    pinned_pages: int | None = None
    """Quota that the operator fixed; the policy plans around it."""


UNSEEN: Final = Observation()


@dataclass(frozen=True, slots=True)
class GuestSnapshot:
    """One guest as the policy sees it."""

    name: str
    assigned_pages: int
    """Promised size of the guest as a VM."""
    reservation_pages: int
    """What can never be taken; at most `assigned_pages`."""
    shares: int
    """Relative weight when memory is short; 0 gets its reservation and what the others leave."""
    quota_pages: int
    """What it may use now."""
    lent_pages: int = 0
    """How much of the quota comes out of the host reserve and is owed."""
    demand_pages: int | None = None
    working_set_pages: int | None = None
    spare_pages: int | None = None
    movable: bool = True
    pinned_pages: int | None = None


@dataclass(frozen=True, slots=True)
class HostSnapshot:
    """The host as the policy sees it."""

    pool_pages: int
    reserve_pages: int
    guests: tuple[GuestSnapshot, ...]

    @property
    def shareable_pages(self) -> int:
        """What quotas may add up to when no reserve is lent: pool minus host reserve."""
        return self.pool_pages - self.reserve_pages
