"""What a policy answers: a quota for every guest, and how short the host is. Pages of 4 KiB."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from host_agent.ledger.columns import Bools, Ints
from protocol.vocabulary import Urgency


@dataclass(frozen=True, slots=True)
class QuotaTarget:
    """The quota that a guest should have."""

    name: str
    quota_pages: int
    entitled_pages: int
    """What it would get if every guest could be moved down to its reservation: differs from the
    quota while somebody can't be, and where the difference is too small to be worth a move."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A quota for each guest of the snapshot, in its order: ascending by name.

    The last fields say how the plan is to be carried out; most policies leave them as they are.
    """

    names: tuple[str, ...]
    quota_pages: Ints
    shortage_pages: int = 0
    """How much more is needed than there is; 0 when every need can be met. What can't be moved or
    is pinned counts as needed."""
    entitled_pages: Ints | None = None
    """As in QuotaTarget; None stands for the quotas themselves."""
    urgency: Urgency | None = None
    """How much the guests are to put up with. None leaves it to the agent, which finds a shortage
    and a guest that waits urgent; a lent reserve and a dry guest are urgent in any case."""
    block_growth: bool = False
    """Nobody gets more than it has, but for guests that run dry."""
    may_swap: Bools | None = None
    """Whose memory may go to swap space to reach its target, as far as the guest's configuration
    has swap for its balloon; None is everybody's where matters are urgent."""
    reclaim_outside: Bools | None = None
    """From whom memory is to be taken without asking how the guest is doing; None is nobody. This
    agent asks them as urgently as it can: a page is only free once its frame is claimed, and a
    frame is only there once the guest's driver has reserved it. Room is made from outside in any
    case (the workload's limit falls, and its kernel reclaims), for as much as the driver offers. To
    lower a limit with no frame behind it would make a quota that its balloon does not explain."""

    @classmethod
    def of(cls, targets: Iterable[QuotaTarget], shortage_pages: int = 0) -> "Plan":
        """The plan that consists of these targets."""
        listed = sorted(targets, key=lambda target: target.name)
        return cls(
            tuple(target.name for target in listed),
            np.array([target.quota_pages for target in listed], np.int64),
            shortage_pages,
            np.array([target.entitled_pages for target in listed], np.int64),
        )

    @property
    def targets(self) -> tuple[QuotaTarget, ...]:
        """The same, guest by guest."""
        quotas = self.quota_pages.tolist()
        entitled = quotas if self.entitled_pages is None else self.entitled_pages.tolist()
        return tuple(map(QuotaTarget, self.names, quotas, entitled))


NO_PLAN = Plan((), np.array([], np.int64))
"""The plan for a host without guests."""
