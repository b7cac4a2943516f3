"""An agent for one purpose: directories and a cgroup of its own, everything removed at the end.

For the demonstration and the bench, which must not meet an agent that the operator runs.
"""

import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from host_agent.agent import Agent
from host_agent.config import Config, HostConfig
from host_agent.service import running


@contextlib.asynccontextmanager
async def private_agent(
    purpose: str, *, pool_bytes: int, reserve_bytes: int
) -> AsyncIterator[Agent]:
    """A working agent. If this process is killed, the watchdog removes everything all the same.

    Raises the UserErrors of `agent.running`.
    """
    with tempfile.TemporaryDirectory(
        prefix=f"memballoon-{purpose}-", ignore_cleanup_errors=True
    ) as top:
        host = HostConfig(
            pool_bytes=pool_bytes,
            reserve_bytes=reserve_bytes,
            run_dir=Path(top) / "run",
            state_dir=Path(top) / "state",
            cgroup_root=f"memballoon-{purpose}-{secrets.token_hex(4)}",
        )
        async with running(Config(host=host), die_with_agent=True, scratch_dir=Path(top)) as agent:
            yield agent
