"""The protocol's words and numbers: versions, roles, reasons, and the bound of everything.

Each bound has the reason beside it. A guest is not trusted: whatever it sends is checked against
these before anything else looks at it. The host's messages are held to the same bounds.
"""

from enum import Enum, StrEnum
from typing import Final

from protocol.units import MIB

PROTOCOL_VERSION: Final = 1
"""The newest version of the protocol that this code speaks."""

OLDEST_PROTOCOL_VERSION: Final = 1
"""The oldest one that it still speaks."""

SWAP_FEATURE: Final = "swap"
"""The host may allow a guest to swap for its balloon: `Target.swap_pages`, `Offer.swap_pages` and
the reason `no_swap`, none of which is used without it."""

SUPPORTED_FEATURES: Final[tuple[str, ...]] = (SWAP_FEATURE,)
"""Optional abilities of this code beyond its version."""

MAX_VERSION: Final = 2**16 - 1
"""Room for versions that nobody will count; keeps the field small."""

MAX_RANGES: Final = 65_536
"""Ranges in one message: 512 KiB on the wire, so a message is decoded in a few milliseconds and
never stalls the other guests of the same event loop. More frames go in more messages."""

MAX_MESSAGE_BYTES: Final = 1 * MIB
"""Body of one message: twice what MAX_RANGES need, the rest is far more than all texts together.
It bounds what a connection buffers for a peer."""

MAX_TEXT_CHARS: Final = 512
"""A reason for a person to read in one log line; not a place for a stack trace."""

MAX_FEATURES: Final = 32
"""Optional abilities named in a greeting; version 1 has one."""

MAX_FEATURE_CHARS: Final = 64
"""A feature's name is an identifier."""

MAX_ID: Final = 2**63 - 1
"""Ids only grow, and fit an int64: at a million a second that lasts 292,000 years."""

MAX_PAGES: Final = 2**32
"""16 TiB of 4 KiB frames: what u32 page frame numbers can name."""

MAX_ADDRESS: Final = 2**64 - 1
"""A virtual address on any 64-bit machine."""

MAX_PID: Final = 2**22
"""PID_MAX_LIMIT of a 64-bit Linux kernel (include/linux/threads.h)."""

MAX_AMOUNT: Final = 2**64 - 1
"""A counter as the kernel prints it (u64). An unlimited cgroup v1 limit is just below 2**63."""

MAX_PERCENT: Final = 100.0
"""Pressure stall averages are percentages of time."""

MAX_OPEN_REPORTS: Final = 64
"""Reports not yet rejected or dropped. Enough to keep the host busy for a second of reserving in
32 MiB chunks; each costs the host the frames of the report, which are bounded by the room that
it granted itself."""

MIN_VITALS_INTERVAL_MS: Final = 10
"""A guest that reads its statistics more often measures mostly itself."""

MAX_VITALS_INTERVAL_MS: Final = 3_600_000
"""An hour. A host that wants no vitals simply drops them."""


class Role(Enum):
    """Which end of the channel."""

    GUEST = "guest"
    HOST = "host"

    @property
    def peer(self) -> "Role":
        """The other end."""
        return Role.HOST if self is Role.GUEST else Role.GUEST


class Urgency(StrEnum):
    """How hard the guest should try to reach its target."""

    CALM = "calm"
    """Only what costs the guest nothing noticeable."""
    SHORT = "short"
    """Page cache may be given up too; anonymous memory only as far as swapping is allowed."""


class RefusalReason(StrEnum):
    """Why a guest gives less than was wanted, or nothing."""

    AT_TARGET = "at_target"
    """The balloon is as large as wanted, or larger."""
    FLOOR = "floor"
    """The guest's reservation or its own minimum is reached."""
    WORKING_SET = "working_set"
    """The memory left is in recent use."""
    REFAULTING = "refaulting"
    """Evicted page cache is being read again."""
    SWAPPING = "swapping"
    """The guest swaps."""
    NO_SWAP = "no_swap"
    """Swapping was allowed, and no swap space is left for it."""
    PRESSURE = "pressure"
    """Tasks stall for memory (PSI)."""
    NO_MEMORY = "no_memory"
    """The kernel gave no pages (ENOMEM, or the cgroup's limit was met)."""
    BUSY = "busy"
    """Another inflation is still under way."""
    SHUTTING_DOWN = "shutting_down"
    """The guest is about to leave."""


class RejectionReason(StrEnum):
    """What the host found wrong with a reported frame."""

    NOT_PRESENT = "not_present"
    NOT_ANONYMOUS = "not_anonymous"
    NOT_LOCKED = "not_locked"
    FOREIGN_CGROUP = "foreign_cgroup"
    """Charged to another cgroup than this guest's."""
    SHARED = "shared"
    """Mapped more than once."""
    ALREADY_CLAIMED = "already_claimed"
    OUT_OF_RANGE = "out_of_range"
    """Not a frame of this guest's memory."""
    NOT_HUGE = "not_huge"
    """Part of a 2 MiB frame was reported, or the frame is made of base pages."""
    NO_ROOM = "no_room"
    """Nothing wrong with the frame: the host can't take it now."""


def one_line(text: str) -> str:
    """Any text made fit for a reason or detail: unprintable characters replaced, cut to length."""
    cut = text[: MAX_TEXT_CHARS + 1]
    printable = "".join(char if char.isprintable() else " " for char in cut)
    return printable if len(cut) <= MAX_TEXT_CHARS else printable[: MAX_TEXT_CHARS - 3] + "..."
