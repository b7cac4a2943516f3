"""What a policy answers: a quota for every guest, and how short the host is. Pages of 4 KiB."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuotaTarget:
    """The quota that a guest should have."""

    name: str
    quota_pages: int
    entitled_pages: int
    """What it would get of everything that is wanted; equals the quota unless it can't move."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A quota for each guest of the snapshot, sorted by name."""

    targets: tuple[QuotaTarget, ...]
    shortage_pages: int
    """How much more is wanted than there is; 0 when every demand is met."""
