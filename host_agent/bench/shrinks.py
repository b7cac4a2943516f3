"""Shrinks of a guest that has the room and allocates at full speed meanwhile, phase by phase."""

import contextlib
import statistics
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Final

import trio

from host_agent.agent import Agent
from host_agent.bench.figures import Figure, Reach
from host_agent.bench.yardstick import Yardstick
from host_agent.private_agent import private_agent
from host_agent.quota.base import Part, VmQuota
from host_agent.quota.phases import ShrinkPhases
from protocol.units import MIB

ALLOCATOR: Final = Path(__file__).with_name("allocator.py")
QUOTA_BYTES: Final = 256 * MIB
SHRUNK_BYTES: Final = 160 * MIB
USED_BYTES: Final = 64 * MIB
OVERHEAD_BYTES: Final = 16 * MIB

MOST_MS: Final = 20.0
"""Version 2 on an emulated processor takes half of that; settling alone would be ten times it."""


async def shrink_figures(shrinks: int) -> list[Figure]:
    """How long a shrink takes, and for how long it stops the guest: medians."""
    taken: list[ShrinkPhases] = []
    stalls_s: list[float] = []
    async with (
        private_agent("bench", pool_bytes=64 * MIB, reserve_bytes=0) as agent,
        _guest(agent) as (quota, allocator),
    ):
        for turn in range(shrinks + 1):
            quota.raise_workload(QUOTA_BYTES)
            await allocator.turn()  # what it noticed so far is not the shrink's
            phases = await trio.to_thread.run_sync(quota.make_room, SHRUNK_BYTES)
            stalled_s = await allocator.turn()
            if turn:
                taken.append(phases)
                stalls_s.append(stalled_s)
        kills = quota.oom_kills_total
    return [
        Figure(
            name="shrink_median",
            value=statistics.median(phases.total_s for phases in taken) * 1000,
            unit=f"ms ({breakdown(taken)})",
            reach=Reach("at most", MOST_MS),
            detail={"phases_s": [asdict(phases) for phases in taken], "oom_kills": kills},
        ),
        Figure(
            name="shrink_longest_stall_median",
            value=statistics.median(stalls_s) * 1000,
            unit="ms",
            reach=Reach("at most", MOST_MS),
            detail={"longest_stall_s": stalls_s, "bytes": QUOTA_BYTES - SHRUNK_BYTES},
        ),
    ]


def breakdown(taken: list[ShrinkPhases]) -> str:
    """The phases that took any time, in order, with their medians in milliseconds."""
    medians = (
        (field.name, statistics.median(getattr(phases, field.name) for phases in taken))
        for field in fields(ShrinkPhases)
        if field.name != "frozen_s"
    )
    return ", ".join(
        f"{name.removesuffix('_s')} {median_s * 1000:.2f}" for name, median_s in medians if median_s
    )


@contextlib.asynccontextmanager
async def _guest(agent: Agent) -> AsyncIterator[tuple[VmQuota, Yardstick]]:
    """A workload under a quota of its own: no driver, no ledger, just the kernel's limit.

    It is below the agent's root, where the watchdog finds it if this process is killed.
    """
    quota = await trio.to_thread.run_sync(
        agent.quotas.create, "shrink", QUOTA_BYTES, OVERHEAD_BYTES
    )
    try:
        await trio.to_thread.run_sync(quota.arm_dry_events)
        procs = quota.procs_path(Part.WORKLOAD)
        command = [sys.executable, str(ALLOCATOR), str(procs), str(USED_BYTES)]
        process = await trio.lowlevel.open_process(command, stdin=PIPE, stdout=PIPE)
        try:
            allocator = Yardstick(process)
            await allocator.line()
            yield quota, allocator
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(partial(_take_down, quota))


def _take_down(quota: VmQuota) -> None:
    quota.kill_all()
    quota.remove()
