"""An agent with numbers in a dictionary, behind the real facade on a real socket."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from host_agent.errors import (
    AgentError,
    BadRequest,
    NoSuchReservation,
    NoSuchVm,
    NotEnoughMemory,
    VmExists,
)
from host_agent.facade.control import build_app
from host_agent.facade.port import AgentPort, ClientRequest, VmChange, VmSpec
from host_agent.facade.server import serve
from host_agent.facade.views import (
    DecisionView,
    HostView,
    PolicyFaultView,
    PolicyView,
    ReservationView,
    TransferView,
    VitalsView,
    VmState,
    VmView,
)
from protocol.units import MIB


class NumbersAgent:
    """Keeps the contract of AgentPort, without any memory."""

    def __init__(self, pool_bytes: int = 512 * MIB) -> None:
        self.pool_bytes = pool_bytes
        self.views: dict[str, VmView] = {}
        self.specs: dict[str, VmSpec] = {}
        self.changes: list[tuple[str, VmChange]] = []
        self.hold: trio.Event | None = None
        self.held = threading.Event()
        self.cancelled = threading.Event()
        self.defect: Exception | None = None
        self.policy_name = "shares"
        self.fault: PolicyFaultView | None = None
        self.explained: list[DecisionView] = []
        self.reserved: dict[str, ReservationView] = {}
        self.stuck: dict[str, AgentError] = {}
        """VMs that can't be stopped, and what is said of them."""

    async def launch(self, spec: VmSpec) -> VmView:
        await self._held_up()
        if self.defect is not None:
            raise self.defect
        if spec.name in self.views:
            raise VmExists(spec.name)
        missing_bytes = spec.reservation_bytes - self.host().free_bytes
        if missing_bytes > 0:
            raise NotEnoughMemory(missing_bytes, sorted(self.views))
        quota_bytes = min(spec.startup_bytes, self.host().free_bytes)
        self.specs[spec.name] = spec
        self.views[spec.name] = VmView(
            name=spec.name,
            state=VmState.RUNNING,
            backend="numbers",
            assigned_bytes=spec.assigned_bytes,
            reservation_bytes=spec.reservation_bytes,
            shares=spec.shares,
            quota_bytes=quota_bytes,
            balloon_actual_bytes=spec.assigned_bytes - quota_bytes,
            balloon_target_bytes=spec.assigned_bytes - quota_bytes,
            lent_bytes=0,
            overhead_bytes=20 * MIB,
            oom_kills=0,
            connected=True,
        )
        return self.views[spec.name]

    async def stop(self, name: str) -> None:
        view = self.vm(name)
        if name in self.stuck:
            raise self.stuck[name]
        del self.views[view.name]

    async def change(self, name: str, change: VmChange) -> VmView:
        view = self.vm(name)
        self.changes.append((name, change))
        target_bytes = change.target_bytes
        if change.quota_bytes is not None:
            target_bytes = view.assigned_bytes - change.quota_bytes
        if target_bytes is not None and target_bytes > view.assigned_bytes - view.reservation_bytes:
            raise BadRequest(f"{name}: the reservation is in the way")
        update = {
            "balloon_target_bytes": target_bytes,
            "pinned": None if target_bytes is None else True,
            "shares": change.shares,
            "reservation_bytes": change.reservation_bytes,
        }
        if change.automatic:
            update["pinned"] = False
        kept = {key: value for key, value in update.items() if value is not None}
        self.views[name] = view.model_copy(update=kept)
        return self.views[name]

    def vms(self) -> list[VmView]:
        return [self.views[name] for name in sorted(self.views)]

    def vm(self, name: str) -> VmView:
        if name not in self.views:
            raise NoSuchVm(name)
        return self.views[name]

    def host(self) -> HostView:
        quotas_bytes = sum(view.quota_bytes for view in self.views.values())
        assigned_bytes = sum(view.assigned_bytes for view in self.views.values())
        return HostView(
            pool_bytes=self.pool_bytes,
            reserve_bytes=16 * MIB,
            reserve_left_bytes=16 * MIB,
            free_bytes=self.pool_bytes - 16 * MIB - quotas_bytes,
            quotas_bytes=quotas_bytes,
            overdrawn_bytes=0,
            assigned_bytes=assigned_bytes,
            overcommit_ratio=assigned_bytes / self.pool_bytes,
            policy=self.policy_name,
            policy_fault=self.fault,
            shortage=False,
            shortage_bytes=0,
            oom_kills=0,
            moves_total=0,
            version="0",
            cgroup_version=1,
            uptime_s=1.5,
        )

    def vitals(self, name: str) -> VitalsView | None:
        self.vm(name)
        return None if name == "mute" else VitalsView(age_s=0.5, usage_bytes=3 * MIB)

    async def decisions(self, name: str) -> list[DecisionView]:
        self.vm(name)
        return self.explained

    def policy(self) -> PolicyView:
        return PolicyView(
            name=self.policy_name,
            source="a test",
            settings={"step": "2MiB"},
            configured="shares",
            known=("other", "shares"),
            fault=self.fault,
        )

    def reservations(self) -> list[ReservationView]:
        return list(self.reserved.values())

    async def login(self, client: str) -> list[ReservationView]:
        purged = [one for one in self.reservations() if one.client == client]
        for one in purged:
            del self.reserved[one.id]
        return purged

    async def reserve(self, request: ClientRequest) -> ReservationView:
        await self._held_up()
        missing_bytes = request.size_bytes - self.host().free_bytes
        if missing_bytes > 0:
            raise NotEnoughMemory(missing_bytes, sorted(self.views))
        name = f"r{len(self.reserved)}"
        self.reserved[name] = ReservationView(
            id=name, client=request.client, size_bytes=request.size_bytes, missing_bytes=0
        )
        return self.reserved[name]

    async def _held_up(self) -> None:
        if self.hold is not None:
            self.held.set()
            try:
                await self.hold.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise

    async def transfer(self, reservation_id: str, vm: str) -> TransferView:
        if reservation_id not in self.reserved:
            raise NoSuchReservation(f"no reservation {reservation_id!r}")
        one = self.reserved[reservation_id]
        if vm in self.views:
            await self.release(reservation_id)
            return TransferView(given_bytes=one.size_bytes, kept=None)
        moved = self.reserved[reservation_id] = one.model_copy(update={"vm": vm})
        return TransferView(given_bytes=0, kept=moved)

    async def release(self, reservation_id: str) -> None:
        if self.reserved.pop(reservation_id, None) is None:
            raise NoSuchReservation(f"no reservation {reservation_id!r}")

    async def use_policy(self, name: str) -> PolicyView:
        if name not in self.policy().known:
            raise BadRequest(f"unknown policy {name!r}")
        self.policy_name = name
        return self.policy()


def spec(name: str = "web1", assigned_mib: int = 160, **rest: object) -> VmSpec:
    return VmSpec.model_validate({"name": name, "assigned_bytes": assigned_mib * MIB, **rest})


@dataclass(frozen=True)
class Served:
    """The loop that serves, seen from another thread."""

    token: trio.lowlevel.TrioToken
    scope: trio.CancelScope

    def soon(self, call: Callable[[], object]) -> None:
        with suppress(trio.RunFinishedError):
            self.token.run_sync_soon(call)

    def stop(self) -> None:
        self.soon(self.scope.cancel)


@contextmanager
def served(agent: AgentPort, socket_path: Path) -> Iterator[Served]:
    """`agent` at `socket_path`, on a loop in a thread of its own."""
    ready = threading.Event()
    ended: list[BaseException] = []
    loops: list[Served] = []

    async def main() -> None:
        loops.append(Served(trio.lowlevel.current_trio_token(), trio.CancelScope()))
        with loops[0].scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve, build_app(agent), socket_path))
                ready.set()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            ended.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(20)
        if ended:
            raise _alone(ended[0])
        yield loops[0]
    finally:
        if loops:
            loops[0].stop()
        thread.join(20)
        assert not thread.is_alive()
    assert not ended


def _alone(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
