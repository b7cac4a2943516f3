"""One end of the channel without its I/O: bytes in, messages out, and the other way round.

The connection owns the order of the conversation (transitions.py) and the blame for breaking it.
It knows no stream, no clock and no frame's owner.

Messages are taken one by one with `next_event`, and a message moves the state only when it is
taken. So when the caller looks at one message, the connection's state is the state after that
message, whatever else has arrived with it, and an answer to it is legal. All messages before a bad
one are given out before the error is raised.
"""

from protocol.codec import decode, encode
from protocol.errors import ChannelBroken, ChannelError, LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameDecoder, framed
from protocol.inflation import Inflation
from protocol.messages import Goodbye, Hello, Message, Reset, Target, Welcome
from protocol.negotiation import welcome_fault
from protocol.transitions import (
    HEARD_BY_THE_DEAF,
    HEARING,
    SENDERS,
    SESSION,
    Hearing,
    HearingStep,
    SessionState,
)
from protocol.vocabulary import SWAP_FEATURE, Role


class Connection:
    """The protocol's state at one end.

    Error handling: after a RemoteProtocolError or a ChannelBroken nothing is heard any more, and
    `next_event` raises the same again. After a LocalProtocolError the connection is as it was.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self._session = SessionState.START
        self._hearing = Hearing.LISTENING
        self._inflation = Inflation()
        self._hello: Hello | None = None
        self._features: tuple[str, ...] = ()
        self._frames = FrameDecoder()
        self._ended = False
        self._failure: ChannelError | None = None

    @property
    def session(self) -> SessionState:
        """Where the greeting stands, as far as this end has heard."""
        return self._session

    @property
    def hearing(self) -> Hearing:
        """Whether messages of the peer are dropped because it can't know of a Reset yet."""
        return self._hearing

    @property
    def inflation(self) -> Inflation:
        """Where the newest target stands. To be looked at, not changed; another after a Reset."""
        return self._inflation

    @property
    def may_swap(self) -> bool:
        """Whether both ends know what it means that a guest may swap."""
        return SWAP_FEATURE in self._features

    def send(self, message: Message) -> bytes:
        """The bytes that say this message, all of which are then to be sent, in this order.

        Raises LocalProtocolError if it may not be said now, and ChannelBroken if the connection
        is gone; the state has not changed then.
        """
        if isinstance(self._failure, ChannelBroken):
            raise ChannelBroken(str(self._failure))
        data = framed(encode(message))
        fault = self._walk(self.role, message)
        if fault is not None:
            raise LocalProtocolError(f"{type(message).__name__} can't be sent: {fault}")
        if type(message) is Reset:
            self._hearing = HEARING[self._hearing][HearingStep.SAID_RESET]
        elif type(message) is Goodbye:
            self._hearing = HEARING[self._hearing][HearingStep.SAID_GOODBYE]
            self._frames.discard()
        return data

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the stream; then ask `next_event` until None, before the next bytes.

        Raises LocalProtocolError if that was not done and much is waiting, or after
        `receive_eof`.
        """
        if self._ended:
            raise LocalProtocolError("bytes after the end of file")
        if self._failure is None and not self._said_goodbye:
            self._frames.feed(data)

    def receive_eof(self) -> None:
        """The stream has ended. `next_event` tells, after the messages that are still waiting."""
        self._ended = True

    def next_event(self) -> Message | None:
        """The next message of the peer, or None if there is none yet, or none ever in CLOSED.

        Messages that crossed (see transitions.py) are skipped. Raises RemoteProtocolError for
        bytes or a message that break the protocol, ChannelBroken if the stream has ended and
        nobody said Goodbye.
        """
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure
        try:
            while (body := self._frames.next_body()) is not None:
                message = decode(body)
                if self._hear(message):
                    return message
        except RemoteProtocolError as error:
            self._fail(SessionState.VIOLATED, error)
            raise
        if self._ended and self._session is not SessionState.CLOSED:
            torn = self._frames.buffered_bytes
            inside = f", {torn} bytes into a message" if torn else ""
            raise self.break_off(f"the peer is gone without a Goodbye{inside}")
        return None

    def break_off(self, reason: str) -> ChannelBroken:
        """The stream can't be used any more. Gives the error to raise."""
        error = ChannelBroken(reason)
        self._fail(SessionState.BROKEN, error)
        return error

    @property
    def _said_goodbye(self) -> bool:
        return self._session is SessionState.CLOSED and self._hearing is Hearing.DEAF

    def _fail(self, state: SessionState, error: ChannelError) -> None:
        self._session = state
        self._failure = error
        self._frames.discard()

    def _hear(self, message: Message) -> bool:
        """Walk with a message of the peer. False if it is dropped, having crossed."""
        if self._hearing is Hearing.DEAF and type(message) not in HEARD_BY_THE_DEAF:
            return False
        if (
            self.role is Role.HOST
            and self._session is SessionState.RUNNING
            and self._inflation.is_dropped(message)
        ):
            return False
        fault = self._walk(self.role.peer, message)
        if fault is not None:
            raise RemoteProtocolError(f"{type(message).__name__} from the peer: {fault}")
        if type(message) in HEARD_BY_THE_DEAF:
            self._hearing = HEARING[self._hearing][HearingStep.HEARD_ANEW]
        return True

    def _walk(self, sender: Role, message: Message) -> str | None:
        """One step of every machine. Gives the fault, in which case nothing has changed."""
        kind = type(message)
        if sender not in SENDERS[kind]:
            return f"a {sender.value} never says that"
        after = SESSION[self._session].get(kind)
        if after is None:
            return f"the session is {self._session}"
        if isinstance(message, Welcome) and self._hello is not None:
            fault = welcome_fault(self._hello, message)
        elif isinstance(message, Target) and message.swap_pages and not self.may_swap:
            fault = f"the feature {SWAP_FEATURE!r} was not agreed on"
        else:
            fault = self._inflation.accept(message)
        if fault is not None:
            return fault
        if isinstance(message, Hello):
            self._hello = message
        elif isinstance(message, Welcome):
            self._features = message.features
        if after is SessionState.START:
            self._inflation = Inflation()
        self._session = after
        return None
