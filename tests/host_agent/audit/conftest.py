"""A child process with real pages in a memory cgroup of its own (v1, or v2 where that is all)."""

import ast
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from host_agent.quota.cgroup2_levels import hand_down_memory

CHILD = Path(__file__).parent / "page_child.py"
DEADLINE_S = 60.0 if os.environ.get("MEMBALLOON_SLOW_MACHINE") else 20.0


class PageChild:
    """Runs Python statements in a process of its own."""

    def __init__(self, cgroup: Path) -> None:
        self.cgroup = cgroup
        self._process = subprocess.Popen(
            [sys.executable, "-S", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid
        assert self._answer() is None
        self.run(f"join({str(cgroup / 'cgroup.procs')!r})")

    def run(self, statements: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{statements!r}\n")
        return self._answer()

    def arena(self, pages: int, *, huge: bool = False, locked: bool = True) -> int:
        address = self.run(f"a = map_arena({pages}, {huge}); result = a")
        if locked:
            self.run(f"lock(a, {pages})")
        return int(address)

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        word, _, rest = self._process.stdout.readline().partition(" ")
        if word != "ok":
            raise RuntimeError(f"the child failed: {word} {rest}")
        return ast.literal_eval(rest)


def memory_root() -> Path:
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if v1.is_dir():
        return v1
    hand_down_memory(v2)
    return v2


def remove_cgroup(directory: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            # Its last process may still be on its way out.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@pytest.fixture
def new_cgroup() -> Iterator[Callable[[], Path]]:
    if os.geteuid():
        pytest.skip("needs root: cgroups and /proc/kpageflags")
    made: list[Path] = []

    def make() -> Path:
        directory = memory_root() / f"mbtest-{secrets.token_hex(4)}"
        directory.mkdir()
        made.append(directory)
        return directory

    yield make
    for directory in made:
        remove_cgroup(directory)


@pytest.fixture
def new_child(new_cgroup: Callable[[], Path]) -> Iterator[Callable[..., PageChild]]:
    made: list[PageChild] = []

    def make(cgroup: Path | None = None) -> PageChild:
        made.append(PageChild(cgroup or new_cgroup()))
        return made[-1]

    yield make
    for child in made:
        child.end()


@pytest.fixture
def child(new_child: Callable[..., PageChild]) -> PageChild:
    return new_child()
