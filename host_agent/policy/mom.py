"""oVirt's MOM: all guests shrink while the host is short of free memory, and grow while it is not.

With, in pages, cur the guest's quota, used what it uses of it, min its reservation, max its
maximum, and with h the free part of the host (0 to 1):

    h < 0.20    all shrink:
                    g   = h                  (0.20 * h / 0.20)
                    g   = h - 0.05           where h <= 0.05: below 0 the guests have to swap
                    new = max(0.95 * cur, max(min, used + g * cur))
    h >= 0.20   all grow:
                    new = min(max, max(1.05 * cur, max(min, used + 0.20 * cur)))

and nothing where |new - cur| <= 0.0025 * cur, nor where a shrinking guest would grow.

Source: oVirt MOM, doc/balloon.rules; the numbers are its `defvar`s.

What differs from it, and why:
- It takes the lesser of `balloon_min` and used + g * cur, which lets a guest shrink below its
  minimum; here it is the larger, since a minimum is a promise.
- Its growing branch names a variable that only the shrinking one sets; the 20 % that it is meant to
  be is taken.
- It averages statistics over its last samples. The driver's are taken as they are.
- 5 % of growth for everybody can take the host past the threshold, and the next run takes it back,
  for ever. Here growth ends where h reaches 0.20; what there is of it goes by shares.
- A guest that does not say how much it uses is left alone (MOM: a mandatory statistic is absent).
- MOM runs at an interval; the agent decides whenever something has changed. So a run here is the
  first decision after the interval: those between repeat what the run wanted.
- Shrinking is urgent, and where h <= 0.05 guests may swap: MOM sets the size of the balloon, and
  here the guest has a say.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Bools, HostColumns, Ints
from host_agent.policy.carried import LastRun
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.fill import fill
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, shortage_pages
from protocol.vocabulary import Urgency


@dataclass(frozen=True, slots=True)
class MomSettings:
    """The options of `mom`, with the values of balloon.rules."""

    pressure_threshold: float = 0.20
    """Free part of the host below which guests shrink."""
    pressure_critical: float = 0.05
    """At or below it they shrink into swapping."""
    min_guest_free: float = 0.20
    """Part of its quota that a guest likes to have free while there is no pressure."""
    max_change: float = 0.05
    """Part of its quota by which a guest changes at once, at most."""
    min_change: float = 0.0025
    """Part of its quota up to which a change is not worth the trouble."""
    interval_s: float = 10.0
    """From one run to the next."""

    def __post_init__(self) -> None:
        """Parts are parts, and the critical one is the lesser."""
        for name in ("pressure_threshold", "min_guest_free", "max_change", "min_change"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1")
        if not 0 <= self.pressure_critical <= self.pressure_threshold:
            raise ValueError("pressure_critical must lie between 0 and pressure_threshold")
        if self.interval_s < 0:
            raise ValueError("interval_s can't be negative")


DEFAULTS: Final = MomSettings()


@dataclass(frozen=True, slots=True, eq=False)
class _Wish:
    """What the formula wants, and from what."""

    pages: Ints
    used_pages: Ints
    guest_free_part: float
    acts: Bools
    """Free hand, with the statistics that it takes."""
    small: Bools
    """The change is not worth the trouble."""


@dataclass(frozen=True, slots=True)
class Mom:
    """The policy `mom`, as described above. It remembers its last run."""

    settings: MomSettings = DEFAULTS

    name: ClassVar[str] = "mom"
    source: ClassVar[str] = "oVirt MOM, doc/balloon.rules"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """All shrink, or all grow; or what the last run wanted."""
        settings = self.settings
        last: LastRun | None = memory
        free_part = host_free_part(host)
        shrinks = free_part < settings.pressure_threshold
        wish = self._shrink(host, free_part) if shrinks else self._grow(host)
        threshold_pages = int(np.ceil(settings.pressure_threshold * host.shareable_pages))
        repeats = last is not None and now_s - last.run_s < settings.interval_s
        if last is None or not repeats:
            wanted = wish.pages if shrinks else _up_to(host, wish.pages, threshold_pages)
            last = LastRun(now_s, host.names, host.quota_pages, wanted)
        else:
            wanted = last.again(host)
        kept = keep_promises(host, wanted)
        critical = free_part <= settings.pressure_critical
        plan = Plan(
            host.names,
            kept.quota_pages,
            shortage_pages(host, threshold_pages),
            urgency=Urgency.SHORT if shrinks else None,
            may_swap=~host.fixed if critical else None,
        )

        def details() -> Details:
            branch = (
                "memory is critically short: it shrinks into swapping"
                if critical
                else "the host is short of free memory: all shrink"
                if shrinks
                else "the host has free memory: all grow"
            )
            return Details(
                host=(
                    ("host free", free_part, "fraction"),
                    ("guest free", wish.guest_free_part, "fraction"),
                    ("shareable", host.shareable_pages, "pages"),
                ),
                guests=(
                    ("used", host.usage_pages, "pages"),
                    ("min", host.reservation_pages, "pages"),
                    ("max", host.most_pages, "pages"),
                    ("cur", host.quota_pages, "pages"),
                    ("new", wish.pages, "pages"),
                    ("quota wanted", kept.quota_pages, "pages"),
                ),
                rules=(
                    *kept.rules,
                    (
                        np.ones(len(host), np.bool_) & repeats,
                        "between two runs: what the last one wanted",
                    ),
                    (~wish.acts, "how much it uses is unknown: it is left alone"),
                    (wish.small, "the change is too small to be worth it"),
                    (wanted < wish.pages, "cut: growth ends at the pressure threshold"),
                ),
                otherwise=branch,
            )

        return Decision(plan, last, Explanation(host.names, details))

    def _shrink(self, host: HostColumns, free_part: float) -> _Wish:
        settings = self.settings
        if free_part <= settings.pressure_critical:
            guest_free_part = free_part - settings.pressure_critical
        else:
            guest_free_part = settings.min_guest_free * free_part / settings.pressure_threshold
        current = host.quota_pages
        used = host.usage_pages.or_else(current)
        ideal = np.maximum(host.reservation_pages, used + guest_free_part * current)
        new = np.floor(np.maximum((1 - settings.max_change) * current, ideal)).astype(np.int64)
        return self._worth_it(host, new, used, guest_free_part, ~(new <= current))

    def _grow(self, host: HostColumns) -> _Wish:
        settings = self.settings
        current = host.quota_pages
        used = host.usage_pages.or_else(current)
        ideal = np.maximum(host.reservation_pages, used + settings.min_guest_free * current)
        new = np.floor(np.maximum((1 + settings.max_change) * current, ideal)).astype(np.int64)
        new = np.minimum(new, host.most_pages)
        return self._worth_it(host, new, used, settings.min_guest_free, new < current)

    def _worth_it(
        self, host: HostColumns, new: Ints, used: Ints, guest_free_part: float, wrong_way: Bools
    ) -> _Wish:
        current = host.quota_pages
        acts = ~host.fixed & host.usage_pages.known
        small = np.abs(new - current) <= self.settings.min_change * current
        pages = np.where(acts & ~small & ~wrong_way, new, current)
        return _Wish(pages, used, guest_free_part, acts, acts & (small | wrong_way))


def host_free_part(host: HostColumns) -> float:
    """What is free of what is shared out, 0 to 1; a host of nothing is short of everything."""
    shareable = host.shareable_pages
    if shareable <= 0:
        return 0.0
    return max(shareable - int(host.quota_pages.sum()), 0) / shareable


def _up_to(host: HostColumns, wanted: Ints, kept_free_pages: int) -> Ints:
    """`wanted`, but growth cut by shares to what leaves so much of the host free."""
    current = host.quota_pages
    room = max(host.shareable_pages - int(current.sum()) - kept_free_pages, 0)
    total = int(np.minimum(wanted, current).sum()) + room
    if int(wanted.sum()) <= total:
        return wanted
    return fill(total, np.minimum(wanted, current), wanted, host.shares)
