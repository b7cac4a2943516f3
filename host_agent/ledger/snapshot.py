"""What a policy sees: the host and its guests at one instant, frozen.

Here it stands as rows, one value a guest, as the ledger writes it; `HostSnapshot.columns` is the
same as one array a quantity, which is what a policy is given. All sizes are in pages of 4 KiB.
Absent knowledge is None, never 0: a guest that has not said what it needs is not a guest that
needs nothing.
"""

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from host_agent.ledger.columns import HostColumns, maybe_floats, maybe_ints


@dataclass(frozen=True, slots=True, kw_only=True)
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

    usage_pages: int | None = None
    """What the guest uses of its quota, page cache included."""
    active_fraction: float | None = None
    """Part of its memory in use at all lately, 0 to 1: estimated in the guest by sampling."""
    pressure_some_total_s: float | None = None
    """How long some task of it has waited for memory in all (PSI). None on cgroup v1."""
    refault_pages_total: int | None = None
    """Evicted page cache that it read again, in all."""
    swap_used_pages: int | None = None
    oom_kills_total: int | None = None

    has_driver: bool = True
    """A driver is connected."""
    dry: bool = False
    """It has run into its quota: it waits for memory, or did so within the last second."""
    stalled_since_s: float | None = None
    """Since when it should give memory and has given none, on the clock of `now_s`; None if it
    does as it is told."""
    maximum_pages: int | None = None
    """The most that it may have, if that is less than the assigned size."""
    startup_pages: int | None = None
    """What it would like to begin with."""
    buffer_percent: float | None = None
    """What it is to have beyond its demand."""
    inaccuracy_pages: int | None = None
    """How far quota and target may lie apart and still count as equal: one frame of its balloon."""


UNSEEN: Final = Observation()


@dataclass(frozen=True, slots=True)
class GuestSnapshot(Observation):
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

    @property
    def columns(self) -> HostColumns:
        """The same as columns, in the order of the guests' names, whatever the order here."""
        rows = sorted(self.guests, key=lambda guest: guest.name)

        def of(name: str) -> list[Any]:
            return [getattr(row, name) for row in rows]

        columns: dict[str, Any] = {
            **{name: np.array(of(name), np.int64) for name in _INT_COLUMNS},
            **{name: np.array(of(name), np.bool_) for name in _BOOL_COLUMNS},
            **{name: maybe_ints(of(name)) for name in _MAYBE_INT_COLUMNS},
            **{name: maybe_floats(of(name)) for name in _MAYBE_FLOAT_COLUMNS},
        }
        return HostColumns(
            pool_pages=self.pool_pages,
            reserve_pages=self.reserve_pages,
            names=tuple(of("name")),
            **columns,
        )


def rows_of(host: HostColumns) -> HostSnapshot:
    """The same host as rows: for a policy that would rather loop over its guests."""
    every: dict[str, list[Any]] = {
        name: getattr(host, name).tolist() for name in (*_INT_COLUMNS, *_BOOL_COLUMNS)
    }
    for name in (*_MAYBE_INT_COLUMNS, *_MAYBE_FLOAT_COLUMNS):
        column = getattr(host, name)
        pairs = zip(column.values.tolist(), column.known.tolist(), strict=True)
        every[name] = [value if is_known else None for value, is_known in pairs]
    guests = tuple(
        GuestSnapshot(name=name, **{key: values[place] for key, values in every.items()})
        for place, name in enumerate(host.names)
    )
    return HostSnapshot(host.pool_pages, host.reserve_pages, guests)


def _columns_of(annotation: Any) -> tuple[str, ...]:
    return tuple(row.name for row in fields(GuestSnapshot) if row.type == annotation)


_INT_COLUMNS: Final = _columns_of(int)
_BOOL_COLUMNS: Final = _columns_of(bool)
_MAYBE_INT_COLUMNS: Final = _columns_of(int | None)
_MAYBE_FLOAT_COLUMNS: Final = _columns_of(float | None)
