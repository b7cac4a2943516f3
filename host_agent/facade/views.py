"""The values that the control API answers with: what the agent tells of its VMs and its host.

Values are frozen, sizes are in bytes, absent is None. What it is asked stands in port.py.
"""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """What crosses the control API, in either direction."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VmState(StrEnum):
    """A mock VM in one word.

    `waiting` waits for memory before it is made; `dry` has or just had no memory left in its
    quota; `stuck` did not reach its target, `uncooperative` again and again.
    """

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    STUCK = "stuck"
    UNCOOPERATIVE = "uncooperative"
    DRY = "dry"
    STOPPING = "stopping"


class VmView(Value):
    """A mock VM as the agent sees it now.

    `swap_free_bytes` is the least of what is left of its swap and of the machine's. `last_reason`
    is why its driver last gave less than the target, or what giving it costs; `pinned` means that
    an operator chose the target.
    """

    name: str
    state: VmState
    backend: str
    assigned_bytes: int
    reservation_bytes: int
    shares: int
    quota_bytes: int
    balloon_actual_bytes: int
    balloon_target_bytes: int
    lent_bytes: int
    overhead_bytes: int
    usage_bytes: int | None = None
    working_set_bytes: int | None = None
    demand_bytes: int | None = None
    oom_kills: int
    connected: bool
    swap_bytes: int = 0
    balloon_may_swap: bool = False
    swap_used_bytes: int | None = None
    swap_free_bytes: int | None = None
    last_reason: str | None = None
    maximum_bytes: int | None = None
    """The most that a policy gives it; null for its assigned size."""
    pinned: bool = False


class VitalsView(Value):
    """The last statistics that a VM's driver sent, `age_s` seconds ago; None is unknown."""

    age_s: float
    limit_bytes: int | None = None
    usage_bytes: int | None = None
    anon_bytes: int | None = None
    file_bytes: int | None = None
    inactive_file_bytes: int | None = None
    active_file_bytes: int | None = None
    dirty_bytes: int | None = None
    unevictable_bytes: int | None = None
    kernel_bytes: int | None = None
    refault_bytes_total: int | None = None
    refault_anon_bytes_total: int | None = None
    major_faults_total: int | None = None
    swap_used_bytes: int | None = None
    swap_free_bytes: int | None = None
    pressure_some_avg10: float | None = None
    pressure_full_avg10: float | None = None
    pressure_some_total_s: float | None = None
    oom_kills_total: int | None = None
    working_set_bytes: int | None = None
    demand_bytes: int | None = None
    spare_bytes: int | None = None
    active_fraction: float | None = None


class PolicyFaultView(Value):
    """What is wrong with the policy in force: it has given no plan for `age_s` seconds."""

    text: str
    age_s: float
    times: int


class HostView(Value):
    """The pool and what became of it. `free_bytes` is in nobody's quota and not in the reserve.

    `held_bytes` are kept for clients that have reserved them. `overdrawn_bytes` is what VMs have
    beyond the pool since an agent with a smaller one took them over.
    """

    pool_bytes: int
    reserve_bytes: int
    reserve_left_bytes: int
    free_bytes: int
    held_bytes: int = 0
    quotas_bytes: int
    overdrawn_bytes: int
    assigned_bytes: int
    overcommit_ratio: float
    policy: str
    policy_fault: PolicyFaultView | None = None
    shortage: bool
    shortage_bytes: int
    oom_kills: int
    moves_total: int
    version: str
    cgroup_version: int
    uptime_s: float


class PolicyView(Value):
    """The policy in force with its settings, and which there are. `fault` is null while it works.

    After a restart the configuration decides again.
    """

    name: str
    source: str
    settings: dict[str, Any]
    configured: str
    known: tuple[str, ...]
    fault: PolicyFaultView | None = None


class ReservationView(Value):
    """What a client has reserved. `missing_bytes` is what is still to be freed."""

    id: str
    client: str
    size_bytes: int
    missing_bytes: int
    vm: str | None = None
    """The VM that it was handed over to, and that does not run yet."""


class TransferView(Value):
    """What became of a reservation that was handed over: given to a VM that runs, or kept for it.

    `given_bytes` may be less than was reserved: then the VM has its size, and the rest is free.
    """

    given_bytes: int
    kept: ReservationView | None


class TermView(Value):
    """One term of a policy's formula for one VM; null is unknown."""

    name: str
    value: int | float | bool | str | None
    unit: str


class DeedView(Value):
    """What was done about a VM: `times` times, from `first_age_s` to `last_age_s` seconds ago."""

    what: str
    size_bytes: int
    times: int
    first_age_s: float
    last_age_s: float
    detail: str


class DecisionView(Value):
    """One target of one VM: wanted by `times` decisions, why, and what was done.

    `quota_bytes` is what the VM had when it was first decided, `target_quota_bytes` what it is to
    have. `rule` and `terms` are those of the first of these decisions, `last_rule` and `last_terms`
    those of the last.
    """

    policy: str
    first_age_s: float
    last_age_s: float
    times: int
    quota_bytes: int
    target_quota_bytes: int
    rule: str
    terms: tuple[TermView, ...]
    last_rule: str
    last_terms: tuple[TermView, ...]
    done: tuple[DeedView, ...]
