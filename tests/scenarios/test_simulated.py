"""The same scenario on real mock VMs and in the simulator: the same order of events, and quotas
within TOLERANCE_MIB of each other wherever they have settled.

Three VMs of 200 MiB share 420 MiB. One grows beyond its quota, then a second, then the third, for
which there is not enough any more; then the first one needs little. What the real workloads use
besides what they are told to, and how long each act takes, goes into the simulated scenario: both
are the machine's, and not the policy's. An act ends when everything has settled: how high a driver
estimates a demand that is growing depends on when it looks, and is forgotten only in seconds.
"""

import csv
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from scenario_rig import LOOK_S, PATIENCE_S, Rig, appetite, spec, touched, until, workload

from host_agent.agent import Agent
from host_agent.balance import LONGEST_REFUSAL_PAUSE_S
from host_agent.policy_settings import make_policy
from host_agent.simulator.engine import Engine
from host_agent.simulator.guests import SECOND_US
from host_agent.simulator.library import load_scenario
from host_agent.simulator.scenario import Scenario
from host_agent.simulator.traces import needs_of
from host_agent.workload_client import WorkloadClient
from protocol.units import MIB, bytes_of

pytestmark = pytest.mark.effects

NAMES: Final = ("a", "b", "c")
SIZE_MIB: Final = 200
POOL_MIB: Final = 450
RESERVE_MIB: Final = 30
ACTS: Final = ((40, 40, 40), (150, 40, 40), (150, 140, 40), (150, 140, 100), (40, 140, 100))
"""Anonymous memory that each of them wants, act by act, in MiB."""

TOLERANCE_MIB: Final = 12
"""A twentieth of a VM: what is left of a demand that is being forgotten, and a refusal's margin."""

MOVED_MIB: Final = 12
"""A quota that has moved by more since its act began has risen or fallen. The least that one of
them has to is 13; without that they move by up to 5, and by what was left to forget and to plan."""

PLAYS: Final = 3

STEADY_S: Final = 1.5
STEADY_MIB: Final = 3
STEADY_DEMAND_MIB: Final = 0.5
"""A demand halves every 5 s (guest_driver/demand.py): less than 3 MiB of it are left to forget."""

SETTLES_S: Final = 3 * PATIENCE_S
"""110 MiB less of demand are forgotten in 22 s."""

Event = tuple[str, str]


@dataclass
class Course:
    """What happened: events by act in their order, and the quotas at the end of each, in MiB."""

    events: list[list[Event]] = field(default_factory=list)
    quotas: list[dict[str, float]] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    _begin: dict[str, float] = field(default_factory=dict)
    _dry: dict[str, int] = field(default_factory=dict)

    def act(self, now_s: float, quotas: Mapping[str, float], dry: Mapping[str, int]) -> None:
        self.events.append([])
        self.starts_s.append(now_s)
        self._begin, self._dry = dict(quotas), dict(dry)

    def see(self, quotas: Mapping[str, float], dry: Mapping[str, int]) -> None:
        """Note what is new since the act began, once."""
        for name in NAMES:
            moved = quotas[name] - self._begin[name]
            for kind, happened in (
                ("runs dry", dry[name] > self._dry[name]),
                ("gets", moved > MOVED_MIB),
                ("gives", moved < -MOVED_MIB),
            ):
                if happened and (kind, name) not in self.events[-1]:
                    self.events[-1].append((kind, name))

    def order(self) -> list[list[tuple[str, list[str]]]]:
        """By act: who did what in which order; who did the same one after the other, as a group."""
        return [
            [(kind, sorted(name for _, name in group)) for kind, group in groupby(act, _kind)]
            for act in self.events
        ]


def _kind(event: Event) -> str:
    return event[0]


# On real mock VMs


def real_state(agent: Agent) -> tuple[dict[str, float], dict[str, int]]:
    quotas = {vm.name: vm.quota_bytes / MIB for vm in agent.vms()}
    return quotas, {name: agent.balancer.guests[name].dry_total for name in NAMES}


def real_demands(agent: Agent) -> dict[str, float]:
    vitals = {name: agent.balancer.guests[name].vitals for name in NAMES}
    return {name: (said.demand_bytes or 0) / MIB if said else 0.0 for name, said in vitals.items()}


def real_targets(agent: Agent) -> dict[str, float]:
    guests = agent.balancer.guests
    return {name: bytes_of(guests[name].target_pages or 0) / MIB for name in NAMES}


async def until_settled(agent: Agent, course: Course) -> None:
    """Until no quota and no demand has moved for a while; what happens meanwhile is noted."""
    before = demands = dict.fromkeys(NAMES, 0.0)
    since_s = trio.current_time()
    enough_s = STEADY_S
    with trio.fail_after(SETTLES_S):
        while trio.current_time() - since_s < enough_s:
            await trio.sleep(LOOK_S)
            quotas, dry = real_state(agent)
            course.see(quotas, dry)
            now = real_demands(agent)
            if moved(before, quotas, STEADY_MIB) or moved(demands, now, STEADY_DEMAND_MIB):
                before, demands, since_s = quotas, now, trio.current_time()
            # Who has refused is asked again only after a pause.
            on_target = not moved(quotas, real_targets(agent), STEADY_MIB)
            enough_s = STEADY_S if on_target else STEADY_S + LONGEST_REFUSAL_PAUSE_S


def moved(before: Mapping[str, float], now: Mapping[str, float], most_mib: float) -> bool:
    return any(abs(now[name] - before[name]) > most_mib for name in NAMES)


async def play_for_real(agent: Agent, course: Course) -> float:
    """All acts. Returns what a workload uses besides what it was told to, in MiB."""
    for name in NAMES:
        await agent.launch(spec(name, SIZE_MIB, reservation_bytes=40 * MIB))
    began_s = trio.current_time()
    clients = {name: workload(agent, name) for name in NAMES}
    besides_mib = 0.0
    for number, wanted in enumerate(ACTS):
        course.act(trio.current_time() - began_s, *real_state(agent))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_settled, agent, course)
            for name, anon_mib in zip(NAMES, wanted, strict=True):
                if not number or anon_mib != ACTS[number - 1][NAMES.index(name)]:
                    await appetite(clients[name], anon_mib)
                    await touched(clients[name], anon_mib)
        course.quotas.append(real_state(agent)[0])
        if not number:
            usage = [vm.usage_bytes for vm in agent.vms()]
            assert None not in usage
            besides_mib = sum(size or 0 for size in usage) / MIB / len(NAMES) - wanted[0]
    course.starts_s.append(trio.current_time() - began_s)
    return besides_mib


# In the simulator


def the_same_scenario(course: Course, besides_mib: float) -> Scenario:
    def trace(number: int) -> dict[str, Any]:
        levels = [act[number] + besides_mib for act in ACTS]
        starts_s = course.starts_s[: len(ACTS)]
        points = [(at_s, int(mib * MIB)) for at_s, mib in zip(starts_s, levels, strict=True)]
        return {"kind": "steps", "points": points}

    guest = {"memory": SIZE_MIB * MIB, "reservation": 40 * MIB, "cache_share": 0.0}
    return Scenario.model_validate(
        {
            "duration_s": course.starts_s[-1],
            "look_s": 0.2,
            "host": {"pool": POOL_MIB * MIB, "reserve": RESERVE_MIB * MIB, "interval_s": 0.25},
            "guest": [
                guest | {"name": name, "trace": trace(number)} for number, name in enumerate(NAMES)
            ],
        }
    )


def play_simulated(scenario: Scenario, starts_s: list[float]) -> Course:
    dry = dict.fromkeys(NAMES, 0)

    def count(now_us: int, event: str, fields: Mapping[str, Any]) -> None:
        if event == "dry":
            dry[fields["vm"]] += 1

    engine = Engine(scenario, needs_of(scenario, 0, {}), make_policy("shares", {}), log=count)
    course = Course()
    engine.begin()
    for start_s, end_s in pairwise(starts_s):
        course.act(start_s, simulated_quotas(engine), dry)
        while engine.next_us is not None and engine.next_us < end_s * SECOND_US:
            engine.step()
            course.see(simulated_quotas(engine), dry)
        course.quotas.append(simulated_quotas(engine))
    return course


def simulated_quotas(engine: Engine) -> dict[str, float]:
    return dict(zip(NAMES, (engine.books.quota / 256).tolist(), strict=True))


def differences(simulated: Course, real: Course) -> list[str]:
    # In the first act real VMs start one after the other, simulated ones at once.
    told, happened = simulated.order()[1:], real.order()[1:]
    found = [] if told == happened else [f"simulated: {told}, real: {happened}"]
    for act, (ours, theirs) in enumerate(zip(simulated.quotas, real.quotas, strict=True)):
        found += [
            f"act {act}, {name}: simulated {ours[name]:.0f} MiB, real {theirs[name]:.0f} MiB"
            for name in NAMES
            if abs(ours[name] - theirs[name]) > TOLERANCE_MIB
        ]
    return found


def test_the_simulator_tells_what_real_vms_do(rig: Rig) -> None:
    """One of PLAYS plays: a machine that is busy with something else delays real VMs alone."""
    found: list[list[str]] = []

    async def scenario() -> None:
        real = Course()
        async with rig.agent(pool_mib=POOL_MIB, reserve_mib=RESERVE_MIB) as agent:
            besides_mib = await play_for_real(agent, real)
            assert agent.oom_kills == 0
        simulated = play_simulated(the_same_scenario(real, besides_mib), real.starts_s)
        found.append(differences(simulated, real))

    while len(found) < PLAYS and not (found and not found[-1]):
        rig.play(scenario, deadline_s=len(ACTS) * SETTLES_S)
    assert found[-1] == [], found


def test_a_real_run_is_recorded_and_played(rig: Rig, tmp_path: Path) -> None:
    """`balloon record` beside a real agent, and a scenario that plays what it wrote."""
    path = tmp_path / "run.csv"
    agent = rig.agent_process(pool_mib=300, reserve_mib=20)
    with rig.client() as client:
        client.launch(spec("a", 160, reservation_bytes=40 * MIB))
        client.launch(spec("b", 128, reservation_bytes=40 * MIB))
        recording = rig.balloon(
            "record", str(path), "--interval-s", "0.1", "--run-dir", str(rig.run_dir)
        )

        def used_mib() -> list[float]:
            """What was recorded of a, so far."""
            if not path.exists():
                return []
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            return [int(row["usage_bytes"] or 0) / MIB for row in rows if row["vm"] == "a"]

        async def grow() -> None:
            await until(used_mib, "the recording to begin")
            await appetite(WorkloadClient(rig.state_dir / "disks" / "a" / "workload.sock"), 70)
            await until(lambda: max(used_mib()) > 70, "the growth in the recording")

        trio.run(grow)
        for name in ("a", "b"):
            client.stop(name)
    for child in (recording, agent):
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=PATIENCE_S)
        if child is recording:
            assert (child.returncode, f"{path}: " in out) == (0, True)
    toml = tmp_path / "again.toml"
    toml.write_text(
        'duration_s = 5.0\nlook_s = 0.1\n[host]\npool = "300MiB"\nreserve = "20MiB"\n'
        '[[guest]]\nname = "a"\nmemory = "160MiB"\nreservation = "40MiB"\n'
        'trace = { kind = "recorded", file = "run.csv", vm = "a", repeat = false }\n'
    )
    loaded = load_scenario(str(toml))
    needs = needs_of(loaded.scenario, 0, loaded.recordings)
    assert needs.min() < 40 * 256
    assert needs.max() >= 70 * 256
    run = Engine(loaded.scenario, needs, make_policy("shares", {})).run()
    assert run.totals.need_page_us > 0
