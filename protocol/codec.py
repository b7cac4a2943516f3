"""Messages to bytes and back: msgpack maps {"type": wire name, field: value, ...}.

Driven by the fields that the messages declare (fields.py); there is no code for any one message.
Decoding believes nothing: whatever is wrong with the bytes is a RemoteProtocolError that names
the message and the field. Unknown keys are ignored, so that a later version may add some; unknown
types and unknown enum values are not.
"""

from dataclasses import MISSING
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from protocol.errors import RemoteProtocolError
from protocol.messages import MESSAGES, Message
from protocol.vocabulary import MAX_MESSAGE_BYTES, MAX_TEXT_CHARS

TYPE_KEY: Final = "type"

BY_WIRE_NAME: Final[dict[str, type[Message]]] = {cls.WIRE_NAME: cls for cls in MESSAGES}

MAX_KEYS: Final = 64
"""Keys in a map. The largest message, Vitals, has 22; the rest is room for later versions."""

MAX_ITEMS: Final = 64
"""Items in an array. The longest, the features, has 32."""

MAX_CONTAINERS: Final = 256
"""Maps and arrays in one message. A Rejection has at most 11. Without this bound one MiB of empty
arrays, a byte each, would become 56 MiB of Python objects under a key that nobody knows."""

MAX_TEXT_BYTES: Final = 4 * MAX_TEXT_CHARS
"""UTF-8 takes at most four bytes a character."""


class _TooManyContainers(ValueError):
    """Raised inside the unpacker to stop it."""


def encode(message: Message) -> bytes:
    """The body of a message. Total: a message that was built can be encoded."""
    body: dict[str, Any] = {TYPE_KEY: message.WIRE_NAME}
    for field in message.FIELDS:
        value = getattr(message, field.name)
        if value is None:
            continue
        body[field.name] = value if field.to_wire is None else field.to_wire(value)
    packed: bytes = msgpack.packb(body)
    return packed


def decode(body: bytes) -> Message:
    """The message of a body. Raises RemoteProtocolError for anything that is none."""
    raw = _unpack(body)
    if type(raw) is not dict:
        raise RemoteProtocolError(f"a message must be a map, not {type(raw).__name__}")
    wire_name = raw.get(TYPE_KEY)
    cls = BY_WIRE_NAME.get(wire_name) if type(wire_name) is str else None
    if cls is None:
        raise RemoteProtocolError(f"unknown message type {str(wire_name)[:40]!r}")
    values: dict[str, Any] = {}
    for field in cls.FIELDS:
        name = field.name
        value = raw.get(name, MISSING)
        if value is MISSING:
            if field.default is MISSING:
                raise RemoteProtocolError(f"{cls.__name__}.{name} is missing")
            continue
        if field.from_wire is not None:
            try:
                value = field.from_wire(value)
            except ValueError as error:
                raise RemoteProtocolError(f"{cls.__name__}.{name} {error}") from error
        values[name] = value
    try:
        return cls(**values)
    except ValueError as error:  # a bound; the text names message and field
        raise RemoteProtocolError(str(error)) from error


def _unpack(body: bytes) -> Any:
    containers = 0

    def counted(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise _TooManyContainers(f"more than {MAX_CONTAINERS} maps and arrays")
        return container

    try:
        return msgpack.unpackb(
            body,
            strict_map_key=True,
            object_hook=counted,
            list_hook=counted,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_KEYS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, OverflowError) as error:
        # ValueError covers msgpack's ExtraData, FormatError and StackError, and bad UTF-8.
        detail = str(error) or type(error).__name__
        raise RemoteProtocolError(f"malformed msgpack: {detail[:200]}") from error
