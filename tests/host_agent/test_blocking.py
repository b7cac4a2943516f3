"""Blocking work in threads: results, deadlines, cancellation, and late results undone."""

import threading
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from host_agent.blocking import AUDITS, LIMIT_WRITES, DeadlinePassed, Threads, run_blocking

REAL_DEADLINE_S = 20.0


class Work:
    """A call that can be held up; it counts what was done and undone."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go = threading.Event()
        self.undone = threading.Event()
        self.undos = 0
        self.error: Exception | None = None

    def do(self) -> str:
        self.started.set()
        assert self.go.wait(REAL_DEADLINE_S)
        if self.error is not None:
            raise self.error
        return "done"

    def undo(self) -> None:
        self.undos += 1
        self.undone.set()


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.go.set()


async def ended(limiter: trio.CapacityLimiter) -> None:
    """Until the threads are through, those left behind included."""
    with trio.fail_after(REAL_DEADLINE_S):
        while limiter.borrowed_tokens:
            await trio.sleep(0.001)


def test_the_result_and_the_error_are_the_calls_own(work: Work) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        work.go.set()
        result = await run_blocking(work.do, timeout_s=20.0, limiter=limiter, undo=work.undo)
        assert result == "done"
        work.error = KeyError("mine")
        with pytest.raises(KeyError, match="mine"):
            await run_blocking(work.do, timeout_s=20.0, limiter=limiter, undo=work.undo)
        assert work.undos == 0

    trio.run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_a_late_success_is_undone_a_late_failure_is_not(work: Work, fails: bool) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        work.error = KeyError("late") if fails else None
        with pytest.raises(DeadlinePassed, match=r"no end after 0\.01 s"):
            await run_blocking(work.do, timeout_s=0.01, limiter=limiter, undo=work.undo)
        assert work.undos == 0
        work.go.set()
        await ended(limiter)
        assert work.undos == (0 if fails else 1)

    trio.run(main)


def test_without_an_undo_a_late_success_stands(work: Work) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        with pytest.raises(DeadlinePassed):
            await run_blocking(work.do, timeout_s=0.01, limiter=limiter)
        work.go.set()
        await ended(limiter)

    trio.run(main)


def test_a_cancelled_callers_success_is_undone(work: Work) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def call() -> None:
                    await run_blocking(
                        work.do, timeout_s=REAL_DEADLINE_S, limiter=limiter, undo=work.undo
                    )

                nursery.start_soon(call)
                await trio.to_thread.run_sync(work.started.wait, REAL_DEADLINE_S)
                scope.cancel()
        assert scope.cancelled_caught
        assert work.undos == 0
        work.go.set()
        await ended(limiter)
        assert work.undos == 1

    trio.run(main)


def test_a_success_that_nobody_hears_of_is_undone(work: Work) -> None:
    """The caller is cancelled when the call has succeeded and its thread has not told yet."""

    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:

            def cancel_and_hold_the_loop() -> None:
                scope.cancel()
                work.go.set()
                # The thread ends meanwhile. Should it be slower than that, it undoes by itself.
                time.sleep(0.05)

            def do() -> str:
                token.run_sync_soon(cancel_and_hold_the_loop)
                return work.do()

            await run_blocking(do, timeout_s=20.0, limiter=limiter, undo=work.undo)
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(work.undone.wait, REAL_DEADLINE_S)
        assert work.undos == 1

    trio.run(main)


def test_a_call_that_never_began_has_nothing_to_undo(work: Work) -> None:
    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        async with limiter:
            with pytest.raises(DeadlinePassed):
                await run_blocking(work.do, timeout_s=0.01, limiter=limiter, undo=work.undo)
        assert not work.started.is_set()
        assert work.undos == 0

    trio.run(main)


def test_a_slow_limit_write_holds_no_audit_up(work: Work) -> None:
    async def main() -> None:
        threads = Threads()
        assert threads.limit_writes.total_tokens == LIMIT_WRITES
        assert threads.audits.total_tokens == AUDITS
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                await run_blocking(work.do, timeout_s=20.0, limiter=threads.limit_writes)

            for _ in range(LIMIT_WRITES + 3):
                nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            assert threads.limit_writes.available_tokens == 0
            looked = await run_blocking(lambda: 7, timeout_s=20.0, limiter=threads.audits)
            assert looked == 7
            work.go.set()

    trio.run(main)
