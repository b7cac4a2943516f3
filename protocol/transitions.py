"""The protocol's specification: which message may be said when, as tables.

Theory
------
A conversation is seen by two ends, each with its own copy of the state. A transition happens at
the sender when it sends and at the receiver when it hears, so for a while the copies differ; the
stream keeps the order of each direction, nothing keeps the order between them. One set of tables
serves both ends: a row is the same whether the message is said or heard. What differs is blame
(a message that is not in the table is a LocalProtocolError at the sender and a RemoteProtocolError
at the receiver) and what to do about messages that crossed.

The state has three parts that move on their own:

- `SESSION`: have the two greeted each other. The guest speaks first. Every Hello is answered by
  exactly one Welcome or Goodbye.
- `INFLATION`: one walk from a target to reserved frames, within a running session.
- `REPORT`: for each page frame list, what has become of it.

Vitals and Return stand outside of the last two: they may be said at any time while running.

Crossing, within a session
--------------------------
Only the host may interrupt: a Target is legal in any state of `INFLATION` and begins a new walk
with a larger target id. The guest may have said something about the older target before it heard
of the new one. So the host, and only the host, hears messages with an older target id, and
`CROSSED` says what becomes of them. Offer and Refusal are words: dropped. Report and Reserved are
about frames that really are reserved: they are events, and the host rejects or claims the frames.
The guest never hears of an older target, since the host knows which one is the newest: a Reserve
or Decline for another target is a violation. A larger target id than the host ever said is one too.

A reservation is what a Reserve opens and the Reserved with the same target id closes. It outlives
its target when a new one arrives, but not the next Offer: the guest must close it before it says
that. So there is never more than one. Reports are legal while it is open, their pages never exceed
the room that it grants, and the Reserved says how many there were in all.

Crossing, over a reset
----------------------
Either end may say Reset in a running session, and both return to START. The sender then does not
listen (`HEARING` is DEAF) to whatever the peer said before it knew: the host until a Hello, the
guest until a Welcome, both until a Goodbye. No numbers are needed to tell an old greeting from a
new one:

- Reset is legal in RUNNING alone. So the guest has heard the Welcome of every earlier Hello when
  it says Reset or hears one, and no old Welcome can be on its way: the next one answers its next
  Hello. An end that is sick of a greeting says Goodbye.
- The host has heard every earlier Hello when it is RUNNING; the guest says the next one only after
  a Reset. So the first Hello that the host hears after its own Reset is a new one, whether the
  guest said it because of that Reset or because of one of its own that crossed it.
- If both say Reset at once, each drops the other's: the guest is in START or GREETING and deaf,
  the host in START and deaf. The guest's Hello then finds the host, and the Welcome the guest. A
  Reset that the host says after that Welcome is heard after it.

Nothing of the old session is carried over: ids start anew, reservations and open reports are
forgotten by both. The next Hello and Welcome say what is claimed.

Ends
----
Goodbye closes at once: who says it hears nothing more, who hears it can't answer. A violation by
the peer leads to VIOLATED, where a last Goodbye may tell it why. A stream that ends in any other
state than CLOSED leads to BROKEN.
"""

from enum import StrEnum
from typing import Final

from protocol.messages import (
    Claim,
    Decline,
    Dropped,
    Goodbye,
    Hello,
    Message,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Reset,
    Return,
    Target,
    Vitals,
    Welcome,
)
from protocol.vocabulary import Role

MessageType = type[Message]


class SessionState(StrEnum):
    """How far the two have come in greeting each other."""

    START = "START"
    GREETING = "GREETING"
    RUNNING = "RUNNING"
    CLOSED = "CLOSED"
    VIOLATED = "VIOLATED"
    BROKEN = "BROKEN"


class InflationState(StrEnum):
    """How far the newest target has come."""

    IDLE = "IDLE"
    TARGETED = "TARGETED"
    OFFERED = "OFFERED"
    RESERVING = "RESERVING"


class ReportState(StrEnum):
    """What has become of the frames of one report. OVER: it is forgotten."""

    REPORTED = "REPORTED"
    TRIMMED = "TRIMMED"
    CLAIMED = "CLAIMED"
    OVER = "OVER"


class ReportStep(StrEnum):
    """What is said about a report. A claim names all frames that were not rejected."""

    REJECTION_OF_ALL = "Rejection of all frames"
    REJECTION_OF_SOME = "Rejection of some frames"
    CLAIM = "Claim"
    DROPPED = "Dropped"


class Hearing(StrEnum):
    """Whether this end listens to what the peer says."""

    LISTENING = "LISTENING"
    DEAF = "DEAF"


class HearingStep(StrEnum):
    """What makes this end deaf, and what it hears all the same and listens from then on."""

    SAID_RESET = "said Reset"
    SAID_GOODBYE = "said Goodbye"
    HEARD_ANEW = "heard Hello, Welcome or Goodbye"


class Crossed(StrEnum):
    """What the host does about a message with an older target id."""

    DROPPED = "dropped"
    EVENT = "an event, if the reservation is open"


GUEST_ALONE: Final = frozenset({Role.GUEST})
HOST_ALONE: Final = frozenset({Role.HOST})
EITHER: Final = frozenset(Role)

SENDERS: Final[dict[MessageType, frozenset[Role]]] = {
    Hello: GUEST_ALONE,
    Welcome: HOST_ALONE,
    Target: HOST_ALONE,
    Offer: GUEST_ALONE,
    Refusal: GUEST_ALONE,
    Reserve: HOST_ALONE,
    Decline: HOST_ALONE,
    Report: GUEST_ALONE,
    Reserved: GUEST_ALONE,
    Rejection: HOST_ALONE,
    Claim: HOST_ALONE,
    Dropped: GUEST_ALONE,
    Return: HOST_ALONE,
    Vitals: GUEST_ALONE,
    Reset: EITHER,
    Goodbye: EITHER,
}

WHILE_RUNNING: Final[tuple[MessageType, ...]] = tuple(
    message for message in SENDERS if message not in (Hello, Welcome, Reset, Goodbye)
)

SESSION: Final[dict[SessionState, dict[MessageType, SessionState]]] = {
    SessionState.START: {
        Hello: SessionState.GREETING,
        Goodbye: SessionState.CLOSED,
    },
    SessionState.GREETING: {
        Welcome: SessionState.RUNNING,
        Goodbye: SessionState.CLOSED,
    },
    SessionState.RUNNING: {
        **dict.fromkeys(WHILE_RUNNING, SessionState.RUNNING),
        Reset: SessionState.START,
        Goodbye: SessionState.CLOSED,
    },
    SessionState.VIOLATED: {
        Goodbye: SessionState.CLOSED,
    },
    SessionState.CLOSED: {},
    SessionState.BROKEN: {},
}

INFLATION: Final[dict[InflationState, dict[MessageType, InflationState]]] = {
    InflationState.IDLE: {
        Target: InflationState.TARGETED,
    },
    InflationState.TARGETED: {
        Target: InflationState.TARGETED,
        Offer: InflationState.OFFERED,
        Refusal: InflationState.IDLE,
    },
    InflationState.OFFERED: {
        Target: InflationState.TARGETED,
        Reserve: InflationState.RESERVING,
        Decline: InflationState.IDLE,
    },
    InflationState.RESERVING: {
        Target: InflationState.TARGETED,
        Report: InflationState.RESERVING,
        Reserved: InflationState.IDLE,
    },
}

REPORT: Final[dict[ReportState, dict[ReportStep, ReportState]]] = {
    ReportState.REPORTED: {
        ReportStep.REJECTION_OF_ALL: ReportState.OVER,
        ReportStep.REJECTION_OF_SOME: ReportState.TRIMMED,
        ReportStep.CLAIM: ReportState.CLAIMED,
    },
    ReportState.TRIMMED: {
        ReportStep.CLAIM: ReportState.CLAIMED,
    },
    ReportState.CLAIMED: {
        ReportStep.DROPPED: ReportState.OVER,
    },
    ReportState.OVER: {},
}

HEARING: Final[dict[Hearing, dict[HearingStep, Hearing]]] = {
    Hearing.LISTENING: {
        HearingStep.SAID_RESET: Hearing.DEAF,
        HearingStep.SAID_GOODBYE: Hearing.DEAF,
        HearingStep.HEARD_ANEW: Hearing.LISTENING,
    },
    Hearing.DEAF: {
        HearingStep.SAID_GOODBYE: Hearing.DEAF,
        HearingStep.HEARD_ANEW: Hearing.LISTENING,
    },
}

HEARD_BY_THE_DEAF: Final[frozenset[MessageType]] = frozenset({Hello, Welcome, Goodbye})
"""What makes an end listen again after its own Reset. After its own Goodbye nothing is heard."""

CROSSED: Final[dict[MessageType, Crossed]] = {
    Offer: Crossed.DROPPED,
    Refusal: Crossed.DROPPED,
    Report: Crossed.EVENT,
    Reserved: Crossed.EVENT,
}
