"""Why a policy wants what it wants: the terms of its formula, filled in for one guest.

A policy hands over whole columns and the masks of its rules, inside a function that is called only
if somebody asks; so an explanation costs nothing until then.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from host_agent.ledger.columns import Bools, Floats, Ints, MaybeFloats, MaybeInts
from protocol.field_kinds import number_text
from protocol.vocabulary import one_line

Unit: TypeAlias = Literal["pages", "shares", "percent", "fraction", "s", "shares/page", ""]
Column: TypeAlias = Ints | Floats | Bools | MaybeInts | MaybeFloats
Value: TypeAlias = int | float | bool | str | None

MOST_TERMS: Final = 64
"""Of one explanation: the longest of our own has 14, and a person is to read it."""

MOST_BITS: Final = 63
"""Of a number that is told as one: what a program in any language reads."""


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the formula for one guest. A value of None is unknown."""

    name: str
    value: Value
    unit: Unit = ""


@dataclass(frozen=True, slots=True)
class Why:
    """What a decision about one guest came from."""

    rule: str
    """The rule that decided, in words."""
    terms: tuple[Term, ...]
    """What was known, then what was wanted, in the order of the formula."""


def plain(why: Why) -> Why:
    """The same, fit to be shown: lines of bounded length, and values that JSON has.

    A policy may be anybody's. Raises whatever looking at it raises.
    """
    terms = why.terms[:MOST_TERMS]
    return Why(
        one_line(str(why.rule)),
        tuple(_plain_term(term) for term in terms),
    )


def plain_value(value: Any) -> Value:
    """A value of anybody's as one that can be told in JSON; texts are cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if value.bit_length() <= MOST_BITS else number_text(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return _text(value)


def _plain_term(term: Term) -> Term:
    unit: Any = _text(term.unit)
    value = plain_value(term.value)
    if unit == "pages" and value is not None:
        value = int(value)  # or it is no number of pages
    return Term(_text(term.name), value, unit)


def _text(value: Any) -> str:
    return one_line(str(value))


@dataclass(frozen=True, slots=True, eq=False)
class Details:
    """The explanation of one decision about all guests, as columns."""

    host: Sequence[tuple[str, Value, Unit]] = ()
    """Terms that are the same for all guests."""
    guests: Sequence[tuple[str, Column, Unit]] = ()
    """Terms with a value for each guest."""
    rules: Sequence[tuple[Bools, str]] = ()
    """The first whose mask holds is the rule that decided about the guest."""
    otherwise: str = ""
    """The rule where none of these masks holds."""


class Explanation:
    """The explanation of one decision, put together when it is asked for."""

    __slots__ = ("_details", "_make", "names")

    def __init__(self, names: tuple[str, ...], make: Callable[[], Details]) -> None:
        self.names = names
        self._make = make
        self._details: Details | None = None

    def of(self, name: str) -> Why:
        """What the decision about `name` came from. Raises KeyError for one not in the plan."""
        try:
            place = self.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        if self._details is None:
            self._details = self._make()
        details = self._details
        host = tuple(Term(term, value, unit) for term, value, unit in details.host)
        guest = tuple(
            Term(term, _value_at(column, place), unit) for term, column, unit in details.guests
        )
        rules = (text for mask, text in details.rules if mask[place])
        return Why(next(rules, details.otherwise), host + guest)


def _value_at(column: Column, place: int) -> Value:
    if isinstance(column, np.ndarray):
        value: Value = column[place].item()
        return value
    return column.at(place)
