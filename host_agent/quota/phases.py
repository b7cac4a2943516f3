"""Where the time of a shrink goes: for the bench, and for whoever looks for a quicker order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

Phase = Literal["look", "reclaim", "settle", "freeze", "check", "write", "thaw"]


@dataclass(frozen=True, slots=True)
class ShrinkPhases:
    """Seconds of each phase of one `make_room` that succeeded, in their order.

    On version 1 the kernel reclaims in the `write`, and there is nothing but that and the `look`.
    `frozen_s` is the longest that the workload stood still for it: at most the sum of the last
    four, less where it was thawed in between.
    """

    look_s: float = 0.0
    reclaim_s: float = 0.0
    settle_s: float = 0.0
    freeze_s: float = 0.0
    check_s: float = 0.0
    write_s: float = 0.0
    thaw_s: float = 0.0
    frozen_s: float = 0.0

    @property
    def total_s(self) -> float:
        """From the call to its end, but for the restoring of what was changed meanwhile."""
        return (
            self.look_s
            + self.reclaim_s
            + self.settle_s
            + self.freeze_s
            + self.check_s
            + self.write_s
            + self.thaw_s
        )


class PhaseClock:
    """Runs from its making; a phase that comes twice is added up."""

    def __init__(self) -> None:
        self._since_s = perf_counter()
        self._spent_s: dict[Phase, float] = {}
        self._longest_frozen_s = 0.0

    def ended(self, phase: Phase) -> None:
        """The time since the last phase ended was this one's."""
        now_s = perf_counter()
        self._spent_s[phase] = self._spent_s.get(phase, 0.0) + now_s - self._since_s
        self._since_s = now_s

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Around the time in which the workload stands still."""
        began_s = perf_counter()
        try:
            yield
        finally:
            self._longest_frozen_s = max(self._longest_frozen_s, perf_counter() - began_s)

    def phases(self) -> ShrinkPhases:
        """What was measured so far."""
        spent = {f"{phase}_s": spent_s for phase, spent_s in self._spent_s.items()}
        return ShrinkPhases(**spent, frozen_s=self._longest_frozen_s)
