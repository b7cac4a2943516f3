"""The measurements. Ours and the plain loop take turns, so that a noisy machine slows both."""

import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import trio

from host_agent.agent import Agent
from host_agent.bench.figures import Figure, Reach, machine
from host_agent.bench.inflation import GUEST, inflation
from host_agent.bench.shrinks import shrink_figures
from host_agent.bench.steps import (
    REST_S,
    TURN_DEADLINE_S,
    FrameSize,
    launch,
    set_quota,
    time_quota,
    until_quota,
)
from host_agent.bench.yardstick import yardstick
from host_agent.errors import AgentError
from host_agent.facade.port import VmChange
from host_agent.guest_command import WORKLOAD_SOCKET
from host_agent.private_agent import private_agent
from host_agent.quota.base import Part
from host_agent.workload_client import WorkloadClient, WorkloadError
from protocol.units import GIB, KIB, MIB, PAGE_BYTES

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured, in bytes and times."""

    inflate_bytes: int
    move_bytes: int
    burst_bytes: int
    repetitions: int
    bursts: int

    @classmethod
    def full(cls) -> Self:
        """What the figures are promised for."""
        return cls(1 * GIB, 512 * MIB, 100 * MIB, repetitions=7, bursts=50)

    @classmethod
    def small(cls) -> Self:
        """Whether it runs at all; the ratios say little at this size."""
        return cls(64 * MIB, 32 * MIB, 16 * MIB, repetitions=2, bursts=2)


SCALES: Final = {"full": Scale.full, "small": Scale.small}


async def run_bench(scale: Scale, progress: Progress) -> dict[str, Any]:
    """All figures, with the machine that they were measured on."""
    figures: list[Figure] = []
    reaches: tuple[tuple[FrameSize, float], ...] = (("4KiB", 0.90), ("2MiB", 0.75))
    for frames, least in reaches:
        progress(f"inflating and deflating, {frames} frames")
        figures += await _inflate_and_deflate(scale, frames, least)
    progress("moving between guests")
    figures.append(await _move(scale))
    progress("bursts beyond the quota")
    figures += await _bursts(scale)
    progress("shrinking a guest that allocates at full speed")
    figures += await shrink_figures(scale.bursts)
    async with private_agent("bench", pool_bytes=64 * MIB, reserve_bytes=0) as agent:
        about = machine(agent.quotas.cgroup_version)
    return {"machine": about, "figures": [figure.to_json() for figure in figures]}


# Inflating and deflating


async def _inflate_and_deflate(scale: Scale, frames: FrameSize, least: float) -> list[Figure]:
    async with inflation(scale.inflate_bytes, frames) as one:
        await one.turn()  # warms up
        turns = [await one.turn() for _ in range(scale.repetitions)]
        memory = _guest_side_memory(one.agent, GUEST)
    plain = [turn.plain_s for turn in turns]
    inflated = [turn.inflate_s for turn in turns]
    deflated = [turn.deflate_s for turn in turns]
    ratio = Figure(
        name=f"inflate_{frames}_ratio",
        value=statistics.median(plain) / statistics.median(inflated),
        unit="plain loop's time / balloon's time",
        reach=Reach("at least", least),
        detail={"plain_s": plain, "balloon_s": inflated, "bytes": scale.inflate_bytes},
    )
    deflate = Figure(
        name=f"deflate_{frames}",
        value=statistics.median(deflated) * 1000,
        unit="ms",
        reach=Reach("at most", 5.0),
        detail={"balloon_s": deflated, "bytes": scale.inflate_bytes},
    )
    return [ratio, deflate] + ([memory] if frames == "4KiB" else [])


def _guest_side_memory(agent: Agent, name: str) -> Figure:
    """Memory of the driver and the pseudo-process that nobody else has: USS."""
    by_process: dict[str, float] = {}
    quota = agent.balancer.guests[name].live_quota
    for pid in quota.processes(Part.DRIVER):
        process = Path(f"/proc/{pid}")
        rollup = (process / "smaps_rollup").read_text(encoding="ascii")
        lines = (line.split() for line in rollup.splitlines())
        private = sum(int(line[1]) for line in lines if line[0].startswith("Private_"))
        comm = (process / "comm").read_text(encoding="utf-8").strip()
        by_process[f"{comm} {pid}"] = private * KIB / MIB
    balloon = [mib for comm, mib in by_process.items() if not comm.startswith(("sh ", "unshare "))]
    return Figure(
        name="guest_side_memory",
        value=sum(balloon),
        unit="MiB (USS of driver and pseudo-process)",
        reach=Reach("at most", 20.0),
        detail={"mib_by_process": by_process},
    )


# Moving


async def _move(scale: Scale) -> Figure:
    """Back and forth between two guests that fill the pool: each wish needs the other's pages."""
    size = scale.move_bytes
    assigned = 3 * size + 256 * MIB
    most, least = assigned, assigned - size
    plain: list[float] = []
    moved: list[float] = []
    async with (
        private_agent("bench", pool_bytes=most + least, reserve_bytes=0) as agent,
        yardstick(agent, size, PAGE_BYTES) as loop,
    ):
        await launch(agent, "a", assigned, startup=least)
        await launch(agent, "b", assigned, startup=least)
        rich, poor = "a", "b"
        for turn in range(scale.repetitions + 1):
            # The rich one is the policy's: it gets whatever the other is not promised.
            await set_quota(agent, poor, least)
            await agent.change(rich, VmChange(automatic=True))
            await until_quota(agent, rich, most)
            plain_s = await loop.turn()
            await trio.sleep(REST_S)
            moved_s = await time_quota(agent, poor, most)
            await trio.sleep(REST_S)
            rich, poor = poor, rich
            if turn:
                plain.append(plain_s)
                moved.append(moved_s)
    return Figure(
        name="move_ratio",
        value=statistics.median(moved) / statistics.median(plain),
        unit="move's time / plain loop's time",
        reach=Reach("at most", 1.25),
        detail={"plain_s": plain, "move_s": moved, "bytes": size},
    )


# Bursts


async def _bursts(scale: Scale) -> list[Figure]:
    """A workload that needs much more than its quota, at once, again and again."""
    burst = scale.burst_bytes
    quota = 192 * MIB  # above what the guest never goes below at this size
    assigned = quota + 2 * burst + 64 * MIB
    stalls: list[float] = []
    async with _burst_host(quota, assigned, reserve_bytes=2 * burst) as (agent, workload):
        for turn in range(scale.bursts + 1):
            used = agent.balancer.guests["a"].live_quota.read().workload_usage_bytes
            answer = await workload.burst(quota - used + burst)
            await workload.unburst()
            await until_quota(agent, "a", quota)
            if turn:
                stalls.append(float(answer["longest_stall_s"]))
        kills = sum(guest.live_quota.oom_kills_total for guest in agent.balancer.guests.values())
        dry = agent.balancer.guests["a"].dry_total
    if not dry:
        raise AgentError("the workload never ran dry: the bursts measured nothing")
    return [
        Figure(
            name="burst_longest_stall_median",
            value=statistics.median(stalls) * 1000,
            unit="ms",
            reach=Reach("at most", 5.0),
            detail={"longest_stall_s": stalls, "bytes": burst, "dry_events": dry},
        ),
        Figure(
            name="burst_oom_kills",
            value=kills,
            unit="processes",
            reach=Reach("at most", 0),
            detail={"bursts": scale.bursts + 1},
        ),
    ]


@asynccontextmanager
async def _burst_host(
    quota: int, assigned: int, *, reserve_bytes: int
) -> AsyncIterator[tuple[Agent, WorkloadClient]]:
    """A guest with the demonstration's workload, and nothing free but the host reserve."""
    pool = quota + reserve_bytes
    async with private_agent("bench", pool_bytes=pool, reserve_bytes=reserve_bytes) as agent:
        await launch(agent, "a", assigned, startup=quota, command=())
        await set_quota(agent, "a", quota)
        workload = WorkloadClient(agent.places.disk_dir("a") / WORKLOAD_SOCKET)
        with trio.fail_after(TURN_DEADLINE_S):
            while True:
                try:
                    await workload.stats()
                    break
                except WorkloadError:
                    await trio.sleep(REST_S)
        yield agent, workload
