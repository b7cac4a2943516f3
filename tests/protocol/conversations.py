"""Two connections with bytes under way between them, for tests that need a whole conversation."""

from protocol.connection import Connection
from protocol.messages import (
    Hello,
    Message,
    Offer,
    Report,
    Reserve,
    Target,
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.vocabulary import SWAP_FEATURE, Role, Urgency

NOTHING = PageFrames.empty()
HELLO = Hello(1, 1, ("zstd", "huge", SWAP_FEATURE), "test", 7, 0, 10_000, 0, NOTHING)
WELCOME = Welcome(1, (SWAP_FEATURE,), 10_000, NOTHING, 200)


def target(target_id: int, pages: int = 1000, swap_pages: int = 0) -> Target:
    return Target(target_id, pages, Urgency.CALM, swap_pages)


def frames(start: int, count: int = 10) -> PageFrames:
    return PageFrames.span(start, count)


class Conversation:
    """A guest, a host, and the bytes that each has said and the other not yet heard."""

    def __init__(self) -> None:
        self.ends = {role: Connection(role) for role in Role}
        self.under_way = {role: bytearray() for role in Role}
        """By the sender's role."""

    @property
    def guest(self) -> Connection:
        return self.ends[Role.GUEST]

    @property
    def host(self) -> Connection:
        return self.ends[Role.HOST]

    def say(self, role: Role, message: Message) -> None:
        """Said, but not heard yet."""
        self.under_way[role] += self.ends[role].send(message)

    def guest_says(self, *messages: Message) -> None:
        for message in messages:
            self.say(Role.GUEST, message)

    def host_says(self, *messages: Message) -> None:
        for message in messages:
            self.say(Role.HOST, message)

    def hear(self, listener: Role, max_bytes: int | None = None) -> list[Message]:
        """What the listener makes of the next bytes under way to it."""
        buffer = self.under_way[listener.peer]
        data = bytes(buffer if max_bytes is None else buffer[:max_bytes])
        del buffer[: len(data)]
        connection = self.ends[listener]
        connection.receive_data(data)
        events = []
        while (event := connection.next_event()) is not None:
            events.append(event)
        return events

    def host_hears(self) -> list[Message]:
        return self.hear(Role.HOST)

    def guest_hears(self) -> list[Message]:
        return self.hear(Role.GUEST)

    def guest_tells(self, *messages: Message) -> list[Message]:
        """Said and heard at once."""
        self.guest_says(*messages)
        return self.host_hears()

    def host_tells(self, *messages: Message) -> list[Message]:
        """Said and heard at once."""
        self.host_says(*messages)
        return self.guest_hears()

    # Shortcuts to the states where tests begin.

    def running(self) -> "Conversation":
        self.guest_tells(HELLO)
        self.host_tells(WELCOME)
        return self

    def reserving(self, target_id: int = 1, pages: int = 100) -> "Conversation":
        self.host_tells(target(target_id))
        self.guest_tells(Offer(target_id, pages))
        self.host_tells(Reserve(target_id, pages, 0))
        return self

    def reported(self, report_id: int = 1) -> "Conversation":
        """Ten frames from 0 are reported to the first target."""
        self.reserving()
        self.guest_tells(Report(1, report_id, frames(0)))
        return self
