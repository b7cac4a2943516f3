"""How often a peer may do a thing: pure, time is an argument."""


class Pace:
    """Counts events in windows of `window_s`; more than `most` in one is too fast."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most = most
        self._window_s = window_s
        self._began_s: float | None = None
        self._count = 0

    def is_too_fast(self, now_s: float) -> bool:
        """Count one event; whether it was one too many."""
        if self._began_s is None or now_s - self._began_s >= self._window_s:
            self._began_s = now_s
            self._count = 0
        self._count += 1
        return self._count > self._most
