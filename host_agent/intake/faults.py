"""What a guest can be at fault of, beyond breaking the protocol itself."""

from typing import Final

from protocol.vocabulary import RejectionReason

LIES: Final = frozenset(
    {
        RejectionReason.OUT_OF_RANGE,
        RejectionReason.ALREADY_CLAIMED,
        RejectionReason.FOREIGN_CGROUP,
        RejectionReason.SHARED,
        RejectionReason.NO_ROOM,
    }
)
"""Reasons that no honest driver can cause: the frames are not the guest's to give."""


class GuestAtFault(Exception):
    """The guest lied or got stuck; the message says how. Its connection ends."""


class GuestLied(GuestAtFault):
    """It named frames that are not its own, kept frames that it said it had dropped, or floods."""


class GuestStuck(GuestAtFault):
    """It made no progress towards its target by the deadline."""
