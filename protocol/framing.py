"""Length-prefixed frames: where one message ends in a stream of bytes.

A frame is a u32 big-endian length and as many bytes of body, 1 to MAX_MESSAGE_BYTES. Sans-I/O: it
is fed whatever the stream gave and hands out whole bodies. It knows nothing of what is in them.
"""

from typing import Final

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.vocabulary import MAX_MESSAGE_BYTES

LENGTH_BYTES: Final = 4

MAX_FRAME_BYTES: Final = LENGTH_BYTES + MAX_MESSAGE_BYTES


def framed(body: bytes) -> bytes:
    """The body with its length before it. LocalProtocolError if it is empty or too long."""
    if not 1 <= len(body) <= MAX_MESSAGE_BYTES:
        raise LocalProtocolError(
            f"a message of {len(body)} bytes; 1 to {MAX_MESSAGE_BYTES} can be sent"
        )
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class FrameDecoder:
    """Bytes in, bodies out, whatever the splits.

    Its memory is bounded: a length out of bounds is refused before the body is there, and no
    bytes are taken while a whole frame (or a bad length) waits to be fetched, but for the rest of
    the piece that completed it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def buffered_bytes(self) -> int:
        """Bytes fed and not yet handed out. More than 0 at the end of file: a torn message."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream.

        Raises LocalProtocolError if more than one whole frame is waiting already: the caller must
        fetch with `next_body` until None before it reads on.
        """
        if len(self._buffer) > MAX_FRAME_BYTES:
            raise LocalProtocolError("more bytes were fed while whole messages wait to be fetched")
        self._buffer += data

    def next_body(self) -> bytes | None:
        """The next whole body, or None if more bytes are needed.

        Raises RemoteProtocolError for a length out of bounds, as often as it is asked again.
        """
        if len(self._buffer) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if not 1 <= length <= MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(
                f"a message of {length} bytes is announced; 1 to {MAX_MESSAGE_BYTES} are allowed"
            )
        end = LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[LENGTH_BYTES:end])
        del self._buffer[:end]  # a bytearray gives up its head without copying the rest
        return body

    def discard(self) -> None:
        """Forget what is buffered: nothing more will be heard of this stream."""
        self._buffer.clear()
