"""The protocol on a trio stream: the only module of this package that does I/O.

A `Channel` moves bytes between a stream and a Connection, and turns the stream's errors into
ChannelBroken. It decides nothing: what a message means is its caller's business.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from protocol.connection import Connection
from protocol.errors import ChannelBroken
from protocol.messages import Message
from protocol.transitions import SessionState

RECEIVE_BYTES: Final = 64 * 1024
"""Most bytes read at once. A connection buffers at most this and one message."""

STREAM_ERRORS: Final[dict[type[Exception], str]] = {
    trio.BrokenResourceError: "the stream broke",
    trio.ClosedResourceError: "the channel was closed at this end",
}
"""Foreign errors, each with what it means here; all of them are ChannelBroken."""


class Channel:
    """Messages over a stream.

    Resource handling: the channel owns the stream from the start; `aclose` (or leaving the
    `async with`) closes it. Closing says no Goodbye: send one before, where there is time.
    One task may receive while others send.
    """

    def __init__(self, stream: trio.abc.Stream, connection: Connection) -> None:
        self.connection = connection
        self._stream = stream
        self._sending = trio.Lock()

    async def receive(self) -> Message:
        """The next message of the peer. Always a checkpoint; a cancelled call loses nothing.

        Raises RemoteProtocolError if the peer breaks the protocol, and ChannelBroken when nothing
        more can come: the stream has ended, was closed here, or one of the two said Goodbye.
        """
        await trio.lowlevel.checkpoint()
        while True:
            message = self.connection.next_event()
            if message is not None:
                return message
            if self.connection.session is SessionState.CLOSED:
                raise ChannelBroken("the conversation has ended with a Goodbye")
            with self._translated_errors():
                data = await self._stream.receive_some(RECEIVE_BYTES)
            if data:
                self.connection.receive_data(bytes(data))
            else:
                self.connection.receive_eof()

    async def send(self, *messages: Message) -> None:
        """Say these messages, in one piece and in this order.

        Raises LocalProtocolError for a message that may not be said now; the messages before it
        are sent, the ones after it are not. Raises ChannelBroken if the stream is gone. A call
        that is cancelled while it waits for another sender has said nothing; cancelled later, it
        may have sent half a message, so the channel is broken then.
        """
        async with self._sending:
            # Whoever hears the end of a session and cancels the senders of it must not find that
            # one of them, woken in that instant, still speaks.
            await trio.lowlevel.checkpoint_if_cancelled()
            said = bytearray()
            try:
                for message in messages:
                    said += self.connection.send(message)
            finally:
                # Not an `else`: what the connection counts as said has to be sent.
                if said:
                    await self._send_all(bytes(said))

    async def aclose(self) -> None:
        """Close the stream. Waiting calls raise ChannelBroken. May be called again."""
        await self._stream.aclose()

    async def __aenter__(self) -> "Channel":
        """The channel itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        await self.aclose()

    async def _send_all(self, data: bytes) -> None:
        with self._translated_errors():
            try:
                await self._stream.send_all(data)
            except trio.Cancelled:
                self.connection.break_off("sending was cancelled, perhaps within a message")
                raise

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except tuple(STREAM_ERRORS) as error:
            raise self.connection.break_off(STREAM_ERRORS[type(error)]) from error
