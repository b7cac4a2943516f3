"""Room: what a workload is shrunk by, so that its guest's balloon may reserve as much.

Keeps the books and the kernel's limit of one workload together, whoever raises the limit meanwhile
and however late a limit write ends.
"""

from contextlib import suppress
from functools import partial
from typing import Final

import trio

from host_agent.blocking import DeadlinePassed, Threads, run_blocking
from host_agent.guest import Guest
from host_agent.ledger.ledger import Ledger
from host_agent.quota.errors import NoRoom, QuotaError
from protocol.units import bytes_of

ROOM_DEADLINE_S: Final = 10.0
"""Making room may have to write 100 MiB of dirty cache to a slow disk."""


class Room:
    """The room of one guest."""

    def __init__(self, guest: Guest, ledger: Ledger, threads: Threads) -> None:
        self._guest = guest
        self._ledger = ledger
        self._threads = threads

    async def make(self, pages: int, swap_pages: int = 0) -> bool:
        """Shrink the workload by `pages`. False, with nothing changed, if it needs them.

        Up to `swap_pages` may be swapped out for that; they stay so even if it was in vain.
        """
        name = self._guest.name
        if pages > self._ledger.view(name).workload_pages:
            return False
        # In the books first: whoever raises the quota meanwhile sees the intended limit and has
        # the attempt given up, so that the kernel and the books can't part.
        self._ledger.make_room(name, pages)
        limit_bytes = bytes_of(self._ledger.view(name).workload_pages)
        try:
            await run_blocking(
                partial(
                    self._shrink,
                    limit_bytes,
                    bytes_of(swap_pages),
                    trio.lowlevel.current_trio_token(),
                ),
                timeout_s=ROOM_DEADLINE_S,
                limiter=self._threads.limit_writes,
            )
        except (NoRoom, DeadlinePassed):
            self.give_back()
            return False
        return True

    def give_back(self) -> None:
        """Give room that was made and not used back to the workload."""
        name = self._guest.name
        pages = self._ledger.close_room(name)
        if not self._put_limit_right() and pages:
            # The kernel still holds the workload down: the books must not say otherwise.
            self._ledger.make_room(name, pages)

    def _shrink(self, limit_bytes: int, swap_bytes: int, token: trio.lowlevel.TrioToken) -> None:
        """The limit write, in a thread that may outlive its attempt, and even its session."""
        if not self._guest.shrinking.acquire(blocking=False):
            raise NoRoom("an earlier limit write of this guest is still under way")
        try:
            self._guest.live_quota.make_room(limit_bytes, swap_bytes=swap_bytes)
        finally:
            self._guest.shrinking.release()
            with suppress(trio.RunFinishedError):
                # It has ended, perhaps too late: what the books say then is in force.
                token.run_sync_soon(self._put_limit_right)

    def _put_limit_right(self) -> bool:
        """Raise the workload's limit to what the books say. False if that failed.

        Also where no room was open: after a write that ended late, or one of an agent before this.
        """
        name = self._guest.name
        if name not in self._ledger or self._guest.quota is None:
            return True  # it was removed meanwhile
        limit_bytes = bytes_of(self._ledger.view(name).workload_pages)
        try:
            self._guest.quota.raise_workload(limit_bytes)
        except QuotaError as error:
            self._guest.last_reason = f"quota: {error}"
            return False
        return True
