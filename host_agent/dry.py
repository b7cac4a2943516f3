"""The answer to a guest that runs dry, before anybody is killed.

The kernel holds the workload that reached its quota and tells on a descriptor. The answer comes out
of what is free and the host reserve, in steps that double while the guest goes on needing more: few
stalls for a burst, little lent to a guest that was only a page short. If there is nothing to lend,
the guest waits, stalled but alive, while the policy makes the others give; only after
`patience_s`, or when the guest has its full size already, does its own kernel decide, as in a real
VM that is out of memory. The watchdog (watchdog.py) answers if this agent can't.
"""

import logging
from typing import Final

import trio

from host_agent.balance import Balancer
from host_agent.guest import Guest
from protocol.units import MIB, bytes_of, pages_of

LOG = logging.getLogger("memballoon.dry")

FIRST_STEP_PAGES: Final = pages_of(8 * MIB)
"""A workload at full speed uses this up in 3 ms."""

LARGEST_STEP_PAGES: Final = pages_of(64 * MIB)

CALM_AFTER_S: Final = 1.0
"""No dry event for so long: the next burst begins with the first step again."""

LOOK_AGAIN_S: Final = 0.02
"""While a guest waits for memory it is looked at this often, besides every credit."""

KERNEL_DECIDES_S: Final = 1.0
"""How long the kernel is given to kill; then the guest is held again when it runs dry."""


class DryAnswer:
    """Watches one guest for as long as it runs."""

    def __init__(self, guest: Guest, balancer: Balancer, patience_s: float) -> None:
        self._guest = guest
        self._balancer = balancer
        self._patience_s = patience_s
        self._step_pages = FIRST_STEP_PAGES
        self._last_s = -CALM_AFTER_S

    async def run(self) -> None:
        """Answer every dry event until cancelled."""
        quota = self._guest.live_quota
        descriptor = quota.arm_dry_events()
        while True:
            # The look comes first: an agent that takes over may find its guest dry already.
            if quota.dry_state().under_oom:
                await self._answer()
            self._guest.dry = False
            await trio.lowlevel.wait_readable(descriptor)

    async def _answer(self) -> None:
        guest = self._guest
        guest.dry = True
        guest.dry_total += 1
        began_s = guest.dry_s = trio.current_time()
        self._choose_step(began_s)
        given = self._balancer.lend(guest, self._step_pages)
        self._balancer.replan()
        if given:
            self._step_pages = min(self._step_pages * 2, LARGEST_STEP_PAGES)
            LOG.info("%s ran dry: lent it %.1f MiB", guest.name, bytes_of(given) / MIB)
        elif self._is_at_full_size():
            await self._let_kernel_decide()
        else:
            LOG.warning("%s ran dry and there is nothing to lend: it waits", guest.name)
            await self._wait_for_memory(began_s)

    def _choose_step(self, now_s: float) -> None:
        if now_s - self._last_s > CALM_AFTER_S:
            self._step_pages = FIRST_STEP_PAGES
        self._last_s = now_s

    async def _wait_for_memory(self, began_s: float) -> None:
        guest, quota = self._guest, self._guest.live_quota
        while quota.dry_state().under_oom:
            if self._balancer.lend(guest, FIRST_STEP_PAGES):
                LOG.info("%s waited %.0f ms", guest.name, (trio.current_time() - began_s) * 1000)
                return
            if self._is_at_full_size() or trio.current_time() - began_s > self._patience_s:
                await self._let_kernel_decide()
                return
            with trio.move_on_after(LOOK_AGAIN_S):
                await guest.quota_changed.wait()

    def _is_at_full_size(self) -> bool:
        view = self._balancer.ledger.view(self._guest.name)
        # Room that was made for the balloon comes back when the attempt to inflate ends.
        return not view.claimed and not view.room_pages

    async def _let_kernel_decide(self) -> None:
        guest, quota = self._guest, self._guest.live_quota
        why = "it has its full size" if self._is_at_full_size() else "nobody could give it more"
        # What was killed is told by whoever counts it: the guest may end with that.
        LOG.warning("%s is out of memory (%s): its kernel decides", guest.name, why)
        quota.let_kernel_decide()
        try:
            with trio.move_on_after(KERNEL_DECIDES_S):
                while quota.dry_state().under_oom:
                    await trio.sleep(LOOK_AGAIN_S)
        finally:
            quota.rearm()
