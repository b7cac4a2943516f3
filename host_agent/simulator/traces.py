"""What each guest needs at each step of virtual time: traces as columns of pages.

Pure but for the recordings that a scenario names. All randomness comes from the scenario's seed,
the number of the host, and the number of the guest, so that a guest's trace depends on nothing
else: not on the order of the work, nor on who does it.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np
import numpy.typing as npt

from host_agent.errors import ConfigError
from host_agent.simulator.scenario import (
    Burst,
    Correlated,
    Diurnal,
    GuestTable,
    Recorded,
    Scenario,
    Steady,
    Steps,
    Trace,
)
from protocol.units import PAGE_BYTES, pages_of

Pages = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
Needs = npt.NDArray[np.int32]
"""Pages of 4 KiB by step and guest, shape (looks, guests): 2**31 pages are 8 TiB."""

_GUESTS: Final = 0
_GROUPS: Final = 1
"""Which stream of random numbers: of a guest, or of a group of guests."""

MAX_CSV_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Recording:
    """One VM of a recording: `times_s` from 0 on, ascending, and the pages needed from then on."""

    times_s: Seconds
    pages: Pages


Recordings = Mapping[str, Recording]
"""By the name of the VM."""


def needs_of(scenario: Scenario, host: int, recordings: Mapping[Recorded, Recordings]) -> Needs:
    """Pages that each guest of host number `host` needs at each look, within its assigned size.

    The columns are in the order of the tables and, within one, of the guests' numbers.
    """
    times_s: Seconds = np.arange(scenario.looks) * np.float64(scenario.look_s)
    columns: list[npt.NDArray[np.int32]] = []
    number = 0
    for table in scenario.guests:
        for at_table, arrives_s in enumerate(arrivals_s(table)):
            random = np.random.default_rng([scenario.seed, host, _GUESTS, number])
            from_launch = isinstance(table.trace, Steps) and table.trace.from_launch
            own_s = times_s - arrives_s if from_launch else times_s
            pages = _trace(scenario, table.trace, own_s, random, host, at_table, recordings)
            columns.append(np.clip(pages, 0, pages_of(table.assigned_bytes)).astype(np.int32))
            number += 1
    return np.stack(columns, axis=1)


def _trace(
    scenario: Scenario,
    trace: Trace,
    times_s: Seconds,
    random: np.random.Generator,
    host: int,
    at_table: int,
    recordings: Mapping[Recorded, Recordings],
) -> Pages:
    match trace:
        case Steady():
            levels = np.full(times_s.shape, float(trace.level_bytes))
        case Diurnal():
            peak_s = trace.peak_s + random.random() * trace.spread_s
            wave = 0.5 + 0.5 * np.cos(2 * math.pi * (times_s - peak_s) / trace.period_s)
            levels = trace.low_bytes + wave * (trace.high_bytes - trace.low_bytes)
        case Correlated():
            shared = np.random.default_rng(
                [scenario.seed, host, _GROUPS, crc32(trace.group.encode())]
            )
            starts_s = _instants(shared, trace.every_s, scenario.duration_s)
            joins = random.random(starts_s.size) < trace.joins
            late_s = random.random(starts_s.size) * trace.stagger_s
            levels = _bursts(trace, times_s, (starts_s + late_s)[joins])
        case Burst():
            starts_s = _instants(random, trace.every_s, scenario.duration_s)
            levels = _bursts(trace, times_s, starts_s)
        case Steps():
            begins_s = np.array([time_s for time_s, _ in trace.points])
            sizes = np.array([0, *(size for _, size in trace.points)], dtype=np.float64)
            levels = sizes[np.searchsorted(begins_s, times_s, side="right")]
        case Recorded():
            return _played(trace, times_s, at_table, recordings[trace])
    if trace.noise:
        levels = levels * (1 + trace.noise * random.standard_normal(times_s.size))
    pages: Pages = (np.maximum(levels, 0) // PAGE_BYTES).astype(np.int64)
    return pages


def _instants(random: np.random.Generator, every_s: float, until_s: float) -> Seconds:
    """Random instants from 0 to `until_s`, `every_s` apart in the mean."""
    count = random.poisson(until_s / every_s)
    return np.sort(random.random(count) * until_s)


def _bursts(trace: Burst, times_s: Seconds, starts_s: Seconds) -> Seconds:
    """High from each start for the length of a burst, low otherwise."""
    starts_s = np.sort(starts_s)
    last = np.searchsorted(starts_s, times_s, side="right") - 1
    since_s = times_s - np.concatenate((starts_s, [-math.inf]))[last]  # -1: none yet
    high = since_s < trace.length_s
    return np.where(high, float(trace.high_bytes), float(trace.low_bytes))


def _played(trace: Recorded, times_s: Seconds, at_table: int, recordings: Recordings) -> Pages:
    names = sorted(recordings)
    recording = recordings[names[at_table % len(names)] if trace.vm is None else trace.vm]
    length_s = recording.times_s[-1]
    if trace.repeat and length_s > 0:
        times_s = np.mod(times_s, length_s)
    at = np.searchsorted(recording.times_s, times_s, side="right") - 1
    scaled: Pages = (recording.pages[at] * trace.scale).astype(np.int64)
    return scaled


# Recordings


def recordings_of(scenario: Scenario, folder: Path) -> dict[Recorded, Recordings]:
    """Every recording that the scenario names, read; `folder` is the scenario's own.

    Raises:
        ConfigError: one line with the file and what is wrong with it.
    """
    traces = [table.trace for table in scenario.guests if isinstance(table.trace, Recorded)]
    return {trace: read_recording(folder / trace.file, trace) for trace in traces}


def read_recording(path: Path, trace: Recorded) -> Recordings:
    """The VMs of a CSV file with the columns `time_s`, `vm`, and the one that counts as need."""
    rows: dict[str, list[tuple[float, int]]] = {}
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise ConfigError(f"{path}: a recording of more than 1GiB is not read")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for column in ("time_s", "vm", trace.column):
                if column not in (reader.fieldnames or ()):
                    raise ConfigError(f"{path}: no column {column!r} in its first line")
            for row in reader:
                if row[trace.column]:  # empty: not known then
                    rows.setdefault(row["vm"], []).append(_row(path, reader, row, trace.column))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise ConfigError(f"{path}: it holds no {trace.column} of any VM")
    if trace.vm is not None and trace.vm not in rows:
        raise ConfigError(f"{path}: no VM {trace.vm!r} (it has: {', '.join(sorted(rows))})")
    begins_s = min(points[0][0] for points in rows.values())
    return {name: _recording(path, name, points, begins_s) for name, points in rows.items()}


def _row(
    path: Path, reader: "csv.DictReader[str]", row: Mapping[str, str | None], column: str
) -> tuple[float, int]:
    try:
        time_s, need_bytes = float(row["time_s"] or ""), int(row[column] or "")
    except ValueError:
        time_s, need_bytes = math.nan, 0
    if not math.isfinite(time_s) or need_bytes < 0:
        raise ConfigError(f"{path}: line {reader.line_num}: no time, or no number of bytes")
    return time_s, pages_of(need_bytes)


def _recording(
    path: Path, name: str, points: list[tuple[float, int]], begins_s: float
) -> Recording:
    times_s = np.array([time_s for time_s, _ in points]) - begins_s
    if (np.diff(times_s) < 0).any():
        raise ConfigError(f"{path}: the rows of {name} are not in the order of time")
    times_s[0] = 0.0  # a VM that came later needs from the start what it needed at first
    return Recording(times_s, np.array([pages for _, pages in points], dtype=np.int64))


def arrivals_s(table: GuestTable) -> list[float]:
    """When each guest of the table is launched, in seconds."""
    return [table.arrives_s + number * table.arrives_every_s for number in range(table.count)]
