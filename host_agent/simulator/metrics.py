"""What a simulation is judged by. Each figure is defined here, and in docs/simulator.md.

`Meter` watches one host; its `Totals` are plain sums and lists, so that those of many hosts add up
to those of a fleet (`figures_of`). Between two events nothing changes, so that integrals over time
are exact sums. Sizes are in pages inside, in bytes in the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from host_agent.policy.fill import fill
from host_agent.simulator.books import Pages
from host_agent.simulator.guests import NEVER_US, SECOND_US
from host_agent.simulator.host_state import Counts, HostState
from protocol.units import MIB, bytes_of, pages_of

REQUEST_PAGES: Final = pages_of(1 * MIB)
REQUEST_SHARE: Final = 0.02
"""A request begins when a guest needs so much more than its quota, the larger of the two, and ends
when its quota covers the need: less is noise."""

TURN_PAGES: Final = pages_of(2 * MIB)
"""A quota that goes back by more than this has turned: the policies' own idea of too little."""

MOST_SAMPLES: Final = 600
"""Of a plot: more are not to be seen."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One host at one instant, for a plot; sizes in pages, of all guests together."""

    now_us: int
    need: int
    quota: int
    unmet: int
    reserve_left: int
    swapped: int


@dataclass(slots=True)
class Totals:
    """Sums over one host's whole run. `_page_us` are pages times microseconds."""

    duration_us: int = 0
    need_page_us: float = 0.0
    met_page_us: float = 0.0
    stall_us: int = 0
    unmet_us: int = 0
    """While some guest had less than it needed."""
    overcommitted_us: int = 0
    """While all guests together needed more than pool less reserve: no policy can help that."""
    swapped_out_pages: int = 0
    back_and_forth_pages: int = 0
    turns: int = 0
    guest_us: int = 0
    """Guests times the time that they ran."""
    fairness_us: int = 0
    fairness_sum: float = 0.0
    kills: int = 0
    satisfied_us: list[int] = field(default_factory=list)
    """How long each request waited that was satisfied."""
    withdrawn_us: list[int] = field(default_factory=list)
    """That ended because its guest came to need less."""
    open_us: list[int] = field(default_factory=list)
    """That was there at the end."""
    counts: Counts = field(default_factory=Counts)
    samples: list[Sample] = field(default_factory=list)


class Meter:
    """Watches one host. Call `passed` before an event changes anything, `look` after it has."""

    def __init__(self, host: HostState, samples_every_us: int | None = None) -> None:
        self._host = host
        self._every_us = samples_every_us
        self._next_sample_us = 0
        self.totals = Totals(counts=host.counts)
        count = len(host.traits.names)
        self._now_us = 0
        self._need = self._met = self._waits = self._runs = 0
        self._overcommitted = False
        self._fairness: float | None = None
        self._since_us = np.full(count, NEVER_US)
        self._first: Pages = np.zeros(count, np.int64)
        self._last: Pages = np.zeros(count, np.int64)
        self._travelled: Pages = np.zeros(count, np.int64)
        self._extreme: Pages = np.zeros(count, np.int64)
        self._direction = np.zeros(count, np.int64)
        self._ran = np.zeros(count, np.bool_)

    def passed(self, now_us: int) -> None:
        """Time has passed until `now_us`, in the state of the last look."""
        span_us, totals = now_us - self._now_us, self.totals
        self._now_us = now_us
        if not span_us:
            return
        totals.duration_us += span_us
        totals.need_page_us += self._need * span_us
        totals.met_page_us += self._met * span_us
        totals.stall_us += self._waits * span_us
        totals.guest_us += self._runs * span_us
        totals.unmet_us += span_us * (self._met < self._need)
        totals.overcommitted_us += span_us * self._overcommitted
        if self._fairness is not None:
            totals.fairness_us += span_us
            totals.fairness_sum += self._fairness * span_us

    def look(self, now_us: int, *, needs_changed: bool = False) -> None:
        """The state from `now_us` on; `needs_changed`: what ends now was withdrawn, not met."""
        host = self._host
        quota = host.books.quota
        wanted = self.wanted
        met = np.minimum(wanted, quota)
        self._need, self._met = int(wanted.sum()), int(met.sum())
        self._waits = int(np.count_nonzero(host.dry))
        self._runs = int(np.count_nonzero(host.running))
        self._overcommitted = self._need > host.books.pool_pages - host.books.reserve_pages
        if needs_changed:
            self._fairness = self._jain(wanted, met) if self._overcommitted else None
        self._follow_requests(wanted, quota, now_us, needs_changed)
        self._follow_turns(quota)
        if self._every_us is not None and now_us >= self._next_sample_us:
            self._next_sample_us = now_us + self._every_us
            self.totals.samples.append(
                Sample(
                    now_us, self._need, int(quota.sum()), self._need - self._met,
                    host.books.reserve_left_pages, int(host.guests.swapped.sum()),
                )
            )  # fmt: skip

    @property
    def wanted(self) -> Pages:
        """What each running guest needs; kept heap counts, since its owner would swap it."""
        guests = self._host.guests
        both = np.minimum(guests.anon + guests.want_cache, self._host.traits.assigned)
        return np.where(self._host.running, both, 0)

    def end(self, now_us: int) -> Totals:
        """All that was found out by `now_us`."""
        self.passed(now_us)
        totals, host = self.totals, self._host
        still = self._since_us[self._since_us != NEVER_US]
        totals.open_us = (now_us - still).tolist()
        totals.swapped_out_pages = int(host.guests.swapped_out_total.sum())
        totals.kills = int(host.guests.kills.sum())
        # Way made, less the way that was needed to get from where it was to where it is.
        needed = np.abs(self._last - self._first)
        totals.back_and_forth_pages = int((self._travelled - needed).sum()) // 2
        return totals

    def _follow_requests(
        self, wanted: Pages, quota: Pages, now_us: int, needs_changed: bool
    ) -> None:
        lack = wanted - quota
        asked = self._since_us != NEVER_US
        begins = lack >= np.maximum(REQUEST_PAGES, REQUEST_SHARE * wanted)
        asks = np.where(asked, lack > 0, begins)
        if (asks == asked).all():
            return
        ended = asked & ~asks
        totals = self.totals
        waited = totals.withdrawn_us if needs_changed else totals.satisfied_us
        waited += (now_us - self._since_us[ended]).tolist()
        self._since_us[ended] = NEVER_US
        self._since_us[asks & ~asked] = now_us

    def _follow_turns(self, quota: Pages) -> None:
        running = self._host.running
        began = running & ~self._ran
        self._ran = running.copy()
        if began.any():
            for column in (self._first, self._last, self._extreme):
                column[began] = quota[began]
        moved = np.where(running, quota - self._last, 0)
        if not moved.any():
            return
        self._travelled += np.abs(moved)
        self._last = np.where(running, quota, self._last)
        back = np.where(running, quota - self._extreme, 0)
        way = np.sign(back)
        turns = (np.abs(back) > TURN_PAGES) & (way != self._direction)
        self.totals.turns += int(np.count_nonzero(turns & (self._direction != 0)))
        self._direction[turns] = way[turns]
        further = turns | (way == self._direction)
        self._extreme = np.where(further & running, quota, self._extreme)

    def _jain(self, wanted: Pages, met: Pages) -> float | None:
        """Jain's index of what each guest got of its fair part: 1 is fair, 1/n all to one.

        The fair part is weighted max-min fairness: by shares, between reservation and need.
        """
        host = self._host
        rows = np.flatnonzero(host.running & (wanted > 0))
        low = np.minimum(host.traits.reservation[rows], wanted[rows])
        total = host.books.pool_pages - host.books.reserve_pages
        fair = fill(total, low, wanted[rows], host.traits.shares[rows])
        parts = met[rows] / np.maximum(fair, 1)
        squares = float((parts * parts).sum())
        return float(parts.sum()) ** 2 / (rows.size * squares) if squares else None


Figures = dict[str, Any]
"""By name, with the unit in the name; None where there is nothing to tell."""


def figures_of(hosts: Sequence[Totals]) -> Figures:
    """The figures of one host, or of many as one fleet."""
    every = list(hosts)

    def total(name: str) -> Any:
        return sum(getattr(totals, name) for totals in every)

    def counted(name: str) -> int:
        return sum(getattr(totals.counts, name) for totals in every)

    satisfied, withdrawn, still, starts = (
        np.concatenate([np.array(spans, np.int64) for spans in kind])
        for kind in zip(
            *(
                (one.satisfied_us, one.withdrawn_us, one.open_us, one.counts.start_us)
                for one in every
            ),
            strict=True,
        )
    )
    # Those that were never satisfied count with the time that they waited: leaving them out would
    # make the worst policy look like the quickest.
    waits = np.concatenate((satisfied, withdrawn, still))
    guest_hours = total("guest_us") / SECOND_US / 3600
    fairness_us = total("fairness_us")
    return {
        "demand_met_percent": _ratio(100 * total("met_page_us"), total("need_page_us")),
        "stall_s": total("stall_us") / SECOND_US,
        "would_be_swaps_bytes": bytes_of(total("swapped_out_pages")),
        "oom_kills": total("kills"),
        "unmet_s": total("unmet_us") / SECOND_US,
        "shortage_s": total("overcommitted_us") / SECOND_US,
        "moved_bytes": bytes_of(counted("claimed_pages")),
        "lent_bytes": bytes_of(counted("lent_pages")),
        "fairness": _ratio(total("fairness_sum"), fairness_us),
        "turns_per_guest_hour": _ratio(total("turns"), guest_hours),
        "back_and_forth_bytes": bytes_of(total("back_and_forth_pages")),
        "requests": int(waits.size),
        "requests_satisfied": int(satisfied.size),
        "requests_withdrawn": int(withdrawn.size),
        "requests_open": int(still.size),
        "request_p50_s": _percentile_s(waits, 50),
        "request_p99_s": _percentile_s(waits, 99),
        "launches": counted("launches"),
        "launches_refused": counted("launches_refused"),
        "start_p50_s": _percentile_s(starts, 50),
        "start_p99_s": _percentile_s(starts, 99),
        "asked": counted("asked"),
        "refused": counted("refused"),
        "dry_events": counted("dry_events"),
        "stuck": counted("stuck"),
        "plans": counted("plans"),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None


def _percentile_s(spans_us: "np.ndarray[Any, np.dtype[np.int64]]", percent: int) -> float | None:
    if not spans_us.size:
        return None
    # The smallest span that so many per cent are not above: one that happened, not a mean of two.
    return float(np.percentile(spans_us, percent, method="inverted_cdf")) / SECOND_US
