"""What the workload can be told: one JSON object a line, checked before anything is done.

{"cmd": "set", "anon_bytes": n, "cache_bytes": n, "rate": bytes_per_s | null}   any of the three
{"cmd": "stats", "reset": bool}
{"cmd": "burst", "bytes": n}     answered when all of it has been touched
{"cmd": "unburst"}
{"cmd": "stop"}

Every answer is one line, {"ok": true, ...} or {"ok": false, "error": text}.

Named tuples and no dataclasses: importing those costs a process of 9 MiB another one.
"""

import json
import math
from typing import Final, NamedTuple

MAX_BYTES: Final = 64 * 1024**3
"""Bound of each size that is asked for, and the addresses kept for the anonymous set."""

MAX_CACHE_BYTES: Final = 4 * 1024**3
"""A file descriptor for each 8 MiB makes 512, of the 1,024 that a process has."""

MAX_LINE_BYTES: Final = 4096
"""A command has a few dozen; more is somebody who does not speak this."""


class CommandError(ValueError):
    """A line that is no command; the text says why, for the one who sent it."""


class Rate(NamedTuple):
    """Bytes touched a second in all; None for all of the set once a second."""

    bytes_per_s: float | None


class Set(NamedTuple):
    """Change what is wanted; None leaves a thing as it is."""

    anon_bytes: int | None = None
    cache_bytes: int | None = None
    rate: Rate | None = None


class Stats(NamedTuple):
    """Tell the statistics, and start them afresh if `reset`."""

    reset: bool = False


class StartBurst(NamedTuple):
    """Allocate and touch so much more, at full speed."""

    burst_bytes: int


class EndBurst(NamedTuple):
    """Give the burst's memory back."""


class Stop(NamedTuple):
    """End the workload."""


Command = Set | Stats | StartBurst | EndBurst | Stop

_KEYS: Final[dict[str, frozenset[str]]] = {
    "set": frozenset({"anon_bytes", "cache_bytes", "rate"}),
    "stats": frozenset({"reset"}),
    "burst": frozenset({"bytes"}),
    "unburst": frozenset(),
    "stop": frozenset(),
}


def parse(line: bytes) -> Command:
    """One line as a command. Raises CommandError; nothing of a bad line is done."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CommandError("not a line of JSON") from error
    if not isinstance(fields, dict):
        raise CommandError("not a JSON object")
    name = fields.pop("cmd", None)
    if not isinstance(name, str) or name not in _KEYS:
        raise CommandError(f"cmd is none of {', '.join(_KEYS)}")
    if unknown := sorted(set(fields) - _KEYS[name]):
        raise CommandError(f"unknown to {name}: {unknown[0][:64]}")
    if name == "set":
        return _set(fields)
    if name == "stats":
        reset = fields.get("reset", False)
        if not isinstance(reset, bool):
            raise CommandError("reset is not true or false")
        return Stats(reset)
    if name == "burst":
        burst_bytes = _size(fields, "bytes", MAX_BYTES)
        if not burst_bytes:
            raise CommandError("bytes is missing or 0")
        return StartBurst(burst_bytes)
    return EndBurst() if name == "unburst" else Stop()


def _set(fields: dict[str, object]) -> Set:
    rate = None
    if "rate" in fields:
        rate = Rate(_rate(fields["rate"]))
    return Set(
        anon_bytes=_size(fields, "anon_bytes", MAX_BYTES),
        cache_bytes=_size(fields, "cache_bytes", MAX_CACHE_BYTES),
        rate=rate,
    )


def _size(fields: dict[str, object], name: str, most_bytes: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise CommandError(f"{name} is not a whole number")
    if not 0 <= value <= most_bytes:
        raise CommandError(f"{name} is not between 0 and {most_bytes}")
    return value


def _rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CommandError("rate is not a number")
    # The bound keeps a huge integer from overflowing when it becomes a float.
    if not 0 < value <= 1e15 or not math.isfinite(value):
        raise CommandError("rate is not a positive number of bytes a second")
    return float(value)
