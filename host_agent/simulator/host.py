"""The agent's side of a simulated host: what balance.py, launches and dry.py do, in columns.

The same sentence as the agent's: events -> books -> snapshot -> the policy's plan -> free first,
grant later. Constants are the agent's own, and so are the order of grants, the loans to dry guests,
and what makes a matter urgent. What the sessions do is in balloons.py. What differs is told in
docs/simulator.md.

Pure: time is an argument, in whole microseconds, and effects are the books' and the guests'. The
engine (engine.py) says when.
"""

from bisect import bisect_left
from typing import Protocol

import numpy as np

from host_agent.agent import MEMORY_DEADLINE_S
from host_agent.dry import CALM_AFTER_S, FIRST_STEP_PAGES, LARGEST_STEP_PAGES
from host_agent.errors import AgentError
from host_agent.ledger.columns import HostColumns
from host_agent.policy.decisions import DecisionLog
from host_agent.policy.explain import Why
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import NO_PLAN
from host_agent.pressing import URGENT_AFTER_S
from host_agent.simulator.balloons import Balloons
from host_agent.simulator.books import Flags, Pages, Rows
from host_agent.simulator.guests import NEVER_US, SECOND_US
from host_agent.simulator.host_state import HostState
from host_agent.simulator.scenario import HostTable
from protocol.units import bytes_of
from protocol.vocabulary import Urgency


class SimulationError(AgentError):
    """A policy failed, or answered nonsense: the simulation can't go on."""

    kind = "simulation"


class Decides(Protocol):
    """What is needed of a policy here."""

    name: str

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """As Policy.decide, checked. Raises SimulationError for what is no sound decision."""
        ...

    def why(self, decision: Decision, name: str) -> Why:
        """What the decision about a guest came from, fit to be shown. Raises SimulationError."""
        ...


class Host:
    """One host under one policy."""

    def __init__(self, state: HostState, settings: HostTable, policy: Decides) -> None:
        self.state = state
        self.launch_patience_us = round(MEMORY_DEADLINE_S * SECOND_US)
        self._patience_us = round(settings.dry_patience_s * SECOND_US)
        self._balloons = Balloons(state)
        self._needs: Pages = np.zeros(len(state.traits.names), np.int64)
        """Of the traces, as they are now."""
        self._policy = policy
        self._decisions = DecisionLog()
        self._memory: Memory = None
        self._plan = NO_PLAN
        self._short = False

    # Guests come, change and go

    def arrive(self, row: int, now_us: int) -> None:
        """A guest is launched: it waits for its memory."""
        self.state.books.admit(row)
        self.state.counts.launches += 1
        self._enter(row, present=True)
        self.state.tell(now_us, "launch", row)

    def leave(self, row: int, now_us: int) -> None:
        """A guest is stopped, wherever in its life it is."""
        state = self.state
        if not state.present[row]:
            return
        state.books.remove(row)
        self._enter(row, present=False)
        state.tell(now_us, "stop", row)
        state.settle(now_us)

    def give_up_launch(self, row: int, now_us: int) -> None:
        """A launch has waited long enough: it starts with what it has, or is refused."""
        state = self.state
        if not state.present[row] or state.running[row]:
            return
        if state.books.quota[row] >= max(state.traits.reservation[row], 1):
            self._start(np.array([row]), now_us)
            return
        state.counts.launches_refused += 1
        state.books.remove(row)
        self._enter(row, present=False)
        state.tell(now_us, "launch refused", row)

    def change(self, needs: Pages, now_us: int) -> None:
        """The traces go on: guests need something else."""
        self._needs = needs
        self.state.guests.wants(needs, self.state.running, now_us)
        self.state.settle(now_us)

    def look(self, elapsed_s: float) -> None:
        """The drivers look at their guests, and tell."""
        self.state.guests.look(self.state.workload, elapsed_s)
        self.state.replan = True

    def _enter(self, row: int, *, present: bool) -> None:
        self._decisions.forget(self.state.traits.names[row])
        self.state.enter(row, present=present)

    def _start_who_may(self, now_us: int) -> None:
        state, quota, traits = self.state, self.state.books.quota, self.state.traits
        wish = np.minimum(state.target, traits.startup)
        may = (
            state.present & ~state.running & (state.target >= 0)
            & (quota >= np.maximum(traits.reservation, 1)) & (quota >= wish)
        )  # fmt: skip
        if may.any():
            self._start(np.flatnonzero(may), now_us)

    def _start(self, rows: Rows, now_us: int) -> None:
        state = self.state
        state.running[rows] = True
        for row in rows.tolist():
            state.counts.start_us.append(now_us - int(state.traits.arrives_us[row]))
            state.tell(now_us, "start", row, quota_bytes=bytes_of(int(state.books.quota[row])))
        state.guests.wants(self._needs, state.running, now_us)
        state.settle(now_us)
        state.guests.look(state.workload, 0.0)
        state.replan = True

    # Planning: look, decide, ask, grant

    def plan_once(self, now_us: int) -> Decision:
        """One round, as Balancer.plan_once."""
        state = self.state
        state.replan = False
        host = state.snapshot(now_us)
        decision = self._policy.decide(host, self._memory, now_us / SECOND_US)
        self._plan, self._memory = decision.plan, decision.memory
        state.counts.plans += 1
        state.target[state.rows] = decision.plan.quota_pages
        if state.log is not None:
            self._tell_decision(host, decision, now_us)
        self._note_targets(now_us)
        self._ask(now_us)
        self._grant_free(now_us)
        self._start_who_may(now_us)
        return decision

    def _note_targets(self, now_us: int) -> None:
        state, quota, rows = self.state, self.state.books.quota, self.state.rows
        more = np.zeros(quota.size, np.bool_)
        less = np.zeros(quota.size, np.bool_)
        more[rows] = state.target[rows] > quota[rows]
        less[rows] = state.target[rows] < quota[rows]
        since = state.wanted_since_us
        state.wanted_since_us = np.where(more, np.minimum(since, now_us), NEVER_US)
        since = state.stalled_since_us
        state.stalled_since_us = np.where(less, np.minimum(since, now_us), NEVER_US)
        short = self._plan.shortage_pages > 0
        if short != self._short:
            state.tell(now_us, "short" if short else "no longer short")
        self._short = short

    def _urgency(self, now_us: int) -> Urgency:
        if self.state.books.lent.any() or self.state.is_dry(now_us).any():
            return Urgency.SHORT
        if self._plan.urgency is not None:
            return self._plan.urgency
        waits = (now_us - self.state.wanted_since_us > URGENT_AFTER_S * SECOND_US).any()
        return Urgency.SHORT if self._short or waits else Urgency.CALM

    def _ask(self, now_us: int) -> None:
        # Nothing is taken from outside: a frame is its driver's. The matter is urgent then.
        outside = self._all_rows(self._plan.reclaim_outside, missing=False)
        short = outside | (self._urgency(now_us) is Urgency.SHORT)
        may_swap = self._all_rows(self._plan.may_swap, missing=True)
        self._balloons.ask(short, may_swap & self.state.traits.balloon_may_swap, now_us)

    def _all_rows(self, of_plan: Flags | None, *, missing: bool) -> Flags:
        """A column of the plan for all rows; `missing` where the plan says nothing."""
        flags = np.full(self.state.present.size, missing)
        if of_plan is not None:
            flags[self.state.rows] = of_plan
        return flags

    # Credits and grants

    def credit(self, now_us: int) -> None:
        """What the balloons have given by now is claimed, and granted to others."""
        if self._balloons.credit(now_us):
            self._grant_free(now_us)
            self._start_who_may(now_us)

    def next_credit_us(self, now_us: int, credit_us: int) -> int | None:
        """As Balloons.next_credit_us."""
        return self._balloons.next_credit_us(now_us, credit_us)

    def _grant_free(self, now_us: int) -> None:
        """Free pages go to those who are to get more: dry guests first, then the neediest."""
        state, books = self.state, self.state.books
        free = books.free_pages
        if free <= 0:
            return
        lack = np.where(state.present & (state.target >= 0), state.target - books.quota, 0)
        if self._plan.block_growth:
            lack = np.where(state.dry, lack, 0)
        takers = np.flatnonzero(lack > 0)
        if not takers.size:
            return
        takers = takers[np.lexsort((takers, -lack[takers], ~state.dry[takers]))]
        pages: Pages = np.diff(np.minimum(np.cumsum(lack[takers]), free), prepend=0)
        takers, pages = takers[pages > 0], pages[pages > 0]
        self._balloons.stop_making_room(takers, now_us)
        books.grant(takers, pages)
        state.counts.granted_pages += int(pages.sum())
        self._took(takers, pages, "gets", now_us)

    def _took(self, rows: Rows, pages: Pages, how: str, now_us: int) -> None:
        state = self.state
        enough = rows[state.books.quota[rows] >= state.target[rows]]
        state.wanted_since_us[enough] = NEVER_US
        if state.log is not None:
            for row, count in zip(rows.tolist(), pages.tolist(), strict=True):
                state.tell(now_us, how, row, bytes=bytes_of(count))
        state.settle(now_us)

    # Dry guests

    def answer_dry(self, now_us: int) -> None:
        """Lend to guests that run dry, as dry.py does; or let their kernels decide."""
        state, books = self.state, self.state.books
        rows = np.flatnonzero(state.dry)
        if not rows.size:
            return
        calm = now_us - state.answered_us[rows] > CALM_AFTER_S * SECOND_US
        state.step[rows[calm]] = FIRST_STEP_PAGES
        state.answered_us[rows] = state.dry_us[rows] = now_us
        self._balloons.stop_making_room(rows, now_us)
        given = books.lend(rows, state.step[rows])
        got = rows[given > 0]
        state.counts.lent_pages += int(given.sum())
        state.step[got] = np.minimum(state.step[got] * 2, LARGEST_STEP_PAGES)
        self._took(got, given[given > 0], "is lent", now_us)
        waits = state.dry[rows] & (given == 0)
        full = books.quota[rows] == state.traits.assigned[rows]
        patient = now_us - state.dry_since_us[rows] < self._patience_us
        self._kill(rows[waits & (full | ~patient)], now_us)
        state.replan = True

    def next_dry_us(self, now_us: int, round_us: int) -> int | None:
        """When dry guests are to be answered next: soon while there is something to lend."""
        state = self.state
        if not state.dry.any():
            return None
        if state.books.free_pages + state.books.reserve_left_pages > 0:
            return now_us + round_us
        return max(int(state.dry_since_us[state.dry].min()) + self._patience_us, now_us + 1)

    def _kill(self, rows: Rows, now_us: int) -> None:
        if not rows.size:
            return
        self.state.guests.kill(rows, now_us)
        for row in rows.tolist():
            self.state.tell(now_us, "kernel kills", row)
        self.state.settle(now_us)

    # The log

    def _tell_decision(self, host: HostColumns, decision: Decision, now_us: int) -> None:
        """The terms of the decision about each guest of which the agent would open a record."""
        opened = self._decisions.decided(self._policy.name, host, decision, now_us / SECOND_US)
        for name in opened:
            place = bisect_left(host.names, name)
            why = self._policy.why(decision, name)
            self.state.tell(
                now_us,
                "decision",
                int(self.state.rows[place]),
                quota_bytes=bytes_of(int(host.quota_pages[place])),
                target_bytes=bytes_of(int(decision.plan.quota_pages[place])),
                rule=why.rule,
                terms=[[term.name, term.value, term.unit] for term in why.terms],
            )
