"""Tests of the bed boot it: minutes in all, and packages that most machines have not."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bed_rig import Bed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("MEMBALLOON_VM") == "1":
        return
    for item in items:
        if item.get_closest_marker("vm"):
            item.add_marker(pytest.mark.skip(reason="needs the VM bed: make test-vm"))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    try:
        yield made
        assert made.qemus() == []
        assert list(tmp_path.iterdir()) == []
    finally:
        for pid in made.qemus():
            os.kill(pid, signal.SIGKILL)
