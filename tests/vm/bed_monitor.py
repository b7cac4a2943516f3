"""Lines of JSON to and from a VM: its monitor (QMP), and programs inside on a port of their own."""

import json
import socket
import time
from typing import Any

from bed_errors import BedError

CHUNK_BYTES = 1 << 16


class JsonLines:
    """One JSON object a line, each way, over a connected socket."""

    def __init__(self, connection: socket.socket, whose: str) -> None:
        self._connection = connection
        self._whose = whose
        self._heard = b""

    def write(self, message: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, timeout_s: float) -> dict[str, Any]:
        """The next object. Raises BedError if there is none in time, or ever."""
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            self._connection.settimeout(max(end_s - time.monotonic(), 0.001))
            try:
                chunk = self._connection.recv(CHUNK_BYTES)
            except TimeoutError as error:
                raise BedError(f"{self._whose}: nothing within {timeout_s:.0f} s") from error
            if not chunk:
                raise BedError(f"{self._whose}: the VM has ended")
            self._heard += chunk
        line, _, self._heard = self._heard.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError as error:
            raise BedError(f"{self._whose}: no JSON: {line[:200]!r}") from error
        if not isinstance(found, dict):
            raise BedError(f"{self._whose}: no object: {line[:200]!r}")
        return found


class Monitor:
    """QEMU's, as far as a balloon needs it (docs/interop/qmp-spec in QEMU's sources)."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._lines = JsonLines(connection, "the monitor")
        self._timeout_s = timeout_s
        greeting = self._lines.read(timeout_s)
        version = greeting["QMP"]["version"]["qemu"]
        self.version = f"{version['major']}.{version['minor']}.{version['micro']}"
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: int) -> Any:
        """What a command returns; events are passed over. Raises BedError."""
        self._lines.write({"execute": command, "arguments": arguments})
        while True:
            answer = self._lines.read(self._timeout_s)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise BedError(f"{command}: {answer['error'].get('desc', answer['error'])}")
