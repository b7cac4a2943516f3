"""The division of host_agent/policy/fill.py, one part after the other, in fractions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    above the sum of the highs. Parts of weight 0 come last: they have their lows, and divide
    equally what the others can't take. The result does not depend on the order of `parts`.
    """
    weighted = {name: part for name, part in parts.items() if part.weight > 0}
    last = {name: replace(part, weight=1) for name, part in parts.items() if part.weight == 0}
    result = _fill(total_pages - sum(part.low_pages for part in last.values()), weighted)
    return result | _fill(total_pages - sum(result.values()), last)


def _fill(total_pages: int, parts: Mapping[str, Bounds]) -> dict[str, int]:
    """As `fill`, where every weight is above 0."""
    level, unit = _level(total_pages, parts)
    result: dict[str, int] = {}
    remainders: dict[str, int] = {}
    for name, part in parts.items():
        pages, remainder = divmod(level * part.weight, unit)
        result[name] = min(max(pages, part.low_pages), part.high_pages)
        if part.low_pages <= pages < part.high_pages:
            remainders[name] = remainder
    # The exact parts add up to a whole number, and so do the remainders: the pages lost, fewer than
    # there are remainders above 0.
    lost = sum(remainders.values()) // unit
    for name in sorted(remainders, key=lambda name: (-remainders[name], name))[:lost]:
        result[name] += 1
    return result


def _level(total_pages: int, parts: Mapping[str, Bounds]) -> tuple[int, int]:
    """The level at which the parts add up to the total, or the nearest that the bounds allow.

    Returns pages for one unit of weight as numerator and denominator, in integers throughout.

    The sum of the parts is constant + slope * level, and bends where a part leaves its low (its
    weight joins the slope) or reaches its high (its weight leaves it). Walk over the bends in
    order, until the total lies before the next one: O(n log n).
    """
    constant = sum(part.low_pages for part in parts.values())
    if constant >= total_pages or not parts:
        return 0, 1
    bends = sorted(
        (Fraction(bound, part.weight), sign * bound, sign * part.weight)
        for part in parts.values()
        for sign, bound in ((1, part.low_pages), (-1, part.high_pages))
    )
    slope = 0
    for bend, bound, weight in bends:
        # The sum at this bend, without a division.
        if constant * bend.denominator + slope * bend.numerator >= total_pages * bend.denominator:
            return total_pages - constant, slope
        constant -= bound
        slope += weight
    last_bend = bends[-1][0]
    return last_bend.numerator, last_bend.denominator
