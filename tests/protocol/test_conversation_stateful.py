"""No violation ever arises between two honest ends, however their messages cross.

The strongest form of it: whatever one end's connection lets it say, the other's hears without a
complaint, at any time and in any pieces. And once everything is heard, both agree on the state.
"""

import contextlib

from conversations import HELLO, WELCOME, Conversation, frames, target
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.connection import Connection
from protocol.errors import LocalProtocolError
from protocol.messages import (
    Claim,
    Decline,
    Dropped,
    Goodbye,
    Message,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Reset,
    Return,
    Vitals,
)
from protocol.page_frames import PageFrames
from protocol.transitions import Hearing, SessionState
from protocol.vocabulary import MAX_OPEN_REPORTS, RefusalReason, RejectionReason, Role


class CrossingMessages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.both = Conversation()
        self.next_report_id = 0
        self.next_frame = 0

    def try_to_say(self, role: Role, message: Message) -> None:
        """The connection judges; if it says no, nothing has happened."""
        with contextlib.suppress(LocalProtocolError):
            self.both.say(role, message)

    # The guest's words. Ids and numbers are near what it knows, so that most are legal.

    @rule()
    def hello(self) -> None:
        self.try_to_say(Role.GUEST, HELLO)

    @rule(back=st.integers(0, 1), pages=st.integers(1, 60))
    def offer(self, back: int, pages: int) -> None:
        self.try_to_say(Role.GUEST, Offer(self.target_id(self.both.guest, back), pages))

    @rule(back=st.integers(0, 1))
    def refuse(self, back: int) -> None:
        target_id = self.target_id(self.both.guest, back)
        self.try_to_say(Role.GUEST, Refusal(target_id, RefusalReason.BUSY))

    @rule(count=st.integers(1, 12))
    def report(self, count: int) -> None:
        reservation = self.both.guest.inflation.reservation
        if reservation is not None:
            self.next_report_id += 1
            self.next_frame += count + 1
            self.try_to_say(
                Role.GUEST,
                Report(reservation.target_id, self.next_report_id, frames(self.next_frame, count)),
            )

    @rule()
    def end_reservation(self) -> None:
        reservation = self.both.guest.inflation.reservation
        if reservation is not None:
            self.try_to_say(Role.GUEST, Reserved(reservation.target_id, reservation.reported_pages))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        chosen = self.some_report(self.both.guest, data)
        if chosen is not None:
            self.try_to_say(Role.GUEST, Dropped(*chosen))

    @rule()
    def vitals(self) -> None:
        self.try_to_say(Role.GUEST, Vitals(clock_s=0.0))

    # The host's words

    @rule()
    def welcome(self) -> None:
        self.try_to_say(Role.HOST, WELCOME)

    @rule(forward=st.integers(0, 2))
    def new_target(self, forward: int) -> None:
        self.try_to_say(Role.HOST, target(self.target_id(self.both.host, -forward)))

    @rule(pages=st.integers(1, 60))
    def reserve(self, pages: int) -> None:
        self.try_to_say(Role.HOST, Reserve(self.target_id(self.both.host), pages, 0))

    @rule()
    def decline(self) -> None:
        self.try_to_say(Role.HOST, Decline(self.target_id(self.both.host)))

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        chosen = self.some_report(self.both.host, data)
        if chosen is not None:
            self.try_to_say(Role.HOST, Claim(*chosen))

    @rule(data=st.data(), pages=st.integers(1, 12))
    def reject(self, data: st.DataObject, pages: int) -> None:
        chosen = self.some_report(self.both.host, data)
        if chosen is not None:
            report_id, whole = chosen
            group = (whole.lowest(pages), RejectionReason.NOT_LOCKED)
            self.try_to_say(Role.HOST, Rejection(report_id, (group,)))

    @rule()
    def give_back(self) -> None:
        self.try_to_say(Role.HOST, Return(frames(0)))

    # Both

    @rule(role=st.sampled_from(Role))
    def reset(self, role: Role) -> None:
        self.try_to_say(role, Reset("test"))

    @rule(role=st.sampled_from(Role), really=st.integers(0, 15))
    def goodbye(self, role: Role, really: int) -> None:
        if really == 0:  # seldom: it ends the conversation
            self.try_to_say(role, Goodbye("test"))

    @rule(role=st.sampled_from(Role), max_bytes=st.integers(1, 400))
    def hear_some(self, role: Role, max_bytes: int) -> None:
        self.hear(role, max_bytes)

    @rule()
    def hear_everything_and_agree(self) -> None:
        for role in Role:
            self.hear(role, None)
        guest, host = self.both.guest, self.both.host
        assert guest.session is host.session
        if guest.session is SessionState.RUNNING:
            assert guest.hearing is host.hearing is Hearing.LISTENING
            mine, theirs = guest.inflation, host.inflation
            assert mine.state is theirs.state
            assert mine.target_id == theirs.target_id
            assert mine.offered_pages == theirs.offered_pages
            assert mine.reservation == theirs.reservation
            assert mine.open_reports == theirs.open_reports

    @invariant()
    def the_host_has_no_more_open_reports_than_the_guest_may_have(self) -> None:
        assert len(self.both.host.inflation.open_reports) <= MAX_OPEN_REPORTS

    def hear(self, role: Role, max_bytes: int | None) -> None:
        """Whatever was said is heard without an error: that is the property."""
        for event in self.both.hear(role, max_bytes):
            if isinstance(event, Offer | Refusal):
                assert event.target_id <= (self.both.host.inflation.target_id or 0)

    @staticmethod
    def target_id(connection: Connection, back: int = 0) -> int:
        return max(0, (connection.inflation.target_id or 0) - back)

    @staticmethod
    def some_report(connection: Connection, data: st.DataObject) -> tuple[int, PageFrames] | None:
        reports = connection.inflation.open_reports
        if not reports:
            return None
        report_id = data.draw(st.sampled_from(sorted(reports)))
        return report_id, reports[report_id].frames


TestCrossingMessages = CrossingMessages.TestCase
TestCrossingMessages.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
