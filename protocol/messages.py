"""The messages of the channel: frozen values, valid once built.

    guest -> host   Hello, Offer, Refusal, Report, Reserved, Dropped, Vitals
    host -> guest   Welcome, Target, Reserve, Decline, Claim, Rejection, Return
    both ways       Reset, Goodbye

Building one with a value out of bounds raises ValueError, with the message and the field in its
text. What a message means in the order of a conversation stands in transitions.py; how it looks
in bytes, in codec.py. A field with a default may be absent on the wire.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from protocol.field_kinds import Choice, FrameList, OneOf, Real, Text, Whole
from protocol.fields import Pair, TupleOf
from protocol.message_base import Message, wire_message
from protocol.page_frames import PageFrames
from protocol.units import HUGE_FRAME_ORDER, PAGE_BYTES
from protocol.vocabulary import (
    MAX_ADDRESS,
    MAX_AMOUNT,
    MAX_FEATURE_CHARS,
    MAX_FEATURES,
    MAX_ID,
    MAX_PAGES,
    MAX_PERCENT,
    MAX_PID,
    MAX_RANGES,
    MAX_TEXT_CHARS,
    MAX_VERSION,
    MAX_VITALS_INTERVAL_MS,
    MIN_VITALS_INTERVAL_MS,
    RefusalReason,
    RejectionReason,
    Urgency,
)

__all__ = [
    "MESSAGES",
    "Claim",
    "Decline",
    "Dropped",
    "Goodbye",
    "Hello",
    "Message",
    "Offer",
    "Refusal",
    "Rejection",
    "Report",
    "Reserve",
    "Reserved",
    "Reset",
    "Return",
    "Target",
    "Vitals",
    "Welcome",
]

Version = Annotated[int, Whole(1, MAX_VERSION)]
Id = Annotated[int, Whole(0, MAX_ID)]
Pages = Annotated[int, Whole(0, MAX_PAGES)]
SomePages = Annotated[int, Whole(1, MAX_PAGES)]
FrameOrder = Annotated[int, Choice((0, HUGE_FRAME_ORDER))]
Line = Annotated[str, Text(MAX_TEXT_CHARS)]
Features = Annotated[tuple[str, ...], TupleOf(Text(MAX_FEATURE_CHARS, 1), MAX_FEATURES)]
SomeFrames = Annotated[PageFrames, FrameList()]
AnyFrames = Annotated[PageFrames, FrameList(may_be_empty=True)]
Amount = Annotated[int, Whole(0, MAX_AMOUNT)]
Seconds = Annotated[float, Real(0.0, math.inf)]
Percent = Annotated[float, Real(0.0, MAX_PERCENT)]
Fraction = Annotated[float, Real(0.0, 1.0)]
RejectedFrames = Annotated[
    tuple[tuple[PageFrames, RejectionReason], ...],
    TupleOf(Pair(FrameList(), OneOf(RejectionReason)), len(RejectionReason), 1),
]


@wire_message
@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The guest's first message: who it is, what it speaks, what it still has claimed.

    `arena_address` is where the pseudo-process maps its arena, in its own address space: frame
    `pfn` lies at arena_address + pfn * 4096. The pid is as the guest sees it; the host believes
    neither and finds the process by its credentials.
    """

    version_min: Version
    version_max: Version
    features: Features
    software: Line
    pseudo_process_pid: Annotated[int, Whole(1, MAX_PID)]
    arena_address: Annotated[int, Whole(0, MAX_ADDRESS, multiple_of=PAGE_BYTES)]
    arena_pages: SomePages
    frame_order: FrameOrder
    claimed: AnyFrames

    def __post_init__(self) -> None:
        """Besides the fields' own bounds: versions and arena fit together."""
        Message.__post_init__(self)
        _check_features(self, self.features)
        if self.version_min > self.version_max:
            raise ValueError("Hello.version_min must not be above version_max")
        if self.arena_address + self.arena_pages * PAGE_BYTES > MAX_ADDRESS + 1:
            raise ValueError("Hello.arena_pages must end within the address space")
        _check_within(self, "claimed", self.claimed, self.arena_pages)


@wire_message
@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The host's answer to a Hello: what holds from now on.

    `claimed` is what both ends take for claimed from here on. Vitals are wanted every
    `vitals_interval_ms`.
    """

    version: Version
    features: Features
    assigned_pages: SomePages
    claimed: AnyFrames
    vitals_interval_ms: Annotated[int, Whole(MIN_VITALS_INTERVAL_MS, MAX_VITALS_INTERVAL_MS)]

    def __post_init__(self) -> None:
        """Besides the fields' own bounds: claimed frames are frames of the guest."""
        Message.__post_init__(self)
        _check_features(self, self.features)
        _check_within(self, "claimed", self.claimed, self.assigned_pages)


@wire_message
@dataclass(frozen=True, slots=True)
class Target(Message):
    """The host wants the balloon to have `balloon_pages` pages in all; replaces older targets.

    For that the guest may swap out up to `swap_pages` of its memory, if it thinks fit.
    """

    target_id: Id
    balloon_pages: Pages
    urgency: Urgency
    swap_pages: Pages = 0


@wire_message
@dataclass(frozen=True, slots=True)
class Offer(Message):
    """The guest can spare `pages` more pages now; `reason` says why less than wanted.

    To spare them it swaps out up to `swap_pages` of its memory.
    """

    target_id: Id
    pages: SomePages
    reason: RefusalReason | None = None
    detail: Line = ""
    swap_pages: Pages = 0


@wire_message
@dataclass(frozen=True, slots=True)
class Refusal(Message):
    """The guest can spare nothing now, or has nothing to do."""

    target_id: Id
    reason: RefusalReason
    detail: Line = ""


@wire_message
@dataclass(frozen=True, slots=True)
class Reserve(Message):
    """The host has made room: reserve up to `pages` pages, in frames of `frame_order`."""

    target_id: Id
    pages: SomePages
    frame_order: FrameOrder

    def __post_init__(self) -> None:
        """Besides the fields' own bounds: whole frames."""
        Message.__post_init__(self)
        if self.pages % (1 << self.frame_order):
            raise ValueError(
                f"Reserve.pages must be whole frames of order {self.frame_order}, not {self.pages}"
            )


@wire_message
@dataclass(frozen=True, slots=True)
class Decline(Message):
    """The host could not make room for the offer."""

    target_id: Id
    detail: Line = ""


@wire_message
@dataclass(frozen=True, slots=True)
class Report(Message):
    """A page frame list: frames that are reserved and wait to be claimed."""

    target_id: Id
    report_id: Id
    frames: SomeFrames


@wire_message
@dataclass(frozen=True, slots=True)
class Reserved(Message):
    """The reservation is over: `pages` pages were reported in all, `reason` says why not more."""

    target_id: Id
    pages: Pages
    reason: RefusalReason | None = None
    detail: Line = ""


@wire_message
@dataclass(frozen=True, slots=True)
class Claim(Message):
    """The host has verified these frames of a report: drop them."""

    report_id: Id
    frames: SomeFrames


@wire_message
@dataclass(frozen=True, slots=True)
class Rejection(Message):
    """The host does not take these frames of a report, each group with its reason."""

    report_id: Id
    rejected: RejectedFrames

    def __post_init__(self) -> None:
        """Besides the fields' own bounds: a frame has one reason, a reason one group."""
        Message.__post_init__(self)
        if sum(frames.range_count for frames, _ in self.rejected) > MAX_RANGES:
            raise ValueError(f"Rejection.rejected must have at most {MAX_RANGES} ranges in all")
        if len({reason for _, reason in self.rejected}) < len(self.rejected):
            raise ValueError("Rejection.rejected must name each reason once")
        pages = sum(frames.page_count for frames, _ in self.rejected)
        if len(self.rejected) > 1 and self.frames.page_count < pages:
            raise ValueError("Rejection.rejected must name each frame once")

    @property
    def frames(self) -> PageFrames:
        """All rejected frames."""
        together = self.rejected[0][0]
        for frames, _ in self.rejected[1:]:
            together = together | frames
        return together


@wire_message
@dataclass(frozen=True, slots=True)
class Dropped(Message):
    """The claimed frames of a report have no physical pages any more."""

    report_id: Id
    frames: SomeFrames


@wire_message
@dataclass(frozen=True, slots=True)
class Return(Message):
    """The quota is raised: these claimed frames are the guest's again."""

    frames: SomeFrames


@wire_message
@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals(Message):
    """The guest's statistics. None means unknown, never 0.

    `clock_s` is the guest's monotonic clock; totals are cumulative. The last four are the
    driver's estimates; `active_fraction` is the part of its memory that was in use lately. Every
    value replaces the one before: a statistic that is absent now is unknown now.
    """

    clock_s: Seconds
    limit_bytes: Amount | None = None
    usage_bytes: Amount | None = None
    anon_bytes: Amount | None = None
    file_bytes: Amount | None = None
    inactive_file_bytes: Amount | None = None
    active_file_bytes: Amount | None = None
    dirty_bytes: Amount | None = None
    unevictable_bytes: Amount | None = None
    kernel_bytes: Amount | None = None
    refault_bytes_total: Amount | None = None
    refault_anon_bytes_total: Amount | None = None
    major_faults_total: Amount | None = None
    swap_used_bytes: Amount | None = None
    swap_free_bytes: Amount | None = None
    pressure_some_avg10: Percent | None = None
    pressure_full_avg10: Percent | None = None
    pressure_some_total_s: Seconds | None = None
    oom_kills_total: Amount | None = None
    working_set_bytes: Amount | None = None
    demand_bytes: Amount | None = None
    spare_bytes: Amount | None = None
    active_fraction: Fraction | None = None


@wire_message
@dataclass(frozen=True, slots=True)
class Reset(Message):
    """The sender has lost the thread: everything starts again with a Hello.

    What is claimed stays claimed; reserved frames that are not claimed yet are released.
    """

    reason: Line


@wire_message
@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    """The sender says nothing more and closes; the peer should close as well."""

    reason: Line


MESSAGES: tuple[type[Message], ...] = (
    Hello,
    Welcome,
    Target,
    Offer,
    Refusal,
    Reserve,
    Decline,
    Report,
    Reserved,
    Rejection,
    Claim,
    Dropped,
    Return,
    Vitals,
    Reset,
    Goodbye,
)
"""Every message, in the order of a conversation."""


def _check_features(message: Message, features: tuple[str, ...]) -> None:
    if len(set(features)) < len(features):
        raise ValueError(f"{type(message).__name__}.features must name each feature once")


def _check_within(message: Message, name: str, frames: PageFrames, pages: int) -> None:
    if frames and int(frames.stops[-1]) > pages:
        raise ValueError(f"{type(message).__name__}.{name} must name frames below {pages}")
