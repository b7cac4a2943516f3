"""Steps of a conversation, taken by a test in a guest's place."""

from collections.abc import Callable

from host_rig import Line

from host_agent.guest import Guest
from host_agent.intake.session import GuestSession
from protocol.messages import (
    Claim,
    Dropped,
    Offer,
    Report,
    Reserve,
    Reserved,
    Target,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, pages_of
from protocol.vocabulary import Urgency

SIZE = 64 * MIB

PAGES = pages_of(SIZE)

STEP = pages_of(8 * MIB)


Run = Callable[..., None]


def session_of(guest: Guest) -> GuestSession:
    assert guest.session is not None
    return guest.session


async def offer(line: Line, guest: Guest, pages: int) -> Target:
    """The host wishes for `pages` more, and the guest offers them."""
    actual = len(line.claimed)
    assert not session_of(guest).inflating
    session_of(guest).wish(actual + pages, Urgency.CALM)
    target = await line.hear(Target)
    assert target.balloon_pages == actual + pages
    await line.say(Offer(target.target_id, pages))
    return target


async def reserve(line: Line, guest: Guest, pages: int) -> tuple[Target, PageFrames]:
    """As far as populated frames that are not reported yet."""
    target = await offer(line, guest, pages)
    order = await line.hear(Reserve)
    assert order.pages == pages
    first = int(line.claimed.stops[-1]) if line.claimed else 0
    frames = PageFrames.span(first, pages)
    line.frames.populate(frames)
    return target, frames


async def drop(line: Line, claim: Claim) -> None:
    line.frames.drop(claim.frames)
    line.claimed |= claim.frames
    await line.say(Dropped(claim.report_id, claim.frames))


async def inflate(line: Line, guest: Guest, pages: int) -> None:
    """All of it, in one report."""
    target, frames = await reserve(line, guest, pages)
    await line.say(Report(target.target_id, target.target_id, frames))
    await line.say(Reserved(target.target_id, pages))
    await drop(line, await line.hear(Claim))
