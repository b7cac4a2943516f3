"""What takes minutes: the whole demonstration, the whole bench, and a long unruly day."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import trio
from scenario_rig import BALLOON, Rig, appetite, spec, until, workload

from host_agent.facade.port import VmChange
from host_agent.workload_client import WorkloadError
from protocol.units import MIB

pytestmark = [pytest.mark.effects, pytest.mark.soak]

DAY_S = 180.0
VMS = 5


def run_balloon(*arguments: str, timeout_s: float) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", BALLOON, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    print(done.stdout)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_the_whole_demonstration_holds() -> None:
    found = run_balloon("demo", "--json", timeout_s=300)
    assert found["failures"] == []
    assert found["holds"] is True
    assert int(str(found["peak_memory_bytes"])) <= 2048 * MIB


def test_the_whole_bench_kills_nobody() -> None:
    """Speed is for a quiet machine to show; what is not speed has to hold on any."""
    found = run_balloon("bench", "--json", timeout_s=900)
    figures = found["figures"]
    assert isinstance(figures, list)
    holds = {figure["name"]: figure["holds"] for figure in figures}
    assert holds["burst_oom_kills"]
    assert holds["guest_side_memory"]


def test_an_unruly_day(rig: Rig) -> None:
    """Appetites, pins, shares and deaths at random: the limits hold, nobody is killed."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    dice = random.Random(seed)

    async def scenario() -> None:
        async with (
            rig.agent(pool_mib=560, reserve_mib=40) as agent,
            rig.watched(agent, 160) as watch,
        ):
            names = [f"vm{number}" for number in range(VMS)]
            for name in names:
                await agent.launch(spec(name, 160, reservation_bytes=80 * MIB))
            deeds = 0
            ends_s = trio.current_time() + DAY_S
            while trio.current_time() < ends_s:
                name = dice.choice(names)
                match dice.choice(["eat", "eat", "eat", "pin", "free", "shares", "death"]):
                    case "eat":
                        with contextlib.suppress(WorkloadError):
                            await appetite(
                                workload(agent, name), dice.randrange(60), dice.randrange(80)
                            )
                    case "pin":
                        quota = dice.randrange(80, 100) * MIB
                        await agent.change(name, VmChange(quota_bytes=quota))
                    case "free":
                        await agent.change(name, VmChange(automatic=True))
                    case "shares":
                        await agent.change(name, VmChange(shares=dice.choice([500, 1000, 2000])))
                    case "death":
                        with contextlib.suppress(LookupError, ProcessLookupError):
                            program = dice.choice(["driver", "balloon"])
                            os.kill(rig.pid_of(name, program), signal.SIGKILL)
                deeds += 1
                agent.ledger.check()
                await trio.sleep(dice.random())
            for name in names:
                await agent.change(name, VmChange(automatic=True))
            await until(lambda: all(vm.connected for vm in agent.vms()), "all drivers")
            await until(
                lambda: agent.host().reserve_left_bytes == 40 * MIB, "the reserve", deadline_s=60
            )
            assert deeds > DAY_S / 2
            assert agent.oom_kills == 0
            assert watch.samples > 1000

    rig.play(scenario, deadline_s=DAY_S + 120)
