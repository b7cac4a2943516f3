"""Meta's senpai: probe how little a guest needs, by how long it stalls for want of memory.

Each guest by itself, whatever the others do. `integral` adds up for how many seconds its tasks have
stalled; the target is to stall 10 ms in 6 s. With x the guest's quota in pages:

    integral > target                     back off:
        err = integral / target;  adj = min((err / 20)^2 * 1.00, 1.00);  x' = x + x * adj
    else, 6 s after the last change       probe:
        err = target / integral;  adj = min((err / 10)^2 * 0.01, 0.01);  x' = x - x * adj

After either, the integral begins at 0 again. So a guest without stalls loses 1 % every 6 s, and one
that stalls 200 ms within 6 s has its quota doubled at once.

Source: facebookincubator/senpai, senpai.py. 20 and 10 are its `coeff_backoff` and `coeff_probe`,
1.00 and 0.01 its `max_backoff` and `max_probe`.

What differs from it, and why:
- It works on memory.high, a wall that slows a guest down; a quota is a hard limit here. So a guest
  that runs dry counts as stalled for as long as it is dry.
- Stalls are the kernel's (PSI, `some`). cgroup v1 has none: there each page of evicted cache that
  is read again counts as `refault_cost_s` of stall, which is an estimate. A guest of whom neither
  is known is left alone, as senpai does not start without PSI.
- It counts ticks of 1 s and decides at a tick; here time is what the clock says between decisions.
- It begins at what a guest uses now; here at its quota, since a hard limit at usage would leave no
  room to breathe. Its `min_size` and `max_size` are the guest's reservation and maximum.
- It never looks at the host. Here growth is cut where the quotas would exceed pool minus reserve.
- What a probe takes is asked for urgently, since the driver's own estimate of its demand would keep
  it from being found out.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Bools, Floats, HostColumns
from host_agent.policy.carried import Carried, LastRun
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, shortage_pages
from protocol.vocabulary import Urgency

LEAST_INTEGRAL_S: Final = 1e-6
"""As senpai divides: by at least a microsecond."""


@dataclass(frozen=True, slots=True)
class SenpaiSettings:
    """The options of `senpai`, with its own defaults."""

    interval_s: float = 6.0
    """From a change to the next probe."""
    stall_s: float = 0.010
    """The stall to aim at, within an interval."""
    max_probe: float = 0.01
    max_backoff: float = 1.0
    coeff_probe: float = 10.0
    """Probing is at its most where the stall is this part of what is aimed at."""
    coeff_backoff: float = 20.0
    """Backing off is at its most where the stall is so many times what is aimed at."""
    refault_cost_s: float = 100e-6
    """Stall for each page read again, where the kernel measures none: a read from a fast disk."""

    def __post_init__(self) -> None:
        """Nothing is divided by zero, and a guest is not probed away at once."""
        for name in ("interval_s", "stall_s", "coeff_probe", "coeff_backoff"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        if not 0 < self.max_probe < 1:
            raise ValueError("max_probe must lie between 0 and 1")
        for name in ("max_backoff", "refault_cost_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative")


DEFAULTS: Final = SenpaiSettings()


@dataclass(frozen=True, slots=True, eq=False)
class SenpaiMemory:
    """What is known of each guest from the decisions before."""

    last: LastRun
    """The last decision."""
    stall_total_s: Floats
    """NaN where it was unknown."""
    measured: Bools
    """The total was the kernel's, not an estimate."""
    integral_s: Floats
    probe_s: Floats
    """When the next probe is due, on the clock of `now_s`."""


@dataclass(frozen=True, slots=True)
class Senpai:
    """The policy `senpai`, as described above."""

    settings: SenpaiSettings = DEFAULTS

    name: ClassVar[str] = "senpai"
    source: ClassVar[str] = "facebookincubator/senpai, senpai.py"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """Back off where guests stall, probe where they have not for a while."""
        settings = self.settings
        before: SenpaiMemory = self._at_first(host, now_s) if memory is None else memory
        carried = Carried(before.last.names, host.names)
        fresh = self._at_first(host, now_s)
        last_total_s = carried.column(before.stall_total_s, fresh.stall_total_s)
        was_measured = carried.column(before.measured, fresh.measured)
        integral_s = carried.column(before.integral_s, fresh.integral_s)
        probe_s = carried.column(before.probe_s, fresh.probe_s)

        total_s, measured = self._stall_total_s(host)
        grown_s = total_s - last_total_s
        comparable = (measured == was_measured) & np.isfinite(grown_s) & (grown_s > 0)
        dry_s = np.where(host.dry, max(now_s - before.last.run_s, 0.0), 0.0)
        integral_s = integral_s + np.maximum(np.where(comparable, grown_s, 0.0), dry_s)

        knows = np.isfinite(total_s)
        acts = ~host.fixed & host.has_driver
        backs_off = acts & (integral_s > settings.stall_s)
        probes = acts & ~backs_off & knows & ~host.dry & (now_s >= probe_s)
        factor = self._factor(integral_s, backs_off, probes)
        stepped = np.floor(host.quota_pages * (1 + factor)).astype(np.int64)
        changes = backs_off | probes
        wanted = np.where(changes, stepped, before.last.again(host))
        wanted = np.where(acts & ~knows & ~backs_off, host.quota_pages, wanted)

        kept = keep_promises(host, wanted)
        plan = Plan(
            host.names,
            kept.quota_pages,
            shortage_pages(host),
            urgency=Urgency.SHORT if np.any(kept.quota_pages < host.quota_pages) else None,
        )
        after = SenpaiMemory(
            LastRun(now_s, host.names, host.quota_pages, wanted),
            total_s,
            measured,
            np.where(changes, 0.0, integral_s),
            np.where(changes, now_s + settings.interval_s, probe_s),
        )

        def details() -> Details:
            return Details(
                host=(
                    ("stall aimed at", settings.stall_s, "s"),
                    ("interval", settings.interval_s, "s"),
                ),
                guests=(
                    ("integral", integral_s, "s"),
                    ("stall is measured", measured, ""),
                    ("next probe in", np.maximum(probe_s - now_s, 0.0), "s"),
                    ("adjustment", factor, "fraction"),
                    ("quota now", host.quota_pages, "pages"),
                    ("quota wanted", kept.quota_pages, "pages"),
                ),
                rules=(
                    *kept.rules,
                    (backs_off, "it stalls for more than what is aimed at: back off"),
                    (probes, "it stalls for less than what is aimed at: probe"),
                    (~knows, "how long it stalls is unknown: it is left alone"),
                    (wanted != host.quota_pages, "on its way to what was wanted last"),
                ),
                otherwise="the next probe is not due yet",
            )

        return Decision(plan, after, Explanation(host.names, details))

    def _at_first(self, host: HostColumns, now_s: float) -> SenpaiMemory:
        """The memory of guests that are seen for the first time."""
        total_s, measured = self._stall_total_s(host)
        count = len(host)
        return SenpaiMemory(
            LastRun(now_s, host.names, host.quota_pages, host.quota_pages),
            total_s,
            measured,
            np.zeros(count),
            np.full(count, now_s + self.settings.interval_s),
        )

    def _stall_total_s(self, host: HostColumns) -> tuple[Floats, Bools]:
        """How long each guest has stalled in all, NaN if unknown; and where that was measured."""
        refaults = host.refault_pages_total
        estimated = np.where(refaults.known, refaults.values * self.settings.refault_cost_s, np.nan)
        return host.pressure_some_total_s.or_else(estimated), host.pressure_some_total_s.known

    def _factor(self, integral_s: Floats, backs_off: Bools, probes: Bools) -> Floats:
        """By which part of its quota each guest changes."""
        settings = self.settings
        over = integral_s / settings.stall_s
        up = np.minimum(
            (over / settings.coeff_backoff) ** 2 * settings.max_backoff, settings.max_backoff
        )
        under = settings.stall_s / np.maximum(integral_s, LEAST_INTEGRAL_S)
        down = np.minimum(
            (under / settings.coeff_probe) ** 2 * settings.max_probe, settings.max_probe
        )
        factor: Floats = np.where(backs_off, up, np.where(probes, -down, 0.0))
        return factor
