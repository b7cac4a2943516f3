"""Blocking kernel work in threads, with deadlines.

A write to a cgroup file or a read of pagemap can't be interrupted: when its deadline passes, the
thread is left behind. What it does late must not stand, so the caller says how to undo it.
"""

from collections.abc import Callable
from threading import Lock
from typing import Final, TypeVar

import trio

T = TypeVar("T")

LIMIT_WRITES: Final = 16
"""Limit writes at once: each may wait for its guest's dirty pages to reach the disk, and guests
have to be able to wait side by side."""

AUDITS: Final = 4
"""Audits at once: they are bound by the processor, and few boxes gain from more."""


class DeadlinePassed(Exception):
    """A blocking call did not end in time; its thread was left behind."""


class Threads:
    """Two pools of threads, so that slow limit writes never hold up an audit."""

    def __init__(self) -> None:
        self.limit_writes = trio.CapacityLimiter(LIMIT_WRITES)
        self.audits = trio.CapacityLimiter(AUDITS)


async def run_blocking(
    call: Callable[[], T],
    *,
    timeout_s: float,
    limiter: trio.CapacityLimiter,
    undo: Callable[[], object] | None = None,
) -> T:
    """Run `call` in a thread; its result, or its exception.

    Raises DeadlinePassed after `timeout_s`. If the call succeeds after that, or after the caller
    was cancelled, the thread runs `undo`.
    """
    lock = Lock()
    abandoned = False
    succeeded = False

    def work() -> T:
        nonlocal succeeded
        result = call()
        with lock:
            succeeded = True
            late = abandoned
        if late and undo is not None:
            undo()
        return result

    try:
        with trio.fail_after(timeout_s):
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except (trio.TooSlowError, trio.Cancelled) as gone:
        with lock:
            abandoned = True
            result_is_lost = succeeded
        if result_is_lost and undo is not None:
            trio.lowlevel.start_thread_soon(undo, lambda _outcome: None)
        if isinstance(gone, trio.TooSlowError):
            raise DeadlinePassed(f"no end after {timeout_s:g} s") from None
        raise
