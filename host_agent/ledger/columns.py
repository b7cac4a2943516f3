"""The host as columns: one array a quantity, one place a guest, in the order of their names.

This is what a policy is given. A policy that works on whole columns decides about 10,000 guests in
milliseconds; one that would rather loop has `rows_of` (snapshot.py). All sizes are in pages of
4 KiB. What is not known has no value at all: `Maybe` keeps the values and where they are known
apart, so that nobody takes an unknown demand for a demand of 0. All arrays are read-only.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Final, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Maybe(Generic[Number]):
    """A column of which some values may be unknown. What stands in `values` there means nothing."""

    values: NDArray[Number]
    known: Bools

    def or_else(self, other: "NDArray[Number] | int | float") -> NDArray[Number]:
        """The values, and `other` (a column or one number) where they are unknown."""
        filled: NDArray[Number] = np.where(self.known, self.values, other).astype(self.values.dtype)
        return filled

    def at(self, place: int) -> int | float | None:
        """One value as a Python number; None where it is unknown."""
        return self.values[place].item() if self.known[place] else None


MAX_INT: Final = 2**63 - 1

MaybeInts: TypeAlias = Maybe[np.int64]
MaybeFloats: TypeAlias = Maybe[np.float64]

UNKNOWN_INTS: Final[MaybeInts] = Maybe(np.array(0), np.array(False))
UNKNOWN_FLOATS: Final[MaybeFloats] = Maybe(np.array(0.0), np.array(False))
"""Unknown for every guest, however many there are."""


def known(values: NDArray[Number]) -> Maybe[Number]:
    """A column that is known for every guest."""
    return Maybe(values, np.array(True))


def maybe_ints(values: Iterable[int | None]) -> MaybeInts:
    """A column of integers from values that may be None; what 63 bits can't hold counts as that.

    Some are counters that guests report: none may end the agent, whatever a guest says.
    """
    listed = list(values)
    return Maybe(
        np.array([0 if value is None else min(value, MAX_INT) for value in listed], np.int64),
        np.array([value is not None for value in listed], np.bool_),
    )


def maybe_floats(values: Iterable[float | None]) -> MaybeFloats:
    """A column of floats from values that may be None."""
    listed = list(values)
    return Maybe(
        np.array([0.0 if value is None else value for value in listed], np.float64),
        np.array([value is not None for value in listed], np.bool_),
    )


def _yes() -> Bools:
    return np.array(True)


def _no() -> Bools:
    return np.array(False)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HostColumns:
    """One host at one instant. Place i of every column is the guest `names[i]`.

    What each quantity means stands beside the field of the same name in snapshot.py. A column may
    be given as one value for all guests (an array without dimensions).

    Raises ValueError when the names are not in ascending order, or a column has another length.
    """

    pool_pages: int
    reserve_pages: int
    names: tuple[str, ...]
    """Ascending, each once."""

    # The books
    assigned_pages: Ints
    reservation_pages: Ints
    shares: Ints
    quota_pages: Ints
    lent_pages: Ints = field(default_factory=lambda: np.array(0))

    # What can be done with the guest
    movable: Bools = field(default_factory=_yes)
    has_driver: Bools = field(default_factory=_yes)
    dry: Bools = field(default_factory=_no)
    stalled_since_s: MaybeFloats = UNKNOWN_FLOATS
    pinned_pages: MaybeInts = UNKNOWN_INTS
    maximum_pages: MaybeInts = UNKNOWN_INTS
    startup_pages: MaybeInts = UNKNOWN_INTS
    buffer_percent: MaybeFloats = UNKNOWN_FLOATS
    inaccuracy_pages: MaybeInts = UNKNOWN_INTS

    # What the guest said
    demand_pages: MaybeInts = UNKNOWN_INTS
    working_set_pages: MaybeInts = UNKNOWN_INTS
    spare_pages: MaybeInts = UNKNOWN_INTS
    usage_pages: MaybeInts = UNKNOWN_INTS
    active_fraction: MaybeFloats = UNKNOWN_FLOATS
    pressure_some_total_s: MaybeFloats = UNKNOWN_FLOATS
    refault_pages_total: MaybeInts = UNKNOWN_INTS
    swap_used_pages: MaybeInts = UNKNOWN_INTS
    oom_kills_total: MaybeInts = UNKNOWN_INTS

    def __post_init__(self) -> None:
        """Columns of one value become as long as the others; all become read-only."""
        if any(one >= other for one, other in zip(self.names, self.names[1:], strict=False)):
            raise ValueError("HostColumns.names must be in ascending order, each once")
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, Maybe):
                both = self._fit(column.name, value.values), self._fit(column.name, value.known)
                object.__setattr__(self, column.name, Maybe(*both))
            elif isinstance(value, np.ndarray):
                object.__setattr__(self, column.name, self._fit(column.name, value))

    def __len__(self) -> int:
        """How many guests there are."""
        return len(self.names)

    @property
    def shareable_pages(self) -> int:
        """What quotas may add up to when no reserve is lent: pool minus host reserve."""
        return self.pool_pages - self.reserve_pages

    @property
    def free_pages(self) -> int:
        """In nobody's quota and not in what is left of the reserve."""
        reserve_left = self.reserve_pages - int(self.lent_pages.sum())
        return self.pool_pages - int(self.quota_pages.sum()) - reserve_left

    @property
    def guest_free_pages(self) -> MaybeInts:
        """What each guest has of its quota and doesn't use."""
        return Maybe(
            np.maximum(self.quota_pages - self.usage_pages.values, 0), self.usage_pages.known
        )

    @property
    def most_pages(self) -> Ints:
        """The most that each guest may have: its maximum, else its assigned size."""
        return np.clip(
            self.maximum_pages.or_else(self.assigned_pages),
            self.reservation_pages,
            self.assigned_pages,
        )

    @property
    def fixed(self) -> Bools:
        """About whom a policy has nothing to decide: pinned by the operator, or immovable."""
        return self.pinned_pages.known | ~self.movable

    @property
    def fixed_pages(self) -> Ints:
        """What those have: an immovable guest its quota, a pinned one its pin. 0 for the others."""
        pins = np.where(self.pinned_pages.known, self.within(self.pinned_pages.or_else(0)), 0)
        return np.where(self.movable, pins, self.quota_pages)

    @property
    def left_pages(self) -> int:
        """What the fixed ones leave of pool minus reserve; below 0 if they have more than that."""
        return self.shareable_pages - int(self.fixed_pages.sum())

    def within(self, pages: Ints) -> Ints:
        """`pages`, but at least each guest's reservation and at most its assigned size."""
        return np.clip(pages, self.reservation_pages, self.assigned_pages)

    def _fit(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        length = len(self.names)
        if array.shape not in ((), (length,)):
            raise ValueError(f"HostColumns.{name} must have {length} values, not {array.shape}")
        if array.shape == ():
            return np.broadcast_to(array, (length,))  # a read-only view
        view = array.view()  # the same, at a fifth of the price: there are 22 of them in a snapshot
        view.flags.writeable = False
        return view
