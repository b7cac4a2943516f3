"""Frames survive any split; lengths out of bounds are refused at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import LENGTH_BYTES, MAX_FRAME_BYTES, FrameDecoder, framed
from protocol.vocabulary import MAX_MESSAGE_BYTES


def bodies_of(decoder: FrameDecoder) -> list[bytes]:
    found = []
    while (body := decoder.next_body()) is not None:
        found.append(body)
    return found


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.data())
def test_any_split_gives_the_same_bodies(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(framed(body) for body in bodies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = FrameDecoder()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.feed(stream[start:stop])
        found += bodies_of(decoder)
    assert found == bodies
    assert decoder.buffered_bytes == 0


def test_one_byte_at_a_time() -> None:
    decoder = FrameDecoder()
    found = []
    for byte in framed(b"a") + framed(b"bc" * 500):
        decoder.feed(bytes([byte]))
        found += bodies_of(decoder)
    assert found == [b"a", b"bc" * 500]


@pytest.mark.parametrize("length", [0, MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_a_bad_length_is_refused_before_the_body_and_for_good(length: int) -> None:
    decoder = FrameDecoder()
    decoder.feed(framed(b"good") + length.to_bytes(LENGTH_BYTES, "big"))
    assert decoder.next_body() == b"good"
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match=str(length)):
            decoder.next_body()


def test_three_bytes_of_a_length_are_no_length_yet() -> None:
    decoder = FrameDecoder()
    decoder.feed(b"\xff\xff\xff")
    assert decoder.next_body() is None


def test_the_largest_body_passes() -> None:
    body = bytes(MAX_MESSAGE_BYTES)
    decoder = FrameDecoder()
    decoder.feed(framed(body))
    assert decoder.next_body() == body


@pytest.mark.parametrize("body", [b"", bytes(MAX_MESSAGE_BYTES + 1)])
def test_what_the_peer_would_refuse_is_not_framed(body: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        framed(body)


def test_a_caller_that_never_fetches_is_stopped() -> None:
    decoder = FrameDecoder()
    piece = framed(bytes(MAX_MESSAGE_BYTES))
    decoder.feed(piece)
    decoder.feed(b"\0")
    with pytest.raises(LocalProtocolError):
        decoder.feed(piece)
    assert decoder.buffered_bytes == MAX_FRAME_BYTES + 1


def test_discarded_bytes_are_gone() -> None:
    decoder = FrameDecoder()
    decoder.feed(framed(b"a"))
    decoder.discard()
    assert decoder.next_body() is None
