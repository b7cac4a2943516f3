"""Quotas beyond the pool, as an agent with a smaller pool finds them: said, and paid off."""

import logging
from typing import Final

from host_agent.ledger.ledger import Ledger
from host_agent.sizes import format_size
from protocol.units import bytes_of

LOG: Final = logging.getLogger("memballoon.agent")


class Overdraft:
    """What the books are overdrawn by, watched."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._seen_pages = ledger.overdrawn_pages

    def found(self) -> None:
        """All that runs already is in the books."""
        self._seen_pages = pages = self._ledger.overdrawn_pages
        if pages:
            LOG.warning(
                "the VMs that run have %s more than the pool of %s: they are asked for it, and "
                "nobody is killed",
                format_size(bytes_of(pages)),
                format_size(bytes_of(self._ledger.pool_pages)),
            )

    def paid_pages(self) -> int:
        """What has become free since the last look and is nobody's: the pool is smaller now."""
        paid = self._seen_pages - self._ledger.overdrawn_pages
        self._seen_pages -= paid
        if paid and not self._seen_pages:
            LOG.info("the VMs have no more than the pool any longer")
        return paid
