"""10,000 guests: every policy decides soundly, and what it costs is shown (pytest -s)."""

import statistics
import time

import numpy as np
import pytest

from host_agent.ledger.columns import HostColumns, known
from host_agent.policy.interface import Memory, Policy
from host_agent.policy.registry import BUILT_IN
from host_agent.policy.soundness import faults_of
from protocol.units import MIB, pages_of

GUESTS = 10_000
DECISIONS = 12
AIM_S = 0.050

LOOPS_S = 5 * AIM_S
"""What no busy machine makes of columns, but a loop over guests does."""


def large_host(seed: int, pool_part: float) -> HostColumns:
    """Guests of 32 MiB to 4 GiB; the pool is `pool_part` of what they have."""
    random = np.random.default_rng(seed)
    assigned = random.integers(pages_of(32 * MIB), pages_of(4096 * MIB), GUESTS)
    reservation = assigned // 4
    quota = np.maximum((assigned * random.uniform(0.3, 1, GUESTS)).astype(np.int64), reservation)
    used = (quota * random.uniform(0.3, 1, GUESTS)).astype(np.int64)
    return HostColumns(
        pool_pages=int(quota.sum() * pool_part),
        reserve_pages=0,
        names=tuple(f"vm{number:05}" for number in range(GUESTS)),
        assigned_pages=assigned,
        reservation_pages=reservation,
        shares=random.choice([1, 500, 1000, 2000], GUESTS),
        quota_pages=quota,
        demand_pages=known((assigned * random.uniform(0.1, 1, GUESTS)).astype(np.int64)),
        usage_pages=known(used),
        working_set_pages=known(used // 2),
        pressure_some_total_s=known(random.uniform(0, 1000, GUESTS)),
        refault_pages_total=known(random.integers(0, 100_000, GUESTS)),
    )


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.name)
def test_ten_thousand_guests(kind: type[Policy]) -> None:
    policy = kind()
    for pool_part, what in ((1.5, "roomy"), (1.0, "full")):
        # Two hosts in turn: something is always to be done.
        hosts = [large_host(seed, pool_part) for seed in (1, 2)]
        memory: Memory = None
        spent_s = []
        for number in range(DECISIONS):
            host = hosts[number % 2]
            before_s = time.thread_time()
            decision = policy.decide(host, memory, 1000.0 + 20.0 * number)
            spent_s.append(time.thread_time() - before_s)
            memory = decision.memory
            assert faults_of(host, decision.plan) == []
        median_s = statistics.median(spent_s)
        print(
            f"{kind.name:9} {what:6} {GUESTS} guests: {median_s * 1e3:5.1f} ms a decision, "
            f"{max(spent_s) * 1e3:5.1f} ms at most (aim: {AIM_S * 1e3:.0f} ms)"
        )
        assert median_s < LOOPS_S
