"""What a policy is: a pure function with an explicit memory, and a name.

    decision = policy.decide(host, memory, now_s)

The agent and the simulator call it in the same way, again and again, each time with the memory that
the last decision gave. A policy does no I/O, reads no clock and keeps nothing to itself: the same
arguments give the same decision. docs/writing_a_policy.md shows how to write one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from host_agent.ledger.columns import HostColumns
from host_agent.policy.explain import Explanation
from host_agent.policy.plan import Plan

Memory: TypeAlias = Any
"""What a policy wants to be told the next time: immutable, and None at the start."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What a policy has decided."""

    plan: Plan
    memory: Memory
    why: Explanation


class Policy(Protocol):
    """One policy with its settings. The class is called without arguments for the defaults."""

    name: ClassVar[str]
    """What the configuration and the commands call it."""
    source: ClassVar[str]
    """The paper, manual or program that it follows; one line."""

    @property
    def settings(self) -> Any:
        """Its own options: a frozen dataclass with a default for each field.

        They are the keys of the table `[policy.NAME]`: a field of integers whose name ends in
        `_bytes` is written as a size, without that ending. `__post_init__` refuses with ValueError
        what the field's type allows and the policy doesn't.
        """
        ...

    def decide(self, host: HostColumns, memory: Memory, now_s: float) -> Decision:
        """The quotas that the guests of `host` should have.

        `now_s` is a monotonic clock in seconds; only differences mean something. A guest that
        has come or gone since the last decision is no error: memory kept by guest is kept by name.
        """
        ...


@dataclass(frozen=True, slots=True)
class RangeChange:
    """A running guest's range, each bound as (before, after)."""

    reservation_bytes: tuple[int, int]
    maximum_bytes: tuple[int, int]

    @property
    def is_none(self) -> bool:
        """Nothing is different afterwards."""
        bounds = (self.reservation_bytes, self.maximum_bytes)
        return all(before == after for before, after in bounds)


@runtime_checkable
class JudgesRanges(Protocol):
    """A policy that has a say when the range of a running guest is changed."""

    def range_fault(
        self, reservation_bytes: tuple[int, int], maximum_bytes: tuple[int, int]
    ) -> str | None:
        """Why a running guest's range can't be changed so; None if it can.

        Each is given as (before, after).
        """
        ...
