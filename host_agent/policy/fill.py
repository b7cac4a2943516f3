"""Dividing pages by weight between bounds: the arithmetic under the policies.

The result is a_i = clamp(level * weight_i, low_i, high_i) with one level for all, chosen so that
the parts add up to the total: weighted max-min fairness. Raising any part further would take from
one that has less for its weight. The level is an exact ratio of integers; the parts are rounded
down, and the pages lost to rounding handed out one by one, so that rounding neither makes nor
loses a page.

All of it is integer arithmetic on whole columns, and exact. No product leaves 64 bits, because
weights are below 2**20, a part's pages at most 2**32, and the parts fewer than 2**22: the level is
taken as whole and rest, rest < sum of weights < 2**42, so that rest * weight < 2**62.
"""

from bisect import bisect_left
from typing import Final

import numpy as np

from host_agent.ledger.columns import Bools, Ints

MAX_WEIGHT: Final = 2**20 - 1
"""Above the largest number of shares, 1,000,000."""

MAX_PART_PAGES: Final = 2**32
"""As many as page frame numbers can name: 16 TiB."""

MAX_PARTS: Final = 2**22 - 1

_FRACTION_BITS: Final = 41
"""Two different fractions with denominators below 2**20 differ by more than 2**-40."""


def fill(total_pages: int, low_pages: Ints, high_pages: Ints, weights: Ints) -> Ints:
    """Divide `total_pages` among parts with 0 <= low <= high and weight >= 0; returns pages.

    The sum is `total_pages` unless the bounds forbid it: never below the sum of the lows, never
    above the sum of the highs. Parts of weight 0 come last: they have their lows, and divide
    equally what the others can't take. Pages lost to rounding go to the largest remainders, and
    then to who comes first.

    Raises ValueError where a bound, a weight or the number of parts is beyond what is exact.
    """
    if len(weights) > MAX_PARTS:
        raise ValueError(f"{len(weights)} parts are more than {MAX_PARTS}")
    if len(weights) and not (weights.min() >= 0 and weights.max() <= MAX_WEIGHT):
        raise ValueError(f"weights must lie between 0 and {MAX_WEIGHT}")
    if np.any(low_pages < 0) or np.any(low_pages > high_pages):
        raise ValueError("bounds must be 0 <= low <= high")
    if np.any(high_pages > MAX_PART_PAGES):
        raise ValueError(f"a part can't have more than {MAX_PART_PAGES} pages")
    result = low_pages.astype(np.int64)
    first = weights > 0
    for group, group_weights in ((first, weights), (~first, np.ones_like(weights))):
        if np.any(group):
            left_pages = total_pages - int(result[~group].sum())
            result[group] = _fill(
                left_pages, low_pages[group], high_pages[group], group_weights[group]
            )
    return result


def _fill(total_pages: int, lows: Ints, highs: Ints, weights: Ints) -> Ints:
    """As `fill`, where every weight is above 0."""
    level, unit = _level(total_pages, lows, highs, weights)
    whole, rest = divmod(level, unit)
    # Whoever has weight is full at a level of MAX_PART_PAGES: more would only overflow.
    pages = min(whole, MAX_PART_PAGES) * weights + rest * weights // unit
    remainders = rest * weights % unit
    result: Ints = np.clip(pages, lows, highs)
    inside: Bools = (lows <= pages) & (pages < highs)
    # The exact parts add up to a whole number, and so do the remainders: the pages lost, fewer than
    # there are remainders above 0.
    places = np.flatnonzero(inside)
    lost = int(remainders[places].sum()) // unit
    largest_first = places[np.argsort(-remainders[places], kind="stable")]
    result[largest_first[:lost]] += 1
    return result


def _level(total_pages: int, lows: Ints, highs: Ints, weights: Ints) -> tuple[int, int]:
    """The level at which the parts add up to the total, or the nearest that the bounds allow.

    Returns pages for one unit of weight as numerator and denominator.

    The sum of the parts is constant + slope * level, and bends where a part leaves its low (its
    weight joins the slope) or reaches its high (its weight leaves it). The sums before each bend
    are running totals, and never fall: look for the first bend at which the total is reached.
    """
    least_pages = int(lows.sum())
    if least_pages >= total_pages:
        return 0, 1
    bounds = np.concatenate((lows, highs))
    of_weight = np.concatenate((weights, weights))
    sign = np.repeat(np.array([1, -1]), len(weights))
    # bound / weight in order, exactly: by its whole part, then by the leading bits of the rest.
    fractions = ((bounds % of_weight) << _FRACTION_BITS) // of_weight
    order = np.lexsort((fractions, bounds // of_weight))
    bounds, of_weight, sign = bounds[order], of_weight[order], sign[order]
    constants = least_pages - np.concatenate(([0], np.cumsum(sign * bounds)))
    slopes = np.concatenate(([0], np.cumsum(sign * of_weight)))

    def is_reached(bend: int) -> bool:
        # In Python's integers: these products know no bound.
        bound, weight = int(bounds[bend]), int(of_weight[bend])
        return int(constants[bend]) * weight + int(slopes[bend]) * bound >= total_pages * weight

    bend = bisect_left(range(len(bounds)), True, key=is_reached)
    if bend < len(bounds):
        return total_pages - int(constants[bend]), int(slopes[bend])
    return int(bounds[-1]), int(of_weight[-1])
