"""The host agent: the one owner of the ledger, and what the operator talks to.

    events -> ledger -> snapshot -> policy's plan -> ordered (free first) -> cgroups

The sentence is carried out by the balancer (balance.py); sessions (intake/) bring the events, and
hosting.py gives each mock VM its life; inheritance.py finds the VMs that another agent left. Here
they are put together, and VMs are launched, changed and stopped. service.py runs it.
"""

import contextlib
import logging
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.blocking import Threads
from host_agent.choosing import choose, choose_in_thread
from host_agent.client_desk import ClientDesk
from host_agent.config import Config
from host_agent.errors import (
    AgentError,
    BadRequest,
    ConfigError,
    NoSuchVm,
    NotEnoughMemory,
    UserError,
    VmExists,
)
from host_agent.explaining import Explainer
from host_agent.facade.port import ClientRequest, VmChange, VmSpec
from host_agent.facade.views import (
    DecisionView,
    HostView,
    PolicyView,
    ReservationView,
    TransferView,
    VitalsView,
    VmView,
)
from host_agent.foreign import ForeignFault
from host_agent.guest import Guest, Phase
from host_agent.hosting import START_ERRORS, Hosting, Places, count_kills, protect
from host_agent.inheritance import Inheritance, state_of
from host_agent.ledger.ledger import Ledger, LedgerError
from host_agent.machines.base import Machine, MachineBackend, MachineError
from host_agent.policy.registry import PolicyError, policy_names
from host_agent.promises import changed_range, check_promise, pinned_pages
from host_agent.quota.base import QuotaBackend
from host_agent.quota.errors import QuotaError
from host_agent.state import StateError, save_state
from host_agent.views import fault_view, vitals_view, vm_view
from protocol.units import HUGE_PAGE_BYTES, bytes_of, pages_of

LOG = logging.getLogger("memballoon.agent")

MEMORY_DEADLINE_S: Final = 10.0
"""How long a launch waits for the others' balloons to give it what it needs to start."""

CONNECT_DEADLINE_S: Final = 30.0
"""A driver connects within 0.5 s; a box where many start at once takes longer."""

FLOOR_CHECK_S: Final = 0.1
"""How often a launch looks again whether its plan has changed."""


class Agent:
    """One host's agent; implements the control API's AgentPort. `running` gives a working one."""

    def __init__(
        self, config: Config, quotas: QuotaBackend, machines: Mapping[str, MachineBackend]
    ) -> None:
        """`machines` are the ways of running a mock VM, by the name that a spec chooses."""
        host = config.host
        try:
            self._chosen = choose(host.policy, config.policies)
        except PolicyError as error:
            raise ConfigError(f"[host]: policy: {error}") from None
        self._config = config
        self._quotas = quotas
        self.ledger = Ledger(pages_of(host.pool_bytes), pages_of(host.reserve_bytes))
        policy = self._chosen.policy
        self.balancer = Balancer(self.ledger, policy, host.interval_s)
        self.balancer.use(policy, in_thread=self._chosen.in_thread)
        self._explainer = Explainer()
        self._desk = ClientDesk(self.balancer, self._save)
        self._imports = trio.CapacityLimiter(1)
        self._changing = trio.Lock()
        self._threads = Threads()
        self._places = Places(host.run_dir, host.state_dir)
        self._hosting = Hosting(
            self.balancer,
            quotas,
            machines,
            self._threads,
            self._places,
            dry_patience_s=host.dry_patience_s,
        )
        self._inheritance = Inheritance(
            self.balancer, quotas, machines, self._threads, self._places
        )
        self._nursery: trio.Nursery | None = None
        self._started_s = 0.0
        self._saving = trio.Lock()
        self._knows_all = False
        """All VMs of the state file were taken over; before, it knows more than this agent."""

    @property
    def places(self) -> Places:
        """Where the files of the mock VMs are."""
        return self._places

    @property
    def quotas(self) -> QuotaBackend:
        """The limits of this agent's mock VMs."""
        return self._quotas

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; then stop every VM, or leave them running, as configured."""
        self._started_s = trio.current_time()
        # An agent that can't take over all VMs must leave all of them, and their state, alone.
        self._hosting.keep_running = True
        async with trio.open_nursery() as nursery:
            await self._inheritance.take_over(partial(nursery.start, self._host))
            self._hosting.keep_running = False
            self._knows_all = True
            try:
                self._nursery = nursery
                nursery.start_soon(self.balancer.run)
                nursery.start_soon(self._watch_kernel)
                await self._warm_up()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def keep_vms(self) -> None:
        """From now on the end of the agent is not the end of its VMs."""
        self._hosting.keep_running = True

    # Launching and stopping

    async def launch(self, spec: VmSpec) -> VmView:
        """Start a mock VM: wait for its memory, then make it, then wait for its driver.

        Raises VmExists, BadRequest, NotEnoughMemory, and a UserError if it is stopped meanwhile;
        nothing is left behind then, or when the caller is cancelled.
        """
        guest = self._admit(spec)
        try:
            with guest.launching:
                await self._wait_for_memory(guest)
                await _enter(guest, Phase.STARTING)
                await self._start(guest)
        except BaseException as error:
            await self._undo_launch(guest)
            if isinstance(error, Exception) and guest.launching.cancel_called:
                raise _stopped_early(guest) from error
            if isinstance(error, START_ERRORS):
                raise BadRequest(f"{spec.name} can't be launched: {error}") from error
            raise
        if guest.launching.cancel_called:
            await self._undo_launch(guest)
            raise _stopped_early(guest)
        return self.vm(spec.name)

    def _admit(self, spec: VmSpec) -> Guest:
        if self._nursery is None:
            raise AgentError("the agent is starting or stopping")
        if spec.name in self.balancer.guests:
            raise VmExists(spec.name)
        for other in self.balancer.guests.values():
            if spec.container is not None and spec.container == other.spec.container:
                raise BadRequest(f"{spec.name}: the container {spec.container} is {other.name}'s")
        if spec.frame_order and spec.assigned_bytes % HUGE_PAGE_BYTES:
            raise BadRequest(
                f"{spec.name}: a guest with 2 MiB frames has a whole number of them",
                what_to_do="choose a memory size that is a multiple of 2MiB",
            )
        check_promise(
            self.ledger,
            self.balancer.guests,
            spec.name,
            spec.reservation_bytes,
            clients=self.balancer.clients.reservations,
        )
        self.ledger.admit(
            spec.name,
            pages_of(spec.assigned_bytes),
            pages_of(spec.reservation_bytes),
            spec.shares,
        )
        guest = self.balancer.guests[spec.name] = Guest(spec)
        self.balancer.replan()
        return guest

    async def _wait_for_memory(self, guest: Guest) -> None:
        """Until the guest has its startup quota, or the most that shares entitle it to now."""
        with trio.move_on_after(MEMORY_DEADLINE_S):
            while not self._may_start(guest):
                changed = guest.quota_changed
                with trio.move_on_after(FLOOR_CHECK_S):
                    await changed.wait()
        view = self.ledger.view(guest.name)
        least_pages = max(view.reservation_pages, 1)
        if view.quota_pages < least_pages:
            refused = [
                other.name
                for other in self.balancer.guests.values()
                if other is not guest and other.last_reason is not None
            ]
            raise NotEnoughMemory(bytes_of(least_pages - view.quota_pages), sorted(refused))

    def _may_start(self, guest: Guest) -> bool:
        view = self.ledger.view(guest.name)
        if guest.target_pages is None or view.quota_pages < max(view.reservation_pages, 1):
            return False
        wish = min(guest.target_pages, pages_of(guest.spec.startup_bytes))
        return view.quota_pages >= wish - wish % (1 << guest.spec.frame_order)

    async def _start(self, guest: Guest) -> None:
        if self._nursery is None:
            raise AgentError("the agent is stopping")
        await self._nursery.start(self._host, guest)
        await self._save()
        if guest.spec.container is not None:
            # Whoever starts it may be waiting for this.
            await self._begin(guest)
            return
        with trio.move_on_after(CONNECT_DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_first_of, guest.connected, nursery.cancel_scope)
                nursery.start_soon(_first_of, guest.ended, nursery.cancel_scope)
        if guest.ended.is_set():
            raise MachineError(
                f"its command ended at once, {guest.ended_with or 'nobody knows how'}"
            )
        if not guest.connected.is_set():
            raise MachineError(f"its driver did not connect in {CONNECT_DEADLINE_S:g} s")
        await self._begin(guest)
        if guest.ended.is_set():
            raise MachineError(f"its command ended at once, {guest.ended_with}")

    async def _begin(self, guest: Guest) -> None:
        await _enter(guest, Phase.RUNNING)
        self.balancer.clients.began(guest)
        self.balancer.replan()
        await self._save()
        await trio.lowlevel.checkpoint_if_cancelled()  # a file is written to its end

    async def _host(
        self,
        guest: Guest,
        found: Machine | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Host a guest to its end, and keep the state file true."""
        try:
            await self._hosting.run(guest, found, task_status=task_status)
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    async def _undo_launch(self, guest: Guest) -> None:
        with trio.CancelScope(shield=True):
            if guest.quota is None and guest.machine is None:
                self.balancer.left(guest)
                guest.ended.set()
                return
            guest.scope.cancel()
            await guest.ended.wait()
            await self._save()

    async def stop(self, name: str) -> None:
        """Stop a mock VM; its memory is back in the pool when this returns.

        Raises NoSuchVm, and AgentError if it can't be taken down: it may be tried again then.
        """
        guest = self._guest(name)
        guest.stop()
        if guest.failure is not None:
            await self._hosting.take_down(guest)
        await guest.ended.wait()
        await self._save()
        if guest.failure is not None:
            raise AgentError(
                f"{name} could not be taken down: {guest.failure}",
                what_to_do=f"let its processes end, then `balloon stop {name}` again; "
                "until then it keeps its quota and its name",
            )

    # Changing

    async def change(self, name: str, change: VmChange) -> VmView:
        """Apply an operator's wish; what can't be is refused as a whole."""
        # One at a time: the range that the policy was asked about is the one that is changed.
        async with self._changing:
            await self._check_range(self._guest(name), change)
            self._apply(self._guest(name), change)  # it may have left meanwhile
        await self._save()
        return self.vm(name)

    async def _check_range(self, guest: Guest, change: VmChange) -> None:
        """Refuse a range that can't be, or that the policy does not allow. Raises BadRequest."""
        reservation_bytes = bytes_of(self.ledger.view(guest.name).reservation_pages)
        asked = changed_range(guest, reservation_bytes, change)
        if guest.phase is not Phase.RUNNING or asked.is_none:
            return
        policy = self._chosen.name
        try:
            fault = await self.balancer.range_fault(asked)
        except ForeignFault as error:
            LOG.error("policy %s can't judge a range: %s", policy, error)
            raise BadRequest(
                f"{guest.name}: the policy {policy} can't judge the range: {error}",
                what_to_do="choose another policy",
            ) from error
        if fault is not None:
            raise BadRequest(
                f"{guest.name}: {fault} under the policy {policy}",
                what_to_do="change it before the VM is launched, or choose another policy",
            )

    def _apply(self, guest: Guest, change: VmChange) -> None:
        name = guest.name
        clients = self.balancer.clients.reservations
        guests = self.balancer.guests
        pinned = pinned_pages(self.ledger, guests, guest, change, clients=clients)
        if change.reservation_bytes is not None:
            wanted = change.reservation_bytes
            check_promise(self.ledger, guests, name, wanted, pinned, clients=clients)
        try:
            if change.reservation_bytes is not None:
                self.ledger.set_reservation(name, pages_of(change.reservation_bytes))
            if change.shares is not None:
                self.ledger.set_shares(name, change.shares)
        except LedgerError as error:
            raise BadRequest(str(error)) from error
        if change.reservation_bytes is not None and guest.quota is not None:
            try:
                protect(guest, change.reservation_bytes)
            except QuotaError as error:
                # The VM is on its way out, or the kernel would not: the ledger's promise stands.
                LOG.warning("%s: its reservation is not protected: %s", name, error)
        guest.pinned_pages = pinned
        if change.maximum_bytes is not None:
            guest.maximum_bytes = change.maximum_bytes
        guest.refused_until_s = 0.0
        self.balancer.plan_once()

    async def use_policy(self, name: str) -> PolicyView:
        """Let another policy decide from now on, until the agent ends. BadRequest."""
        try:
            chosen = await choose_in_thread(name, self._config.policies, self._imports)
        except PolicyError as error:
            raise BadRequest(str(error), what_to_do="see `balloon policy`") from error
        self._chosen = chosen
        self.balancer.use(chosen.policy, in_thread=chosen.in_thread)
        LOG.info("policy %s decides from now on", name)
        await self.balancer.plan_anew()
        return self.policy()

    # Clients that reserve memory

    def reservations(self) -> list[ReservationView]:
        """What clients have reserved."""
        return self._desk.views()

    async def login(self, client: str) -> list[ReservationView]:
        """A client begins anew: what it had reserved is purged, and returned."""
        return await self._desk.login(client)

    async def reserve(self, request: ClientRequest) -> ReservationView:
        """Keep memory for a client; NotEnoughMemory if the others don't give it."""
        return await self._desk.reserve(request)

    async def transfer(self, reservation_id: str, vm: str) -> TransferView:
        """Hand a reservation over to a VM. As ClientDesk.transfer."""
        return await self._desk.transfer(reservation_id, vm)

    async def release(self, reservation_id: str) -> None:
        """Free a reservation again. NoSuchReservation."""
        await self._desk.release(reservation_id)

    # Looking

    def policy(self) -> PolicyView:
        """The policy that decides, and which there are."""
        return PolicyView(
            name=self._chosen.name,
            source=self._chosen.source,
            settings=self._chosen.settings,
            configured=self._config.host.policy,
            known=policy_names(),
            fault=fault_view(self.balancer.policy_fault, trio.current_time()),
        )

    async def decisions(self, name: str) -> list[DecisionView]:
        """What was decided about a VM lately, newest first. Raises NoSuchVm."""
        self._guest(name)
        return await self._explainer.views(self.balancer.log.of(name), trio.current_time())

    def vms(self) -> list[VmView]:
        """All mock VMs, by name."""
        return [self.vm(name) for name in sorted(self.balancer.guests)]

    def vm(self, name: str) -> VmView:
        """One mock VM. Raises NoSuchVm."""
        guest = self._guest(name)
        return vm_view(guest, self.ledger.view(name), trio.current_time())

    def vitals(self, name: str) -> VitalsView | None:
        """A VM's last statistics. Raises NoSuchVm."""
        return vitals_view(self._guest(name), trio.current_time())

    def host(self) -> HostView:
        """The pool."""
        ledger = self.ledger
        assigned = sum(guest.assigned_pages for guest in self.balancer.guests.values())
        return HostView(
            pool_bytes=bytes_of(ledger.pool_pages),
            reserve_bytes=bytes_of(ledger.reserve_pages),
            reserve_left_bytes=bytes_of(ledger.reserve_left_pages),
            free_bytes=bytes_of(ledger.free_pages),
            held_bytes=bytes_of(ledger.held_pages),
            quotas_bytes=bytes_of(ledger.quota_pages),
            overdrawn_bytes=bytes_of(ledger.overdrawn_pages),
            assigned_bytes=bytes_of(assigned),
            overcommit_ratio=assigned / ledger.pool_pages,
            policy=self._chosen.name,
            policy_fault=fault_view(self.balancer.policy_fault, trio.current_time()),
            shortage=self.balancer.plan.shortage_pages > 0,
            shortage_bytes=bytes_of(self.balancer.plan.shortage_pages),
            oom_kills=self.oom_kills,
            moves_total=self.balancer.moves.moves_total,
            version=version("memballoon"),
            cgroup_version=self._quotas.cgroup_version,
            uptime_s=trio.current_time() - self._started_s,
        )

    @property
    def oom_kills(self) -> int:
        """Processes of mock VMs that the kernel killed for want of memory, since the start."""
        return self._hosting.kills_of_the_gone + sum(
            guest.oom_kills for guest in self.balancer.guests.values()
        )

    def _guest(self, name: str) -> Guest:
        try:
            return self.balancer.guests[name]
        except KeyError:
            raise NoSuchVm(name) from None

    async def enter_scope(self, name: str, scope: Path) -> None:
        """For the container backend: see `Hosting.enter_scope`."""
        await self._hosting.enter_scope(name, scope)

    def rearm_all(self) -> None:
        """Hold dry guests again: the watchdog may have let all of them go."""
        for guest in self.balancer.guests.values():
            if guest.quota is not None and guest.phase is not Phase.STOPPING:
                with contextlib.suppress(QuotaError):
                    guest.quota.rearm()

    async def _watch_kernel(self) -> None:
        """Count what the guests' kernels killed for want of memory."""
        while True:
            await trio.sleep(self._config.host.interval_s)
            for guest in tuple(self.balancer.guests.values()):
                if guest.quota is not None and guest.phase is Phase.RUNNING:
                    count_kills(guest, guest.quota)

    # What lasts

    async def _save(self) -> None:
        if not self._knows_all:
            return
        state = state_of(self.balancer)
        # In a thread, since it waits for the disk; one at a time and in order, the newest last.
        async with self._saving:
            try:
                await trio.to_thread.run_sync(save_state, self._places.state_dir, state)
            except StateError as error:
                LOG.error("%s", error)

    async def _warm_up(self) -> None:
        """Compile the driver's modules once: a mock VM's root is read-only, it can't keep them."""
        imports = "import guest_driver.cli, guest_driver.driver, guest_driver.workload"
        await trio.run_process([sys.executable, "-OO", "-c", imports], check=False)


async def _enter(guest: Guest, phase: Phase) -> None:
    """The next phase of a launch, unless it was stopped just before this task came to run."""
    await trio.lowlevel.checkpoint_if_cancelled()
    guest.phase = phase


def _stopped_early(guest: Guest) -> UserError:
    return UserError(f"{guest.name} was stopped while it was being launched")


async def _first_of(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
