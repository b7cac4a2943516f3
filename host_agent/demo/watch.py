"""The demonstration's independent eye: what the kernel itself says of the limits, all the time."""

import contextlib
import time
from pathlib import Path
from threading import Event
from typing import Final

import trio

from host_agent.quota.errors import QuotaError
from host_agent.quota.kernel_sum import KernelSum

INTERVAL_S: Final = 0.002
"""A move takes tens of milliseconds, so that this sees every state that lasts."""


class LimitWatch:
    """Reads the sum of all limits in a thread of its own, until stopped."""

    def __init__(self, root: Path, overhead_bytes: int) -> None:
        self._root = root
        self._overhead_bytes = overhead_bytes
        self._stop = Event()
        self.highest_bytes = 0
        self.samples = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            await trio.to_thread.run_sync(self._watch, abandon_on_cancel=True)
        finally:
            self._stop.set()

    def _watch(self) -> None:
        limits = KernelSum(self._root, self._overhead_bytes)
        try:
            while not self._stop.is_set():
                with contextlib.suppress(QuotaError, OSError):
                    reading = limits.read()
                    # A sum that changed while it was read is of no one instant.
                    if reading.stable:
                        self.highest_bytes = max(self.highest_bytes, reading.sum_bytes)
                        self.samples += 1
                time.sleep(INTERVAL_S)
        finally:
            limits.close()


def peak_memory_bytes(root: Path) -> int | None:
    """Highest use of all below the agent's root, as the kernel counted it; None if unknown."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        with contextlib.suppress(OSError, ValueError):
            return int((root / name).read_text())
    return None
