"""A host without an agent on a clock of its own, for tests of what an agent is made of."""

import pytest
import trio
import trio.testing
from host_rig import Body, Run, open_rig


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, clock: trio.testing.MockClock) -> Run:
    """A body on a host of 256 MiB, 16 MiB of which are its reserve."""

    def run(body: Body) -> None:
        async def main() -> None:
            async with open_rig(monkeypatch) as (rig, nursery):
                await body(rig, nursery)

        trio.run(main, clock=clock)

    return run
