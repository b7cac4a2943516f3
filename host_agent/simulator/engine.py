"""The events of one simulated host, on a virtual clock.

The clock is a whole number of microseconds. Events of the same instant come in the order of their
kinds, and of their rows within a kind, so that the same scenario, seed and policy always give the
same run, to the last byte. Whatever has no event does not change.
"""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Final, Literal, TypeVar

import numpy as np

from host_agent.deciding import ask_and_check
from host_agent.foreign import Errors, ForeignFault, ask_and_wait, guarded
from host_agent.intake.reception import VITALS_INTERVAL_MS
from host_agent.ledger.columns import HostColumns
from host_agent.ledger.ledger import LedgerError
from host_agent.policy.explain import Why, plain
from host_agent.policy.interface import Decision, Memory, Policy
from host_agent.policy.registry import is_built_in
from host_agent.policy.soundness import UnsoundPlan
from host_agent.simulator.books import Books, ColumnBooks, LedgerBooks
from host_agent.simulator.guests import NEVER_US, SECOND_US, Traits
from host_agent.simulator.host import Host, SimulationError
from host_agent.simulator.host_state import HostState, Log
from host_agent.simulator.metrics import MOST_SAMPLES, Meter, Totals
from host_agent.simulator.scenario import Scenario
from host_agent.simulator.traces import Needs
from protocol.units import pages_of

T = TypeVar("T")

BooksKind = Literal["auto", "ledger", "columns"]

MOST_GUESTS_OF_LEDGER: Final = 16
"""Up to so many guests the agent's own ledger keeps the books; beyond, columns do. Measured: with
30 guests a run on the ledger takes twice as long."""

CHECK_EVERY: Final = 256
"""Plans between two checks of all invariants; the total is checked at every event."""

DRY_ROUND_US: Final = 5_000
"""From running dry to a loan, and on to the next: a workload at full speed uses up 8 MiB in 3 ms,
64 MiB in 24."""

ANSWER_DEADLINE_S: Final = 10.0
"""Of an installed policy. No VM waits here, and a machine that is busy with other hosts must not
change the result."""

VITALS_US: Final = VITALS_INTERVAL_MS * 1000
"""A driver looks so long after its guest has changed: as late as a real one does at most."""


class Kind(IntEnum):
    """Kinds of events; at the same instant the lower comes first."""

    LEAVE = 0
    ARRIVE = 1
    GIVE_UP = 2
    LOOK = 3
    """Drivers look at their guests."""
    CHANGE = 4
    """The traces go on."""
    CREDIT = 5
    DRY = 6
    PLAN = 7


@dataclass(frozen=True, slots=True)
class HostRun:
    """What came of one host. `decide_s`: real time in the policy, in all and at most at once."""

    totals: Totals
    events: int
    decide_s: float
    longest_decide_s: float


class _Asked:
    """A policy, asked as anybody's must be, and how long its decisions took.

    What raises or does not answer in time ends the simulation: there is no last plan to play on
    with that would say anything of the policy.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.name = policy.name
        self._ask = guarded if is_built_in(self.name) else _in_time
        self.total_s = self.longest_s = 0.0

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        began_s = time.perf_counter()
        try:
            decision = self._ask(
                partial(ask_and_check, self._policy, host, memory, now_s), (UnsoundPlan,)
            )
        except ForeignFault as fault:
            raise SimulationError(f"policy {self.name} at {now_s:g} s: {fault}") from fault
        took_s = time.perf_counter() - began_s
        self.total_s += took_s
        self.longest_s = max(self.longest_s, took_s)
        return decision

    def why(self, decision: Decision, name: str) -> Why:
        try:
            return self._ask(lambda: plain(decision.why.of(name)), ())
        except ForeignFault as fault:
            raise SimulationError(f"policy {self.name} can't explain itself: {fault}") from fault


def _in_time(call: Callable[[], T], known: Errors) -> T:
    return ask_and_wait(call, timeout_s=ANSWER_DEADLINE_S, known=known)


class Engine:
    """One host of a scenario under one policy; `run` plays it once."""

    def __init__(
        self,
        scenario: Scenario,
        needs: Needs,
        policy: Policy,
        *,
        books: BooksKind = "auto",
        log: Log | None = None,
        samples: bool = False,
    ) -> None:
        host, traits = scenario.host, Traits.of(scenario)
        self._needs = needs[:, traits.columns]
        self._look_us = round(scenario.look_s * SECOND_US)
        self._vitals_us = min(VITALS_US, self._look_us)
        self._end_us = round(scenario.duration_s * SECOND_US)
        self._interval_us = round(host.interval_s * SECOND_US)
        self._gap_us = round(host.plan_gap_s * SECOND_US)
        self._credit_us = round(host.credit_s * SECOND_US)
        if books == "auto":
            books = "ledger" if len(traits.names) <= MOST_GUESTS_OF_LEDGER else "columns"
        make = LedgerBooks if books == "ledger" else ColumnBooks
        pool_pages, reserve_pages = pages_of(host.pool_bytes), pages_of(host.reserve_bytes)
        self.books: Books = make(
            traits.names, traits.assigned, traits.reservation, pool_pages, reserve_pages
        )
        self._policy = _Asked(policy)
        self.state = HostState(traits, self.books, log)
        self.host = Host(self.state, host, self._policy)
        every_us = max(1, self._end_us // MOST_SAMPLES)
        self.meter = Meter(self.state, every_us if samples else None)
        self.now_us = 0
        self.events = 0
        self._queue: list[tuple[int, Kind, int]] = []
        self._due_us: dict[Kind, int] = {}
        """When the next of a kind of which there is only one at a time is due."""
        self._planned_us = -self._gap_us

    def run(self) -> HostRun:
        """Play the scenario to its end."""
        self.begin()
        while self.step():
            pass
        self.books.check()
        totals = self.meter.end(self._end_us)
        return HostRun(totals, self.events, self._policy.total_s, self._policy.longest_s)

    def begin(self) -> None:
        """Enter the events that the scenario tells."""
        traits = self.state.traits
        for row, (arrives_us, leaves_us) in enumerate(
            zip(traits.arrives_us.tolist(), traits.leaves_us.tolist(), strict=True)
        ):
            self._at(arrives_us, Kind.ARRIVE, row)
            if leaves_us != NEVER_US:
                self._at(leaves_us, Kind.LEAVE, row)
        self._once(0, Kind.CHANGE)
        self._once(0, Kind.PLAN)

    def step(self) -> bool:
        """The next event. False if there is none before the end."""
        if self.next_us is None:
            return False
        when_us, kind, row = heapq.heappop(self._queue)
        self.meter.passed(when_us)
        self.now_us = when_us
        if row < 0:
            del self._due_us[kind]
        self.events += 1
        self._happen(kind, row)
        self.meter.look(when_us, needs_changed=kind in (Kind.CHANGE, Kind.LEAVE))
        self._follow_up()
        if self.books.free_pages < 0:
            raise LedgerError(f"quotas and reserve exceed the pool at {when_us} us")
        return True

    @property
    def next_us(self) -> int | None:
        """When the next event is; None if there is none before the end."""
        while self._queue:
            when_us, kind, row = self._queue[0]
            if row >= 0 or self._due_us.get(kind) == when_us:
                return when_us if when_us <= self._end_us else None
            heapq.heappop(self._queue)  # it was put forward
        return None

    def _happen(self, kind: Kind, row: int) -> None:
        host, now_us = self.host, self.now_us
        match kind:
            case Kind.ARRIVE:
                host.arrive(row, now_us)
                self._at(now_us + host.launch_patience_us, Kind.GIVE_UP, row)
            case Kind.LEAVE:
                host.leave(row, now_us)
            case Kind.GIVE_UP:
                host.give_up_launch(row, now_us)
            case Kind.LOOK:
                host.look(self._look_us / SECOND_US)
            case Kind.CHANGE:
                at = now_us // self._look_us
                host.change(self._needs[at].astype(np.int64), now_us)
                self._once(now_us + self._vitals_us, Kind.LOOK)
                if at + 1 < len(self._needs):
                    self._once(now_us + self._look_us, Kind.CHANGE)
            case Kind.CREDIT:
                host.credit(now_us)
            case Kind.DRY:
                host.answer_dry(now_us)
            case Kind.PLAN:
                self._plan()

    def _plan(self) -> None:
        self.host.plan_once(self.now_us)
        self._planned_us = self.now_us
        if self.state.counts.plans % CHECK_EVERY == 0:
            self.books.check()

    def _follow_up(self) -> None:
        """Enter what follows from the state after an event."""
        host, now_us = self.host, self.now_us
        wanted_us = now_us if self.state.replan else self._planned_us + self._interval_us
        self._once(max(wanted_us, self._planned_us + self._gap_us, now_us), Kind.PLAN)
        credit_us = host.next_credit_us(now_us, self._credit_us)
        if credit_us is not None:
            self._once(credit_us, Kind.CREDIT)
        dry_us = host.next_dry_us(now_us, DRY_ROUND_US)
        if dry_us is not None:
            self._once(dry_us, Kind.DRY)

    def _at(self, when_us: int, kind: Kind, row: int) -> None:
        heapq.heappush(self._queue, (when_us, kind, row))

    def _once(self, when_us: int, kind: Kind) -> None:
        """An event of a kind of which the earliest counts."""
        if self._due_us.get(kind, NEVER_US) > when_us:
            self._due_us[kind] = when_us
            heapq.heappush(self._queue, (when_us, kind, -1))
