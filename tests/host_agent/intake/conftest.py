"""A host without an agent, for tests of its sessions."""

import pytest
import trio
import trio.testing
from host_rig import Body, open_rig
from session_steps import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(body: Body, clock: trio.abc.Clock | None = None) -> None:
        async def main() -> None:
            async with open_rig(monkeypatch) as (rig, nursery):
                await body(rig, nursery)

        trio.run(main, clock=clock)

    return run
