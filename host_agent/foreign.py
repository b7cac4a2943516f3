"""Somebody else's code, asked so that it harms nobody: in a thread, with a deadline.

Whatever it raises, and that it does not answer, comes back as a ForeignFault of one short line. A
thread can't be ended: one that hangs is left behind, and ends with the process.
"""

import threading
from collections.abc import Callable
from typing import Final, TypeVar

import trio

from host_agent.blocking import DeadlinePassed, run_blocking
from protocol.vocabulary import one_line

T = TypeVar("T")

Errors = tuple[type[Exception], ...]

IMPORT_DEADLINE_S: Final = 10.0
"""To import a package and make its policy: what draws in large libraries takes seconds."""


class ForeignFault(Exception):
    """Somebody else's code failed, or did not answer in time; one line."""


def said(error: BaseException) -> str:
    """An exception in one line, whatever it makes of being printed."""
    kind = type(error).__name__
    try:
        text = short(str(error))
    except Exception:
        return kind  # its text is somebody else's code as well
    return f"{kind}: {text}" if text else kind


def short(text: str) -> str:
    """Any text in one line of bounded length."""
    return " ".join(one_line(text).split())


def guarded(call: Callable[[], T], known: Errors = ()) -> T:
    """The call's result. Raises ForeignFault for whatever it raises.

    An error of the types `known` is ours, and its text is taken as it is.
    """
    try:
        return call()
    except known as error:
        raise ForeignFault(short(str(error))) from error
    except BaseException as error:
        # It may raise what no Exception is: a panic of an extension, for one.
        on_main = threading.current_thread() is threading.main_thread()
        if isinstance(error, KeyboardInterrupt) and on_main:
            raise
        raise ForeignFault(f"it raised {said(error)}") from error


async def ask(
    call: Callable[[], T],
    *,
    timeout_s: float,
    limiter: trio.CapacityLimiter,
    known: Errors = (),
    if_busy: str | None = None,
) -> T:
    """As `guarded`, in a thread, while the event loop goes on.

    Those that hang keep their threads. If none was left for this one until its deadline, that is
    not its fault: `if_busy` is what is said then.
    """
    was_busy = limiter.available_tokens < 1
    began = threading.Event()

    def work() -> T:
        began.set()
        return guarded(call, known)

    try:
        return await run_blocking(work, timeout_s=timeout_s, limiter=limiter)
    except DeadlinePassed:
        if if_busy is not None and was_busy and not began.is_set():
            raise ForeignFault(if_busy) from None
        raise _too_late(timeout_s) from None


def ask_and_wait(call: Callable[[], T], *, timeout_s: float, known: Errors = ()) -> T:
    """As `ask`, where there is no event loop that it could hold up."""
    results: list[T] = []
    faults: list[BaseException] = []

    def work() -> None:
        try:
            results.append(guarded(call, known))
        except ForeignFault as fault:
            faults.append(fault)

    thread = threading.Thread(target=work, name="foreign code", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if results:
        return results[0]
    raise faults[0] if faults else _too_late(timeout_s)


def _too_late(timeout_s: float) -> ForeignFault:
    return ForeignFault(f"it has not answered within {timeout_s:g} s")
