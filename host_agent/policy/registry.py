"""Which policies there are: the built-in ones, and those that installed packages bring along.

A package offers a policy under the entry point group `memballoon.policies`; the entry point's name
is the policy's, its value the class. Nothing of a package is imported before its policy is wanted.
"""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from host_agent.policy.esx import Esx
from host_agent.policy.hyperv import Hyperv
from host_agent.policy.interface import Policy
from host_agent.policy.manual import Manual
from host_agent.policy.mom import Mom
from host_agent.policy.proxmox import Proxmox
from host_agent.policy.senpai import Senpai
from host_agent.policy.shares import Shares
from host_agent.policy.squeezed import Squeezed

ENTRY_POINT_GROUP: Final = "memballoon.policies"

BUILT_IN: Final[tuple[type[Policy], ...]] = (
    Shares,
    Esx,
    Hyperv,
    Proxmox,
    Squeezed,
    Mom,
    Senpai,
    Manual,
)
"""The table of the policies that come with memballoon."""


class PolicyError(Exception):
    """A policy that is not known, or that can't be loaded; one line."""


def built_in() -> Mapping[str, type[Policy]]:
    """The policies that come with memballoon, by name."""
    return {kind.name: kind for kind in BUILT_IN}


def installed() -> Mapping[str, EntryPoint]:
    """The policies that packages offer, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def policy_names() -> tuple[str, ...]:
    """All that can be chosen, in order."""
    return tuple(sorted({*built_in(), *installed()}))


def is_built_in(name: str) -> bool:
    """Whether the policy comes with memballoon."""
    return name in built_in()


def policy_class(name: str) -> type[Policy]:
    """The class of the policy `name`; a built-in one can't be replaced. Raises PolicyError."""
    ours = built_in()
    if name in ours:
        return ours[name]
    point = installed().get(name)
    if point is None:
        raise PolicyError(f"unknown policy {name!r} (known: {', '.join(policy_names())})")
    try:
        loaded: Any = point.load()
    except (Exception, SystemExit) as error:
        # Whatever a foreign module raises while it is imported.
        raise PolicyError(f"policy {name!r} can't be loaded from {point.value}: {error}") from error
    if not (isinstance(loaded, type) and callable(getattr(loaded, "decide", None))):
        raise PolicyError(f"policy {name!r}: {point.value} is no class with a method `decide`")
    called = getattr(loaded, "name", None)
    if called != name:
        raise PolicyError(f"policy {name!r}: {point.value} calls itself {called!r}")
    return loaded
