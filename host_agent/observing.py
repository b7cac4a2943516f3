"""What a policy is told of a guest beside the books: its statistics, and how it behaves. Pure."""

from typing import Final

from host_agent.guest import Guest, Phase
from host_agent.ledger.snapshot import Observation
from protocol.messages import Vitals
from protocol.units import MIB, pages_of

DRY_MEMORY_S: Final = 1.0
"""A guest that ran dry is taken to need more than it has for so long, whatever it reports."""

DRY_NEED_PAGES: Final = pages_of(8 * MIB)
"""And so much more: about a first loan, and more than what a policy leaves alone as too little."""

UNCOOPERATIVE_AFTER: Final = 3
"""Stuck so many times in a row, a guest is planned around until it gives something."""

UNKNOWN_VITALS: Final = Vitals(clock_s=0.0)
"""Of a guest that has said nothing yet."""

UNCOOPERATIVE_PAUSE_S: Final = 30.0
"""It is given another chance so often: else it could never give anything again."""


def observe(guest: Guest, quota_pages: int, now_s: float) -> Observation:
    """What is known of a guest that has `quota_pages`."""
    if guest.phase is Phase.PENDING:
        startup_pages = pages_of(guest.spec.startup_bytes)
        return Observation(
            demand_pages=startup_pages,
            startup_pages=startup_pages,
            maximum_pages=pages_or_none(guest.maximum_bytes),
            buffer_percent=guest.spec.buffer_percent,
            inaccuracy_pages=guest.frame_pages,
            has_driver=False,
        )
    vitals = guest.vitals or UNKNOWN_VITALS
    demand_pages = pages_or_none(vitals.demand_bytes)
    dry = is_dry(guest, now_s)
    if dry:
        # Its statistics are older than its trouble: it needs more than it has.
        demand_pages = max(demand_pages or 0, quota_pages + DRY_NEED_PAGES)
    return Observation(
        demand_pages=demand_pages,
        working_set_pages=pages_or_none(vitals.working_set_bytes),
        spare_pages=pages_or_none(vitals.spare_bytes),
        usage_pages=pages_or_none(vitals.usage_bytes),
        active_fraction=vitals.active_fraction,
        pressure_some_total_s=vitals.pressure_some_total_s,
        refault_pages_total=pages_or_none(vitals.refault_bytes_total),
        swap_used_pages=pages_or_none(vitals.swap_used_bytes),
        oom_kills_total=vitals.oom_kills_total,
        has_driver=guest.session is not None,
        dry=dry,
        stalled_since_s=guest.stalled_since_s,
        startup_pages=pages_of(guest.spec.startup_bytes),
        inaccuracy_pages=guest.frame_pages,
        maximum_pages=pages_or_none(guest.maximum_bytes),
        buffer_percent=guest.spec.buffer_percent,
        movable=guest.phase is Phase.RUNNING
        and guest.session is not None
        and (
            guest.stuck_times < UNCOOPERATIVE_AFTER or now_s - guest.stuck_s > UNCOOPERATIVE_PAUSE_S
        ),
        pinned_pages=guest.pinned_pages,
    )


def pages_or_none(size_bytes: int | None) -> int | None:
    """As `pages_of`, for what may be unknown."""
    return None if size_bytes is None else pages_of(size_bytes)


def is_dry(guest: Guest, now_s: float) -> bool:
    """It waits for memory, or did so just now."""
    return guest.dry or now_s - guest.dry_s < DRY_MEMORY_S
