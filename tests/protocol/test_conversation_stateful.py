"""No violation ever arises between two honest ends, however their messages cross.

The strongest form of it: whatever one end's connection lets it say, the other's hears without a
complaint, at any time and in any pieces. And once everything is heard, both agree on the state.
"""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from conversations import HELLO, WELCOME, Conversation, frames, target
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from protocol.errors import LocalProtocolError
from protocol.messages import (
    MESSAGES,
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
from protocol.transitions import Hearing, InflationState, SessionState
from protocol.vocabulary import MAX_OPEN_REPORTS, RefusalReason, RejectionReason, Role


class Speakers(Conversation):
    """Two ends that say whatever their connections allow them."""

    def __init__(self) -> None:
        super().__init__()
        self.next_report_id = 0
        self.next_frame = 0
        self.heard: Counter[type[Message]] = Counter()

    def speak(self, role: Role, choice: int, pages: int) -> None:
        words = self.words_of_the_guest if role is Role.GUEST else self.words_of_the_host
        self.say_one_of(role, choice, list(words(pages, often=choice % 7 < 2)))

    def hear(self, listener: Role, max_bytes: int | None = None) -> list[Message]:
        """Whatever was said is heard without an error: that is the property."""
        events = super().hear(listener, max_bytes)
        self.heard.update(type(event) for event in events)
        assert len(self.host.inflation.open_reports) <= MAX_OPEN_REPORTS
        return events

    def hear_everything_and_agree(self) -> None:
        for role in Role:
            self.hear(role)
        guest, host = self.guest, self.host
        assert guest.session is host.session
        if guest.session is SessionState.RUNNING:
            assert guest.hearing is host.hearing is Hearing.LISTENING
            mine, theirs = guest.inflation, host.inflation
            assert mine.state is theirs.state
            assert mine.target_id == theirs.target_id
            assert mine.offered_pages == theirs.offered_pages
            assert mine.swap_pages == theirs.swap_pages
            assert mine.reservation == theirs.reservation
            assert mine.open_reports == theirs.open_reports

    def say_one_of(self, role: Role, choice: int, words: list[Message]) -> None:
        """The first of the words, from the chosen one on, that this end's connection allows."""
        at = choice % len(words)
        for message in words[at:] + words[:at]:
            try:
                self.say(role, message)
            except LocalProtocolError:
                continue
            return

    def words_of_the_guest(self, pages: int, often: bool) -> Iterator[Message]:
        """Near what it knows, so that many are legal; the connection judges.

        The words that lead nowhere are said less `often`, or no conversation would get deep.
        """
        inflation = self.guest.inflation
        target_id = inflation.target_id or 0
        yield HELLO
        yield Offer(target_id, pages, swap_pages=min(pages, inflation.swap_pages))
        if inflation.reservation is not None:
            of_target = inflation.reservation.target_id
            count = min(pages, 12)
            self.next_report_id += 1
            self.next_frame += count + 1
            yield Report(of_target, self.next_report_id, frames(self.next_frame, count))
            yield Reserved(of_target, inflation.reservation.reported_pages)
        for report_id, report in inflation.open_reports.items():
            yield Dropped(report_id, report.frames)
        if often:
            yield Refusal(target_id, RefusalReason.BUSY)
            yield Refusal(target_id, RefusalReason.NO_SWAP)
            yield Offer(max(0, target_id - 1), pages)
            yield Vitals(clock_s=0.0)

    def words_of_the_host(self, pages: int, often: bool) -> Iterator[Message]:
        inflation = self.host.inflation
        target_id = inflation.target_id or 0
        yield WELCOME
        yield Reserve(target_id, max(1, min(pages, inflation.offered_pages)), 0)
        for report_id, report in inflation.open_reports.items():
            yield Claim(report_id, report.frames)
            group = (report.frames.lowest(min(pages, 12)), RejectionReason.NOT_LOCKED)
            yield Rejection(report_id, (group,))
        if often or inflation.state is InflationState.IDLE:
            yield target(target_id + 1 + pages % 2, swap_pages=pages % 20)
        if often:
            yield Decline(target_id)
            yield Reserve(max(0, target_id - 1), pages, 0)
            yield Return(frames(0))


class CrossingMessages(RuleBasedStateMachine):
    """Short conversations, which Hypothesis makes shorter still when one fails."""

    @initialize(running=st.booleans())
    def begin(self, running: bool) -> None:
        self.speakers = Speakers()
        if running:
            self.speakers.running()

    @rule(role=st.sampled_from(Role), choice=st.integers(0, 50), pages=st.integers(1, 60))
    def speak(self, role: Role, choice: int, pages: int) -> None:
        self.speakers.speak(role, choice, pages)

    @rule(role=st.sampled_from(Role), max_bytes=st.integers(1, 400))
    def hear_some(self, role: Role, max_bytes: int) -> None:
        self.speakers.hear(role, max_bytes)

    @rule()
    def hear_everything_and_agree(self) -> None:
        self.speakers.hear_everything_and_agree()

    @rule(role=st.sampled_from(Role))
    def reset(self, role: Role) -> None:
        self.speakers.say_one_of(role, 0, [Reset("test")])

    @rule(role=st.sampled_from(Role))
    def leave(self, role: Role) -> None:
        self.speakers.say_one_of(role, 0, [Goodbye("test")])


TestCrossingMessages = CrossingMessages.TestCase
TestCrossingMessages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def long_conversation(seed: int) -> Counter[type[Message]]:
    """A thousand steps, deep into reservations and reports; repeatable by its seed."""
    dice = random.Random(seed)
    speakers = Speakers()
    for _ in range(1000):
        role = dice.choice(list(Role))
        fate = dice.random()
        if fate < 0.5:
            speakers.speak(role, dice.randrange(1000), dice.randint(1, 60))
        elif fate < 0.96:
            speakers.hear(role, dice.choice([1, 60, 300, 1000]))
        elif fate < 0.99:
            speakers.hear_everything_and_agree()
        else:
            speakers.say_one_of(role, 0, [Reset("test")])
    speakers.say_one_of(dice.choice(list(Role)), 0, [Goodbye("test")])
    speakers.hear_everything_and_agree()
    return speakers.heard


@pytest.mark.parametrize("first_seed", range(0, 60, 15))
def test_long_conversations_hold_and_reach_every_message(first_seed: int) -> None:
    heard: Counter[type[Message]] = Counter()
    for seed in range(first_seed, first_seed + 15):
        heard += long_conversation(seed)
    assert set(heard) == set(MESSAGES)
    assert min(heard.values()) >= 5, heard
