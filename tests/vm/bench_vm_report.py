"""What `make bench-vm` found, as figures and as a table. Pure."""

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

GIB = 1 << 30
MIB = 1 << 20
WIDTH = 80

NOTES = (
    "Comparable: a guest of the same size, as much memory moved, the same kernel, emulator and "
    "processors, in turns, each with the other VM stopped; times until the memory is gone, and "
    "seen to be gone (virtio-balloon: query-balloon, then the guest's MemTotal and QEMU's own "
    "resident memory; memballoon: every frame verified, then the kernel's limit).",
    "Not comparable, what happens: virtio-balloon takes 4 KiB pages from the guest kernel's "
    "allocator and lists 256 of them a message; QEMU drops each with madvise and verifies nothing. "
    "memballoon makes room first, zeroes and locks every page, has each one verified, and drops "
    "it then.",
    "Not comparable, whom it is for: virtio-balloon gives to the machine, through nested page "
    "tables; memballoon gives to its own VM's kernel, as quota for others, through one table.",
    "Deflating is lazy on both sides: the guest may use the memory again, and pays for each page "
    "when it touches it first. That isn't in these times.",
)
NOTE_TCG = (
    "Emulated (TCG): whatever runs inside, kernel or Python, costs about ten times as much, while "
    "virtio-balloon's other half, in QEMU, runs at full speed. Ratios under KVM differ."
)


@dataclass(frozen=True, slots=True)
class Setting:
    """Of the whole run."""

    qemu: str
    kernel: str
    accelerator: str
    processors: int
    guest_bytes: int
    moved_bytes: int
    turns: int


@dataclass(frozen=True, slots=True)
class VirtioTurn:
    """Seconds."""

    inflate_s: float
    deflate_s: float


@dataclass(frozen=True, slots=True)
class OurTurn:
    """Seconds; `plain_s` is for populating and locking as much in a loop, in the same VM."""

    plain_s: float
    inflate_s: float
    deflate_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """Turns of the two in alternation."""

    frames: str
    virtio: tuple[VirtioTurn, ...]
    ours: tuple[OurTurn, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Medians in GiB/s, and as ratios to virtio-balloon's in the same round."""

    frames: str
    who: str
    inflate_gib_per_s: float
    deflate_gib_per_s: float | None
    inflate_ratio: float
    deflate_ratio: float | None


def rows(setting: Setting, rounds: Sequence[Round]) -> list[Row]:
    found = []
    for one in rounds:
        moved = setting.moved_bytes
        base_in = _speed(moved, [turn.inflate_s for turn in one.virtio])
        base_out = _speed(moved, [turn.deflate_s for turn in one.virtio])
        ours_in = _speed(moved, [turn.inflate_s for turn in one.ours])
        ours_out = _speed(moved, [turn.deflate_s for turn in one.ours])
        plain = _speed(moved, [turn.plain_s for turn in one.ours])
        found += [
            Row(one.frames, "virtio-balloon", base_in, base_out, 1.0, 1.0),
            Row(
                one.frames, "memballoon", ours_in, ours_out, ours_in / base_in, ours_out / base_out
            ),
            Row(one.frames, "plain loop", plain, None, plain / base_in, None),
        ]
    return found


def notes(setting: Setting) -> list[str]:
    return [*NOTES, *((NOTE_TCG,) if setting.accelerator == "tcg" else ())]


def to_json(setting: Setting, rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "setting": asdict(setting),
        "figures": [asdict(row) for row in rows(setting, rounds)],
        "rounds": [asdict(one) for one in rounds],
        "notes": notes(setting),
    }


def table(setting: Setting, rounds: Sequence[Round]) -> str:
    lines = [
        f"A guest of {setting.guest_bytes // MIB} MiB, {setting.moved_bytes // MIB} MiB moved, "
        f"medians of {setting.turns} turns in alternation",
        f"QEMU {setting.qemu}, {setting.accelerator}, {setting.processors} processors, "
        f"Linux {setting.kernel}",
        "",
        f"{'frames':8}{'':16}{'inflate':>14}{'ratio':>8}{'deflate':>14}{'ratio':>8}",
    ]
    for row in rows(setting, rounds):
        lines.append(
            f"{row.frames:8}{row.who:16}"
            f"{_cell(row.inflate_gib_per_s)}{_ratio(row.inflate_ratio)}"
            f"{_cell(row.deflate_gib_per_s)}{_ratio(row.deflate_ratio)}".rstrip()
        )
    said = [
        textwrap.fill(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
        for note in notes(setting)
    ]
    return "\n".join([*lines, "", *said])


def _speed(moved_bytes: int, seconds: Sequence[float]) -> float:
    return moved_bytes / GIB / statistics.median(seconds)


def _cell(gib_per_s: float | None) -> str:
    return " " * 14 if gib_per_s is None else f"{gib_per_s:8.3g} GiB/s"


def _ratio(ratio: float | None) -> str:
    return " " * 8 if ratio is None else f"{ratio:8.2f}"
