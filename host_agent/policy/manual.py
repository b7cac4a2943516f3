"""Nothing moves but by command: plain KVM.

A VM under plain KVM has a balloon, and nobody who decides about it: it keeps the size that it has
until somebody gives QEMU's monitor another one (`balloon`). Here that is `balloon set --target` and
`--quota`, which pin a guest; what is not pinned keeps its quota:

    quota' = pin       where there is one, within reservation and assigned size
    quota' = startup   for a guest that starts, as far as there is room
    quota' = quota     else

all in pages. Demand counts for nothing, except that a shortage is said.

Source: QEMU, the monitor's command `balloon` (qapi/machine.json); virtio_balloon does what it says.

What differs: a plan may never add up to more than pool minus reserve. A guest that ran dry has been
lent from the reserve without a command, and this has to be paid back: by shares, and never out of a
reservation.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from host_agent.ledger.columns import HostColumns
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, shortage_pages


@dataclass(frozen=True, slots=True)
class ManualSettings:
    """`manual` has no options."""


DEFAULTS: Final = ManualSettings()


@dataclass(frozen=True, slots=True)
class Manual:
    """The policy `manual`, as described above. It needs no memory."""

    settings: ManualSettings = DEFAULTS

    name: ClassVar[str] = "manual"
    source: ClassVar[str] = "plain KVM: the command `balloon` of QEMU's monitor"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """Everybody keeps what it has, but for pins and those that start."""
        kept = keep_promises(host, host.quota_pages)
        plan = Plan(host.names, kept.quota_pages, shortage_pages(host))
        return Decision(
            plan,
            None,
            Explanation(
                host.names,
                lambda: Details(
                    host=(("shareable", host.shareable_pages, "pages"),),
                    guests=(
                        ("pinned", host.pinned_pages, "pages"),
                        ("quota now", host.quota_pages, "pages"),
                        ("quota wanted", kept.quota_pages, "pages"),
                    ),
                    rules=kept.rules,
                    otherwise="no command: it keeps what it has",
                ),
            ),
        )
