"""A figure of the bench, and the machine that it was measured on."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from host_agent.sizes import format_size
from protocol.units import KIB


@dataclass(frozen=True, slots=True)
class Reach:
    """What a figure should be."""

    bound: Literal["at least", "at most"]
    value: float

    def holds(self, value: float) -> bool:
        """Whether `value` is within reach."""
        return value >= self.value if self.bound == "at least" else value <= self.value

    def __str__(self) -> str:
        return f"{self.bound} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. `detail` holds what it was made of, for whoever wants to check."""

    name: str
    value: float
    unit: str
    reach: Reach
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the figure is within reach."""
        return self.reach.holds(self.value)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "reach": str(self.reach),
            "holds": self.holds,
            "detail": self.detail,
        }


def machine(cgroup_version: int) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processor": _first_value(Path("/proc/cpuinfo"), "model name"),
        "processors": os.cpu_count(),
        "memory": _memory(),
        "cgroup_version": cgroup_version,
        "transparent_hugepages": _line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
    }


def _memory() -> str | None:
    text = _first_value(Path("/proc/meminfo"), "MemTotal")
    return None if text is None else format_size(int(text.split()[0]) * KIB)


def _first_value(path: Path, key: str) -> str | None:
    """The value of the first `key : value` line, None if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
