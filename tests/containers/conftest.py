"""Tests with a real Docker engine, for the whole session one; images are made once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from base_image import make_base
from docker_rig import DockerRig, make_small_image
from engine import Engine, EngineUnavailable, engine_for_tests, missing_for_engine, tool
from images import Images, build_images

from tests.conftest import RUN_PREFIX

HERE = Path(__file__).parent
WORKLOADS = ("redis-server", "redis-tools")
"""Debian's packages of what runs in guests, besides our own workload."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    if ours and (reason := missing_for_engine()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        with engine_for_tests(f"{RUN_PREFIX}-docker") as engine:
            yield engine
    except EngineUnavailable as error:
        pytest.skip(f"no Docker engine: {error}")


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> Iterator[str]:
    """Debian's python3, sh, busybox and redis; with `-build` at its end, wheels as well."""
    try:
        tool("mmdebstrap")  # there may be no registry
    except EngineUnavailable as error:
        pytest.skip(str(error))
    tag = f"{RUN_PREFIX}-base"
    make_base(engine, tag, WORKLOADS)
    yield tag
    engine.forget_images(tag, f"{tag}-build")


@pytest.fixture(scope="session")
def small_image(engine: Engine) -> Iterator[str]:
    """This machine's sh and a few tools, and no Python."""
    tag = f"{RUN_PREFIX}-small"
    make_small_image(engine, tag)
    yield tag
    engine.forget_images(tag)


@pytest.fixture
def rig(
    cgroup_name: str, engine: Engine, small_image: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DockerRig]:
    """An agent's places and its containers, and the certainty that nothing is left of them."""
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    made = DockerRig(cgroup_name, engine, small_image)
    try:
        yield made
        made.assert_nothing_left()
    finally:
        made.take_down()


@pytest.fixture(scope="session")
def images(engine: Engine, base_image: str) -> Iterator[Images]:
    """The project's own."""
    images = build_images(engine, base_image, RUN_PREFIX)
    yield images
    engine.forget_images(images.agent, images.guest_redis, images.guest)
