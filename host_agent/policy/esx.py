"""VMware ESX: memory is taken from whoever pays the least for a page, and idle pages cost more.

With, for each guest, S its shares, P its quota in pages, f the active part of it (0 to 1), and tau
the idle tax:

    rho = S / (P * (f + k * (1 - f)))   k = 1 / (1 - tau)   tau = 0.75    (shares per page)

Memory is taken from the lowest rho until all of those it was taken from have the same: so what a
guest is entitled to is a level times S / (f + k * (1 - f)), within bounds. It has at least its
reservation, and of what it has already the balloon may take so much that it is 65 % of the assigned
size; it has at most its maximum, and no more than it has or needs. f is the larger of a slow and a
fast average of its samples, so that it rises soon and falls late.

How short the host is, is told by its free memory against minFree:

    minFree = 899 MiB for the first 28 GiB of the host and 1 % of the rest; `scale_min_free` makes
              it proportional on a host below 28 GiB

    state   entered below   left upward at      what happens
    high          -               -             growth out of what is free
    clear       100 %           400 %           the same
    soft         64 %           100 %           the balloon takes from who has more than entitled
    hard         32 %            64 %           the same, beyond 65 %, into swap, and from outside
    low          16 %            32 %           the same, and nobody grows but who runs dry

All guests together are entitled to the host less minFree. A guest grows to what it is entitled to,
as far as there is free memory.

Sources: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, sections 4
and 5 (idle tax, sampling, states); the vSphere 6 memory states and their thresholds as described
by D. Epping (2015), who notes that going down and up have different bounds.

What differs from it, and why:
- ESX hands out a page when it is touched; here a quota is given before. So quotas take the place of
  consumed memory, growth is what a guest needs beyond its quota, and memory that a guest has stays
  with it until others need it.
- Which bounds apply upward isn't published. Here a state is left at the bound of the next better.
- Page sharing, large pages and compression are not there: clear does what high does.
- In hard ESX swaps guests' pages itself. Here the plan says that guests may swap and that memory
  may be taken without asking them; how far that goes is the agent's business.
- ESX samples the active part by a hundred random pages. A driver samples by the accessed bits of
  all pages that the workload has mapped (guest_driver/activity.py), as a part of the quota, so that
  unused quota and inactive page cache count as idle. It says nothing where it can't look into the
  workload's processes, and while the guest refaults or swaps. Then the sample is the working set
  over the quota: anonymous memory counts as active however idle it is. Where nothing is known, all
  of it counts as active.
- The averages' times aren't published.
- A guest with shares 0 has a rho of 0: it is the first to be taken from.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Floats, HostColumns, Ints, Maybe
from host_agent.policy.carried import Carried
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.fill import MAX_WEIGHT, fill
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, need_pages, shortage_pages
from protocol.units import GIB, MIB, pages_of
from protocol.vocabulary import Urgency

MIN_FREE_PAGES: Final = pages_of(899 * MIB)
MIN_FREE_HOST_PAGES: Final = pages_of(28 * GIB)
MIN_FREE_DIVISOR: Final = 100
"""minFree: so much for a host of so much, and 1 % of what is beyond."""


class HostState(IntEnum):
    """How short the host is; the larger, the shorter."""

    HIGH = 0
    CLEAR = 1
    SOFT = 2
    HARD = 3
    LOW = 4


ENTERED_BELOW_PERCENT: Final = {
    HostState.CLEAR: 100,
    HostState.SOFT: 64,
    HostState.HARD: 32,
    HostState.LOW: 16,
}
LEFT_AT_PERCENT: Final = {
    HostState.CLEAR: 400,
    HostState.SOFT: 100,
    HostState.HARD: 64,
    HostState.LOW: 32,
}
"""Of minFree."""


@dataclass(frozen=True, slots=True)
class EsxSettings:
    """The options of `esx`."""

    idle_tax: float = 0.75
    """tau: 0 treats idle pages as active ones, towards 1 they are all taken first."""
    scale_min_free: bool = True
    """minFree in proportion to a host below 28 GiB; false for 899 MiB all the same."""
    balloon_max_percent: float = 65.0
    """Of the assigned size."""
    fast_s: float = 10.0
    slow_s: float = 60.0
    """Times of the two averages of the active part: after so long a change counts by 63 %."""

    def __post_init__(self) -> None:
        """A tax below all, and averages that know time."""
        if not 0 <= self.idle_tax < 1:
            raise ValueError("idle_tax must be at least 0 and below 1")
        if not 0 <= self.balloon_max_percent <= 100:
            raise ValueError("balloon_max_percent must lie between 0 and 100")
        if not 0 < self.fast_s <= self.slow_s:
            raise ValueError("fast_s must be above 0 and at most slow_s")


DEFAULTS: Final = EsxSettings()


@dataclass(frozen=True, slots=True, eq=False)
class EsxMemory:
    """The host's state, and the averages of each guest's active part."""

    state: HostState
    now_s: float
    names: tuple[str, ...]
    fast: Floats
    slow: Floats
    """NaN for a guest of which no sample has come yet."""


@dataclass(frozen=True, slots=True, eq=False)
class _Entitlement:
    """What each guest is entitled to, and from what. Pages."""

    active: Floats
    page_cost: Floats
    low: Ints
    high: Ints
    pages: Ints


@dataclass(frozen=True, slots=True)
class Esx:
    """The policy `esx`, as described above."""

    settings: EsxSettings = DEFAULTS

    name: ClassVar[str] = "esx"
    source: ClassVar[str] = "Waldspurger, OSDI 2002; vSphere 6 memory states"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """Take from the lowest rho what the host's state asks for."""
        before: EsxMemory | None = memory
        fast, slow = self._averages(host, before, now_s)
        active = np.where(np.isnan(fast), 1.0, np.fmax(fast, slow))
        min_free = self.min_free_pages(host)
        free = host.shareable_pages - int(host.quota_pages.sum())
        state = next_state(HostState.HIGH if before is None else before.state, free, min_free)
        entitled = self._entitle(host, active, state, min_free)

        now, due = host.quota_pages, entitled.pages
        grown = np.maximum(now, np.minimum(due, need_pages(host)))
        shrunk = np.minimum(now, due)
        blocked = np.zeros(len(host), np.bool_)
        if state is HostState.LOW:
            blocked = (grown > np.maximum(now, host.reservation_pages)) & ~host.dry
            grown = np.where(blocked, now, grown)
        wanted = np.where(grown > now, grown, shrunk if state >= HostState.SOFT else now)
        kept = keep_promises(host, wanted, decides_starts=True)
        beyond_balloon = ~host.fixed & (kept.quota_pages < now) if state >= HostState.HARD else None
        plan = Plan(
            host.names,
            kept.quota_pages,
            shortage_pages(host, min_free),
            entitled_pages=np.where(~host.fixed, due, host.fixed_pages),
            urgency=Urgency.SHORT if state >= HostState.SOFT else None,
            block_growth=state is HostState.LOW,
            may_swap=beyond_balloon,
            reclaim_outside=beyond_balloon,
        )

        def details() -> Details:
            held = np.maximum(now, 1) * entitled.page_cost
            return Details(
                host=(
                    ("state", state.name.lower(), ""),
                    ("free", free, "pages"),
                    ("minFree", min_free, "pages"),
                    ("k", self._idle_cost(), ""),
                ),
                guests=(
                    ("S", host.shares, "shares"),
                    ("P", now, "pages"),
                    ("f fast", Maybe(fast, ~np.isnan(fast)), "fraction"),
                    ("f slow", Maybe(slow, ~np.isnan(slow)), "fraction"),
                    ("f", active, "fraction"),
                    ("rho", host.shares / held, "shares/page"),
                    ("need", need_pages(host), "pages"),
                    ("least", entitled.low, "pages"),
                    ("most", entitled.high, "pages"),
                    ("entitled", due, "pages"),
                    ("quota wanted", kept.quota_pages, "pages"),
                ),
                rules=(
                    *kept.rules,
                    (blocked, "low: nobody grows"),
                    (grown > now, "it grows to what it is entitled to"),
                    ((wanted < now) & (due <= entitled.low), "down to what may be taken from it"),
                    (wanted < now, "its rho is the lowest: it gives down to the common level"),
                    (
                        (due < now) & (state < HostState.SOFT),
                        "it has more than entitled, but the host has free memory",
                    ),
                    (due < need_pages(host), "its shares and idle pages entitle it to no more"),
                ),
                otherwise="it has what it needs",
            )

        return Decision(
            plan,
            EsxMemory(state, now_s, host.names, fast, slow),
            Explanation(host.names, details),
        )

    def min_free_pages(self, host: HostColumns) -> int:
        """minFree of this host; never less than a page."""
        pages = max(host.shareable_pages, 0)
        first = MIN_FREE_PAGES
        if self.settings.scale_min_free and pages < MIN_FREE_HOST_PAGES:
            first = MIN_FREE_PAGES * pages // MIN_FREE_HOST_PAGES
        return max(first + max(pages - MIN_FREE_HOST_PAGES, 0) // MIN_FREE_DIVISOR, 1)

    def _idle_cost(self) -> float:
        return 1 / (1 - self.settings.idle_tax)

    def _averages(
        self, host: HostColumns, before: EsxMemory | None, now_s: float
    ) -> tuple[Floats, Floats]:
        """Fast and slow average of the active part; NaN where nothing was ever known."""
        working_set = host.working_set_pages
        part = working_set.values / np.maximum(host.quota_pages, 1)
        guess = np.where(working_set.known & (host.quota_pages > 0), part, np.nan)
        sample = np.clip(host.active_fraction.or_else(guess), 0.0, 1.0)
        if before is None:
            return sample, sample
        carried = Carried(before.names, host.names)
        passed_s = max(now_s - before.now_s, 0.0)

        def average(old: Floats, time_s: float) -> Floats:
            old = carried.column(old, sample)
            old = np.where(np.isnan(old), sample, old)
            moved = old + (sample - old) * (1 - math.exp(-passed_s / time_s))
            return np.where(np.isnan(sample), old, moved)

        return average(before.fast, self.settings.fast_s), average(
            before.slow, self.settings.slow_s
        )

    def _entitle(
        self, host: HostColumns, active: Floats, state: HostState, min_free: int
    ) -> _Entitlement:
        """Min-funding revocation, brought to its end: one level for all, between bounds."""
        page_cost = active + self._idle_cost() * (1 - active)
        low = host.reservation_pages
        if state < HostState.HARD:
            most_balloon = np.floor(
                host.assigned_pages * (self.settings.balloon_max_percent / 100)
            ).astype(np.int64)
            # It protects what a guest has; it promises nothing to one that has less.
            low = np.maximum(low, np.minimum(host.assigned_pages - most_balloon, host.quota_pages))
        most = np.maximum(host.most_pages, low)
        high = np.clip(np.maximum(need_pages(host), host.quota_pages), low, most)
        free = ~host.fixed
        pages = host.quota_pages.copy()
        pages[free] = fill(
            host.left_pages - min_free,
            low[free],
            high[free],
            _weights(host.shares[free] / page_cost[free]),
        )
        return _Entitlement(active, page_cost, low, high, pages)


def next_state(state: HostState, free_pages: int, min_free_pages: int) -> HostState:
    """The state after a look at the free memory, by the bounds of both directions."""
    percent = 100 * free_pages
    while state < HostState.LOW:
        worse = HostState(state + 1)
        if percent >= ENTERED_BELOW_PERCENT[worse] * min_free_pages:
            break
        state = worse
    while state > HostState.HIGH and percent >= LEFT_AT_PERCENT[state] * min_free_pages:
        state = HostState(state - 1)
    return state


def _weights(parts: Floats) -> Ints:
    """Whole weights in proportion to `parts`, as exact as `fill` takes them; 0 stays 0."""
    largest = parts.max(initial=0.0)
    if largest <= 0:
        return np.zeros(len(parts), np.int64)
    # A power of two: quarters and halves of shares stay exact.
    scale = 2.0 ** math.floor(math.log2(MAX_WEIGHT / largest))
    scaled = np.rint(parts * scale).astype(np.int64)
    return np.where(parts > 0, np.clip(scaled, 1, MAX_WEIGHT), 0)
