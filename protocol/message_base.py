"""What all messages have in common: a wire name, declared fields, and validity once built."""

from typing import ClassVar, TypeVar

from protocol.fields import Field, fields_of


class Message:
    """What all messages have. Not to be built itself."""

    __slots__ = ()

    WIRE_NAME: ClassVar[str]
    """Value of the key "type" on the wire."""
    FIELDS: ClassVar[tuple[Field, ...]]

    def __post_init__(self) -> None:
        """Raise ValueError for the first field that is out of bounds."""
        for field in self.FIELDS:
            fault = field.fault(getattr(self, field.name))
            if fault is not None:
                raise ValueError(f"{type(self).__name__}.{field.name} {fault}")


AnyMessage = TypeVar("AnyMessage", bound=Message)


def wire_message(cls: type[AnyMessage]) -> type[AnyMessage]:
    """Give a message class its wire name and its fields, read from the annotations."""
    cls.WIRE_NAME = cls.__name__.lower()
    cls.FIELDS = fields_of(cls)
    return cls
