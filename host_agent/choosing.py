"""A policy chosen by name: made, and what is shown of it read once, so that nobody asks it again.

Importing a policy, making it and reading its settings run code that may be anybody's. So does the
check of a configuration's tables. A built-in policy is made at once, another one in a thread with a
deadline.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from host_agent.foreign import IMPORT_DEADLINE_S, ForeignFault, ask, ask_and_wait, short
from host_agent.policy.interface import Policy
from host_agent.policy.registry import PolicyError, is_built_in
from host_agent.policy_settings import PolicyTables, make_policy, settings_as_table


@dataclass(frozen=True, slots=True)
class ChosenPolicy:
    """A policy with its settings, and what is shown of it."""

    policy: Policy
    name: str
    source: str
    settings: dict[str, Any]
    """As its table in the configuration would have them."""

    @property
    def in_thread(self) -> bool:
        """Whether it is somebody else's, and is to be asked in a thread."""
        return not is_built_in(self.name)


def choose(name: str, tables: PolicyTables) -> ChosenPolicy:
    """The policy `name`, made; waits for it. Raises PolicyError of one line."""
    making = partial(_make, name, tables)
    if is_built_in(name):
        return making()
    try:
        return ask_and_wait(making, timeout_s=IMPORT_DEADLINE_S, known=(PolicyError,))
    except ForeignFault as fault:
        raise _error(name, fault) from fault


async def choose_in_thread(
    name: str, tables: PolicyTables, limiter: trio.CapacityLimiter
) -> ChosenPolicy:
    """The same, while the event loop goes on."""
    making = partial(_make, name, tables)
    if is_built_in(name):
        return making()
    known = (PolicyError,)
    try:
        return await ask(
            making,
            timeout_s=IMPORT_DEADLINE_S,
            limiter=limiter,
            known=known,
            if_busy="not imported: another policy's import still hangs",
        )
    except ForeignFault as fault:
        raise _error(name, fault) from fault


def check_tables(tables: PolicyTables) -> None:
    """Raise PolicyError for a table of no policy, or one that its policy refuses."""
    for name in tables:
        choose(name, tables)


def _make(name: str, tables: PolicyTables) -> ChosenPolicy:
    policy = make_policy(name, tables)
    return ChosenPolicy(policy, name, short(str(policy.source)), settings_as_table(policy))


def _error(name: str, fault: ForeignFault) -> PolicyError:
    ours = isinstance(fault.__cause__, PolicyError)
    return PolicyError(str(fault) if ours else f"policy {name!r}: {fault}")
