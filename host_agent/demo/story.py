"""The demonstration itself: ten VMs that are promised more than there is, in four acts.

It starts an agent of its own, with directories and a cgroup of its own, and speaks to it as an
operator would. Everything is removed at the end, however it ends.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import trio

from host_agent.agent import Agent
from host_agent.demo.outcome import Act, Outcome, Stall, mib, unfair
from host_agent.demo.scenario import Appetite, Scenario
from host_agent.demo.watch import LimitWatch, peak_memory_bytes
from host_agent.errors import AgentError
from host_agent.facade.port import VmSpec
from host_agent.facade.views import VmView
from host_agent.guest import overhead_of
from host_agent.guest_command import WORKLOAD_SOCKET
from host_agent.moves import Move
from host_agent.private_agent import private_agent
from host_agent.workload_client import WorkloadClient, WorkloadError
from protocol.units import MIB

LOOK_S: Final = 0.05
STEADY_S: Final = 1.5
"""An act has ended when nothing has moved for so long."""

STEADY_BYTES: Final = 3 * MIB
"""A quota this near to its target has arrived: the policy leaves smaller differences alone."""

NEWCOMER_DEADLINE_S: Final = 30.0

Progress = Callable[[str], None]


class ActFailed(Exception):
    """An act did not come to its end; the message says what was waited for."""


class Story:
    """One play on a running agent."""

    def __init__(self, scenario: Scenario, agent: Agent, progress: Progress) -> None:
        self._scenario = scenario
        self._agent = agent
        self._progress = progress
        self._workloads: dict[str, WorkloadClient] = {}
        self._moves_seen = 0

    async def play(self, outcome: Outcome) -> None:
        """All acts, in order; each is added to `outcome` as it ends."""
        for act in (self._start, self._one_grows, self._newcomer, self._crowd, self._calm):
            outcome.acts.append(await act())

    # The acts

    async def _start(self) -> Act:
        plan = self._scenario
        asked = (
            f"{plan.vms} VMs of {mib(plan.assigned_bytes)} each on "
            f"{mib(plan.pool_bytes)}, each using about {mib(plan.calm.total_bytes)}"
        )
        return await self._act(
            "0. Ten VMs start" if plan.vms == 10 else "0. The VMs start", asked, self._launch_all
        )

    async def _launch_all(self) -> str:
        async with trio.open_nursery() as nursery:
            for number in range(1, self._scenario.vms + 1):
                nursery.start_soon(self._launch, number)
        await self._until_steady()
        quotas = [vm.quota_bytes for vm in self._agent.vms()]
        return f"quotas from {mib(min(quotas))} to {mib(max(quotas))}"

    async def _one_grows(self) -> Act:
        name, grown = self._name(1), self._scenario.grown
        asked = f"{name} grows from {mib(self._scenario.calm.total_bytes)} to "
        asked += mib(grown.total_bytes)

        async def play() -> str:
            before = self._agent.vm(name).quota_bytes
            await self._set(name, grown)
            await self._until(
                lambda: self._agent.vm(name).quota_bytes >= grown.total_bytes,
                f"{name} to get {mib(grown.total_bytes)}",
            )
            await self._until_touched(name, grown)
            await self._until_steady()
            after = self._agent.vm(name).quota_bytes
            return f"its quota went from {mib(before)} to {mib(after)}"

        return await self._act("a. One VM grows", asked, play)

    async def _newcomer(self) -> Act:
        number = self._scenario.vms + 1
        name = self._name(number)

        async def play() -> str:
            began_s = trio.current_time()
            await self._launch(number)
            ready_s = trio.current_time() - began_s
            await self._until_steady()
            quota = self._agent.vm(name).quota_bytes
            return f"{name} ran {ready_s * 1000:.0f} ms later, with {mib(quota)}"

        asked = f"an eleventh VM of {mib(self._scenario.assigned_bytes)}"
        if number != 11:
            asked = f"one more VM of {mib(self._scenario.assigned_bytes)}"
        return await self._act("b. One more VM", asked, play)

    async def _crowd(self) -> Act:
        crowded = self._scenario.crowded
        names = [vm.name for vm in self._agent.vms()]
        wanted = len(names) * crowded.total_bytes
        asked = (
            f"all {len(names)} want {mib(crowded.total_bytes)} at once: "
            f"{mib(wanted)} of {mib(self._scenario.pool_bytes)}"
        )
        failures: list[str] = []

        async def play() -> str:
            for name in names:
                await self._set(name, crowded)
            await self._until(lambda: self._agent.host().shortage, "the shortage to be said")
            await self._until_steady()
            await self._until_fair()
            shortage = self._agent.host().shortage_bytes
            if not shortage:
                failures.append("the shortage was not said any more when all had settled")
            failures.extend(unfair(self._agent.vms(), STEADY_BYTES))
            there_is = self._scenario.pool_bytes - self._scenario.reserve_bytes
            return (
                f"{self._quotas_by_shares()}; {mib(wanted - there_is)} less than was asked for, "
                f"{mib(shortage)} less than the guests' own estimates: shares and reservations "
                f"decided"
            )

        return await self._act("c. Everybody wants more at once", asked, play, failures)

    async def _calm(self) -> Act:
        calm = self._scenario.calm
        asked = f"all go back to {mib(calm.total_bytes)}"

        async def play() -> str:
            for vm in self._agent.vms():
                await self._set(vm.name, calm)
            await self._until(lambda: not self._agent.host().shortage, "the shortage to end")
            await self._until_steady()
            return f"no shortage any more; {self._quotas_by_shares()}"

        return await self._act("d. Calm returns", asked, play)

    # What the acts are made of

    async def _act(
        self,
        title: str,
        asked: str,
        play: Callable[[], Awaitable[str]],
        failures: list[str] | None = None,
    ) -> Act:
        self._progress(f"{title}: {asked}")
        failed = [] if failures is None else failures
        began_s = trio.current_time()
        given = "nothing that can be told"
        try:
            given = await play()
        except (ActFailed, AgentError) as error:
            failed.append(str(error))
        for vm in self._agent.vms():
            if vm.quota_bytes < vm.reservation_bytes:
                failed.append(f"{vm.name} has less than its reservation")
        return Act(
            title=title,
            asked=asked,
            given=given,
            seconds=trio.current_time() - began_s,
            moves=self._new_moves(),
            stall=await self._longest_stall(),
            failures=tuple(failed),
        )

    def _new_moves(self) -> tuple[Move, ...]:
        book = self._agent.balancer.moves
        new = book.moves_total - self._moves_seen
        self._moves_seen = book.moves_total
        return book.moves[len(book.moves) - new :] if new else ()

    async def _launch(self, number: int) -> None:
        plan, name = self._scenario, self._name(number)
        spec = VmSpec(
            name=name,
            assigned_bytes=plan.assigned_bytes,
            reservation_bytes=plan.reservation_bytes,
            startup_bytes=plan.startup_bytes,
            shares=plan.shares_of(number),
        )
        await self._agent.launch(spec)
        path = self._agent.places.disk_dir(name) / WORKLOAD_SOCKET
        self._workloads[name] = WorkloadClient(path)
        await self._until(path.exists, f"the workload of {name} to listen")
        await self._set(name, plan.calm)
        await self._until_touched(name, plan.calm)

    async def _set(self, name: str, appetite: Appetite) -> None:
        await self._workloads[name].set(
            anon_bytes=appetite.anon_bytes, cache_bytes=appetite.cache_bytes, timeout_s=30.0
        )

    async def _until_touched(self, name: str, appetite: Appetite) -> None:
        """Until the anonymous set has really been touched; the cache comes as it can."""
        deadline_s = trio.current_time() + self._scenario.step_deadline_s
        while trio.current_time() < deadline_s:
            stats = await self._workloads[name].stats(timeout_s=30.0)
            if stats["anon"]["touched_bytes"] >= appetite.anon_bytes and (
                stats["cache"]["ready_bytes"] >= appetite.cache_bytes
            ):
                return
            await trio.sleep(LOOK_S)
        raise ActFailed(f"{name} did not touch its {mib(appetite.total_bytes)} in time")

    async def _until(self, predicate: Callable[[], bool], what: str) -> None:
        with trio.move_on_after(self._scenario.step_deadline_s):
            while not predicate():
                await trio.sleep(LOOK_S)
            return
        raise ActFailed(f"waited in vain for {what}")

    async def _until_steady(self) -> None:
        """Until every quota has been where the plan wants it for `STEADY_S`."""
        steady_since_s = trio.current_time()
        deadline_s = steady_since_s + self._scenario.step_deadline_s
        before: dict[str, int] = {}
        while trio.current_time() - steady_since_s < STEADY_S:
            if trio.current_time() > deadline_s:
                raise ActFailed("the quotas did not settle")
            vms = self._agent.vms()
            now = {vm.name: vm.quota_bytes for vm in vms}
            moved = any(
                abs(quota - before.get(name, 0)) > STEADY_BYTES for name, quota in now.items()
            )
            if moved or any(_is_off_target(vm) for vm in vms):
                steady_since_s = trio.current_time()
                before = now
            await trio.sleep(LOOK_S)

    async def _until_fair(self) -> None:
        """Until nobody has less than by its shares, or as long as a step may take.

        A guest that has just refused is asked again after a pause only, and a plan takes nothing
        from one that says it can spare nothing now: all may stand still before shares have told.
        """
        with contextlib.suppress(ActFailed):  # who has less is told by name
            await self._until(lambda: not unfair(self._agent.vms(), STEADY_BYTES), "fair quotas")

    async def _longest_stall(self) -> Stall | None:
        stalls = []
        for name, workload in self._workloads.items():
            with contextlib.suppress(WorkloadError):
                stats = await workload.stats(reset=True, timeout_s=30.0)
                for kind in ("anon", "cache"):
                    if stats[kind]["max_s"] is not None:
                        stalls.append(Stall(name, float(stats[kind]["max_s"]), kind))
        return max(stalls, key=lambda stall: stall.seconds, default=None)

    def _quotas_by_shares(self) -> str:
        by_shares: dict[int, list[int]] = {}
        for vm in self._agent.vms():
            by_shares.setdefault(vm.shares, []).append(vm.quota_bytes)
        return ", ".join(
            f"{mib(sum(quotas) // len(quotas))} for {shares} shares"
            for shares, quotas in sorted(by_shares.items(), reverse=True)
        )

    def _name(self, number: int) -> str:
        return f"vm{number:02d}"


def _is_off_target(vm: VmView) -> bool:
    target = vm.assigned_bytes - vm.balloon_target_bytes
    return abs(vm.quota_bytes - target) > STEADY_BYTES


@contextlib.asynccontextmanager
async def stage(scenario: Scenario) -> AsyncIterator[tuple[Agent, LimitWatch]]:
    """An agent for the play, and the eye on its limits."""
    sizes = {"pool_bytes": scenario.pool_bytes, "reserve_bytes": scenario.reserve_bytes}
    async with private_agent("demo", **sizes) as agent, trio.open_nursery() as nursery:
        watch = LimitWatch(agent.quotas.root, overhead_of(scenario.assigned_bytes))
        nursery.start_soon(watch.run)
        yield agent, watch
        nursery.cancel_scope.cancel()


async def play(
    scenario: Scenario,
    progress: Progress,
    on_stage: Callable[[Agent], Awaitable[None]] | None = None,
) -> Outcome:
    """The whole demonstration. `on_stage` runs beside it, with the agent, until it ends."""
    outcome = Outcome(scenario.pool_bytes, scenario.overcommit_ratio)
    began_s = trio.current_time()
    async with stage(scenario) as (agent, watch), trio.open_nursery() as nursery:
        if on_stage is not None:
            nursery.start_soon(on_stage, agent)
        try:
            await Story(scenario, agent, progress).play(outcome)
        finally:
            outcome.oom_kills = agent.oom_kills
            outcome.highest_sum_of_limits_bytes = watch.highest_bytes
            outcome.samples = watch.samples
            outcome.peak_memory_bytes = peak_memory_bytes(agent.quotas.root)
            outcome.seconds = trio.current_time() - began_s
        nursery.cancel_scope.cancel()
    return outcome
