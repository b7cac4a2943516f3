"""One simulated host at one instant: its guests, its books, and what its agent knows of each guest.

The columns are what the agent keeps in its Guest objects (guest.py): place i of each is the guest
`traits.names[i]`. Here they are kept and shown to the policy, and guests touch what they need; who
decides what becomes of them is host.py and balloons.py. Pure: time is an argument, in whole
microseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from host_agent.dry import FIRST_STEP_PAGES
from host_agent.ledger.columns import HostColumns, Maybe, known
from host_agent.observing import (
    DRY_MEMORY_S,
    DRY_NEED_PAGES,
    UNCOOPERATIVE_AFTER,
    UNCOOPERATIVE_PAUSE_S,
)
from host_agent.simulator.books import Books, Flags, Pages, Rows
from host_agent.simulator.guests import NEVER_US, SECOND_US, Guests, Traits


class Log(Protocol):
    """Where events go, if anybody wants them."""

    def __call__(self, now_us: int, event: str, fields: Mapping[str, Any]) -> None:
        """One event at an instant of virtual time."""
        ...


@dataclass(slots=True)
class Counts:
    """What is counted as it happens; sizes in pages."""

    claimed_pages: int = 0
    granted_pages: int = 0
    lent_pages: int = 0
    asked: int = 0
    refused: int = 0
    dry_events: int = 0
    stuck: int = 0
    launches: int = 0
    launches_refused: int = 0
    plans: int = 0
    start_us: list[int] = field(default_factory=list)
    """How long each launch waited for memory."""


class HostState:
    """One host. `replan`: something has happened that the agent would plan for."""

    def __init__(self, traits: Traits, books: Books, log: Log | None = None) -> None:
        count = len(traits.names)
        self.traits, self.books, self.guests = traits, books, Guests(traits)
        self.counts = Counts()
        self.log = log
        self.replan = False
        self.present: Flags = np.zeros(count, np.bool_)
        """In the books."""
        self.running: Flags = np.zeros(count, np.bool_)

        # What it is to have, and how long it has not had it
        self.target = np.full(count, -1)
        self.wanted_since_us = np.full(count, NEVER_US)
        self.stalled_since_us = np.full(count, NEVER_US)

        # Its balloon
        self.inflating: Flags = np.zeros(count, np.bool_)
        self.refused_until_us = np.zeros(count, np.int64)
        self.asked_short: Flags = np.zeros(count, np.bool_)
        self.refusals = np.zeros(count, np.int64)
        self.began_us = np.zeros(count, np.int64)
        self.offered = np.zeros(count, np.int64)
        self.given = np.zeros(count, np.int64)
        self.stuck_times = np.zeros(count, np.int64)
        self.stuck_us = np.full(count, -NEVER_US)
        self.away_until_us = np.zeros(count, np.int64)

        # Its want
        self.dry: Flags = np.zeros(count, np.bool_)
        """Waits for memory."""
        self.dry_since_us = np.zeros(count, np.int64)
        self.dry_us = np.full(count, -NEVER_US)
        """When it was answered last."""
        self.answered_us = np.full(count, -NEVER_US)
        self.step = np.full(count, FIRST_STEP_PAGES)

        self._rows: Rows = np.zeros(0, np.intp)
        self._names: tuple[str, ...] = ()
        self._rows_are_old = False
        """Somebody has come or gone: many at once are looked up once."""

    @property
    def workload(self) -> Pages:
        """The workloads' limits: quota without the room made for the balloon."""
        return self.books.quota - self.books.room

    @property
    def rows(self) -> Rows:
        """Places of those that are there."""
        self._look_up()
        return self._rows

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        self._look_up()
        return self._names

    def _look_up(self) -> None:
        if self._rows_are_old:
            self._rows_are_old = False
            self._rows = np.flatnonzero(self.present)
            self._names = tuple(self.traits.names[at] for at in self._rows.tolist())

    def enter(self, row: int, *, present: bool) -> None:
        """A guest has come, or gone: what was known of the last one of its name is forgotten."""
        self.present[row] = present
        self.running[row] = self.inflating[row] = self.dry[row] = False
        self.target[row] = -1
        self.wanted_since_us[row] = self.stalled_since_us[row] = NEVER_US
        self.refused_until_us[row] = self.refusals[row] = self.stuck_times[row] = 0
        self.guests.forget(np.array([row]))
        self._rows_are_old = self.replan = True

    def settle(self, now_us: int) -> None:
        """The guests touch what they need; who can't, runs dry."""
        self.guests.settle(self.workload)
        waits = self.guests.waiting > 0
        for row in np.flatnonzero(waits & ~self.dry).tolist():
            self.dry_since_us[row] = now_us
            self.counts.dry_events += 1
            self.tell(now_us, "dry", row)
        self.dry = waits

    def connected(self, now_us: int) -> Flags:
        """Whose driver is there."""
        traits = self.traits
        cycle = np.maximum(traits.on_us + traits.off_us, 1)
        there = (now_us % cycle < traits.on_us) & (now_us >= self.away_until_us)
        return np.asarray(self.running & there)

    def is_dry(self, now_us: int) -> Flags:
        """It waits for memory, or did so just now."""
        return np.asarray(self.dry | (now_us - self.dry_us < DRY_MEMORY_S * SECOND_US))

    def snapshot(self, now_us: int) -> HostColumns:
        """What the policy sees, as the agent would show it: copies throughout."""
        rows, books, guests, traits = self.rows, self.books, self.guests, self.traits
        quota, running = books.quota[rows], self.running[rows]
        connected = self.connected(now_us)[rows]
        cooperates = (self.stuck_times < UNCOOPERATIVE_AFTER) | (
            now_us - self.stuck_us > UNCOOPERATIVE_PAUSE_S * SECOND_US
        )
        dry = self.is_dry(now_us)[rows]
        demand = np.where(running, guests.says_demand()[rows], traits.startup[rows])
        demand = np.where(dry, np.maximum(demand, quota + DRY_NEED_PAGES), demand)
        stalled_us = self.stalled_since_us[rows]
        return HostColumns(
            pool_pages=books.pool_pages,
            reserve_pages=books.reserve_pages,
            names=self.names,
            assigned_pages=traits.assigned[rows],
            reservation_pages=traits.reservation[rows],
            shares=traits.shares[rows],
            quota_pages=quota,
            lent_pages=books.lent[rows],
            movable=~running | (connected & cooperates[rows]),
            has_driver=connected,
            dry=dry,
            stalled_since_s=Maybe(stalled_us / SECOND_US, stalled_us != NEVER_US),
            maximum_pages=Maybe(traits.maximum.values[rows], traits.maximum.known[rows]),
            buffer_percent=Maybe(
                traits.buffer_percent.values[rows], traits.buffer_percent.known[rows]
            ),
            startup_pages=known(traits.startup[rows]),
            inaccuracy_pages=known(np.ones(rows.size, np.int64)),
            demand_pages=known(demand),
            working_set_pages=Maybe(guests.usage[rows], running),
            spare_pages=Maybe(guests.says_spare(books.quota, now_us)[rows], running),
            usage_pages=Maybe(guests.usage[rows], running),
            active_fraction=Maybe(guests.active_fraction(books.quota)[rows], running),
            pressure_some_total_s=Maybe(guests.pressure_total_s[rows], running),
            refault_pages_total=Maybe(guests.refaults_total[rows], running),
            swap_used_pages=Maybe(guests.swapped[rows], running),
            oom_kills_total=Maybe(guests.kills[rows], running),
        )

    def tell(self, now_us: int, event: str, row: int | None = None, **fields: Any) -> None:
        """An event for the log, if there is one."""
        if self.log is not None:
            vm = {} if row is None else {"vm": self.traits.names[row]}
            self.log(now_us, event, {**vm, **fields})
