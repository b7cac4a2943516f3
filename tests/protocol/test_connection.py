"""The order of a conversation: what each end may say, who is blamed, and messages that cross."""

import dataclasses

import pytest
from conversations import HELLO, WELCOME, Conversation, frames, target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codec import encode
from protocol.connection import Connection
from protocol.errors import ChannelBroken, LocalProtocolError, RemoteProtocolError
from protocol.framing import LENGTH_BYTES, framed
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
    Welcome,
)
from protocol.negotiation import negotiate
from protocol.page_frames import PageFrames
from protocol.transitions import (
    CROSSED,
    INFLATION,
    REPORT,
    SENDERS,
    SESSION,
    Hearing,
    InflationState,
    SessionState,
)
from protocol.vocabulary import MAX_MESSAGE_BYTES, MAX_OPEN_REPORTS, RefusalReason, Role
from protocol.vocabulary import RejectionReason as Why

VITALS = Vitals(clock_s=1.0)
RESET = Reset("test")
GOODBYE = Goodbye("test")


@pytest.fixture
def both() -> Conversation:
    return Conversation()


def forged(connection: Connection, message: Message) -> None:
    """Let a connection hear a message that no honest peer would have sent."""
    connection.receive_data(framed(encode(message)))


def assert_violation(connection: Connection, message: Message, text: str) -> None:
    forged(connection, message)
    for _ in range(2):  # and it stays dead
        with pytest.raises(RemoteProtocolError, match=text):
            connection.next_event()
    assert connection.session is SessionState.VIOLATED
    forged(connection, GOODBYE)
    with pytest.raises(RemoteProtocolError, match=text):
        connection.next_event()


def settled(both: Conversation) -> tuple[SessionState, InflationState]:
    """The state, on which both ends agree once everything is heard."""
    guest, host = both.guest, both.host
    assert guest.session is host.session
    if guest.session is SessionState.RUNNING:
        assert guest.hearing is host.hearing is Hearing.LISTENING
        mine, theirs = guest.inflation, host.inflation
        assert mine.state is theirs.state
        assert mine.target_id == theirs.target_id
        assert mine.reservation == theirs.reservation
        assert mine.open_reports == theirs.open_reports
    return guest.session, guest.inflation.state


# The tables as such


def test_the_tables_are_complete() -> None:
    assert set(SESSION) == set(SessionState)
    assert set(INFLATION) == set(InflationState)
    for row in (*SESSION.values(), *INFLATION.values()):
        assert set(row) <= set(SENDERS)
    for steps in REPORT.values():
        assert set(steps.values()) <= set(REPORT)
    for message in CROSSED:
        assert SENDERS[message] == {Role.GUEST}


# A whole conversation


def test_pages_move_out_and_back(both: Conversation) -> None:
    assert both.guest_tells(HELLO) == [HELLO]
    assert both.host_tells(WELCOME) == [WELCOME]
    assert settled(both) == (SessionState.RUNNING, InflationState.IDLE)
    both.host_tells(target(1))
    assert settled(both)[1] is InflationState.TARGETED
    both.guest_tells(VITALS, Offer(1, 30, RefusalReason.WORKING_SET))
    assert settled(both)[1] is InflationState.OFFERED
    both.host_tells(Reserve(1, 30, 0))
    assert settled(both)[1] is InflationState.RESERVING
    both.guest_tells(Report(1, 1, frames(0)), Report(1, 2, frames(100)), Reserved(1, 20))
    assert settled(both)[1] is InflationState.IDLE
    rejected = PageFrames.span(3, 2)
    rest = frames(0) - rejected
    both.host_tells(Rejection(1, ((rejected, Why.SHARED),)), Claim(1, rest), Claim(2, frames(100)))
    both.guest_tells(Dropped(2, frames(100)), Dropped(1, rest))
    assert both.guest.inflation.open_reports == {}
    both.host_tells(Return(rest))
    both.guest_tells(GOODBYE)
    assert settled(both)[0] is SessionState.CLOSED


def test_refusal_and_decline_end_a_walk(both: Conversation) -> None:
    both.running().host_tells(target(1))
    both.guest_tells(Refusal(1, RefusalReason.FLOOR))
    assert settled(both)[1] is InflationState.IDLE
    both.host_tells(target(2))
    both.guest_tells(Offer(2, 5))
    both.host_tells(Decline(2))
    assert settled(both)[1] is InflationState.IDLE


# Greeting


@pytest.mark.parametrize("message", [VITALS, RESET, Offer(1, 1)])
def test_the_guest_begins_with_hello(both: Conversation, message: Message) -> None:
    with pytest.raises(LocalProtocolError, match="session is START"):
        both.guest_says(message)
    assert_violation(both.host, message, "session is START")


@pytest.mark.parametrize("message", [WELCOME, target(1), RESET])
def test_the_host_waits_for_hello(both: Conversation, message: Message) -> None:
    with pytest.raises(LocalProtocolError, match="session is START"):
        both.host_says(message)
    assert_violation(both.guest, message, "session is START")


def test_a_hello_is_answered_once(both: Conversation) -> None:
    both.running()
    with pytest.raises(LocalProtocolError, match="session is RUNNING"):
        both.host_says(WELCOME)
    with pytest.raises(LocalProtocolError, match="session is RUNNING"):
        both.guest_says(HELLO)
    assert_violation(both.guest, WELCOME, "session is RUNNING")


def test_the_host_may_refuse_a_guest_before_or_after_its_hello(both: Conversation) -> None:
    both.host_says(GOODBYE)
    both.guest_says(HELLO)  # crosses
    assert both.guest_hears() == [GOODBYE]
    assert both.host_hears() == []
    assert settled(both)[0] is SessionState.CLOSED


@pytest.mark.parametrize(
    ("welcome", "text"),
    [
        (Welcome(2, (), 1, PageFrames.empty(), 200), "version 2 is not one of"),
        (Welcome(1, ("odd",), 1, PageFrames.empty(), 200), "no feature 'odd'"),
    ],
)
def test_a_welcome_must_fit_the_hello(both: Conversation, welcome: Welcome, text: str) -> None:
    both.guest_tells(HELLO)
    with pytest.raises(LocalProtocolError, match=text):
        both.host_says(welcome)
    assert_violation(both.guest, welcome, text)


def test_negotiation_takes_the_newest_common_version_and_features() -> None:
    agreed = negotiate(HELLO, version_min=1, version_max=3, features=("huge", "other"))
    assert (agreed.version, agreed.features) == (1, ("huge",))
    with pytest.raises(RemoteProtocolError, match="guest speaks 1 to 1, this host 2 to 3"):
        negotiate(HELLO, version_min=2, version_max=3)


@pytest.mark.parametrize("role", Role)
def test_nobody_says_the_others_words(both: Conversation, role: Role) -> None:
    both.running()
    message = {Role.GUEST: target(1), Role.HOST: VITALS}[role]
    with pytest.raises(LocalProtocolError, match=f"a {role.value} never says that"):
        both.say(role, message)
    assert_violation(both.ends[role.peer], message, f"a {role.value} never says that")


# Inflation: what is no transition of the table


def test_target_ids_grow(both: Conversation) -> None:
    both.running().host_tells(target(5))
    for target_id in (5, 4):
        with pytest.raises(LocalProtocolError, match="does not come after target 5"):
            both.host_says(target(target_id))
    assert_violation(both.guest, target(5), "does not come after")


GUEST_FAULTS = [
    (InflationState.IDLE, Offer(1, 1), "the inflation is IDLE"),
    (InflationState.IDLE, Refusal(1, RefusalReason.BUSY), "the inflation is IDLE"),
    (InflationState.OFFERED, Offer(1, 1), "the inflation is OFFERED"),
    (InflationState.OFFERED, Refusal(1, RefusalReason.BUSY), "the inflation is OFFERED"),
    (InflationState.OFFERED, Report(1, 1, frames(0)), "no reservation is open for target 1"),
    (InflationState.OFFERED, Reserved(1, 0), "no reservation is open for target 1"),
    (InflationState.RESERVING, Offer(1, 1), "the inflation is RESERVING"),
    (InflationState.RESERVING, Offer(2, 1), "target 2 is not the newest, 1"),
    (InflationState.RESERVING, Report(2, 1, frames(0)), "no reservation is open for target 2"),
    (InflationState.RESERVING, Report(1, 1, frames(0, 101)), "101 pages are more than the 100"),
    (InflationState.RESERVING, Reserved(2, 0), "no reservation is open for target 2"),
    (InflationState.RESERVING, Reserved(1, 1), "1 pages are not the 0 reported"),
    (InflationState.RESERVING, Dropped(1, frames(0)), "report 1 is not open"),
]


def in_state(both: Conversation, state: InflationState) -> None:
    """Target 1 in this state; IDLE is after a refusal."""
    both.running().host_tells(target(1))
    if state is InflationState.IDLE:
        both.guest_tells(Refusal(1, RefusalReason.FLOOR))
    if state in (InflationState.OFFERED, InflationState.RESERVING):
        both.guest_tells(Offer(1, 100))
    if state is InflationState.RESERVING:
        both.host_tells(Reserve(1, 100, 0))
    assert settled(both)[1] is state


@pytest.mark.parametrize(("state", "message", "text"), GUEST_FAULTS)
def test_what_a_guest_may_not_say(
    both: Conversation, state: InflationState, message: Message, text: str
) -> None:
    in_state(both, state)
    with pytest.raises(LocalProtocolError, match=text):
        both.guest_says(message)
    assert settled(both)[1] is state  # a refused message changes nothing
    assert_violation(both.host, message, text)


HOST_FAULTS = [
    (InflationState.TARGETED, Reserve(1, 1, 0), "the inflation is TARGETED"),
    (InflationState.TARGETED, Decline(1), "the inflation is TARGETED"),
    (InflationState.OFFERED, Reserve(1, 101, 0), "101 pages are more than the 100 offered"),
    (InflationState.OFFERED, Reserve(0, 1, 0), "target 0 is not the newest, 1"),
    (InflationState.OFFERED, Decline(2), "target 2 is not the newest, 1"),
    (InflationState.RESERVING, Reserve(1, 1, 0), "the inflation is RESERVING"),
    (InflationState.RESERVING, Decline(1), "the inflation is RESERVING"),
    (InflationState.RESERVING, Claim(1, frames(0)), "report 1 is not open"),
    (InflationState.RESERVING, Rejection(1, ((frames(0), Why.SHARED),)), "report 1 is not open"),
]


@pytest.mark.parametrize(("state", "message", "text"), HOST_FAULTS)
def test_what_a_host_may_not_say(
    both: Conversation, state: InflationState, message: Message, text: str
) -> None:
    in_state(both, state)
    with pytest.raises(LocalProtocolError, match=text):
        both.host_says(message)
    assert settled(both)[1] is state
    assert_violation(both.guest, message, text)


def test_the_room_bounds_all_reports_together(both: Conversation) -> None:
    both.running().reserving(pages=25)
    both.guest_tells(Report(1, 1, frames(0)), Report(1, 2, frames(10)))
    both.host_tells(Rejection(1, ((frames(0), Why.SHARED),)))  # gives no room back
    assert_violation(both.host, Report(1, 3, frames(20)), "30 pages are more than the 25 granted")


# Reports


def test_report_ids_grow(both: Conversation) -> None:
    both.running().reported(report_id=7)
    with pytest.raises(LocalProtocolError, match="does not come after report 7"):
        both.guest_says(Report(1, 7, frames(50)))
    assert_violation(both.host, Report(1, 6, frames(50)), "does not come after report 7")


def test_open_reports_are_bounded(both: Conversation) -> None:
    both.running().reserving()
    for report_id in range(MAX_OPEN_REPORTS):
        both.guest_tells(Report(1, report_id, frames(report_id * 2, 1)))
    one_more = Report(1, 1000, frames(1000, 1))
    with pytest.raises(LocalProtocolError, match="64 reports are open already"):
        both.guest_says(one_more)
    both.host_tells(Claim(3, frames(6, 1)))
    with pytest.raises(LocalProtocolError, match="64 reports are open already"):
        both.guest_says(one_more)  # a claimed report is open until it is dropped
    both.guest_tells(Dropped(3, frames(6, 1)), one_more)
    assert_violation(both.host, Report(1, 1001, frames(1001, 1)), "64 reports are open already")


PART = frames(2, 3)
REST = frames(0) - PART


@pytest.mark.parametrize(
    ("said", "message", "text"),
    [
        ([], Claim(1, PART), "not exactly the frames left"),
        ([], Claim(1, frames(0, 11)), "not exactly the frames left"),
        ([], Claim(2, frames(0)), "report 2 is not open"),
        ([], Rejection(1, ((frames(5), Why.SHARED),)), "has not all of these frames"),
        ([Claim(1, frames(0))], Claim(1, frames(0)), "report 1 is CLAIMED"),
        ([Claim(1, frames(0))], Rejection(1, ((PART, Why.SHARED),)), "report 1 is CLAIMED"),
        ([Rejection(1, ((PART, Why.SHARED),))], Claim(1, frames(0)), "not exactly the frames"),
        ([Rejection(1, ((PART, Why.SHARED),))], Claim(1, PART), "not exactly the frames"),
        (
            [Rejection(1, ((PART, Why.SHARED),))],
            Rejection(1, ((REST, Why.NO_ROOM),)),
            "report 1 is TRIMMED",
        ),
        ([Rejection(1, ((frames(0), Why.SHARED),))], Claim(1, frames(0)), "report 1 is not open"),
    ],
)
def test_a_report_is_answered_once(
    both: Conversation, said: list[Message], message: Message, text: str
) -> None:
    both.running().reported().host_tells(*said)
    with pytest.raises(LocalProtocolError, match=text):
        both.host_says(message)
    assert_violation(both.guest, message, text)


@pytest.mark.parametrize(
    ("said", "message", "text"),
    [
        ([], Dropped(1, frames(0)), "report 1 is REPORTED"),
        ([Claim(1, frames(0))], Dropped(1, PART), "not exactly the frames left"),
        ([Rejection(1, ((PART, Why.SHARED),))], Dropped(1, REST), "report 1 is TRIMMED"),
        ([Rejection(1, ((PART, Why.SHARED),)), Claim(1, REST)], Dropped(1, frames(0)), "exactly"),
    ],
)
def test_only_claimed_frames_are_dropped(
    both: Conversation, said: list[Message], message: Message, text: str
) -> None:
    both.running().reported().host_tells(*said)
    with pytest.raises(LocalProtocolError, match=text):
        both.guest_says(message)
    assert_violation(both.host, message, text)


# Crossing within a session


@pytest.mark.parametrize("answer", [Offer(1, 9), Refusal(1, RefusalReason.FLOOR)])
def test_words_about_an_older_target_are_dropped(both: Conversation, answer: Message) -> None:
    both.running().host_tells(target(1))
    both.guest_says(answer)
    both.host_says(target(2))
    assert both.host_hears() == []
    assert both.host.inflation.state is InflationState.TARGETED
    assert both.guest_hears() == [target(2)]
    assert both.guest_tells(Offer(2, 4)) == [Offer(2, 4)]
    assert settled(both)[1] is InflationState.OFFERED


def test_frames_of_an_older_target_are_events(both: Conversation) -> None:
    both.running().reserving()
    both.host_says(target(2))
    late = [Report(1, 1, frames(0)), Reserved(1, 10)]
    assert both.guest_tells(*late) == late
    both.host_tells(Claim(1, frames(0)))
    assert settled(both) == (SessionState.RUNNING, InflationState.TARGETED)
    assert both.guest_tells(Dropped(1, frames(0))) == [Dropped(1, frames(0))]


def test_a_reservation_outlives_its_target_but_not_the_next_offer(both: Conversation) -> None:
    both.running().reserving().host_tells(target(2))
    with pytest.raises(LocalProtocolError, match="reservation of target 1 is still open"):
        both.guest_says(Offer(2, 5))
    both.guest_tells(Report(1, 1, frames(0)))
    both.guest_tells(Refusal(2, RefusalReason.BUSY))
    assert settled(both)[1] is InflationState.IDLE
    both.host_tells(target(3))
    assert both.guest_tells(Reserved(1, 10), Offer(3, 5)) == [Reserved(1, 10), Offer(3, 5)]
    both.host_tells(Reserve(3, 5, 0))
    assert settled(both)[1] is InflationState.RESERVING
    assert_violation(both.host, Reserved(1, 10), "no reservation is open for target 1")


def test_a_reserve_may_be_overtaken_by_the_next_target(both: Conversation) -> None:
    both.running().host_tells(target(1))
    both.guest_tells(Offer(1, 50))
    assert both.host_tells(Reserve(1, 50, 0), target(2)) == [Reserve(1, 50, 0), target(2)]
    both.guest_tells(Reserved(1, 0), Offer(2, 40))
    assert settled(both)[1] is InflationState.OFFERED


def test_only_the_host_forgives(both: Conversation) -> None:
    """The guest hears nothing old: the host knows its own newest target."""
    both.running().host_tells(target(1))
    both.guest_tells(Offer(1, 50))
    both.host_tells(target(2))
    assert_violation(both.guest, Reserve(1, 50, 0), "target 1 is not the newest, 2")


# Reset


def test_a_reset_begins_anew(both: Conversation) -> None:
    both.running().reported()
    both.host_tells(RESET)
    assert settled(both)[0] is SessionState.START
    both.running()
    assert settled(both) == (SessionState.RUNNING, InflationState.IDLE)
    assert both.guest.inflation.open_reports == {}
    both.reported()  # the same ids again
    assert settled(both)[1] is InflationState.RESERVING


def test_what_the_guest_said_before_it_knew_of_the_reset_is_dropped(both: Conversation) -> None:
    both.running().reserving()
    both.guest_says(VITALS, Report(1, 1, frames(0)))
    both.host_says(RESET)
    assert both.guest_hears() == [RESET]
    both.guest_says(HELLO)
    assert both.host_hears() == [HELLO]
    assert both.host_tells(WELCOME) == [WELCOME]
    assert settled(both)[0] is SessionState.RUNNING


def test_what_the_host_said_before_it_knew_of_the_reset_is_dropped(both: Conversation) -> None:
    both.running().reported()
    both.host_says(target(2), Claim(1, frames(0)))
    both.guest_says(RESET, HELLO)
    assert both.guest_hears() == []
    assert both.host_hears() == [RESET, HELLO]
    assert both.host_tells(WELCOME, target(1)) == [WELCOME, target(1)]
    assert settled(both) == (SessionState.RUNNING, InflationState.TARGETED)


def test_two_resets_cross(both: Conversation) -> None:
    both.running()
    both.guest_says(VITALS, RESET, HELLO)
    both.host_says(target(1), RESET)
    assert both.host_hears() == [HELLO]
    both.host_says(WELCOME, RESET)  # and another one at once, which is no old one
    assert both.guest_hears() == [WELCOME, RESET]
    assert settled(both)[0] is SessionState.START
    both.running()


@pytest.mark.parametrize("role", Role)
def test_a_goodbye_is_heard_by_the_deaf(both: Conversation, role: Role) -> None:
    both.running()
    both.say(role, RESET)
    both.say(role.peer, GOODBYE)
    assert both.hear(role) == [GOODBYE]
    assert both.hear(role.peer) == []
    assert settled(both)[0] is SessionState.CLOSED
    assert_violation(both.ends[role], GOODBYE, "session is CLOSED")


def test_there_is_no_reset_of_a_greeting(both: Conversation) -> None:
    both.guest_tells(HELLO)
    for role in Role:
        with pytest.raises(LocalProtocolError, match="session is GREETING"):
            both.say(role, RESET)


def test_an_old_welcome_is_a_violation_after_a_reset(both: Conversation) -> None:
    both.running().guest_says(RESET)
    assert_violation(both.guest, WELCOME, "session is START")


# Ends


@pytest.mark.parametrize("role", Role)
def test_after_a_goodbye_nothing_is_said_or_heard(both: Conversation, role: Role) -> None:
    both.running()
    both.say(role.peer, GOODBYE)
    both.say(role, GOODBYE)  # crosses
    with pytest.raises(LocalProtocolError, match="session is CLOSED"):
        both.say(role, GOODBYE)
    assert both.hear(role) == []
    end = both.ends[role]
    end.receive_data(b"\0" * 100)  # not even looked at
    end.receive_eof()
    assert end.next_event() is None


def test_what_waits_to_be_heard_is_forgotten_with_a_goodbye(both: Conversation) -> None:
    both.running().guest_says(VITALS, GOODBYE)
    both.host.receive_data(bytes(both.under_way[Role.GUEST]))
    both.host_says(GOODBYE)
    assert both.host.next_event() is None


@pytest.mark.parametrize("torn", [0, 3])
def test_the_end_without_a_goodbye_is_nobodys_fault(both: Conversation, torn: int) -> None:
    both.running().guest_says(VITALS)
    both.host.receive_data(bytes(both.under_way[Role.GUEST]) + b"\0\0\0"[:torn])
    both.host.receive_eof()
    assert both.host.next_event() == VITALS  # first what was said
    for _ in range(2):
        with pytest.raises(ChannelBroken, match="3 bytes into" if torn else "without a Goodbye$"):
            both.host.next_event()
    assert both.host.session is SessionState.BROKEN
    with pytest.raises(ChannelBroken):
        both.host_says(target(1))
    with pytest.raises(LocalProtocolError, match="after the end of file"):
        both.host.receive_data(b"x")


def test_a_violation_can_be_answered_by_a_goodbye_alone(both: Conversation) -> None:
    both.running()
    assert_violation(both.host, HELLO, "session is RUNNING")
    with pytest.raises(LocalProtocolError, match="session is VIOLATED"):
        both.host_says(target(1))
    both.host_says(Goodbye("Hello while RUNNING"))
    assert both.guest_hears() == [Goodbye("Hello while RUNNING")]
    with pytest.raises(RemoteProtocolError):
        both.host.next_event()


def test_messages_before_a_bad_one_are_heard(both: Conversation) -> None:
    both.running().guest_says(VITALS, VITALS)
    both.host.receive_data(bytes(both.under_way[Role.GUEST]) + b"\xff\xff\xff\xff")
    assert both.host.next_event() == VITALS
    assert both.host.session is SessionState.RUNNING
    assert both.host.next_event() == VITALS
    with pytest.raises(RemoteProtocolError, match=f"1 to {MAX_MESSAGE_BYTES}"):
        both.host.next_event()


def test_the_state_is_the_one_after_the_message_that_was_taken(both: Conversation) -> None:
    both.running().host_says(target(1), target(2))
    both.guest.receive_data(bytes(both.under_way[Role.HOST]))
    assert both.guest.next_event() == target(1)
    both.guest_says(Offer(1, 5))  # legal: target 2 is there, but not heard yet
    assert both.guest.next_event() == target(2)


# Any bytes


def conversation_bytes() -> bytes:
    both = Conversation()
    both.guest_says(HELLO)
    said = bytes(both.under_way[Role.GUEST])
    both.host_hears()
    both.host_tells(WELCOME, target(1))
    both.guest_says(VITALS, Offer(1, 50))
    said += bytes(both.under_way[Role.GUEST])
    return said


STREAM = conversation_bytes()


def heard_in_pieces(stream: bytes, cuts: list[int]) -> tuple[list[Message], str]:
    """What a host makes of a stream, answering the Hello; events and the text of the error."""
    host = Connection(Role.HOST)
    events: list[Message] = []
    try:
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            host.receive_data(stream[start:stop])
            while (event := host.next_event()) is not None:
                events.append(event)
                if event == HELLO:
                    host.send(WELCOME)
                    host.send(target(1))
    except RemoteProtocolError as error:
        return events, str(error)
    return events, ""


def test_one_byte_at_a_time_gives_the_same_events() -> None:
    events, error = heard_in_pieces(STREAM, list(range(1, len(STREAM))))
    assert events == [HELLO, VITALS, Offer(1, 50)]
    assert not error


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_streams_only_ever_blame_the_peer(data: st.DataObject) -> None:
    stream = bytearray(STREAM)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    assert heard_in_pieces(bytes(stream), cuts) == heard_in_pieces(bytes(stream), [])


@given(st.binary(max_size=300), st.sampled_from(Role))
def test_random_bytes_only_ever_blame_the_peer(stream: bytes, role: Role) -> None:
    connection = Connection(role)
    connection.receive_data(len(stream).to_bytes(LENGTH_BYTES, "big") + stream)
    with pytest.raises(RemoteProtocolError):
        connection.next_event()


# Swap


def test_swapping_is_allowed_by_the_target_and_used_by_the_offer(both: Conversation) -> None:
    both.running().host_tells(target(1, swap_pages=30))
    assert both.guest.inflation.swap_pages == both.host.inflation.swap_pages == 30
    both.guest_tells(Offer(1, 100, swap_pages=30))
    both.host_tells(Reserve(1, 100, 0))
    both.guest_tells(Reserved(1, 0))
    both.host_tells(target(2))
    assert both.guest.inflation.swap_pages == 0
    both.host_tells(target(3, swap_pages=1))
    both.guest_tells(Refusal(3, RefusalReason.NO_SWAP))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Offer(1, 100, swap_pages=31), "31 pages are more than the 30 to be swapped"),
        (Offer(2, 100, swap_pages=1), "1 pages are more than the 0 to be swapped"),
        (Offer(2, 1, RefusalReason.NO_SWAP), "it was not asked to swap"),
        (Refusal(2, RefusalReason.NO_SWAP), "it was not asked to swap"),
    ],
)
def test_nobody_swaps_more_than_allowed(both: Conversation, answer: Message, fault: str) -> None:
    both.running().host_tells(target(1, swap_pages=30))
    if isinstance(answer, Offer | Refusal) and answer.target_id == 2:
        both.host_tells(target(2))
    with pytest.raises(LocalProtocolError, match=fault):
        both.guest.send(answer)
    both.host.receive_data(framed(encode(answer)))
    with pytest.raises(RemoteProtocolError, match=fault):
        both.host.next_event()


def test_without_the_feature_nobody_is_asked_to_swap(both: Conversation) -> None:
    both.guest_tells(HELLO)
    both.host_tells(dataclasses.replace(WELCOME, features=()))
    assert not both.host.may_swap
    with pytest.raises(LocalProtocolError, match="the feature 'swap' was not agreed on"):
        both.host.send(target(1, swap_pages=1))
    both.guest.receive_data(framed(encode(target(1, swap_pages=1))))
    with pytest.raises(RemoteProtocolError, match="the feature 'swap' was not agreed on"):
        both.guest.next_event()
