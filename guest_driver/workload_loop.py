"""The one loop of the workload: serve control, grow, touch what is due, sleep.

A touch that the kernel holds up holds up the loop, and with it the answers. That is meant: it is
what happens to a program that runs out of memory, and the time is measured.
"""

import contextlib
import json
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from guest_driver.workload_control import (
    MAX_LINE_BYTES,
    Command,
    CommandError,
    EndBurst,
    Rate,
    Set,
    StartBurst,
    Stats,
    parse,
)
from guest_driver.workload_latency import Latencies

if TYPE_CHECKING:
    from guest_driver.workload import AnonymousSet, Burst, CacheSet

TICK_S: Final = 0.025
"""Sleep between touches: 40 wake-ups a second spread the touching evenly and cost little."""

CATCH_UP_S: Final = 0.1
"""Touches that fell due during a longer stall are dropped, not made up for: a workload that has
to wait does less, and a storm of touches afterwards would be no one's behaviour."""

STEP_S: Final = 0.005
"""Grown or burst at a stretch before control is looked at again."""

MAX_CLIENTS: Final = 16
"""The host's one and people trying things; more is a leak of somebody's."""

DEFAULT_ROUND_S: Final = 1.0
"""Without a rate, everything is touched once in this time."""


class Makers(NamedTuple):
    """How the workload gets its memory, once it knows that it is the only one at its socket."""

    anonymous: "Callable[[], AnonymousSet]"
    burst: "Callable[[int], Burst]"
    cache: "Callable[[], CacheSet]"


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = bytearray()


class _RunningBurst:
    def __init__(self, burst: "Burst", client: _Client, started_s: float) -> None:
        self.burst = burst
        self.client = client
        self.started_s = started_s
        self.latencies = Latencies()
        self.is_complete = False


class Workload:
    """Everything that runs. `run` returns after `stop`, or a byte on `wakeup` (a signal).

    Resources: listens on `control_path` (mode 0600), which is removed at the end, as are the
    files unless `keep_files`. Errors: OSError if the path can't be had; FileExistsError if
    another workload is alive there, or if it is no socket.
    """

    def __init__(self, makers: Makers, control_path: Path, *, keep_files: bool = False) -> None:
        self._makers = makers
        self._control_path = control_path
        self._keep_files = keep_files
        self._rate: Rate = Rate(None)
        self._grow_bytes_per_s: float | None = None
        self._latencies = {"anon": Latencies(), "cache": Latencies()}
        self._reset_at_s = time.monotonic()
        self._burst: _RunningBurst | None = None
        self._is_stopping = False
        self._due_bytes = 0.0
        self._grow_due_bytes = 0.0
        self._anon_share = 0.0

    def run(self, first: Set, wakeup: socket.socket, grow_bytes_per_s: float | None = None) -> None:
        """Run with the sizes of `first` until told to stop."""
        self._grow_bytes_per_s = grow_bytes_per_s
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            listener = stack.enter_context(_listen(self._control_path))
            stack.callback(self._control_path.unlink, missing_ok=True)
            self._anon = self._makers.anonymous()
            stack.callback(self._anon.close)
            self._cache = self._makers.cache()
            stack.callback(lambda: self._cache.close(remove_files=not self._keep_files))
            stack.callback(self._close_clients)
            self._selector.register(listener, selectors.EVENT_READ)
            self._selector.register(wakeup, selectors.EVENT_READ)
            self._apply_set(first)
            self._loop(listener, wakeup)

    def _loop(self, listener: socket.socket, wakeup: socket.socket) -> None:
        then_s = time.monotonic()
        while not self._is_stopping:
            for key, _ in self._selector.select(0 if self._is_busy() else TICK_S):
                if key.fileobj is listener:
                    self._accept(listener)
                elif key.fileobj is wakeup:
                    self._is_stopping = True
                else:
                    self._receive(key.data)
            now_s = time.monotonic()
            elapsed_s = min(now_s - then_s, CATCH_UP_S)
            then_s = now_s
            self._cache.tend()
            if self._burst is not None and not self._burst.is_complete:
                self._continue_burst(self._burst)
            else:
                self._grow(elapsed_s)
                self._touch(elapsed_s)

    def _is_busy(self) -> bool:
        if self._burst is not None and not self._burst.is_complete:
            return True
        is_growing = self._anon.touched_bytes < self._anon.wanted_bytes
        return is_growing and self._grow_bytes_per_s is None

    def _grow(self, elapsed_s: float) -> None:
        until_s = time.perf_counter() + STEP_S
        if self._grow_bytes_per_s is not None:
            self._grow_due_bytes += self._grow_bytes_per_s * elapsed_s
        latencies = self._latencies["anon"]
        while self._grow_bytes_per_s is None or self._grow_due_bytes > 0:
            before_s = time.perf_counter()
            grown_bytes = self._anon.grow()
            if not grown_bytes:
                self._grow_due_bytes = 0.0
                return
            after_s = time.perf_counter()
            latencies.add(after_s - before_s, grown_bytes)
            self._grow_due_bytes -= grown_bytes
            if after_s > until_s:
                return

    def _touch(self, elapsed_s: float) -> None:
        """Touch what has fallen due, anonymous memory and cache mixed in proportion."""
        anon_bytes, cache_bytes = self._anon.touched_bytes, self._cache.ready_bytes
        whole_bytes = anon_bytes + cache_bytes
        if not whole_bytes:
            return
        rate = self._rate.bytes_per_s or whole_bytes / DEFAULT_ROUND_S
        self._due_bytes = min(self._due_bytes + rate * elapsed_s, rate * CATCH_UP_S + whole_bytes)
        until_s = time.perf_counter() + CATCH_UP_S
        while self._due_bytes > 0:
            self._anon_share += anon_bytes / whole_bytes
            is_anon = self._anon_share >= 1.0
            if is_anon:
                self._anon_share -= 1.0
            touched_bytes = self._touch_one(is_anon)
            self._due_bytes -= touched_bytes
            if not touched_bytes or time.perf_counter() > until_s:
                self._due_bytes = 0.0
                return

    def _touch_one(self, is_anon: bool) -> int:
        before_s = time.perf_counter()
        try:
            touched_bytes = self._anon.touch() if is_anon else self._cache.touch()
        except OSError as error:
            self._cache.error = str(error)
            return 0
        name = "anon" if is_anon else "cache"
        self._latencies[name].add(time.perf_counter() - before_s, touched_bytes)
        return touched_bytes

    def _continue_burst(self, running: _RunningBurst) -> None:
        until_s = time.perf_counter() + STEP_S
        before_s = time.perf_counter()
        while before_s < until_s:
            touched_bytes = running.burst.touch()
            after_s = time.perf_counter()
            if not touched_bytes:
                running.is_complete = True
                answer: dict[str, object] = {
                    "ok": True,
                    "seconds": after_s - running.started_s,
                    "longest_stall_s": running.latencies.longest_s,
                    "p50_s": running.latencies.quantile_s(0.5),
                    "stalls": running.latencies.stalls,
                    "bytes": running.burst.touched_bytes,
                }
                self._answer(running.client, answer)
                return
            running.latencies.add(after_s - before_s, touched_bytes)
            before_s = after_s

    # Control

    def _do(self, command: Command, client: _Client) -> dict[str, object] | None:
        """Carry out a command; its answer, None when that comes later."""
        if isinstance(command, Set):
            self._apply_set(command)
        elif isinstance(command, Stats):
            return self._stats(command)
        elif isinstance(command, StartBurst):
            if self._burst is not None:
                raise CommandError("a burst is held already: unburst first")
            try:
                burst = self._makers.burst(command.burst_bytes)
            except OSError as error:
                raise CommandError(f"no burst: {error.strerror}") from error
            self._burst = _RunningBurst(burst, client, time.perf_counter())
            return None
        elif isinstance(command, EndBurst):
            self._end_burst()
        else:
            self._is_stopping = True
        return {"ok": True}

    def _apply_set(self, command: Set) -> None:
        if command.anon_bytes is not None:
            self._anon.set_wanted(command.anon_bytes)
        if command.cache_bytes is not None:
            self._cache.set_wanted(command.cache_bytes)
        if command.rate is not None:
            self._rate = command.rate

    def _end_burst(self) -> None:
        if self._burst is None:
            raise CommandError("there is no burst")
        running, self._burst = self._burst, None
        running.burst.close()
        if not running.is_complete:
            self._answer(running.client, {"ok": False, "error": "the burst was ended"})

    def _stats(self, command: Stats) -> dict[str, object]:
        now_s = time.monotonic()
        held_bytes = 0 if self._burst is None else self._burst.burst.touched_bytes
        answer: dict[str, object] = {
            "ok": True,
            "elapsed_s": now_s - self._reset_at_s,
            "cpu_s": time.process_time(),
            "rate": self._rate.bytes_per_s,
            "burst_bytes": held_bytes,
            "anon": {
                "wanted_bytes": self._anon.wanted_bytes,
                "touched_bytes": self._anon.touched_bytes,
                **self._latencies["anon"].as_dict(),
            },
            "cache": {
                "wanted_bytes": self._cache.wanted_bytes,
                "ready_bytes": self._cache.ready_bytes,
                "error": self._cache.error,
                **self._latencies["cache"].as_dict(),
            },
        }
        if command.reset:
            for latencies in self._latencies.values():
                latencies.reset()
            self._reset_at_s = now_s
        return answer

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = listener.accept()
            if len(self._selector.get_map()) >= MAX_CLIENTS + 2:
                connection.close()
                return
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, _Client(connection))

    def _receive(self, client: _Client) -> None:
        try:
            chunk = client.connection.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._drop(client)
            return
        client.received += chunk
        while (end := client.received.find(b"\n")) >= 0:
            line = bytes(client.received[:end])
            del client.received[: end + 1]
            try:
                answer = self._do(parse(line), client)
            except CommandError as error:
                answer = {"ok": False, "error": str(error)}
            if answer is not None:
                self._answer(client, answer)
        if len(client.received) > MAX_LINE_BYTES:
            self._answer(client, {"ok": False, "error": "the line is too long"})
            self._drop(client)

    def _answer(self, client: _Client, answer: dict[str, object]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        try:
            # An answer fits the socket's buffer, or its reader has left a hundred unread.
            is_sent = client.connection.send(line) == len(line)
        except OSError:
            is_sent = False
        if not is_sent:
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        client.received.clear()
        with contextlib.suppress(KeyError, ValueError):  # dropped before
            self._selector.unregister(client.connection)
        client.connection.close()

    def _close_clients(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Client):
                self._drop(key.data)
        if self._burst is not None:
            self._burst.burst.close()
            self._burst = None


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, for this user alone, in place of one that nobody serves."""
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(f"{path} is there already and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise FileExistsError(f"another workload listens on {path}")
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)  # before the first instant in which it could be connected to
    try:
        listener.bind(os.fspath(path))
        listener.listen()
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener
