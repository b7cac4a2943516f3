"""The least that a guest of a given size keeps, whoever asks for more. Both ends know it.

Without it a guest could be asked to shrink until its own kernel and services have no room.
Source: Linux, drivers/hv/hv_balloon.c, compute_balloon_floor.
"""

from typing import Final

from protocol.units import MIB

FLOOR_PIECES: Final = (
    (128 * MIB, 8 * MIB, 2),
    (512 * MIB, 40 * MIB, 4),
    (2048 * MIB, 104 * MIB, 8),
    (8192 * MIB, 232 * MIB, 16),
)
"""Ascending: below this assigned size, so many bytes and assigned / divisor. The pieces meet."""

LARGEST_FLOOR: Final = (488 * MIB, 32)
"""The same for sizes above all pieces."""


def floor_bytes(assigned_bytes: int) -> int:
    """Quota that a guest of this assigned size always keeps. Never more than it has."""
    base_bytes, divisor = next(
        (piece[1:] for piece in FLOOR_PIECES if assigned_bytes < piece[0]), LARGEST_FLOOR
    )
    return min(assigned_bytes, base_bytes + assigned_bytes // divisor)
