"""What the measurements are made of: a launch, a wish, and the time until it is in force."""

from time import perf_counter
from typing import Final, Literal

import trio

from host_agent.agent import Agent
from host_agent.errors import AgentError
from host_agent.facade.port import VmChange, VmSpec
from protocol.units import HUGE_PAGE_BYTES, PAGE_BYTES, bytes_of

TURN_DEADLINE_S: Final = 120.0
"""A turn that has not ended by then is reported as broken, not as slow."""

REST_S: Final = 0.1
"""Between turns: what is being freed must not slow the next one."""

FrameSize = Literal["4KiB", "2MiB"]
FRAME_BYTES: Final[dict[FrameSize, int]] = {"4KiB": PAGE_BYTES, "2MiB": HUGE_PAGE_BYTES}


async def launch(
    agent: Agent,
    name: str,
    assigned: int,
    *,
    frames: FrameSize = "4KiB",
    startup: int | None = None,
    command: tuple[str, ...] = ("sleep", "infinity"),
) -> None:
    """A VM whose quota is the one that it was launched with, and stays so."""
    spec = VmSpec(
        name=name,
        assigned_bytes=assigned,
        reservation_bytes=0,
        startup_bytes=assigned if startup is None else startup,
        frames=frames,
        command=command,
    )
    await agent.launch(spec)
    await set_quota(agent, name, spec.startup_bytes)


async def set_quota(agent: Agent, name: str, quota_bytes: int) -> None:
    """Ask for a quota as an operator does, and wait until it is in force.

    The answer to the operator comes later: it waits for the disk, to which the wish is written.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.change, name, VmChange(quota_bytes=quota_bytes))
        await until_quota(agent, name, quota_bytes)


async def until_quota(agent: Agent, name: str, quota_bytes: int) -> None:
    """Wait until the quota is in force, of whoever's wish. Raises AgentError if it won't be."""
    guest = agent.balancer.guests[name]
    with trio.move_on_after(TURN_DEADLINE_S):
        while bytes_of(agent.ledger.view(name).quota_pages) != quota_bytes:
            await guest.quota_changed.wait()
        return
    raise AgentError(f"the quota of {name} did not get where it should: {guest.last_reason}")


async def time_quota(agent: Agent, name: str, quota_bytes: int) -> float:
    """Seconds from the wish until the kernel's limit is there and every frame is settled."""
    async with trio.open_nursery() as nursery:
        began_s = perf_counter()
        nursery.start_soon(agent.change, name, VmChange(quota_bytes=quota_bytes))
        await until_quota(agent, name, quota_bytes)
        took_s = perf_counter() - began_s
    guest = agent.balancer.guests[name]
    limit = guest.live_quota.read().vm_limit_bytes - guest.overhead_bytes
    if limit != quota_bytes:
        raise AgentError(f"the kernel's limit of {name} is {limit}, not {quota_bytes}")
    return took_s
