"""Fields made of others, and the list of a message's fields from its annotations.

The plain kinds are in field_kinds.py. This module adds tuples, pairs and optional values, and
reads a dataclass's type hints once, when the module that declares it is imported.
"""

import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from protocol.field_kinds import Convert, FieldKind, OneOf


@dataclass(frozen=True)
class TupleOf:
    """A bounded tuple of one kind; array in msgpack."""

    item: FieldKind
    max_items: int
    min_items: int = 0

    def fault(self, value: Any) -> str | None:
        """Length before items."""
        if type(value) is not tuple:
            return f"must be a tuple, not {type(value).__name__}"
        if not self.min_items <= len(value) <= self.max_items:
            return f"must have {self.min_items} to {self.max_items} items, not {len(value)}"
        for item in value:
            if fault := self.item.fault(item):
                return f"has an item that {fault}"
        return None

    def to_wire(self, value: tuple[Any, ...]) -> list[Any]:
        """Item by item."""
        convert = self.item.to_wire
        return list(value) if convert is None else [convert(item) for item in value]

    def from_wire(self, value: Any) -> tuple[Any, ...]:
        """Item by item."""
        if type(value) is not list:
            raise ValueError(f"must be an array, not {type(value).__name__}")
        if len(value) > self.max_items:
            raise ValueError(f"must have at most {self.max_items} items, not {len(value)}")
        convert = self.item.from_wire
        return tuple(value) if convert is None else tuple(convert(item) for item in value)

    def describe(self) -> str:
        """With the item's own words."""
        return f"array of {self.min_items} to {self.max_items}: {self.item.describe()}"


@dataclass(frozen=True)
class Pair:
    """Two values of two kinds; array of two in msgpack."""

    first: FieldKind
    second: FieldKind

    def fault(self, value: Any) -> str | None:
        """The first fault of the two."""
        if type(value) is not tuple or len(value) != 2:
            return "must be a pair"
        return self.first.fault(value[0]) or self.second.fault(value[1])

    def to_wire(self, value: tuple[Any, Any]) -> list[Any]:
        """Each by its kind."""
        kinds = (self.first, self.second)
        return [_apply(kind.to_wire, item) for kind, item in zip(kinds, value, strict=True)]

    def from_wire(self, value: Any) -> tuple[Any, Any]:
        """Each by its kind."""
        if type(value) is not list or len(value) != 2:
            raise ValueError("must be an array of two")
        return _apply(self.first.from_wire, value[0]), _apply(self.second.from_wire, value[1])

    def describe(self) -> str:
        """Both."""
        return f"({self.first.describe()}; {self.second.describe()})"


@dataclass(frozen=True)
class Maybe:
    """A value or None, which means unknown or absent. None is left out on the wire."""

    kind: FieldKind

    @property
    def to_wire(self) -> Convert | None:
        """Of the value; None never gets here."""
        return self.kind.to_wire

    @property
    def from_wire(self) -> Convert | None:
        """Of the value, nil as None."""
        convert = self.kind.from_wire
        if convert is None:
            return None
        return lambda value: None if value is None else convert(value)

    def fault(self, value: Any) -> str | None:
        """None is always good."""
        return None if value is None else self.kind.fault(value)

    def describe(self) -> str:
        """Marked as optional."""
        return f"{self.kind.describe()}; or absent"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of one message, ready for quick use."""

    name: str
    kind: FieldKind
    fault: Callable[[Any], str | None]
    to_wire: Convert | None
    from_wire: Convert | None
    default: Any
    """MISSING if the field must be on the wire."""


def fields_of(message_class: type[Any]) -> tuple[Field, ...]:
    """The fields of a dataclass from its annotations. TypeError for one without a kind."""
    hints = get_type_hints(message_class, include_extras=True)
    found = []
    for field in dataclass_fields(message_class):
        kind = _kind_of(hints[field.name])
        found.append(
            Field(field.name, kind, kind.fault, kind.to_wire, kind.from_wire, field.default)
        )
    return tuple(found)


def is_required(field: Field) -> bool:
    """Whether a message without this field is refused."""
    return field.default is MISSING


def _kind_of(hint: Any) -> FieldKind:
    if get_origin(hint) is Annotated:
        kind: FieldKind = get_args(hint)[1]
        return kind
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return OneOf(hint)
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [argument for argument in get_args(hint) if argument is not type(None)]
        return Maybe(_kind_of(inner))
    raise TypeError(f"no field kind for {hint!r}")


def _apply(convert: Convert | None, value: Any) -> Any:
    return value if convert is None else convert(value)
