"""Hyper-V's dynamic memory: every guest gets its demand and a buffer, within its range.

VMs start small and grow from the pool. In pages:

    target   = demand * (1 + buffer / 100)   within minimum and maximum; buffer 20 %
    pressure = 100 * demand / assigned       in percent; `assigned` is what it has now, its quota

    status   OK       it has its target
             Low      it has its demand, but not all of its buffer (pressure up to 100)
             Warning  it has less than its demand (pressure above 100)

minimum is the guest's reservation, but at least the floor by its size (M MiB of RAM):

    M < 128     8 + M/2        M < 2048   104 + M/8       else   488 + M/32
    M < 512    40 + M/4        M < 8192   232 + M/16

maximum is its maximum, else its assigned size. A guest starts with `startup`.

Where the targets do not fit the host, demand comes before buffers: each part is divided by weight
(shares), up to the demands if these do not fit, else up to the targets. While a guest runs, its
minimum may only fall and its maximum only rise (`range_fault`), since what it was told at its
start is what it has counted on.

Sources: Microsoft, "Hyper-V Dynamic Memory Overview" and "Implementing and Configuring Dynamic
Memory" (buffer, weight, range, status); Linux, drivers/hv/hv_balloon.c, compute_balloon_floor.

What differs from it, and why:
- Hyper-V takes the committed memory for a guest's demand; here it is the driver's own estimate,
  page cache in use included.
- How Hyper-V ranks weights against each other isn't published. Here it is weighted max-min
  fairness.
- When it takes back a buffer that nobody else needs isn't published either. Here it is at once,
  but differences up to `step` are left alone, and while the host has all that is wanted up to
  `slack_percent` of the buffer as well: to take up what demand swings by is what a buffer is for,
  and in proportion to the guest's size, which a step is not.
- A guest that does not say what it needs keeps what it has. There is no Smart Paging.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Bools, Floats, HostColumns, Ints, Maybe
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.fill import fill
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, starting
from protocol.guest_floor import FLOOR_PIECES, LARGEST_FLOOR
from protocol.units import MIB, PAGE_BYTES, pages_of


@dataclass(frozen=True, slots=True)
class HypervSettings:
    """The options of `hyperv`."""

    buffer_percent: float = 20.0
    """What a guest is to have beyond its demand, unless it has a buffer of its own."""
    step_bytes: int = 2 * MIB
    """Differences up to this are not worth a move: about what small guests' estimates swing by."""
    slack_percent: float = 10.0
    """Of its buffer: while the host has all that is wanted, differences up to this neither."""

    def __post_init__(self) -> None:
        """Hyper-V's own range, and a step that is a size."""
        if not 0 <= self.buffer_percent <= 2000:
            raise ValueError("buffer_percent must lie between 0 and 2000")
        if self.step_bytes < 0:
            raise ValueError("step can't be negative")
        if not 0 <= self.slack_percent <= 100:
            raise ValueError("slack_percent must lie between 0 and 100")


DEFAULTS: Final = HypervSettings()


@dataclass(frozen=True, slots=True, eq=False)
class _Wish:
    """What the formula wants, and from what. Pages."""

    minimum: Ints
    demand: Ints
    """Within the range."""
    buffer_percent: Floats
    target: Ints
    divided: Ints
    """The target, or what there is of it."""
    shortage: int
    near: Bools
    """Near enough to what it should have."""


@dataclass(frozen=True, slots=True)
class Hyperv:
    """The policy `hyperv`, as described above. It needs no memory."""

    settings: HypervSettings = DEFAULTS

    name: ClassVar[str] = "hyperv"
    source: ClassVar[str] = "Hyper-V dynamic memory; Linux, drivers/hv/hv_balloon.c"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """Demand and buffer for everybody, or by weight what there is of them."""
        wish = self._wish(host)
        kept = keep_promises(
            host, np.where(wish.near, host.quota_pages, wish.divided), decides_starts=True
        )
        plan = Plan(host.names, kept.quota_pages, wish.shortage)
        return Decision(
            plan, None, Explanation(host.names, lambda: _details(host, wish, kept.quota_pages))
        )

    def range_fault(
        self, reservation_bytes: tuple[int, int], maximum_bytes: tuple[int, int]
    ) -> str | None:
        """The minimum of a running guest may only fall, its maximum only rise."""
        if reservation_bytes[1] > reservation_bytes[0]:
            return "the reservation of a running VM may only fall"
        if maximum_bytes[1] < maximum_bytes[0]:
            return "the maximum of a running VM may only rise"
        return None

    def _wish(self, host: HostColumns) -> _Wish:
        free, most = ~host.fixed, host.most_pages
        minimum = np.minimum(np.maximum(host.reservation_pages, floor_pages(host)), most)
        begins = starting(host)
        minimum = np.where(begins, host.reservation_pages, minimum)
        buffer = host.buffer_percent.or_else(self.settings.buffer_percent)
        told = host.demand_pages.or_else(host.quota_pages)
        known = host.demand_pages.known & ~begins
        told = np.where(begins, host.startup_pages.or_else(told), told)
        demand = np.clip(told, minimum, most)
        buffered = np.floor(told * (1 + np.where(known, buffer, 0.0) / 100)).astype(np.int64)
        target = np.clip(buffered, minimum, most)

        left = host.left_pages
        needs, wants = int(demand[free].sum()), int(target[free].sum())
        divided = target.copy()
        if wants > left:
            low, high = (minimum, demand) if needs > left else (demand, target)
            divided[free] = fill(left, low[free], high[free], host.shares[free])
        step = np.full(len(host), pages_of(self.settings.step_bytes))
        if wants <= left:
            slack = (target - demand) * (self.settings.slack_percent / 100)
            step = np.maximum(step, slack.astype(np.int64))
        step = np.where((host.quota_pages < minimum) | begins, 0, step)
        near = np.abs(divided - host.quota_pages) <= step
        return _Wish(minimum, demand, buffer, target, divided, max(needs - left, 0), near)


def floor_pages(host: HostColumns) -> Ints:
    """The floor by size of each guest, as its driver has it (guest_floor.py)."""
    size_bytes = host.assigned_pages * PAGE_BYTES
    base, divisor = (np.full(len(host), value, np.int64) for value in LARGEST_FLOOR)
    for below, piece_base, piece_divisor in reversed(FLOOR_PIECES):
        base = np.where(size_bytes < below, piece_base, base)
        divisor = np.where(size_bytes < below, piece_divisor, divisor)
    # Rounded up to a page: what the driver keeps is no less.
    floor: Ints = np.minimum(host.assigned_pages, -(-(base + size_bytes // divisor) // PAGE_BYTES))
    return floor


def _details(host: HostColumns, wish: _Wish, quotas: Ints) -> Details:
    now = host.quota_pages
    known = host.demand_pages
    told = known.or_else(now)
    pressure = Maybe(100 * told / np.maximum(now, 1), known.known & (now > 0))
    kept = keep_promises(host, np.where(wish.near, now, wish.divided), decides_starts=True)
    return Details(
        host=(("shareable", host.shareable_pages, "pages"),),
        guests=(
            ("demand", known, "pages"),
            ("buffer", wish.buffer_percent, "percent"),
            ("minimum", wish.minimum, "pages"),
            ("maximum", host.most_pages, "pages"),
            ("weight", host.shares, "shares"),
            ("target", wish.target, "pages"),
            ("pressure", pressure, "percent"),
            ("quota now", now, "pages"),
            ("quota wanted", quotas, "pages"),
        ),
        rules=(
            *kept.rules,
            (~known.known, "what it needs is unknown: it keeps what it has"),
            (quotas < told, "Warning: less than its demand; demand is divided by weight"),
            (quotas < wish.target, "Low: not all of its buffer; buffers are divided by weight"),
            (wish.near & (now != wish.divided), "OK: near enough to its target"),
            (wish.target <= wish.minimum, "OK: its minimum is more than demand and buffer"),
            (wish.target >= host.most_pages, "OK: its maximum is less than demand and buffer"),
        ),
        otherwise="OK: demand and buffer",
    )
