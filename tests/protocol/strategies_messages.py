"""Hypothesis strategies for every message, for the tests of this package and of others."""

from hypothesis import strategies as st

from protocol.messages import (
    MESSAGES,
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
from protocol.page_frames import PageFrames
from protocol.units import HUGE_FRAME_ORDER, PAGE_BYTES
from protocol.vocabulary import (
    MAX_ADDRESS,
    MAX_AMOUNT,
    MAX_ID,
    MAX_PAGES,
    MAX_PERCENT,
    MAX_PID,
    MAX_TEXT_CHARS,
    MAX_VERSION,
    MAX_VITALS_INTERVAL_MS,
    MIN_VITALS_INTERVAL_MS,
    RefusalReason,
    RejectionReason,
    Urgency,
)

ids = st.integers(0, MAX_ID)
pages = st.integers(0, MAX_PAGES)
some_pages = st.integers(1, MAX_PAGES)
frame_orders = st.sampled_from([0, HUGE_FRAME_ORDER])
printable = st.characters(exclude_categories=["C", "Z"], include_characters=" ")
lines = st.text(printable, max_size=MAX_TEXT_CHARS).filter(str.isprintable)
feature_tuples = st.lists(
    st.text(printable, min_size=1, max_size=64).filter(str.isprintable), max_size=32, unique=True
).map(tuple)
refusal_reasons = st.sampled_from(RefusalReason)


@st.composite
def page_frames(draw: st.DrawFn, *, stop: int = MAX_PAGES, min_ranges: int = 1) -> PageFrames:
    """Up to a few ranges below `stop`."""
    borders = draw(
        st.lists(
            st.integers(0, min(stop, MAX_PAGES - 1)),
            min_size=2 * min_ranges,
            max_size=min(12, stop + 1),
            unique=True,
        ).map(sorted)
    )
    pairs = list(zip(borders[::2], borders[1::2], strict=False))
    return PageFrames.from_ranges([a for a, _ in pairs], [b - a for a, b in pairs])


@st.composite
def hellos(draw: st.DrawFn) -> Hello:
    version_min, version_max = sorted(draw(st.tuples(*[st.integers(1, MAX_VERSION)] * 2)))
    arena_pages = draw(some_pages)
    highest = (MAX_ADDRESS + 1) // PAGE_BYTES - arena_pages
    return Hello(
        version_min=version_min,
        version_max=version_max,
        features=draw(feature_tuples),
        software=draw(lines),
        pseudo_process_pid=draw(st.integers(1, MAX_PID)),
        arena_address=draw(st.integers(0, highest - 1)) * PAGE_BYTES,
        arena_pages=arena_pages,
        frame_order=draw(frame_orders),
        claimed=draw(page_frames(stop=arena_pages, min_ranges=0)),
    )


@st.composite
def welcomes(draw: st.DrawFn) -> Welcome:
    assigned_pages = draw(some_pages)
    return Welcome(
        version=draw(st.integers(1, MAX_VERSION)),
        features=draw(feature_tuples),
        assigned_pages=assigned_pages,
        claimed=draw(page_frames(stop=assigned_pages, min_ranges=0)),
        vitals_interval_ms=draw(st.integers(MIN_VITALS_INTERVAL_MS, MAX_VITALS_INTERVAL_MS)),
    )


@st.composite
def reserves(draw: st.DrawFn) -> Reserve:
    order = draw(frame_orders)
    frames = draw(st.integers(1, MAX_PAGES >> order))
    return Reserve(draw(ids), frames << order, order)


@st.composite
def rejections(draw: st.DrawFn) -> Rejection:
    reasons = draw(st.lists(st.sampled_from(RejectionReason), min_size=1, unique=True))
    stops = draw(
        st.lists(st.integers(1, MAX_PAGES - 1), min_size=len(reasons), unique=True).map(sorted)
    )
    starts = [0, *stops]
    groups = tuple(
        (PageFrames.span(starts[index], stops[index] - starts[index]), reason)
        for index, reason in enumerate(reasons)
    )
    return Rejection(draw(ids), groups)


amounts = st.none() | st.integers(0, MAX_AMOUNT)
fractions = st.none() | st.floats(0.0, 1.0)
percents = st.none() | st.floats(0.0, MAX_PERCENT)
vitals = st.builds(
    Vitals,
    clock_s=st.floats(0.0, allow_infinity=False),
    **{
        field.name: (
            percents
            if field.name.startswith("pressure")
            else fractions
            if field.name.endswith("fraction")
            else amounts
        )
        for field in Vitals.FIELDS
        if field.name != "clock_s"
    },
)

BY_TYPE: dict[type[Message], st.SearchStrategy[Message]] = {
    Hello: hellos(),
    Welcome: welcomes(),
    Target: st.builds(Target, ids, pages, st.sampled_from(Urgency), pages),
    Offer: st.builds(Offer, ids, some_pages, st.none() | refusal_reasons, lines, pages),
    Refusal: st.builds(Refusal, ids, refusal_reasons, lines),
    Reserve: reserves(),
    Decline: st.builds(Decline, ids, lines),
    Report: st.builds(Report, ids, ids, page_frames()),
    Reserved: st.builds(Reserved, ids, pages, st.none() | refusal_reasons, lines),
    Rejection: rejections(),
    Claim: st.builds(Claim, ids, page_frames()),
    Dropped: st.builds(Dropped, ids, page_frames()),
    Return: st.builds(Return, page_frames()),
    Vitals: vitals,
    Reset: st.builds(Reset, lines),
    Goodbye: st.builds(Goodbye, lines),
}
assert set(BY_TYPE) == set(MESSAGES)

messages = st.one_of(*BY_TYPE.values())
