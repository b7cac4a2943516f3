"""Division by weight between bounds: conserves pages, keeps bounds, is fair, knows no order."""

import time
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from fill_oracle import Bounds
from fill_oracle import fill as exact
from hypothesis import given
from hypothesis import strategies as st

from host_agent.ledger.columns import Ints
from host_agent.policy import fill as columns


def column(values: list[int]) -> Ints:
    return np.array(values, np.int64)


def fill(total_pages: int, parts: dict[str, Bounds]) -> dict[str, int]:
    """The division under test, by name; the parts go in in the order of their names."""
    names = sorted(parts)
    pages = columns.fill(
        total_pages,
        column([parts[name].low_pages for name in names]),
        column([parts[name].high_pages for name in names]),
        column([parts[name].weight for name in names]),
    )
    return dict(zip(names, pages.tolist(), strict=True))


@st.composite
def bounds(draw: st.DrawFn, most: int) -> Bounds:
    low = draw(st.integers(0, most))
    # Equal bounds and equal weights make bends that coincide.
    high = low + draw(st.just(0) | st.integers(0, most))
    return Bounds(
        low, high, draw(st.integers(0, 7) | st.sampled_from([1000, 2000, columns.MAX_WEIGHT]))
    )


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, dict[str, Bounds]]:
    """A total, mostly between what the bounds allow, and the parts.

    Of few pages, where rounding is all there is, or of many, or of as many as there can be.
    """
    some = bounds(draw(st.sampled_from([2, 40, columns.MAX_PART_PAGES // 2])))
    parts = draw(st.dictionaries(st.sampled_from("abcdefgh"), some, max_size=8))
    lows = sum(part.low_pages for part in parts.values())
    highs = sum(part.high_pages for part in parts.values())
    return draw(st.integers(lows - 2, highs + 2)), parts


@given(divisions())
def test_rounding_neither_makes_nor_loses_a_page(division: tuple[int, dict[str, Bounds]]) -> None:
    total, parts = division
    lows = sum(part.low_pages for part in parts.values())
    highs = sum(part.high_pages for part in parts.values())
    assert sum(fill(total, parts).values()) == min(max(total, lows), highs)


@given(divisions())
def test_every_part_is_a_whole_number_within_its_bounds(
    division: tuple[int, dict[str, Bounds]],
) -> None:
    total, parts = division
    result = fill(total, parts)
    assert result.keys() == parts.keys()
    for name, pages in result.items():
        assert type(pages) is int
        assert parts[name].low_pages <= pages <= parts[name].high_pages


@given(divisions(), st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(
    division: tuple[int, dict[str, Bounds]], random: Random
) -> None:
    total, parts = division
    names = list(parts)
    random.shuffle(names)
    assert fill(total, {name: parts[name] for name in names}) == fill(total, parts)


@given(divisions())
def test_who_is_below_its_high_has_no_less_per_weight_than_who_is_above_its_low(
    division: tuple[int, dict[str, Bounds]],
) -> None:
    """Up to the page that rounding takes from the one and gives to the other."""
    total, parts = division
    result = fill(total, parts)
    wanting = [(n, p) for n, p in parts.items() if p.weight and result[n] < p.high_pages]
    giving = [(n, p) for n, p in parts.items() if p.weight and result[n] > p.low_pages]
    for poor, a in wanting:
        for rich, b in giving:
            assert (result[poor] + 1) * b.weight > (result[rich] - 1) * a.weight


@given(divisions())
def test_parts_without_weight_come_last(division: tuple[int, dict[str, Bounds]]) -> None:
    total, parts = division
    result = fill(total, parts)
    last = [(n, p) for n, p in parts.items() if not p.weight]
    if any(result[n] > p.low_pages for n, p in last):
        assert all(result[n] == p.high_pages for n, p in parts.items() if p.weight)


@given(divisions())
def test_one_page_more_takes_no_page_from_anybody_but_by_rounding(
    division: tuple[int, dict[str, Bounds]],
) -> None:
    total, parts = division
    less, more = fill(total, parts), fill(total + 1, parts)
    assert all(more[name] >= less[name] - 1 for name in parts)


@pytest.mark.parametrize("total", [-1, 0, 7])
def test_nobody_gets_nothing(total: int) -> None:
    assert fill(total, {}) == {}


def test_division_by_weight_by_hand() -> None:
    parts = {name: Bounds(0, 1000, weight) for name, weight in (("a", 1), ("b", 2), ("c", 3))}
    # 600 / (1 + 2 + 3) = 100 for one of weight.
    assert fill(600, parts) == {"a": 100, "b": 200, "c": 300}


def test_bounds_by_hand() -> None:
    parts = {
        "low": Bounds(50, 100, 1),
        "high": Bounds(0, 20, 1),
        "a": Bounds(0, 100, 1),
        "b": Bounds(0, 100, 3),
    }
    # "low" keeps 50 and "high" is full with 20: 130 - 70 = 60 remain, 15 for one of weight;
    # but 15 < 20, so "high" is not full: 130 - 50 = 80 among 1 + 1 + 3 = 16 for one of weight.
    assert fill(130, parts) == {"low": 50, "high": 16, "a": 16, "b": 48}
    # 230 - 50 - 20 = 160 among 1 + 3: 40 for one of weight, and "b" is full only at 33.3: so
    # 230 - 50 - 20 - 100 = 60 for "a", which is above 50: "low" rises too, 230 - 120 = 110 for two.
    assert fill(230, parts) == {"low": 55, "high": 20, "a": 55, "b": 100}


def test_lost_pages_go_to_the_largest_remainders_and_then_by_name() -> None:
    parts = {name: Bounds(0, 100, weight) for name, weight in (("a", 3), ("b", 5), ("c", 5))}
    # 17 / 13: a 3.92, b and c 6.54: rounded down 3 + 6 + 6 = 15, two pages are lost.
    assert fill(17, parts) == {"a": 4, "b": 7, "c": 6}


def test_a_page_that_rounding_lost_may_be_the_first_above_the_low() -> None:
    # Half a page each, above lows of 0.
    assert fill(1, {"a": Bounds(0, 9, 1), "b": Bounds(0, 9, 1)}) == {"a": 1, "b": 0}


def test_a_part_at_its_bound_has_no_remainder() -> None:
    # 10 pages: "a" is full with 3, "b" and "c" have 3.5 each, of which rounding loses one page.
    parts = {"a": Bounds(0, 3, 1), "b": Bounds(0, 9, 1), "c": Bounds(0, 9, 1)}
    assert fill(10, parts) == {"a": 3, "b": 4, "c": 3}
    # "a" is held up at 5, above its 3.33.
    parts = {"a": Bounds(5, 9, 1), "b": Bounds(0, 9, 1), "c": Bounds(0, 9, 1)}
    assert fill(10, parts) == {"a": 5, "b": 3, "c": 2}


def test_nobody_has_weight() -> None:
    parts = {"a": Bounds(1, 5, 0), "b": Bounds(0, 10, 0)}
    assert fill(1, parts) == {"a": 1, "b": 0}
    assert fill(8, parts) == {"a": 4, "b": 4}
    assert fill(99, parts) == {"a": 5, "b": 10}


@given(divisions())
def test_it_is_the_exact_division(division: tuple[int, dict[str, Bounds]]) -> None:
    """To the page what fractions of any length give."""
    total, parts = division
    assert fill(total, parts) == exact(total, parts)


@given(st.randoms(use_true_random=False), st.integers(1, 300))
def test_it_is_the_exact_division_of_many_parts(random: Random, count: int) -> None:
    parts = {}
    for number in range(count):
        low = random.choice([0, random.randrange(2**31)])
        high = low + random.choice([0, 1, random.randrange(2**31)])
        weight = random.choice([0, 1, 1000, columns.MAX_WEIGHT, random.randrange(2**20)])
        parts[f"g{number}"] = Bounds(low, high, weight)
    total = random.randrange(count * 2**32)
    assert fill(total, parts) == exact(total, parts)


def test_exact_where_floats_are_not() -> None:
    """The bends of these two differ by one part in 2**51: a float sees the same level."""
    most, weight = columns.MAX_PART_PAGES, columns.MAX_WEIGHT
    parts = {
        "a": Bounds(0, most, weight),
        "b": Bounds(0, most - 4096, weight - 1),
        "c": Bounds(0, most - 1, weight),
    }
    for total in range(3 * most - 4200, 3 * most - 4080):
        assert fill(total, parts) == exact(total, parts)


def test_the_largest_level_does_not_overflow() -> None:
    most = columns.MAX_PART_PAGES
    parts = {"small": Bounds(0, most, 1), "large": Bounds(0, most, columns.MAX_WEIGHT)}
    assert fill(2 * most - 1, parts) == {"small": most - 1, "large": most}


@pytest.mark.parametrize(
    ("low", "high", "weight", "message"),
    [
        (0, 1, -1, "weights"),
        (0, 1, 2**20, "weights"),
        (-1, 1, 1, "bounds"),
        (2, 1, 1, "bounds"),
        (0, 2**32 + 1, 1, "pages"),
    ],
)
def test_what_would_not_be_exact_is_refused(low: int, high: int, weight: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns.fill(1, column([low]), column([high]), column([weight]))


def test_more_parts_than_are_exact_are_refused() -> None:
    few = np.broadcast_to(np.array(1), (columns.MAX_PARTS + 1,))
    with pytest.raises(ValueError, match="parts"):
        columns.fill(1, few, few, few)


def test_ten_thousand_parts_take_milliseconds() -> None:
    """Against numpy's own sort of as many numbers, in the same run on the same machine."""
    count = 10_000
    place = np.arange(count)
    lows, weights = place * 7919 % 1000, 1 + place * 31 % 997
    highs = 1000 + place * 104_729 % 9000

    def fastest_s(work: Callable[[], object]) -> float:
        durations = []
        for _ in range(7):
            start = time.thread_time()
            work()
            durations.append(time.thread_time() - start)
        return min(durations)

    sorts_s = fastest_s(lambda: [np.sort(highs.astype(np.float64)) for _ in range(10)])
    assert fastest_s(lambda: columns.fill(2000 * count, lows, highs, weights)) < 10 * sorts_s
