"""How long touches took: a histogram of constant size, cheap enough for every touch."""

import math
from typing import Final

STALL_S: Final = 0.010
"""A touch that takes longer than this is a stall: no cache miss on a disk of today does."""

_SHORTEST_S: Final = 1e-6
_STEPS_PER_DOUBLING: Final = 4
_BUCKETS: Final = 26 * _STEPS_PER_DOUBLING
"""From 1 us to 67 s in steps of 19 %: a percentile is off by at most that much, upwards."""


class Latencies:
    """Durations of one kind of touch since the last reset, in seconds."""

    __slots__ = ("_counts", "bytes_total", "longest_s", "stalls", "touches")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._counts = [0] * (_BUCKETS + 1)
        self.touches = 0
        self.stalls = 0
        self.longest_s = 0.0
        self.bytes_total = 0

    def add(self, duration_s: float, touched_bytes: int) -> None:
        """Count one touch of `touched_bytes` that took `duration_s`."""
        self.touches += 1
        self.bytes_total += touched_bytes
        self.longest_s = max(self.longest_s, duration_s)
        if duration_s > STALL_S:
            self.stalls += 1
        if duration_s <= _SHORTEST_S:
            bucket = 0
        else:
            steps = math.log2(duration_s / _SHORTEST_S) * _STEPS_PER_DOUBLING
            bucket = min(math.ceil(steps), _BUCKETS)
        self._counts[bucket] += 1

    def quantile_s(self, share: float) -> float | None:
        """The duration that `share` (0 to 1) of the touches did not exceed; None without any."""
        wanted = share * self.touches
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                if bucket == _BUCKETS:  # the last one has no bound
                    return self.longest_s
                bound_s: float = _SHORTEST_S * 2.0 ** (bucket / _STEPS_PER_DOUBLING)
                return min(bound_s, self.longest_s)
        return None

    def as_dict(self) -> dict[str, object]:
        """For JSON; None where there was no touch."""
        return {
            "touches": self.touches,
            "touched_bytes_total": self.bytes_total,
            "max_s": self.longest_s if self.touches else None,
            "p50_s": self.quantile_s(0.50),
            "p99_s": self.quantile_s(0.99),
            "stalls": self.stalls,
        }
