"""The host as columns: the same as the rows, in order, read-only, and unknown is not 0."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given

from host_agent.ledger.columns import HostColumns, Maybe, known, maybe_ints
from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot, rows_of
from host_agent.testing.policy_properties import hosts


@given(hosts())
def test_columns_and_rows_say_the_same(host: HostSnapshot) -> None:
    ordered = replace(host, guests=tuple(sorted(host.guests, key=lambda g: g.name)))
    assert rows_of(host.columns) == ordered
    assert host.columns.names == tuple(g.name for g in ordered.guests)
    assert len(host.columns) == len(host.guests)


def test_every_quantity_of_a_row_is_a_column() -> None:
    rows = {field.name for field in fields(GuestSnapshot)}
    columns = {field.name for field in fields(HostColumns)}
    assert rows - columns == {"name"}
    assert columns - rows == {"pool_pages", "reserve_pages", "names"}


def some(**columns: object) -> HostColumns:
    pages = np.array([10, 20])
    exact = {name: pages for name in ("assigned_pages", "quota_pages", "shares")}
    given = {"names": ("a", "b"), "reservation_pages": pages // 2, **exact, **columns}
    return HostColumns(pool_pages=100, reserve_pages=10, **given)  # type: ignore[arg-type]


def test_a_column_may_be_one_value_for_all() -> None:
    host = some(lent_pages=np.array(3), demand_pages=Maybe(np.array(7), np.array([True, False])))
    assert host.lent_pages.tolist() == [3, 3]
    assert host.demand_pages.or_else(-1).tolist() == [7, -1]
    assert host.usage_pages.known.tolist() == [False, False]
    assert (host.demand_pages.at(0), host.demand_pages.at(1)) == (7, None)


def test_what_is_derived() -> None:
    host = some(
        lent_pages=np.array([4, 0]),
        usage_pages=maybe_ints([12, None]),
        maximum_pages=maybe_ints([None, 3]),
    )
    assert host.shareable_pages == 90
    assert host.free_pages == 100 - 30 - (10 - 4)
    assert host.guest_free_pages.known.tolist() == [True, False]
    assert host.guest_free_pages.at(0) == 0  # 10 - 12: what it uses beyond its quota is not free
    assert host.most_pages.tolist() == [10, 10]  # a maximum below the reservation is void
    assert host.within(np.array([0, 50])).tolist() == [5, 20]


def test_what_is_fixed() -> None:
    host = some(
        pinned_pages=maybe_ints([2, None]), movable=np.array([True, False]), lent_pages=np.array(0)
    )
    assert host.fixed.tolist() == [True, True]
    assert host.fixed_pages.tolist() == [5, 20]  # a pin lies within reservation and size
    assert host.left_pages == 90 - 25
    free = some(pinned_pages=maybe_ints([None, 12]))
    assert (free.fixed.tolist(), free.fixed_pages.tolist()) == ([False, True], [0, 12])
    stuck = some(pinned_pages=maybe_ints([7, 7]), movable=np.array(False))
    assert stuck.fixed_pages.tolist() == [10, 20]


def test_nothing_can_be_written() -> None:
    host = some(spare_pages=known(np.array([1, 2])))
    for array in (host.quota_pages, host.movable, host.spare_pages.values, host.spare_pages.known):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"names": ("b", "a")}, "names must be in ascending order"),
        ({"names": ("a", "a")}, "names must be in ascending order"),
        ({"quota_pages": np.array([1])}, "quota_pages must have 2 values"),
        ({"usage_pages": known(np.array([1, 2, 3]))}, "usage_pages must have 2 values"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some(**columns)


def test_no_counter_of_a_guest_is_too_large() -> None:
    assert maybe_ints([2**64 - 1, 2**63 - 1, None]).values.tolist() == [2**63 - 1, 2**63 - 1, 0]
