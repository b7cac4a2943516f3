"""Every built-in policy in an agent's core: what it wants is what happens, and the books agree."""

from collections.abc import Callable

import pytest
import trio
import trio.testing
from host_rig import Line, Rig, open_rig

from host_agent.guest import Guest
from host_agent.policy.interface import Policy
from host_agent.policy.manual import Manual
from host_agent.policy.registry import BUILT_IN
from protocol.messages import (
    Claim,
    Dropped,
    Offer,
    Refusal,
    Report,
    Reserve,
    Reserved,
    Return,
    Target,
    Vitals,
)
from protocol.page_frames import PageFrames
from protocol.units import MIB, bytes_of
from protocol.vocabulary import RefusalReason

VITALS_S = 1.0
MINUTE_S = 60.0


async def obey(line: Line, guest: Guest) -> None:
    """A driver that gives whatever it is asked for, as long as its connection lasts."""
    while True:
        message = await line.channel.receive()
        if isinstance(message, Target):
            missing = message.balloon_pages - line.claimed.page_count
            if missing > 0:
                await line.say(Offer(message.target_id, missing))
            else:
                await line.say(Refusal(message.target_id, RefusalReason.AT_TARGET))
        elif isinstance(message, Reserve):
            own = PageFrames.span(0, guest.assigned_pages)
            frames = (own - line.claimed).lowest(message.pages)
            line.frames.populate(frames)
            await line.say(
                Report(message.target_id, message.target_id, frames),
                Reserved(message.target_id, message.pages),
            )
        elif isinstance(message, Claim):
            line.frames.drop(message.frames)
            line.claimed |= message.frames
            await line.say(Dropped(message.report_id, message.frames))
        elif isinstance(message, Return):
            line.claimed -= message.frames


async def tell(rig: Rig, line: Line, name: str, used_bytes: int, demand_bytes: int) -> None:
    """What it uses and needs, once a second; it never reads anything again."""
    while True:
        quota_bytes = bytes_of(rig.ledger.view(name).quota_pages)
        await line.say(
            Vitals(
                clock_s=trio.current_time(),
                usage_bytes=min(used_bytes, quota_bytes),
                working_set_bytes=min(used_bytes, quota_bytes),
                demand_bytes=demand_bytes,
                spare_bytes=max(quota_bytes - used_bytes, 0),
                refault_bytes_total=0,
            )
        )
        await trio.sleep(VITALS_S)


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.name)
def test_memory_moves_as_the_policy_wants(
    kind: Callable[[], Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        # 240 MiB are shared out: 200 to a guest that uses 40, 40 to one that needs 120.
        async with open_rig(monkeypatch) as (rig, nursery):
            rig.balancer.policy = policy = kind()
            idle = rig.add("idle", 200 * MIB, quota_bytes=200 * MIB, reservation_bytes=20 * MIB)
            busy = rig.add("busy", 200 * MIB, quota_bytes=40 * MIB, reservation_bytes=20 * MIB)
            for guest, used, demand in ((idle, 40 * MIB, 40 * MIB), (busy, 40 * MIB, 120 * MIB)):
                line = await rig.connect(nursery, guest)
                nursery.start_soon(obey, line, guest)
                nursery.start_soon(tell, rig, line, guest.name, used, demand)
            nursery.start_soon(rig.balancer.run)
            await trio.sleep(MINUTE_S)
            await rig.settle()
            rig.check_bounds()
            idle_bytes = bytes_of(rig.ledger.view("idle").quota_pages)
            busy_bytes = bytes_of(rig.ledger.view("busy").quota_pages)
            assert rig.ends == {"idle": [], "busy": []}
            if isinstance(policy, Manual):
                assert (idle_bytes, busy_bytes) == (200 * MIB, 40 * MIB)
                return
            assert idle_bytes <= 190 * MIB
            if policy.name in ("shares", "esx", "hyperv"):  # those that look at demand
                assert busy_bytes >= 120 * MIB
            if policy.name == "squeezed":
                assert abs(idle_bytes - busy_bytes) <= 1 * MIB

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))
