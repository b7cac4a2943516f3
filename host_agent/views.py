"""What the control API shows of guests and host, made from the books and the runtime records."""

from typing import Final

from host_agent.deciding import PolicyFault
from host_agent.facade.views import (
    DecisionView,
    DeedView,
    PolicyFaultView,
    TermView,
    VitalsView,
    VmState,
    VmView,
)
from host_agent.guest import Guest, Phase
from host_agent.ledger.ledger import AccountView
from host_agent.observing import DRY_MEMORY_S, UNCOOPERATIVE_AFTER
from host_agent.policy.decisions import DecisionRecord
from host_agent.policy.explain import Term, Why
from protocol.units import PAGE_BYTES, bytes_of

_BY_PHASE: Final = {
    Phase.PENDING: VmState.WAITING,
    Phase.STARTING: VmState.STARTING,
    Phase.STOPPING: VmState.STOPPING,
}


def vm_view(guest: Guest, account: AccountView, now_s: float) -> VmView:
    """One mock VM as it is now."""
    vitals = guest.vitals
    target_pages = account.quota_pages if guest.target_pages is None else guest.target_pages
    return VmView(
        name=guest.name,
        state=_state(guest, now_s),
        backend=guest.spec.backend,
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
        swap_bytes=guest.spec.swap_bytes,
        balloon_may_swap=guest.spec.balloon_may_swap,
        swap_used_bytes=None if vitals is None else vitals.swap_used_bytes,
        swap_free_bytes=None if vitals is None else vitals.swap_free_bytes,
        last_reason=guest.last_reason,
        maximum_bytes=guest.maximum_bytes,
        pinned=guest.pinned_pages is not None,
    )


def vitals_view(guest: Guest, now_s: float) -> VitalsView | None:
    """The last statistics of a mock VM; None before the first."""
    vitals = guest.vitals
    if vitals is None:
        return None
    values = {name: getattr(vitals, name, None) for name in VitalsView.model_fields}
    return VitalsView.model_validate({**values, "age_s": now_s - guest.vitals_s})


def decision_view(record: DecisionRecord, why: Why, last_why: Why, now_s: float) -> DecisionView:
    """One decision about a mock VM with its explanations, sizes in bytes."""
    return DecisionView(
        policy=record.policy,
        first_age_s=now_s - record.first_s,
        last_age_s=now_s - record.last_s,
        times=record.times,
        quota_bytes=bytes_of(record.quota_pages),
        target_quota_bytes=bytes_of(record.target_pages),
        rule=why.rule,
        terms=tuple(_term_view(term) for term in why.terms),
        last_rule=last_why.rule,
        last_terms=tuple(_term_view(term) for term in last_why.terms),
        done=tuple(
            DeedView(
                what=deed.what,
                size_bytes=bytes_of(deed.pages),
                times=deed.times,
                first_age_s=now_s - deed.first_s,
                last_age_s=now_s - deed.last_s,
                detail=deed.detail,
            )
            for deed in record.deeds
        ),
    )


def fault_view(fault: PolicyFault | None, now_s: float) -> PolicyFaultView | None:
    """What is wrong with the policy; None if nothing is."""
    if fault is None:
        return None
    return PolicyFaultView(text=fault.text, age_s=now_s - fault.since_s, times=fault.times)


def _term_view(term: Term) -> TermView:
    value, unit = term.value, str(term.unit)
    if unit == "pages":
        unit = "bytes"
        value = None if value is None else int(value) * PAGE_BYTES
    return TermView(name=term.name, value=value, unit=unit)


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
