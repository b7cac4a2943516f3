"""A balloon that is inflated and deflated in turns, beside a plain loop that reserves as much."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from host_agent.agent import Agent
from host_agent.bench.steps import FRAME_BYTES, REST_S, FrameSize, launch, time_quota
from host_agent.bench.yardstick import Yardstick, yardstick
from host_agent.private_agent import private_agent
from protocol.units import MIB

GUEST = "a"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, in seconds."""

    plain_s: float
    inflate_s: float
    deflate_s: float


@dataclass(frozen=True, slots=True)
class Inflation:
    """A guest of twice the size of what it gives, and nobody beside it."""

    agent: Agent
    size_bytes: int
    loop: Yardstick

    async def turn(self) -> Turn:
        """Reserve the size plainly, then by the balloon, and give it back. Raises AgentError."""
        assigned_bytes = guest_bytes(self.size_bytes)
        plain_s = await self.loop.turn()
        await trio.sleep(REST_S)
        inflate_s = await time_quota(self.agent, GUEST, assigned_bytes - self.size_bytes)
        deflate_s = await time_quota(self.agent, GUEST, assigned_bytes)
        await trio.sleep(REST_S)
        return Turn(plain_s, inflate_s, deflate_s)


def guest_bytes(size_bytes: int) -> int:
    """The balloon leaves the guest its floor, so the guest is larger than what it gives."""
    return 2 * size_bytes + 256 * MIB


@asynccontextmanager
async def inflation(size_bytes: int, frames: FrameSize) -> AsyncIterator[Inflation]:
    """An agent and a guest of their own. Raises the UserErrors of `private_agent`."""
    assigned_bytes = guest_bytes(size_bytes)
    async with (
        private_agent("bench", pool_bytes=assigned_bytes, reserve_bytes=0) as agent,
        yardstick(agent, size_bytes, FRAME_BYTES[frames]) as loop,
    ):
        await launch(agent, GUEST, assigned_bytes, frames=frames)
        yield Inflation(agent, size_bytes, loop)
