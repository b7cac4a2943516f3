"""The guests of a simulated host, as columns: what they hold, say, and offer.

A guest has anonymous memory and page cache, both as its trace says. It touches what it needs at
once, anonymous memory first, as far as its workload's limit goes. What anonymous memory does not
fit goes to its swap space, and beyond that the guest waits: it is dry. What is in use and does not
fit comes back again and again, from files or from swap: that is how its driver knows.

What it says and offers follows the guest driver's law (guest_driver/demand.py and balloon.py; the
host may not import them, and tests compare the two): demand is what is in use, in refault and in
swap-in, with growth at the limit projected, plus headroom, fast up and slowly down; cache is
offered only when memory is short, anonymous memory only where the balloon may swap as well, and
nothing at all while the guest swaps or after a kill.

Not modelled: idle page cache, dirty pages, time to touch memory, other CPUs' page counters. Sizes
are in pages, times in whole microseconds of virtual time; guests are rows, in the order of their
names.
"""

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from host_agent.ledger.columns import MaybeFloats, MaybeInts, maybe_floats, maybe_ints
from host_agent.simulator.books import Flags, Pages, Rows
from host_agent.simulator.scenario import (
    GuestTable,
    Intermittent,
    Lying,
    Scenario,
    Slow,
    Stuck,
)
from host_agent.simulator.traces import arrivals_s
from protocol.guest_floor import floor_bytes
from protocol.units import MIB, pages_of

Floats = npt.NDArray[np.float64]

NEVER_US: Final = 2**62
SECOND_US: Final = 1_000_000

# The guest driver's thresholds, with the names that they have there.
HEADROOM_MIN_PAGES: Final = pages_of(4 * MIB)
HEADROOM_SHARE: Final = 0.05
REFAULT_WINDOW_S: Final = 1.0
NOISE_PAGES: Final = pages_of(1 * MIB)
AT_LIMIT_SHARE: Final = 0.985
GROWTH_LOOKAHEAD_S: Final = 2.0
DEMAND_HALF_LIFE_S: Final = 5.0
OOM_KILL_CAUTION_S: Final = 30.0
MARGIN_MIN_PAGES: Final = pages_of(2 * MIB)
MARGIN_SHARE: Final = 0.02
CACHE_FLOOR_PAGES: Final = pages_of(4 * MIB)
SWAP_KEPT_PAGES: Final = pages_of(4 * MIB)
MIN_OFFER_PAGES: Final = pages_of(1 * MIB)

RESTART_S: Final = 10.0
"""How long a guest of which something was killed does without that."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What does not change about the guests: one row each, ordered by name."""

    names: tuple[str, ...]
    columns: Rows
    """Where each guest stands in the scenario: its column of the traces."""
    assigned: Pages
    reservation: Pages
    startup: Pages
    floor: Pages
    maximum: MaybeInts
    buffer_percent: MaybeFloats
    shares: Pages
    swap: Pages
    balloon_may_swap: Flags
    cache_share: Floats
    heap_managed: Flags
    inflate_pages_per_s: Floats
    stuck_from_us: Pages
    on_us: Pages
    """How long a driver stays connected; NEVER_US for those that always are."""
    off_us: Pages
    says_factor: Floats
    hoards: Flags
    arrives_us: Pages
    leaves_us: Pages

    @classmethod
    def of(cls, scenario: Scenario) -> "Traits":
        """The guests of one host of the scenario."""
        rows = [
            (name, table, arrives_s)
            for table in scenario.guests
            for name, arrives_s in zip(table.names(), arrivals_s(table), strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda at: rows[at][0])
        tables = [rows[at][1] for at in order]
        speed = scenario.host.inflate_bytes_per_s

        def ints(values: list[int]) -> Pages:
            return np.array(values, np.int64)

        return cls(
            names=tuple(rows[at][0] for at in order),
            columns=np.array(order, np.intp),
            assigned=ints([pages_of(table.assigned_bytes) for table in tables]),
            reservation=ints([pages_of(table.reservation_bytes) for table in tables]),
            startup=ints([pages_of(table.startup_bytes) for table in tables]),
            floor=ints([pages_of(floor_bytes(table.assigned_bytes)) for table in tables]),
            maximum=maybe_ints(
                None if table.maximum_bytes is None else pages_of(table.maximum_bytes)
                for table in tables
            ),
            buffer_percent=maybe_floats(table.buffer_percent for table in tables),
            shares=ints([table.shares for table in tables]),
            swap=ints([pages_of(table.swap_bytes) for table in tables]),
            balloon_may_swap=np.array([table.balloon_may_swap for table in tables], np.bool_),
            cache_share=np.array([table.cache_share for table in tables]),
            heap_managed=np.array([table.heap_managed for table in tables], np.bool_),
            inflate_pages_per_s=np.array([_speed(table, speed) for table in tables]),
            stuck_from_us=ints([_stuck_from_us(table) for table in tables]),
            on_us=ints([_connected_us(table)[0] for table in tables]),
            off_us=ints([_connected_us(table)[1] for table in tables]),
            says_factor=np.array([_says(table) for table in tables]),
            hoards=np.array([_hoards(table) for table in tables], np.bool_),
            arrives_us=ints([round(rows[at][2] * SECOND_US) for at in order]),
            leaves_us=ints([_leaves_us(table) for table in tables]),
        )


def _speed(table: GuestTable, inflate_bytes_per_s: int) -> float:
    factor = table.behaviour.factor if isinstance(table.behaviour, Slow) else 1.0
    return max(1.0, pages_of(inflate_bytes_per_s) * factor)


def _stuck_from_us(table: GuestTable) -> int:
    stuck = table.behaviour
    return round(stuck.from_s * SECOND_US) if isinstance(stuck, Stuck) else NEVER_US


def _connected_us(table: GuestTable) -> tuple[int, int]:
    there = table.behaviour
    if isinstance(there, Intermittent):
        return round(there.on_s * SECOND_US), round(there.off_s * SECOND_US)
    return NEVER_US, 0


def _says(table: GuestTable) -> float:
    return table.behaviour.factor if isinstance(table.behaviour, Lying) else 1.0


def _hoards(table: GuestTable) -> bool:
    return isinstance(table.behaviour, Lying) and table.behaviour.hoards


def _leaves_us(table: GuestTable) -> int:
    return NEVER_US if table.leaves_s is None else round(table.leaves_s * SECOND_US)


def _zeros(count: int) -> Pages:
    return np.zeros(count, np.int64)


@dataclass(slots=True)
class Guests:
    """What changes about the guests."""

    traits: Traits
    need: Pages = field(init=False)
    """By its trace, both kinds; 0 for one that does not run."""
    anon: Pages = field(init=False)
    """Anonymous memory that it wants to hold."""
    want_cache: Pages = field(init=False)
    held: Pages = field(init=False)
    """Anonymous memory in its quota."""
    cache: Pages = field(init=False)
    swapped: Pages = field(init=False)
    waiting: Pages = field(init=False)
    """Anonymous memory that fits neither quota nor swap."""
    swapped_out_total: Pages = field(init=False)
    refaults_total: Pages = field(init=False)
    pressure_total_s: Floats = field(init=False)
    demand: Floats = field(init=False)
    """The driver's estimate, in pages; remembered from look to look."""
    kills: Pages = field(init=False)
    killed_us: Pages = field(init=False)
    _growth: Floats = field(init=False)
    _refaults: Floats = field(init=False)
    _swapping: Floats = field(init=False)
    _swap_ins: Floats = field(init=False)
    _held_at_look: Pages = field(init=False)
    _swapped_at_look: Pages = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.traits.names)
        for name in (
            "need", "anon", "want_cache", "held", "cache", "swapped", "waiting", "kills",
            "swapped_out_total", "refaults_total", "_held_at_look", "_swapped_at_look",
        ):  # fmt: skip
            setattr(self, name, _zeros(count))
        for name in (
            "demand",
            "pressure_total_s",
            "_growth",
            "_refaults",
            "_swapping",
            "_swap_ins",
        ):
            setattr(self, name, np.zeros(count))
        self.killed_us = np.full(count, -NEVER_US)

    @property
    def usage(self) -> Pages:
        """What each uses of its quota."""
        return self.held + self.cache

    def wants(self, needs: Pages, runs: Flags, now_us: int) -> None:
        """New needs by the traces. Follow with `settle`, then `look`."""
        killed = now_us - self.killed_us < RESTART_S * SECOND_US
        self.need = np.where(runs & ~killed, needs, 0)
        cache = (self.need * self.traits.cache_share).astype(np.int64)
        anon = self.need - cache
        kept = self.traits.heap_managed & runs & ~killed
        self.anon = np.where(kept, np.maximum(anon, self.anon), anon)
        self.want_cache = cache

    def settle(self, workload: Pages) -> None:
        """Touch what is needed, as far as the workloads' limits go."""
        self.held = np.minimum(self.anon, workload)
        short = self.anon - self.held
        before = self.swapped
        self.swapped = np.minimum(short, self.traits.swap)
        self.swapped_out_total += np.maximum(self.swapped - before, 0)
        self.waiting = short - self.swapped
        self.cache = np.minimum(self.want_cache, workload - self.held)

    def look(self, workload: Pages, elapsed_s: float) -> None:
        """The drivers look at their guests and estimate what they need."""
        fade = math.exp(-elapsed_s / REFAULT_WINDOW_S)
        missing = self.want_cache - self.cache
        self._growth = self._growth * fade + np.maximum(self.held - self._held_at_look, 0)
        # A workload goes through all that it needs once in a window: what is swapped comes back,
        # for something else to go, and what is missing of its cache is read again.
        out = np.maximum(self.swapped - self._swapped_at_look, 0)
        back = np.maximum(self._swapped_at_look - self.swapped, 0) + self.swapped * (1 - fade)
        self._swapping = self._swapping * fade + out + back
        self._swap_ins = self._swap_ins * fade + back
        self._refaults = self._refaults * fade + missing * (1 - fade)
        self.refaults_total += (missing * (1 - fade)).astype(np.int64)
        self._held_at_look, self._swapped_at_look = self.held, self.swapped
        lacking = (missing + self.swapped + self.waiting) / np.maximum(self.need, 1)
        self.pressure_total_s += np.minimum(lacking, 1.0) * elapsed_s

        usage = self.usage
        need = usage + np.where(self._refaults > NOISE_PAGES, self._refaults, 0)
        at_limit = usage >= AT_LIMIT_SHARE * workload
        swap_ins = np.where(self._swap_ins > NOISE_PAGES, self._swap_ins, 0)
        growth = self._growth * GROWTH_LOOKAHEAD_S / REFAULT_WINDOW_S
        need = need + np.where(at_limit, growth + swap_ins, 0)
        need += np.maximum(HEADROOM_MIN_PAGES, HEADROOM_SHARE * need)
        fall = 0.5 ** (elapsed_s / DEMAND_HALF_LIFE_S)
        need += np.maximum(self.demand - need, 0) * fall
        self.demand = np.minimum(need, self.traits.assigned)

    def forget(self, rows: Rows) -> None:
        """Guests that have left, or were killed in: nothing of them is remembered."""
        for name in ("need", "anon", "want_cache", "held", "cache", "swapped", "waiting"):
            getattr(self, name)[rows] = 0
        for name in ("demand", "_growth", "_refaults", "_swapping", "_swap_ins"):
            getattr(self, name)[rows] = 0.0
        self._held_at_look[rows] = self._swapped_at_look[rows] = 0

    def kill(self, rows: Rows, now_us: int) -> None:
        """The guests' own kernels kill what needed too much."""
        self.forget(rows)
        self.kills[rows] += 1
        self.killed_us[rows] = now_us

    # What they say

    def says_demand(self) -> Pages:
        """The demand as told: the estimate, or what a liar makes of it."""
        told = np.minimum(np.ceil(self.demand * self.traits.says_factor), self.traits.assigned)
        return told.astype(np.int64)

    def says_spare(self, quota: Pages, now_us: int) -> Pages:
        """What they could give up if memory were short, as told."""
        could = np.minimum(self._spare(quota, short=True), quota - self.traits.floor)
        could = np.where(self._in_trouble(now_us) | self.traits.hoards, 0, np.maximum(could, 0))
        return could.astype(np.int64)

    def active_fraction(self, quota: Pages) -> Floats:
        """Part of the quota in recent use: a heap that is kept for nothing is not."""
        return np.minimum(1.0, np.minimum(self.need, self.usage) / np.maximum(quota, 1))

    def offers(
        self, quota: Pages, target: Pages, short: Flags, may_swap: Flags, now_us: int
    ) -> Pages:
        """What they offer of the way from quota to target; 0 is a refusal.

        `short`: of whom it is urgent; `may_swap`: who may swap out anonymous memory for it.
        """
        missing = np.maximum(quota - target, 0)
        balance = np.where(short, self._spare(quota, short=True), self._spare(quota, short=False))
        left = np.maximum(self.traits.swap - self.swapped - SWAP_KEPT_PAGES, 0)
        swaps = np.where(may_swap & short, np.minimum(left, self.held), 0)
        spare = np.maximum(balance + np.where(swaps >= MIN_OFFER_PAGES, swaps, 0), 0)
        spare = np.where(self._in_trouble(now_us) | self.traits.hoards, 0, spare)
        most = np.minimum(missing, np.maximum(quota - self.traits.floor, 0))
        pages = np.minimum(most, spare).astype(np.int64)
        return np.where(pages >= np.minimum(MIN_OFFER_PAGES, np.maximum(missing, 1)), pages, 0)

    def _spare(self, quota: Pages, *, short: bool) -> Floats:
        """What could go; below 0 where something would have to go before anything is to spare."""
        margin = np.maximum(MARGIN_MIN_PAGES, MARGIN_SHARE * quota)
        if not short:
            return np.asarray(quota - np.maximum(self.usage, self.demand) - margin)
        # Where there is swap the kernel would rather swap than drop cache that is in use.
        droppable = np.where(self.traits.swap > 0, 0, np.maximum(self.cache - CACHE_FLOOR_PAGES, 0))
        return np.asarray(quota - (self.usage - droppable) - margin)

    def _in_trouble(self, now_us: int) -> Flags:
        killed = now_us - self.killed_us < OOM_KILL_CAUTION_S * SECOND_US
        return np.asarray(killed | (self._swapping > NOISE_PAGES))
