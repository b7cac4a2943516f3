"""Policies of somebody else: some work, some don't."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from host_agent.ledger.columns import HostColumns
from host_agent.policy.explain import Details, Explanation
from host_agent.policy.interface import Decision
from host_agent.policy.plan import Plan


def keep(host: HostColumns) -> Plan:
    return Plan(host.names, host.quota_pages)


def decision(host: HostColumns, plan: Any, memory: Any = None) -> Decision:
    return Decision(plan, memory, Explanation(host.names, Details))


class MadeUp:
    """Answers with what a function makes of the host, the memory and the time."""

    name: ClassVar[str] = "made-up"
    source: ClassVar[str] = "a test"
    settings: ClassVar[None] = None

    def __init__(self, answer: Callable[[HostColumns, Any, float], Any]) -> None:
        self.answer = answer

    def decide(self, host: HostColumns, memory: Any, now_s: float) -> Any:
        return self.answer(host, memory, now_s)


@dataclass(frozen=True)
class RatioSettings:
    ratio: float = 0.5
    floor_bytes: int = 8192
    greedy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError("ratio must lie between 0 and 1")


DEFAULT_RATIO = RatioSettings()


@dataclass(frozen=True)
class Ratio:
    """Everybody gets a part of its size; never mind how much there is."""

    settings: RatioSettings = DEFAULT_RATIO
    name: ClassVar[str] = "ratio"
    source: ClassVar[str] = "a test"

    def decide(self, host: HostColumns, memory: Any, now_s: float) -> Decision:
        wanted = (host.assigned_pages * self.settings.ratio).astype(np.int64)
        return decision(host, Plan(host.names, np.where(host.movable, wanted, host.quota_pages)))
