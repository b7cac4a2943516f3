"""What the demonstration found: for people, for machines, and whether all of it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from host_agent.facade.views import VmView
from host_agent.moves import Move
from protocol.units import MIB


@dataclass(frozen=True, slots=True)
class Stall:
    """The longest touch of one workload in one act."""

    vm: str
    seconds: float
    kind: str
    """anon or cache: what was touched."""


@dataclass(frozen=True, slots=True)
class Act:
    """One act: what was asked, what was given, how long it took."""

    title: str
    asked: str
    given: str
    seconds: float
    moves: tuple[Move, ...]
    stall: Stall | None
    failures: tuple[str, ...] = ()
    """What did not hold, one line each."""


@dataclass(slots=True)
class Outcome:
    """The whole play."""

    pool_bytes: int
    overcommit_ratio: float
    acts: list[Act] = field(default_factory=list)
    oom_kills: int = 0
    highest_sum_of_limits_bytes: int = 0
    samples: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    """Highest use of all mock VMs together, overhead included, as the kernel counted it."""

    @property
    def failures(self) -> list[str]:
        """Everything that did not hold."""
        found = [f"{act.title}: {failure}" for act in self.acts for failure in act.failures]
        if self.oom_kills:
            found.append(f"{self.oom_kills} processes were killed for want of memory")
        if self.highest_sum_of_limits_bytes > self.pool_bytes:
            found.append("the limits together exceeded the pool")
        if not self.samples:
            found.append("the kernel's limits were never read")
        return found

    @property
    def holds(self) -> bool:
        """Whether all of it held."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """For machines. Bytes and seconds."""
        return {
            "pool_bytes": self.pool_bytes,
            "overcommit_ratio": self.overcommit_ratio,
            "acts": [
                {
                    "title": act.title,
                    "asked": act.asked,
                    "given": act.given,
                    "seconds": act.seconds,
                    "failures": list(act.failures),
                }
                for act in self.acts
            ],
            "moves": [
                {
                    "act": act.title,
                    "from": move.giver,
                    "to": move.taker,
                    "bytes": move.size_bytes,
                    "seconds": move.seconds,
                }
                for act in self.acts
                for move in act.moves
            ],
            "stalls": [
                {
                    "act": act.title,
                    "vm": act.stall.vm,
                    "seconds": act.stall.seconds,
                    "kind": act.stall.kind,
                }
                for act in self.acts
                if act.stall is not None
            ],
            "oom_kills": self.oom_kills,
            "highest_sum_of_limits_bytes": self.highest_sum_of_limits_bytes,
            "samples_of_limits": self.samples,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": self.seconds,
            "failures": self.failures,
            "holds": self.holds,
        }


def mib(size_bytes: int) -> str:
    """A size as the demonstration shows it: all in one unit, so that sums can be checked."""
    return f"{size_bytes / MIB:.0f} MiB"


def moved_bytes(moves: tuple[Move, ...]) -> int:
    """All of what moved."""
    return sum(move.size_bytes for move in moves)


def describe_moves(moves: tuple[Move, ...]) -> str:
    """One line: how much went from how many to how many, and how long it took at most."""
    if not moves:
        return "nothing had to move"
    givers = sorted({move.giver for move in moves})
    takers = sorted({move.taker for move in moves})
    slowest_s = max(move.seconds for move in moves)
    return (
        f"{mib(moved_bytes(moves))} from {_names(givers)} to {_names(takers)}, "
        f"each wish met in {slowest_s * 1000:.0f} ms at most"
    )


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} holders"


def unfair(vms: Sequence[VmView], margin_bytes: int) -> list[str]:
    """Whether shares told at all, and who has less than somebody with fewer of them, by a margin.

    Who needs no more than it has, by its driver's own estimate, has not been treated unfairly.
    """
    found = []
    by_shares = sorted(vms, key=lambda vm: vm.shares)
    first, last = by_shares[0], by_shares[-1]
    in_need = [vm for vm in by_shares if (vm.demand_bytes or 0) > vm.quota_bytes + margin_bytes]
    if last in in_need and last.quota_bytes < first.quota_bytes + margin_bytes:
        found.append(f"{last.name} has no more than {first.name}, for all its shares")
    for rich in in_need:
        for poor in by_shares:
            less = rich.quota_bytes < poor.quota_bytes - margin_bytes
            if rich.shares > poor.shares and less:
                found.append(
                    f"{rich.name} ({rich.shares} shares) has {mib(rich.quota_bytes)}, "
                    f"{poor.name} ({poor.shares}) {mib(poor.quota_bytes)}"
                )
    return found
