"""The policy `even`: everybody gets the same, within reservation and size, and nothing in a hurry.

    even_i  = clamp(level, reservation_i, size_i), with one level for all: it uses up what there is
    quota_i = even_i, but at least now_i - rate * (seconds since the last decision)

All sizes are in pages of 4 KiB. The template of docs/writing_a_policy.md.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from host_agent.ledger.columns import HostColumns
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.fill import fill
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from protocol.units import MIB, pages_of


@dataclass(frozen=True, slots=True)
class EvenSettings:
    """The keys of the table `[policy.even]`."""

    rate_bytes: int = 64 * MIB
    """How much of a guest's quota goes away in a second, at most. The key is `rate`, a size."""

    def __post_init__(self) -> None:
        """What the type allows and the policy doesn't."""
        if self.rate_bytes < MIB:
            raise ValueError("rate must be 1MiB or more")


DEFAULTS = EvenSettings()


@dataclass(frozen=True, slots=True)
class Even:
    """Everybody gets the same. Its memory is the time of its last decision."""

    settings: EvenSettings = DEFAULTS

    name: ClassVar[str] = "even"
    source: ClassVar[str] = "the template of docs/writing_a_policy.md"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """The quotas that the guests of `host` should have."""
        seconds = 0.0 if memory is None else max(now_s - memory, 0.0)
        most_less = int(min(seconds, 3600.0) * pages_of(self.settings.rate_bytes))
        ours = ~host.fixed
        weights = np.ones(len(host), np.int64)

        even = host.fixed_pages
        even[ours] = fill(
            host.left_pages, host.reservation_pages[ours], host.assigned_pages[ours], weights[ours]
        )
        least = np.maximum(host.quota_pages - most_less, host.reservation_pages)
        if int(least[ours].sum()) > host.left_pages:
            least = host.reservation_pages  # the host reserve is owed: now it is urgent
        most = np.maximum(even, least)
        quotas = even.copy()
        quotas[ours] = fill(host.left_pages, least[ours], most[ours], weights[ours])

        def details() -> Details:
            return Details(
                host=(
                    ("left for those with a free hand", host.left_pages, "pages"),
                    ("most that may go", most_less, "pages"),
                ),
                guests=(
                    ("quota now", host.quota_pages, "pages"),
                    ("reservation", host.reservation_pages, "pages"),
                    ("even", even, "pages"),
                    ("quota wanted", quotas, "pages"),
                ),
                rules=(
                    (~ours, "it is pinned, or it can't be moved"),
                    (quotas > even, "it is on its way down, at the rate that is allowed"),
                    (quotas < even, "it waits for what the others give"),
                ),
                otherwise="it has the same as everybody, within its bounds",
            )

        return Decision(Plan(host.names, quotas), now_s, Explanation(host.names, details))
