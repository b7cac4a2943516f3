"""A part of the version 2 hierarchy that was delegated to this process, as systemd does it.

The inside of a unit with Delegate= is its own business, and nothing above it is. systemd marks the
unit's cgroup with an extended attribute (its CGROUP_DELEGATION document). A unit's process starts
in that very directory, which must have no processes once it hands controllers down: so the agent
moves to a leaf below, and is found there by an agent that looks again. Where the unit names its
leaf itself (DelegateSubgroup=agent) nothing is to be moved.

Only the process's own cgroup is looked at, not those above: a shell of a desktop session is
somewhere below the user's delegated manager, and what it starts is not meant to live in there.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from host_agent.quota.errors import QuotaUnavailable

OWN_CGROUP: Final = Path("/proc/self/cgroup")
LEAF: Final = "agent"
MARKS: Final = ("user.delegate", "trusted.delegate")
"""systemd sets both; the second is readable with CAP_SYS_ADMIN alone."""

HOW: Final = "systemd-run -p Delegate=yes balloon agent"


def is_delegated(directory: Path) -> bool:
    """Whether systemd has marked it so."""
    for mark in MARKS:
        with suppress(OSError):
            if os.getxattr(directory, mark) == b"1":
                return True
    return False


def delegated_home(mount: Path, own_cgroup: str) -> Path | None:
    """What was delegated to this process, going by the text of /proc/self/cgroup; else None."""
    for line in own_cgroup.splitlines():
        if line.startswith("0::/"):
            own = mount / line.removeprefix("0::/")
            if is_delegated(own):
                return own
            if own.name == LEAF and is_delegated(own.parent):
                return own.parent
    return None


def leave_for_leaf(home: Path) -> None:
    """Move this process out of `home`, which is to have children with controllers.

    Raises QuotaUnavailable if it can't, or if others are in there.
    """
    try:
        if os.getpid() in _pids(home):
            leaf = home / LEAF
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(f"{os.getpid()}\n")
        others = _pids(home)
    except OSError as error:
        raise QuotaUnavailable(
            f"cannot move the agent to {home / LEAF} ({error.strerror}): give it a cgroup that is "
            f"its own ({HOW})"
        ) from error
    if others:
        raise QuotaUnavailable(
            f"{home} has other processes than the agent ({', '.join(map(str, others))}): give the "
            f"agent a cgroup that is its own ({HOW}), or move them to a child of it"
        )


def _pids(directory: Path) -> list[int]:
    return [int(line) for line in (directory / "cgroup.procs").read_text().split()]
