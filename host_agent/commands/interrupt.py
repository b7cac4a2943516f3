"""SIGINT and SIGTERM for commands that make things and must remove them before they end."""

import signal
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

Result = TypeVar("Result")

INTERRUPTED: Final = 130
"""Exit status of a command that Ctrl-C ended, as a shell gives it."""


async def unless_interrupted(
    work: Callable[[], Awaitable[Result]], tell: Callable[[str], None]
) -> Result | None:
    """What `work` gives, or None if a signal came first; what it holds is removed either way."""
    result: Result | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                async for _ in signals:
                    tell("interrupted: removing everything")
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop_on_signal)
            result = await work()
            nursery.cancel_scope.cancel()
    return result
