"""Proxmox VE's automatic ballooning: the host is kept at a percentage of its memory.

Every run, in pages, with total the host's memory, used what guests have of it, T the target:

    goal = int(total * T / 100 - used)              T = 80 %

Nothing happens where |goal| <= 10 MiB. Else `goal` is to be given to guests, or (below 0) taken
from them. For a list of guests, with shares s, and `rest` what is left of the goal:

    desired_i = min_i + int((sum(balloon - min) + rest) * s_i / sum(s)),  within min_i and max_i

and each moves to its desired size by at most 100 MiB a run: up while there is something to give,
down in either case, since a guest beyond its shares gives to the others. What guests could not
take goes into the next round as `rest`, until nothing is left of it or nothing moves. `balloon` is
the quota, min the reservation, max the maximum.

A guest has free memory if freemem > 0.25 * min and balloon >= min; who says nothing of its free
memory counts as under pressure. Growth goes to those under pressure, and to all if they take
nothing. Shrinking takes from those with free memory, and from all if they give nothing.

Left out are guests that can't be moved (no driver), without a minimum, and with shares 0.

Source: pve-manager, PVE/Service/pvestatd.pm (auto_ballooning) and PVE/AutoBalloon.pm
(compute_alg1).

What differs from it, and why:
- The host is what the agent shares out, and used are the quotas: Proxmox counts what VMs have
  touched of the machine, but here a quota is promised as a whole.
- Growth is cut where it would exceed pool minus reserve, which a target near 100 % could do.
- Proxmox runs every 10 s; the agent whenever something changes. So a run here is the first decision
  after 10 s: those between repeat what the run wanted, as far as that is still legal.
- Sizes are whole pages, not bytes; and rounds end after `MOST_ROUNDS`, since each of them could
  bring a few pages for ever.
- Shrinking is urgent: Proxmox sets the size of the balloon, and here the guest has a say.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from host_agent.ledger.columns import Bools, HostColumns, Ints
from host_agent.policy.carried import LastRun
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.interface import Decision, Memory
from host_agent.policy.plan import Plan
from host_agent.policy.rules import keep_promises, shortage_pages
from protocol.units import MIB, pages_of
from protocol.vocabulary import Urgency

FREE_SHARE: Final = 0.25
"""More free memory than this part of its minimum, and a guest is not under pressure."""

MOST_ROUNDS: Final = 200


@dataclass(frozen=True, slots=True)
class ProxmoxSettings:
    """The options of `proxmox`, with the values of Proxmox VE."""

    target_percent: float = 80.0
    """Of the host's memory, to be in use: the node's option `ballooning-target`."""
    dead_zone_bytes: int = 10 * MIB
    """A goal up to this is left alone."""
    step_bytes: int = 100 * MIB
    """The most by which a guest changes in one run."""
    interval_s: float = 10.0
    """From one run to the next."""

    def __post_init__(self) -> None:
        """A percentage is one, a step moves something."""
        if not 0 < self.target_percent <= 100:
            raise ValueError("target_percent must be above 0 and at most 100")
        if self.dead_zone_bytes < 0:
            raise ValueError("dead_zone can't be negative")
        if pages_of(self.step_bytes) < 1:
            raise ValueError("step must be at least a page")
        if self.interval_s < 0:
            raise ValueError("interval_s can't be negative")


DEFAULTS: Final = ProxmoxSettings()


@dataclass(frozen=True, slots=True)
class Proxmox:
    """The policy `proxmox`, as described above. It remembers its last run."""

    settings: ProxmoxSettings = DEFAULTS

    name: ClassVar[str] = "proxmox"
    source: ClassVar[str] = "Proxmox VE: pvestatd.pm, auto_ballooning; AutoBalloon.pm, compute_alg1"

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """A run, or what the last run wanted."""
        settings = self.settings
        last: LastRun | None = memory
        target_pages = int(host.shareable_pages * settings.target_percent / 100)
        goal = target_pages - int(host.quota_pages.sum())
        takes_part = _takes_part(host)
        pressed = takes_part & ~_has_free_memory(host)
        repeats = last is not None and now_s - last.run_s < settings.interval_s
        if last is None or not repeats:
            wanted = self._run(host, goal, takes_part, pressed)
            last = LastRun(now_s, host.names, host.quota_pages, wanted)
        else:
            wanted = last.again(host)
        kept = keep_promises(host, wanted)
        plan = Plan(
            host.names,
            kept.quota_pages,
            shortage_pages(host, host.shareable_pages - target_pages),
            urgency=Urgency.SHORT if goal < -pages_of(settings.dead_zone_bytes) else None,
        )

        def details() -> Details:
            now = host.quota_pages
            every = np.ones(len(host), np.bool_)
            small = abs(goal) <= pages_of(settings.dead_zone_bytes)
            return Details(
                host=(
                    ("target", settings.target_percent, "percent"),
                    ("shareable", host.shareable_pages, "pages"),
                    ("goal", goal, "pages"),
                ),
                guests=(
                    ("min", host.reservation_pages, "pages"),
                    ("max", host.most_pages, "pages"),
                    ("shares", host.shares, "shares"),
                    ("freemem", host.guest_free_pages, "pages"),
                    ("under pressure", pressed, ""),
                    ("balloon", now, "pages"),
                    ("desired", wanted, "pages"),
                    ("quota wanted", kept.quota_pages, "pages"),
                ),
                rules=(
                    *kept.rules,
                    (host.reservation_pages == 0, "left out: it has no minimum"),
                    (host.shares == 0, "left out: its shares are 0"),
                    (every & repeats, "between two runs: what the last one wanted"),
                    (every & small, "the goal is too small: nothing moves"),
                    (wanted > now, "the host has memory to give: it grows by its shares"),
                    (wanted < now, "it has more than its shares of what the goal leaves"),
                ),
                otherwise="others come first, or it has what its shares give it",
            )

        return Decision(plan, last, Explanation(host.names, details))

    def _run(self, host: HostColumns, goal: int, takes_part: Bools, pressed: Bools) -> Ints:
        """One run of compute_alg1: the sizes wanted, unchanged where nothing is wanted."""
        if abs(goal) <= pages_of(self.settings.dead_zone_bytes):
            return host.quota_pages
        grows = goal > 0
        first = pressed if grows else takes_part & ~pressed
        wanted, rest = self._change(host, host.quota_pages, first, goal)
        no_progress = rest >= goal if grows else rest <= goal
        if no_progress:
            wanted, _ = self._change(host, wanted, takes_part, rest)
        return wanted

    def _change(
        self, host: HostColumns, sizes: Ints, members: Bools, goal: int
    ) -> tuple[Ints, int]:
        """Share `goal` among the members, round by round. Returns all sizes and what is left."""
        rest = goal
        step = pages_of(self.settings.step_bytes)
        sizes = sizes.copy()
        places = np.flatnonzero(members)
        for _ in range(MOST_ROUNDS):
            if not rest or not len(places):
                break
            low, high = host.reservation_pages[places], host.most_pages[places]
            now, size = host.quota_pages[places], sizes[places]
            total = int((size - low).sum()) + rest
            shares = host.shares[places]
            parts = np.trunc(total / int(shares.sum()) * shares).astype(np.int64)
            desired = np.clip(low + parts, low, high)
            up = (desired > now) & (goal > 0)
            down = desired < now
            new = np.where(up, np.minimum(now + step, desired), size)
            new = np.where(down, np.maximum(now - step, desired), new)
            sizes[places] = new
            change = int((new - size).sum())
            rest -= change
            if not np.any(new != size):
                break
            # Whoever is where it should be takes no part any more.
            places = places[up | down]
        return sizes, rest


def _takes_part(host: HostColumns) -> Bools:
    return (
        ~host.fixed
        & host.has_driver
        & (host.quota_pages > 0)
        & (host.reservation_pages > 0)
        & (host.shares > 0)
    )


def _has_free_memory(host: HostColumns) -> Bools:
    free = host.guest_free_pages
    least = host.reservation_pages
    return free.known & (free.values > FREE_SHARE * least) & (host.quota_pages >= least)
