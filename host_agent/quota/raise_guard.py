"""A raise from the event loop wins over a shrink that runs in a thread.

The shrink's last write may take effect microseconds after the raise and undo it, and a limit that
is too low while a guest is dry would be paid with a kill. So each raise is counted; the shrink
compares the count after each of its writes, and puts back what the raise had set. The lock is held
for a few system calls of 1 us each, never during reclaim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock

from host_agent.quota.errors import NoRoom, VmGone


@dataclass(frozen=True, slots=True)
class ShrinkTicket:
    """What was in force when a shrink began."""

    raises: int
    old_limit_bytes: int


class RaiseGuard:
    """Counts the raises of one limit."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._shrinking = Lock()
        self._raises = 0
        self._raised_to_bytes = 0
        self._closing = False

    @property
    def is_shrinking(self) -> bool:
        """A shrink runs now."""
        return self._shrinking.locked()

    @contextmanager
    def raising(self) -> Iterator[Callable[[int], None]]:
        """Around the writes of a raise, for microseconds; call what it gives with the new limit."""

        def raised(limit_bytes: int) -> None:
            self._raises += 1
            self._raised_to_bytes = limit_bytes

        with self._lock:
            yield raised

    @contextmanager
    def shrinking(
        self, read_limit: Callable[[], int], put_back: Callable[[int], None]
    ) -> Iterator[ShrinkTicket]:
        """Around a shrink, one at a time; if it fails, `put_back` gets the limit to restore."""
        with self._shrinking:
            with self._lock:
                ticket = ShrinkTicket(self._raises, read_limit())
            try:
                yield ticket
            except BaseException:
                with self._lock, suppress(VmGone):
                    raised = self._raises != ticket.raises
                    put_back(self._raised_to_bytes if raised else ticket.old_limit_bytes)
                raise

    def check(self, ticket: ShrinkTicket) -> None:
        """NoRoom if somebody raised the limit since the shrink began, or closes the VM."""
        with self._lock:
            if self._closing:
                raise NoRoom("the VM is being let go: no more room is made in it")
            if self._raises != ticket.raises:
                raise NoRoom("the guest was given memory while room was made in it; try later")

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around a change of the limit's files: a shrink under way gives up, a raise waits."""
        self._closing = True
        try:
            with self._shrinking, self._lock:
                yield
        finally:
            self._closing = False

    def close(self, close_files: Callable[[], None]) -> None:
        """Let a shrink that is under way give up, then close."""
        self._closing = True
        with self._shrinking, self._lock:
            close_files()
