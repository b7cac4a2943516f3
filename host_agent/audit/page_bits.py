"""The kernel's bits for pages.

Sources: Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/kernel-page-flags.h.
"""

from typing import Final

import numpy as np

# /proc/PID/pagemap: one u64 for each virtual page
PAGEMAP_PFN: Final = np.uint64((1 << 55) - 1)
PAGEMAP_EXCLUSIVE: Final = np.uint64(1 << 56)
"""Mapped once only."""
PAGEMAP_FILE_OR_SHARED: Final = np.uint64(1 << 61)
"""A page of a file, or of a shared anonymous mapping (which is a file of tmpfs)."""
PAGEMAP_SWAPPED: Final = np.uint64(1 << 62)
PAGEMAP_PRESENT: Final = np.uint64(1 << 63)

# /proc/kpageflags: one u64 for each physical page
KPF_ANON: Final = np.uint64(1 << 12)
KPF_COMPOUND_HEAD: Final = np.uint64(1 << 15)
KPF_COMPOUND_TAIL: Final = np.uint64(1 << 16)
KPF_KSM: Final = np.uint64(1 << 21)
KPF_THP: Final = np.uint64(1 << 22)
KPF_MLOCKED: Final = np.uint64(1 << 33)
"""Set with the page's mapping itself. UNEVICTABLE (18) is not asked for: it and LRU (5) follow only
when a per-CPU batch is drained. Measured on 6.18 right after the fault, seen from another CPU:
MLOCKED was late for 0 of 11,900 pages; UNEVICTABLE for 0 of 5,950 populated by
MADV_POPULATE_WRITE, which drains, but for 3,476 of 5,950 that were merely touched."""

KPF_COMPOUND: Final = KPF_COMPOUND_HEAD | KPF_COMPOUND_TAIL
