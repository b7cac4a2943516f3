"""Dividing pages by weight between bounds: the arithmetic under the policies.

The result is a_i = clamp(level * weight_i, low_i, high_i) with one level for all, chosen so that
the parts add up to the total: weighted max-min fairness. Raising any part further would take from
one that has less for its weight. Exact in rationals, then rounded down, and the pages lost to
rounding handed out one by one, so that rounding neither makes nor loses a page.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds and weight of one part, in pages: 0 <= low <= high, weight >= 0."""

    low_pages: int
    high_pages: int
    weight: int


def fill(total_pages: int, parts: Mapping[str, Bounds]) -> dict[str, int]:
    """Divide `total_pages`; returns pages by name.

    The sum is `total_pages` unless the bounds forbid it: never below the sum of the lows, never
    above the sum of the highs; parts of weight 0 stay at their low. The result does not depend on
    the order of `parts`.
    """
    level = _level(total_pages, parts)
    exact = {name: _at(level, part) for name, part in parts.items()}
    result = {name: int(value) for name, value in exact.items()}
    spare = min(total_pages, int(sum(exact.values()))) - sum(result.values())
    by_remainder = sorted(parts, key=lambda name: (result[name] - exact[name], name))
    for name in by_remainder[: max(spare, 0)]:
        result[name] += 1
    return result


def _at(level: Fraction, part: Bounds) -> Fraction:
    wanted = level * part.weight
    return min(max(wanted, Fraction(part.low_pages)), Fraction(part.high_pages))


def _level(total_pages: int, parts: Mapping[str, Bounds]) -> Fraction:
    """The level at which the parts add up to the total, or the nearest that the bounds allow.

    The sum is piecewise linear in the level and bends only where a part leaves its low or reaches
    its high: walk over the bends in order.
    """
    weighted = [part for part in parts.values() if part.weight > 0]
    bends = sorted(
        {
            Fraction(bound, part.weight)
            for part in weighted
            for bound in (part.low_pages, part.high_pages)
        }
    )
    if not bends:
        return Fraction(0)
    previous, previous_sum = Fraction(0), sum(_at(Fraction(0), part) for part in parts.values())
    for bend in bends:
        bend_sum = sum(_at(bend, part) for part in parts.values())
        if bend_sum >= total_pages:
            if bend_sum == previous_sum:
                return previous
            share = Fraction(total_pages - previous_sum) / (bend_sum - previous_sum)
            return previous + max(share, Fraction(0)) * (bend - previous)
        previous, previous_sum = bend, bend_sum
    return previous
