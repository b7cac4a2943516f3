"""Speaks to the demonstration's workload in a mock VM: one JSON line out, one back.

The workload's socket lies on the guest's own disk, which the host sees. What answers there is the
guest's program: its answers are bounded and checked, and are for showing, never for deciding.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, Final

import trio

from host_agent.errors import AgentError

MAX_ANSWER_BYTES: Final = 64 * 1024
"""An answer has about 1 KiB; a guest that sends more is not our workload."""

SETTING_TIMEOUT_S: Final = 10.0
"""The workload's loop answers between touches; a touch may wait for memory for seconds."""

BURST_TIMEOUT_S: Final = 60.0


class WorkloadError(AgentError):
    """The workload could not be asked: nobody there, no answer in time, or none that it gives."""

    kind = "workload"


class WorkloadRefused(WorkloadError):
    """The workload answered that it won't; the message has its reason."""

    kind = "workload-refused"


class WorkloadClient:
    """A workload at `path`. Each call is one connection, so a call given up leaves nothing behind.

    All calls raise WorkloadError, WorkloadRefused among them, and nothing else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    async def set(
        self,
        *,
        anon_bytes: int | None = None,
        cache_bytes: int | None = None,
        rate_bytes_per_s: float | None = None,
        timeout_s: float = SETTING_TIMEOUT_S,
    ) -> None:
        """Change what it touches; None leaves a thing as it is. Returns before it has grown."""
        wanted: dict[str, object] = {"anon_bytes": anon_bytes, "cache_bytes": cache_bytes}
        wanted["rate"] = rate_bytes_per_s
        changes = {name: value for name, value in wanted.items() if value is not None}
        await self._ask({"cmd": "set", **changes}, timeout_s)

    async def stats(
        self, *, reset: bool = False, timeout_s: float = SETTING_TIMEOUT_S
    ) -> dict[str, Any]:
        """Its statistics, as workload_loop.py makes them; with `reset`, the next begin here."""
        return await self._ask({"cmd": "stats", "reset": reset}, timeout_s)

    async def burst(
        self, burst_bytes: int, *, timeout_s: float = BURST_TIMEOUT_S
    ) -> dict[str, Any]:
        """Let it touch so much more at full speed, and hold it: `seconds`, `longest_stall_s`."""
        return await self._ask({"cmd": "burst", "bytes": burst_bytes}, timeout_s)

    async def unburst(self, *, timeout_s: float = SETTING_TIMEOUT_S) -> None:
        """Let it give the burst back."""
        await self._ask({"cmd": "unburst"}, timeout_s)

    async def stop(self, *, timeout_s: float = SETTING_TIMEOUT_S) -> None:
        """Let it end; returns when it has agreed to."""
        await self._ask({"cmd": "stop"}, timeout_s)

    async def _ask(self, command: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        try:
            with trio.fail_after(timeout_s):
                line = await self._exchange(json.dumps(command).encode() + b"\n")
        except trio.TooSlowError as error:
            raise WorkloadError(f"no answer from {self.path} within {timeout_s:g} s") from error
        except (OSError, trio.BrokenResourceError, ValueError) as error:
            raise WorkloadError(f"no workload at {self.path}: {error}") from error
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"{self.path} does not answer in JSON lines") from error
        if not isinstance(answer, dict):
            raise WorkloadError(f"{self.path} does not answer with objects")
        if answer.get("ok") is not True:
            reason = str(answer.get("error", "without a reason"))[:200]
            raise WorkloadRefused(f"the workload refused: {reason}")
        return answer

    async def _exchange(self, line: bytes) -> bytes:
        async with await trio.open_unix_socket(self.path) as stream:
            await stream.send_all(line)
            received = bytearray()
            while b"\n" not in received:
                chunk = await stream.receive_some(MAX_ANSWER_BYTES)
                if not chunk:
                    raise ValueError("it hung up")
                received += chunk
                if len(received) > MAX_ANSWER_BYTES:
                    raise ValueError("its answer is too long")
            return bytes(received.partition(b"\n")[0])
