"""docker-compose.yml as a user has it: up, memory moves, down, with both generations of Compose."""

import pytest
from compose_tool import ComposeUnavailable
from engine import Engine, until
from images import Images
from project import GUESTS, SLOW_S, project_of

from tests.conftest import RUN_PREFIX

pytestmark = pytest.mark.effects


@pytest.mark.parametrize("generation", [1, 2])
def test_up_moves_memory_and_down_leaves_nothing(
    engine: Engine, images: Images, generation: int
) -> None:
    name = f"{RUN_PREFIX}-up{generation}"
    try:
        with project_of(engine, RUN_PREFIX, name, generation) as project:
            until(
                lambda: any(giver in GUESTS for _, _, giver in project.moves()),
                lambda: f"memory moves between guests: {project.log()}",
                SLOW_S,
            )
            inside = project.compose.run("exec", "-T", "agent", "balloon", "ps").stdout
            outside = project.balloon("ps")
            for shown in (inside, outside):
                table, _, _ = shown.partition("\n\n")  # below it may stand why a VM gave less
                names = [line.split()[0] for line in table.splitlines()]
                assert names == ["NAME", *sorted(GUESTS)], shown
            stats = project.compose.run("exec", "-T", "agent", "balloon", "stats").stdout
            assert stats.startswith("pool 512MiB: ")
            project.compose.run("down", "--volumes")
            assert project.leftovers() == []
    except ComposeUnavailable as error:
        pytest.skip(str(error))
