"""How long a mock VM takes to be ready, side by side with `docker run` of the same image.

    PYTHONPATH=. python tests/containers/reach.py [--rounds N] [--at-once N]

Ready is: container started, driver connected, quota in force. `docker run` counts until the first
output of its command. Both are measured in turn, in one run, on one engine; what counts is the
ratio. It starts an engine of its own where none runs.
"""

import argparse
import os
import secrets
import statistics
import subprocess
import time
from typing import Any

import trio
from docker_rig import DockerRig, make_small_image
from engine import Engine, engine_for_tests, tool

from host_agent.agent import Agent
from host_agent.quota.base import Part
from protocol.units import MIB

WRITES = 2000


def first_output_s(engine: Engine, image: str) -> float:
    """`docker run` of a command that prints, until it has printed."""
    start_s = time.monotonic()
    with subprocess.Popen(
        [tool("docker"), "run", "--rm", "--network=none", image, "sh", "-c", "echo; sleep 0.1"],
        stdout=subprocess.PIPE,
        env=engine.client_environment(),
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        taken_s = time.monotonic() - start_s
        child.communicate()
    return taken_s


async def all_runs_s(engine: Engine, image: str, count: int) -> float:
    """So many at once, until the last has printed."""
    taken: list[float] = []

    async def one() -> None:
        taken.append(await trio.to_thread.run_sync(first_output_s, engine, image))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return max(taken)


async def all_launches_s(rig: DockerRig, agent: Agent, count: int) -> float:
    """So many at once, until the last is ready; then they are stopped."""
    names = [f"vm{number}" for number in range(count)]
    start_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(agent.launch, rig.vm(name, 48))
    taken_s = trio.current_time() - start_s
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(agent.stop, name)
    return taken_s


async def measure(rig: DockerRig, rounds: int, at_once: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with rig.agent(pool_mib=2048) as agent:
        for count in (1, at_once):
            await all_launches_s(rig, agent, 1)  # warm
            pairs = [
                (
                    await all_runs_s(rig.engine, rig.image, count),
                    await all_launches_s(rig, agent, count),
                )
                for _ in range(rounds)
            ]
            runs, launches = zip(*pairs, strict=True)
            found[f"docker run, {count} at once, ms"] = 1000 * statistics.median(runs)
            found[f"mock VM ready, {count} at once, ms"] = 1000 * statistics.median(launches)
            ratios = [launch / run for run, launch in pairs]
            found[f"ratio, {count} at once (median)"] = statistics.median(ratios)
        await agent.launch(rig.vm("vm", 48))
        quota = agent.balancer.guests["vm"].live_quota
        start_s = time.perf_counter()
        for _ in range(WRITES):
            quota.raise_quota(48 * MIB)
        found["limit change, us"] = 1e6 * (time.perf_counter() - start_s) / WRITES
        assert quota.processes(Part.WORKLOAD)
        await agent.stop("vm")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=10)
    given = parser.parse_args()
    name = f"mbreach-{secrets.token_hex(3)}"
    with engine_for_tests(f"{name}-docker") as engine:
        os.environ["DOCKER_HOST"] = engine.url
        make_small_image(engine, f"{name}-small")
        rig = DockerRig(name, engine, f"{name}-small")
        try:
            found = trio.run(measure, rig, given.rounds, given.at_once)
        finally:
            rig.take_down()
            engine.run("image", "rm", "--force", f"{name}-small", check=False)
    for what, figure in found.items():
        print(f"{what:34} {figure:8.2f}")


if __name__ == "__main__":
    main()
