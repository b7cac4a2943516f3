"""What the control API shows of guests and host, made from the books and the runtime records."""

from typing import Final

from host_agent.balance import DRY_MEMORY_S, UNCOOPERATIVE_AFTER
from host_agent.facade.port import VitalsView, VmState, VmView
from host_agent.guest import Guest, Phase
from host_agent.ledger.ledger import AccountView
from protocol.units import bytes_of

_BY_PHASE: Final = {
    Phase.PENDING: VmState.WAITING,
    Phase.STARTING: VmState.STARTING,
    Phase.STOPPING: VmState.STOPPING,
}


def vm_view(guest: Guest, account: AccountView, backend: str, now_s: float) -> VmView:
    """One mock VM as it is now."""
    vitals = guest.vitals
    target_pages = account.quota_pages if guest.target_pages is None else guest.target_pages
    return VmView(
        name=guest.name,
        state=_state(guest, now_s),
        backend=backend,
        assigned_bytes=guest.spec.assigned_bytes,
        reservation_bytes=bytes_of(account.reservation_pages),
        shares=account.shares,
        quota_bytes=bytes_of(account.quota_pages),
        balloon_actual_bytes=bytes_of(account.claimed.page_count),
        balloon_target_bytes=bytes_of(account.assigned_pages - target_pages),
        lent_bytes=bytes_of(account.lent_pages),
        overhead_bytes=guest.overhead_bytes,
        usage_bytes=None if vitals is None else vitals.usage_bytes,
        working_set_bytes=None if vitals is None else vitals.working_set_bytes,
        demand_bytes=None if vitals is None else vitals.demand_bytes,
        oom_kills=guest.oom_kills,
        connected=guest.session is not None,
        last_reason=guest.last_reason,
        pinned=guest.pinned_pages is not None,
    )


def vitals_view(guest: Guest, now_s: float) -> VitalsView | None:
    """The last statistics of a mock VM; None before the first."""
    vitals = guest.vitals
    if vitals is None:
        return None
    values = {name: getattr(vitals, name, None) for name in VitalsView.model_fields}
    return VitalsView.model_validate({**values, "age_s": now_s - guest.vitals_s})


def _state(guest: Guest, now_s: float) -> VmState:
    """One word for a table: what hinders most comes first."""
    before_or_after = _BY_PHASE.get(guest.phase)
    if before_or_after is not None:
        return before_or_after
    if guest.dry or now_s - guest.dry_s < DRY_MEMORY_S:
        return VmState.DRY
    if guest.stuck_times >= UNCOOPERATIVE_AFTER:
        return VmState.UNCOOPERATIVE
    return VmState.STUCK if guest.stuck_times else VmState.RUNNING
