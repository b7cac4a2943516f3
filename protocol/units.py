"""Units of memory: what a page is, and the conversions between pages and bytes.

Every other module names its units (`quota_bytes`, `target_pages`); the numbers behind the names
stand here alone.
"""

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

PAGE_BYTES: Final = 4 * KIB
"""Bytes of a base page, the unit of a page frame number (x86-64 and the usual arm64 kernels)."""

HUGE_PAGE_BYTES: Final = 2 * MIB
"""Bytes of a huge page: one entry of the middle page directory with 4 KiB base pages."""

PAGES_PER_HUGE_PAGE: Final = HUGE_PAGE_BYTES // PAGE_BYTES

HUGE_FRAME_ORDER: Final = 9
"""`frame_order` of 2 MiB frames: 2**9 base pages. Order 0 is a base page."""


def pages_of(size_bytes: int) -> int:
    """Whole pages in `size_bytes`, rounded down: rounding never makes a page."""
    return size_bytes // PAGE_BYTES


def bytes_of(pages: int) -> int:
    """Bytes of `pages` base pages."""
    return pages * PAGE_BYTES
