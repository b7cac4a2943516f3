"""Messages are valid once built, and cross the wire unchanged; bad bytes are the peer's fault."""

import contextlib
import dataclasses
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies_messages import BY_TYPE, messages

from protocol.codec import MAX_CONTAINERS, decode, encode
from protocol.errors import RemoteProtocolError
from protocol.field_kinds import Whole
from protocol.messages import (
    MESSAGES,
    Claim,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Target,
    Vitals,
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.vocabulary import (
    MAX_FEATURE_CHARS,
    MAX_FEATURES,
    MAX_ID,
    MAX_MESSAGE_BYTES,
    MAX_RANGES,
    MAX_TEXT_CHARS,
    RefusalReason,
    RejectionReason,
    Urgency,
    one_line,
)

FRAMES = PageFrames.from_ranges([0, 10], [3, 5])
HELLO = Hello(1, 1, (), "test", 7, 0x7F00_0000_0000, 1000, 0, FRAMES)
WELCOME = Welcome(1, (), 1000, FRAMES, 200)
TARGET = Target(1, 10, Urgency.CALM)
REPORT = Report(1, 2, FRAMES)
REJECTION = Rejection(1, ((FRAMES, RejectionReason.SHARED),))
VITALS = Vitals(clock_s=1.0)
WORST_FRAMES = PageFrames.from_ranges(np.arange(MAX_RANGES) * 2, np.ones(MAX_RANGES, np.int64))


def raw(message: Message, **changes: Any) -> bytes:
    """The bytes of a message with some keys changed, or left out where the change is `...`."""
    body = {**msgpack.unpackb(encode(message)), **changes}
    packed: bytes = msgpack.packb({key: value for key, value in body.items() if value is not ...})
    return packed


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_message_crosses_unchanged(message_type: type[Message]) -> None:
    @settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
    @given(BY_TYPE[message_type])
    def crosses(message: Message) -> None:
        again = decode(encode(message))
        assert again == message
        assert type(again) is message_type

    crosses()


def test_wire_names_are_distinct() -> None:
    assert len({cls.WIRE_NAME for cls in MESSAGES}) == len(MESSAGES)


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda cls: cls.__name__)
def test_messages_are_frozen_and_slotted(message_type: type[Message]) -> None:
    assert message_type.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__dict__" not in dir(message_type)


REFUSED = [
    (TARGET, {"target_id": -1}, "Target.target_id must be 0 to"),
    (TARGET, {"target_id": MAX_ID + 1}, "Target.target_id"),
    (TARGET, {"target_id": True}, "Target.target_id must be an int, not bool"),
    (TARGET, {"target_id": np.int64(1)}, "Target.target_id must be an int, not int64"),
    (TARGET, {"balloon_pages": 2**32 + 1}, "Target.balloon_pages"),
    (TARGET, {"urgency": "calm"}, "Target.urgency must be a Urgency, not str"),
    (HELLO, {"version_min": 2}, "Hello.version_min must not be above"),
    (HELLO, {"arena_address": 4097}, "Hello.arena_address must be a multiple of 4096"),
    (HELLO, {"arena_address": 2**64 - 4096}, "Hello.arena_pages must end within"),
    (HELLO, {"arena_pages": 14}, "Hello.claimed must name frames below 14"),
    (HELLO, {"frame_order": 1}, "Hello.frame_order must be one of"),
    (HELLO, {"frame_order": False}, "Hello.frame_order must be an int"),
    (HELLO, {"pseudo_process_pid": 0}, "Hello.pseudo_process_pid"),
    (HELLO, {"features": ("a", "a")}, "Hello.features must name each feature once"),
    (HELLO, {"features": ("",)}, "Hello.features has an item that must have 1 to 64"),
    (HELLO, {"features": ["a"]}, "Hello.features must be a tuple"),
    (HELLO, {"features": tuple(map(str, range(MAX_FEATURES + 1)))}, "Hello.features must have"),
    (HELLO, {"software": "x" * (MAX_TEXT_CHARS + 1)}, "Hello.software must have 0 to 512"),
    (HELLO, {"software": "red \x1b[31m"}, "Hello.software must have printable"),
    (HELLO, {"software": "two\nlines"}, "Hello.software must have printable"),
    (HELLO, {"software": "\ud800"}, "Hello.software must have printable"),
    (WELCOME, {"vitals_interval_ms": 9}, "Welcome.vitals_interval_ms must be 10 to"),
    (WELCOME, {"claimed": PageFrames.span(1000, 1)}, "Welcome.claimed must name frames below"),
    (REPORT, {"frames": PageFrames.empty()}, "Report.frames must name at least one"),
    (REPORT, {"frames": PageFrames.span(0, 2**32)}, "Report.frames must name fewer than"),
    (REPORT, {"frames": b""}, "Report.frames must be PageFrames, not bytes"),
    (REJECTION, {"rejected": ()}, "Rejection.rejected must have 1 to"),
    (REJECTION, {"rejected": ((FRAMES, "shared"),)}, "Rejection.rejected has an item"),
    (REJECTION, {"rejected": (FRAMES,)}, "Rejection.rejected has an item that must be a pair"),
    (REJECTION, {"rejected": REJECTION.rejected * 2}, "Rejection.rejected must name each reason"),
    (
        REJECTION,
        {"rejected": (*REJECTION.rejected, (FRAMES, RejectionReason.NO_ROOM))},
        "Rejection.rejected must name each frame once",
    ),
    (VITALS, {"clock_s": float("nan")}, "Vitals.clock_s must be finite"),
    (VITALS, {"clock_s": float("inf")}, "Vitals.clock_s must be finite"),
    (VITALS, {"clock_s": -0.1}, "Vitals.clock_s must be finite"),
    (VITALS, {"clock_s": True}, "Vitals.clock_s must be a number, not bool"),
    (VITALS, {"pressure_some_avg10": 100.5}, "Vitals.pressure_some_avg10"),
    (VITALS, {"active_fraction": 1.01}, "Vitals.active_fraction"),
    (VITALS, {"usage_bytes": 1.0}, "Vitals.usage_bytes must be an int, not float"),
    (Reserve(1, 512, 9), {"pages": 513}, "Reserve.pages must be whole frames"),
    (Offer(1, 1), {"pages": 0}, "Offer.pages"),
    (Offer(1, 1), {"reason": "floor"}, "Offer.reason must be a RefusalReason"),
]


@pytest.mark.parametrize(("message", "changes", "text"), REFUSED)
def test_a_value_out_of_bounds_is_refused_when_built(
    message: Message, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text.replace(".", r"\.").replace("[", r"\[")):
        dataclasses.replace(message, **changes)  # type: ignore[type-var]


def test_too_many_ranges_are_refused() -> None:
    count = MAX_RANGES + 1
    frames = PageFrames.from_ranges(np.arange(count) * 2, np.ones(count, np.int64))
    with pytest.raises(ValueError, match="at most 65536 ranges"):
        Claim(1, frames)
    with pytest.raises(RemoteProtocolError, match=r"Claim\.frames must have at most 65536 ranges"):
        decode(raw(Claim(1, FRAMES), frames=frames.to_wire()))
    half = PageFrames.span(2**31, 1)
    with pytest.raises(ValueError, match="ranges in all"):
        Rejection(1, ((WORST_FRAMES, RejectionReason.SHARED), (half, RejectionReason.NOT_HUGE)))


def test_the_largest_messages_fit_the_largest_frame() -> None:
    text = "\U0001f388" * MAX_TEXT_CHARS
    features = tuple(
        chr(0x1F300 + index) + "\U0001f388" * (MAX_FEATURE_CHARS - 1)
        for index in range(MAX_FEATURES)
    )
    hello = Hello(1, 2**16 - 1, features, text, 2**22, 2**63, 2**32, 9, WORST_FRAMES)
    rejection = Rejection(MAX_ID, ((WORST_FRAMES, RejectionReason.ALREADY_CLAIMED),))
    for message in (hello, rejection):
        body = encode(message)
        assert len(body) < MAX_MESSAGE_BYTES
        assert decode(body) == message


@given(messages, st.dictionaries(st.text(max_size=8).map("x-".__add__), st.integers(0, 9)))
def test_unknown_keys_are_ignored(message: Message, unknown: dict[str, int]) -> None:
    assert decode(raw(message, **dict(list(unknown.items())[:8]))) == message


def test_absent_and_nil_optional_fields_take_their_default() -> None:
    offer = Offer(1, 5)
    assert decode(raw(offer, reason=..., detail=...)) == offer
    assert decode(raw(offer, reason=None)) == offer
    assert decode(raw(VITALS, usage_bytes=None)) == VITALS
    assert b"usage_bytes" not in encode(VITALS)


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda cls: cls.__name__)
def test_each_required_key_is_missed_by_name(message_type: type[Message]) -> None:
    samples: dict[type[Message], Message] = {
        type(message): message for message in (HELLO, WELCOME, TARGET, REPORT, REJECTION, VITALS)
    }
    sample = samples.get(message_type)
    if sample is None:
        frames_or_text = {"frames": FRAMES, "reason": "x", "detail": "x", "frame_order": 0}
        values = {
            field.name: frames_or_text.get(field.name, 1)
            for field in message_type.FIELDS
            if field.default is dataclasses.MISSING
        }
        if message_type is Refusal:
            values["reason"] = RefusalReason.BUSY
        sample = message_type(**values)
    for field in message_type.FIELDS:
        if field.default is dataclasses.MISSING:
            with pytest.raises(
                RemoteProtocolError, match=rf"{message_type.__name__}\.{field.name} is missing"
            ):
                decode(raw(sample, **{field.name: ...}))


WRONG_ON_THE_WIRE = [
    (TARGET, {"target_id": True}, r"Target\.target_id must be an int, not bool"),
    (TARGET, {"target_id": 1.0}, r"Target\.target_id must be an int, not float"),
    (TARGET, {"target_id": "1"}, r"Target\.target_id must be an int, not str"),
    (TARGET, {"target_id": None}, r"Target\.target_id must be an int, not NoneType"),
    (TARGET, {"urgency": "panic"}, r"Target\.urgency is no Urgency: 'panic'"),
    (TARGET, {"urgency": 1}, r"Target\.urgency must be a str"),
    (TARGET, {"type": "tarmac"}, r"unknown message type 'tarmac'"),
    (TARGET, {"type": "Target"}, r"unknown message type 'Target'"),
    (TARGET, {"type": 1}, r"unknown message type '1'"),
    (TARGET, {"type": ["target"]}, r"unknown message type"),
    (TARGET, {"type": ...}, r"unknown message type 'None'"),
    (REPORT, {"frames": "text"}, r"Report\.frames must be bin, not str"),
    (REPORT, {"frames": [1, 2]}, r"Report\.frames must be bin, not list"),
    (REPORT, {"frames": b"1234567"}, r"Report\.frames "),
    (REPORT, {"frames": bytes(8)}, r"Report\.frames "),
    (REPORT, {"frames": b""}, r"Report\.frames must name at least one"),
    (HELLO, {"features": "ab"}, r"Hello\.features must be an array, not str"),
    (HELLO, {"features": [1]}, r"Hello\.features has an item that must be a str"),
    (HELLO, {"features": list(map(str, range(33)))}, r"Hello\.features must have at most 32"),
    (REJECTION, {"rejected": [[FRAMES.to_wire()]]}, r"Rejection\.rejected must be an array of two"),
    (REJECTION, {"rejected": [[FRAMES.to_wire(), "ugly"]]}, r"Rejection\.rejected is no Rejection"),
    (REJECTION, {"rejected": {}}, r"Rejection\.rejected must be an array"),
    (VITALS, {"clock_s": "now"}, r"Vitals\.clock_s must be a number"),
    (VITALS, {"x-unknown": list(range(65))}, r"malformed msgpack"),
    (VITALS, {"x-unknown": "x" * 2049}, r"malformed msgpack"),
    (VITALS, {"x-unknown": msgpack.ExtType(5, b"1")}, r"malformed msgpack"),
    (VITALS, {"x-unknown": {1: 1}}, r"malformed msgpack"),
    (VITALS, {str(key): key for key in range(64)}, r"malformed msgpack"),
]


@pytest.mark.parametrize(("message", "changes", "text"), WRONG_ON_THE_WIRE)
def test_wrong_values_on_the_wire_are_named(
    message: Message, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        decode(raw(message, **changes))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        encode(TARGET)[:-1],
        encode(TARGET) + b"\0",
        encode(TARGET) * 2,
        b"\x92\x01\x02",
        b"\x01",
        b"\xc0",
        b"\x81\xa4type\xa2\xff\xff",  # a text that is no UTF-8
        b"\x81\x81\x01\x01\x01",  # a map as a key
        b"\x91" * 5000 + b"\x90",  # deeper than the unpacker's stack
        b"\xdf\xff\xff\xff\xff",  # a map of 2**32 - 1 keys, announced only
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xd6\xff\xff\xff\xff\xff",  # a timestamp
    ],
)
def test_malformed_bytes_are_the_peers_fault(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(body)


def test_a_bomb_of_empty_arrays_stays_small() -> None:
    def nested(depth: int) -> bytes:
        return b"\x90" if depth == 0 else b"\xdc\x00\x40" + nested(depth - 1) * 64

    bomb = b"\x82\xa4type\xa6vitals\xa1x" + nested(3)
    assert 64**3 < len(bomb) < MAX_MESSAGE_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"more than {MAX_CONTAINERS} maps"):
            decode(bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(body: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(body)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(messages, st.data())
def test_mutated_messages_raise_nothing_else(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(body))
    except RemoteProtocolError:
        return
    assert decode(encode(decoded)) == decoded  # whatever it has become, it is a valid message


@given(st.text(max_size=2 * MAX_TEXT_CHARS))
def test_one_line_makes_any_text_fit(text: str) -> None:
    line = one_line(text)
    Goodbye(line)
    if text.isprintable() and len(text) <= MAX_TEXT_CHARS:
        assert line == text


def test_a_kind_says_its_bounds() -> None:
    assert Whole(0, 2**32).describe() == "int, 0 to 2**32"
    assert Whole(0, 2**63 - 1).describe() == "int, 0 to 2**63 - 1"
