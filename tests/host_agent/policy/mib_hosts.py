"""Small hosts in MiB, for examples that were computed by hand."""

from typing import Any

from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.interface import Decision, Memory, Policy
from host_agent.policy.plan import Plan
from host_agent.testing.policy_properties import carried_out
from protocol.units import MIB, pages_of

PAGES_PER_MIB = pages_of(MIB)


def pages(mib: float) -> int:
    return int(mib * PAGES_PER_MIB)


def vm(
    name: str,
    assigned: float,
    quota: float,
    *,
    least: float = 0,
    shares: int = 1000,
    demand: float | None = None,
    used: float | None = None,
    **others: Any,
) -> GuestSnapshot:
    """One guest; sizes in MiB, `others` as GuestSnapshot has them."""
    return GuestSnapshot(
        name=name,
        assigned_pages=pages(assigned),
        quota_pages=pages(quota),
        reservation_pages=pages(least),
        shares=shares,
        demand_pages=None if demand is None else pages(demand),
        usage_pages=None if used is None else pages(used),
        **others,
    )


def host(pool: float, *guests: GuestSnapshot) -> HostSnapshot:
    """A host that shares out `pool` MiB; its reserve is beside it."""
    return HostSnapshot(pages(pool + 100), pages(100), guests)


def decide(
    policy: Policy, snapshot: HostSnapshot, memory: Memory = None, now_s: float = 1000.0
) -> Decision:
    return policy.decide(snapshot.columns, memory, now_s)


def mib(plan: Plan) -> dict[str, float]:
    """The plan in MiB by name."""
    return {target.name: target.quota_pages / PAGES_PER_MIB for target in plan.targets}


def rule(decision: Decision, name: str) -> str:
    return decision.why.of(name).rule


def term(decision: Decision, name: str, what: str) -> Any:
    """The value of one term of the formula, as it was explained."""
    (value,) = [term.value for term in decision.why.of(name).terms if term.name == what]
    return value


__all__ = [
    "PAGES_PER_MIB",
    "carried_out",
    "decide",
    "host",
    "mib",
    "pages",
    "rule",
    "term",
    "vm",
]
