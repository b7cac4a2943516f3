"""docker-compose.yml on cgroup version 2, as systemd mounts it: the agent is in a container.

Its cgroup namespace is a border there. In the VM bed alone.
"""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose_tool import ComposeUnavailable
from engine import Engine, until
from own_images import make_own_images
from project import SLOW_S, project_of
from scenario_rig import SLOWNESS

from tests.conftest import RUN_PREFIX, missing_systemd

pytestmark = [
    pytest.mark.effects,
    pytest.mark.skipif(missing_systemd() is not None, reason=f"{missing_systemd()}"),
]

PREFIX = f"{RUN_PREFIX}-own"
SERVICES = ("greedy", "redis")
"""One that wants more than it begins with, and one that begins with more than it has to keep.
Emulated, each costs half a minute; so no more of them."""

PATIENCE_S = SLOW_S * SLOWNESS


@pytest.fixture
def own_images(engine: Engine) -> Iterator[Path]:
    work = Path("/tmp") / f"mbi-{secrets.token_hex(3)}"
    work.mkdir()
    try:
        yield make_own_images(engine, PREFIX, work)
        engine.forget_images(
            *(f"{PREFIX}-{target}" for target in ("agent", "guest-redis", "guest"))
        )
    finally:
        shutil.rmtree(work)


def test_up_moves_memory_and_down_leaves_nothing(engine: Engine, own_images: Path) -> None:
    name = f"{RUN_PREFIX}-up"
    try:
        with project_of(
            *(engine, PREFIX, name, 1),
            services=SERVICES,
            more_files=(own_images,),
            slow_s=PATIENCE_S,
        ) as project:
            until(
                lambda: any(move[::2] == ("greedy", "redis") for move in project.moves()),
                lambda: f"memory moves between guests: {project.story()}",
                PATIENCE_S,
            )
            shown = project.compose.run("exec", "-T", "agent", "balloon", "ps").stdout
            states = {line.split()[0]: line for line in shown.splitlines()}
            for service in SERVICES:
                assert "running" in states[service], shown
                assert "no driver" not in states[service], shown
            project.compose.run("down", "--volumes")
            assert project.leftovers() == []
    except ComposeUnavailable as error:
        pytest.skip(str(error))
