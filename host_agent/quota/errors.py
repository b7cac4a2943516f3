"""What can go wrong between a quota and the kernel.

    QuotaError
    ├── QuotaUnavailable    this machine (or this place in it) gives no memory controller
    ├── VmExists            a VM of that name has its directories already
    ├── VmGone              the VM's directories are not there (any more)
    ├── NoRoom              an answer, not a fault: the workload needs what it was asked to give
    ├── LimitRefused        the kernel would not take a limit, or taking it could kill somebody
    └── StillBusy           processes or directories outlived the deadline

Every message is one line that says what failed and what to do about it. A number that no caller
may pass (not a multiple of a page, a "raise" that would lower) is a ValueError: our own bug.
"""

from typing import Final

NO_SWAP_ACCOUNTING: Final = (
    "this kernel does not account for swap by cgroup; boot it with swapaccount=1"
)


class QuotaError(Exception):
    """A quota could not be read, set or taken down."""


class QuotaUnavailable(QuotaError):
    """No usable memory controller here; the message says what to mount, load or delegate."""


class VmExists(QuotaError):
    """A VM of this name exists; nothing was touched."""


class VmGone(QuotaError):
    """The VM's directories were removed, by us or by somebody else."""


class NoRoom(QuotaError):
    """The workload could not be made smaller; its old limit stands and nobody was killed."""


class LimitRefused(QuotaError):
    """A limit could not be set safely; the old one stands unless the message says otherwise."""


class StillBusy(QuotaError):
    """Processes or directories of a VM were still there when the deadline passed."""
