"""Kinds of plain message fields: what a value may be, and how it looks in msgpack.

A message declares each field's type once, as `Annotated[python type, kind]`. Two users read it:
the dataclass when it is built (`fault`), and the codec when it crosses the wire (`to_wire`,
`from_wire`). So a bound can't be forgotten on one of the ways.

A kind's `fault(value)` gives None for a good value, or the end of a sentence that begins with
the field's name. `from_wire` converts only what msgpack can't say (page frames, enums, tuples)
and leaves the rest to `fault`; it raises ValueError with such an end of a sentence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from protocol.page_frames import PageFrames
from protocol.vocabulary import MAX_PAGES, MAX_RANGES

Convert = Callable[[Any], Any]


class FieldKind(Protocol):
    """What is known about one kind of field. A None converter means: as it is."""

    @property
    def to_wire(self) -> Convert | None:
        """Value to what msgpack packs."""

    @property
    def from_wire(self) -> Convert | None:
        """What msgpack gives to value; ValueError if it can't be."""

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""

    def describe(self) -> str:
        """The kind in words, for the protocol's document."""


class _AsItIs:
    """Both converters absent: msgpack has the type itself."""

    to_wire: Convert | None = None
    from_wire: Convert | None = None


@dataclass(frozen=True)
class Whole(_AsItIs):
    """An int within bounds, both included. A bool or a numpy integer is none."""

    lowest: int
    highest: int
    multiple_of: int = 1

    def fault(self, value: Any) -> str | None:
        """Type first: a bool compares like an int."""
        if type(value) is not int:
            return f"must be an int, not {type(value).__name__}"
        if not self.lowest <= value <= self.highest:
            return f"must be {self.lowest} to {self.highest}, not {number_text(value)}"
        if value % self.multiple_of:
            return f"must be a multiple of {self.multiple_of}, not {value}"
        return None

    def describe(self) -> str:
        """With powers of two as such."""
        multiple = f", multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"int, {number_text(self.lowest)} to {number_text(self.highest)}{multiple}"


@dataclass(frozen=True)
class Choice(_AsItIs):
    """One of a few ints."""

    allowed: tuple[int, ...]

    def fault(self, value: Any) -> str | None:
        """Type first: True equals 1."""
        if type(value) is not int:
            return f"must be an int, not {type(value).__name__}"
        if value not in self.allowed:
            return f"must be one of {self.allowed}, not {number_text(value)}"
        return None

    def describe(self) -> str:
        """All of them."""
        return "int, " + " or ".join(str(value) for value in self.allowed)


@dataclass(frozen=True)
class Real(_AsItIs):
    """A finite number within bounds, both included; an int will do, as in Python."""

    lowest: float
    highest: float

    def fault(self, value: Any) -> str | None:
        """NaN fails the comparison as well as any number outside."""
        if type(value) is not float and type(value) is not int:
            return f"must be a number, not {type(value).__name__}"
        if not self.lowest <= value <= self.highest or value == math.inf:
            return f"must be finite, {self.lowest} to {self.highest}, not {number_text(value)}"
        return None

    def describe(self) -> str:
        """With infinity as the absence of a bound."""
        if self.highest == math.inf:
            return f"float, finite, at least {self.lowest:g}"
        return f"float, {self.lowest:g} to {self.highest:g}"


@dataclass(frozen=True)
class Text(_AsItIs):
    """Text in one line, fit for a log and a terminal: printable characters alone."""

    max_chars: int
    min_chars: int = 0

    def fault(self, value: Any) -> str | None:
        """No control characters: a guest's words are shown on the host's terminal."""
        if type(value) is not str:
            return f"must be a str, not {type(value).__name__}"
        if not self.min_chars <= len(value) <= self.max_chars:
            return f"must have {self.min_chars} to {self.max_chars} characters, not {len(value)}"
        if not value.isprintable():
            return "must have printable characters only"
        return None

    def describe(self) -> str:
        """In characters, not bytes."""
        return f"str, {self.min_chars} to {self.max_chars} printable characters"


@dataclass(frozen=True)
class OneOf:
    """A member of a StrEnum; its value crosses the wire. Unknown values are refused."""

    enum: type[StrEnum]
    to_wire: Convert | None = None

    def fault(self, value: Any) -> str | None:
        """A bare str is no member."""
        if type(value) is not self.enum:
            return f"must be a {self.enum.__name__}, not {type(value).__name__}"
        return None

    def from_wire(self, value: Any) -> StrEnum:
        """By value."""
        if type(value) is not str:
            raise ValueError(f"must be a str, not {type(value).__name__}")
        try:
            return self.enum(value)
        except ValueError:
            raise ValueError(f"is no {self.enum.__name__}: {value[:40]!r}") from None

    def describe(self) -> str:
        """By name; the members are listed elsewhere."""
        return self.enum.__name__


@dataclass(frozen=True)
class FrameList:
    """Page frames, at most MAX_RANGES ranges; bin in msgpack."""

    may_be_empty: bool = False

    def fault(self, value: Any) -> str | None:
        """Bounded ranges, frame numbers that fit the wire."""
        if type(value) is not PageFrames:
            return f"must be PageFrames, not {type(value).__name__}"
        if value.range_count > MAX_RANGES:
            return f"must have at most {MAX_RANGES} ranges, not {value.range_count}"
        if value.range_count == 0:
            return None if self.may_be_empty else "must name at least one frame"
        if value.page_count >= MAX_PAGES:
            return "must name fewer than 2**32 frames"  # one range of them all has no wire form
        return None

    def to_wire(self, value: PageFrames) -> bytes:
        """Little-endian u32 pairs."""
        return value.to_wire()

    def from_wire(self, value: Any) -> PageFrames:
        """As large as a message at most, so at most twice MAX_RANGES before `fault` counts them."""
        if type(value) is not bytes:
            raise ValueError(f"must be bin, not {type(value).__name__}")
        return PageFrames.from_wire(value)

    def describe(self) -> str:
        """How many there may be."""
        empty = "possibly none" if self.may_be_empty else "at least one"
        return f"PageFrames, {empty}"


def number_text(value: float) -> str:
    """A number short enough for one line; large powers of two as such."""
    if isinstance(value, int):
        for offset, suffix in ((0, ""), (1, " - 1")):
            power = value + offset
            if power >= 2**22 and power & (power - 1) == 0:
                return f"2**{power.bit_length() - 1}{suffix}"
        if value.bit_length() > 64:
            return f"an int of {value.bit_length()} bits"
    return str(value)
