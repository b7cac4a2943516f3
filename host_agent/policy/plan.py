"""What a policy answers: a quota for every guest, and how short the host is. Pages of 4 KiB."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuotaTarget:
    """The quota that a guest should have."""

    name: str
    quota_pages: int
    entitled_pages: int
    """What it would get if every guest could be moved down to its reservation: differs from the
    quota while somebody can't be, and where the difference is too small to be worth a move."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A quota for each guest of the snapshot, sorted by name."""

    targets: tuple[QuotaTarget, ...]
    shortage_pages: int
    """How much more is needed than there is; 0 when every need can be met. What can't be moved or
    is pinned counts as needed."""
