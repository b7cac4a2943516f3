"""Xen's squeezed: every guest has the same part of the way from its minimum to its maximum.

In pages, with actual the guest's quota, dmin its reservation, dmax its maximum, and inaccuracy how
far actual and target may lie apart and still count as equal (a frame of its balloon):

    gamma  = clamp((free + sum(max(0, actual - dmin - 2 * inaccuracy)) - goal)
                   / sum(dmax - dmin), 0, 1)
    target = dmin + gamma * (dmax - dmin)

over the guests that take part, where free is what is in nobody's quota and goal what is to be kept
free: the option `free`. What named clients have reserved counts as no part of the host, under this
policy as under any other (ledger/client_reservations.py), which comes to the same as a larger goal.
Demand counts for nothing.

Two phases: while anybody has more than its target, only those targets are set, and nobody grows;
when none is left, all are set.

A guest that should give and has made no progress for 5 s is left out of this run: it is still asked
for what it owes, but the others are squeezed as if nothing will come. A run ends when nobody who
takes part has anything to give. After 20 s without progress it is uncooperative: left out
of all runs, until it gives something.

Source: xapi, ocaml/squeezed/lib/squeeze.ml (Proportional, Stuckness_monitor, Squeezer) and
src/memory_server.ml.

What differs from it, and why:
- It counts growing guests as stuck as well. Here growth is granted by the host and waits for
  nobody, so that only giving is watched.
- A guest that has less than its minimum (one that starts) gets it before the rest is divided: xapi
  reserves the memory of a VM before it starts it.
- `free` is 0 by default, since the host reserve is kept beside it; squeezed keeps some MiB for the
  hypervisor.
- Freeing is urgent: squeezed sets the size of the balloon, and here the guest has a say.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Bools, Floats, HostColumns, Ints
from host_agent.policy.carried import Carried
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, need_pages, shortage_pages, starting
from protocol.units import pages_of
from protocol.vocabulary import Urgency


@dataclass(frozen=True, slots=True)
class SqueezedSettings:
    """The options of `squeezed`."""

    free_bytes: int = 0
    """To be kept free, beside the host reserve."""
    stuck_s: float = 5.0
    """Without progress for so long, a guest is left out of a run."""
    uncooperative_s: float = 20.0
    """Without progress for so long, it is left out until it gives something."""

    def __post_init__(self) -> None:
        """Sizes and times in order."""
        if self.free_bytes < 0:
            raise ValueError("free can't be negative")
        if not 0 < self.stuck_s <= self.uncooperative_s:
            raise ValueError("stuck_s must be above 0 and at most uncooperative_s")


DEFAULTS: Final = SqueezedSettings()


@dataclass(frozen=True, slots=True, eq=False)
class SqueezedMemory:
    """How each guest has done what it was told."""

    names: tuple[str, ...] = ()
    actual_pages: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """At the last decision."""
    target_pages: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of the last decision."""
    progress_s: Floats = field(default_factory=lambda: np.zeros(0))
    """When it last came nearer to its target, or had nothing to do."""
    asked_s: Floats = field(default_factory=lambda: np.zeros(0))
    """The same, but not before the present run."""
    left_out: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    """Of this run."""


@dataclass(frozen=True, slots=True, eq=False)
class _Progress:
    """Who takes part, and since when the others have done nothing."""

    target_pages: Ints
    """Of the last decision."""
    progress_s: Floats
    asked_s: Floats
    left_out: Bools
    uncooperative: Bools


@dataclass(frozen=True, slots=True)
class Squeezed:
    """The policy `squeezed`, as described above."""

    settings: SqueezedSettings = DEFAULTS

    name: ClassVar[str] = "squeezed"
    source: ClassVar[str] = "xapi squeezed: squeeze.ml, memory_server.ml"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """Free first, then allocate."""
        before: SqueezedMemory = SqueezedMemory() if memory is None else memory
        actual = host.quota_pages
        inaccuracy = host.inaccuracy_pages.or_else(1)
        progress = self._watch(host, before, inaccuracy, now_s)
        out = progress.left_out | progress.uncooperative
        member = ~host.fixed & ~out
        goal = pages_of(self.settings.free_bytes)

        least = host.reservation_pages
        most = np.where(starting(host), need_pages(host), host.most_pages)
        missing = int(np.maximum(least - actual, 0)[member].sum())
        freeable = np.maximum(actual - least - 2 * inaccuracy, 0)
        free = host.shareable_pages - int(actual.sum())
        surplus = free + int(freeable[member].sum()) - goal - missing
        span = int((most - least)[member].sum())
        gamma = min(max(surplus / span, 0.0), 1.0) if span else 0.0
        target = least + np.floor(gamma * (most - least)).astype(np.int64)
        # Who is left out may give what it owes, but is given nothing.
        owed = np.clip(np.minimum(progress.target_pages, actual), least, host.most_pages)
        target = np.where(out, owed, target)

        frees = member & (target < actual - inaccuracy)
        freeing = bool(np.any(frees))
        wanted = np.where(frees | out, target, actual) if freeing else target
        near = member & (np.abs(target - actual) <= inaccuracy) & (actual >= least)
        wanted = np.where(near, actual, wanted)
        # A minimum is a promise: it waits for no phase.
        wanted = np.maximum(wanted, least)
        kept = keep_promises(host, wanted, decides_starts=True)
        plan = Plan(
            host.names,
            kept.quota_pages,
            shortage_pages(host, goal),
            urgency=Urgency.SHORT if freeing else None,
        )
        left_out = progress.left_out & freeing  # a run that is over leaves nobody out
        after = SqueezedMemory(
            host.names,
            actual,
            np.where(~host.fixed, kept.quota_pages, actual),
            progress.progress_s,
            np.where(progress.left_out & ~left_out, now_s, progress.asked_s),
            left_out,
        )

        def details() -> Details:
            every = np.ones(len(host), np.bool_)
            return Details(
                host=(
                    ("free", free, "pages"),
                    ("goal", goal, "pages"),
                    ("gamma", gamma, "fraction"),
                    ("phase", "freeing" if freeing else "allocating", ""),
                ),
                guests=(
                    ("dmin", least, "pages"),
                    ("dmax", most, "pages"),
                    ("inaccuracy", inaccuracy, "pages"),
                    ("actual", actual, "pages"),
                    ("freeable", freeable, "pages"),
                    ("without progress for", now_s - progress.progress_s, "s"),
                    ("target", target, "pages"),
                    ("quota wanted", kept.quota_pages, "pages"),
                ),
                rules=(
                    *kept.rules,
                    (progress.uncooperative, "uncooperative: left out until it gives something"),
                    (progress.left_out, "no progress: left out of this run"),
                    (near, "near enough to its target"),
                    (frees, "freeing: down to its part of the range"),
                    (every & freeing, "others are freeing: it waits for the allocating phase"),
                ),
                otherwise="allocating: its part of the range",
            )

        return Decision(plan, after, Explanation(host.names, details))

    def _watch(
        self, host: HostColumns, before: SqueezedMemory, inaccuracy: Ints, now_s: float
    ) -> _Progress:
        carried = Carried(before.names, host.names)
        actual, count = host.quota_pages, len(host)
        new = np.full(count, now_s)
        was = carried.column(before.actual_pages, actual)
        target = carried.column(before.target_pages, actual)
        progress_s = carried.column(before.progress_s, new)
        asked_s = carried.column(before.asked_s, new)
        left_out = carried.column(before.left_out, np.zeros(count, np.bool_))
        owes = ~host.fixed & (target < actual - inaccuracy)
        fine = ~owes | (actual < was)
        progress_s = np.where(fine, now_s, progress_s)
        asked_s = np.where(fine, now_s, asked_s)
        return _Progress(
            target,
            progress_s,
            asked_s,
            ~fine & (left_out | (now_s - asked_s > self.settings.stuck_s)),
            ~fine & (now_s - progress_s > self.settings.uncooperative_s),
        )
