"""Runs the bed as a program, and looks for what it leaves behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BED = Path(__file__).parent / "bed.py"
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Bed:
    """`scratch` is where each run puts its files: empty again afterwards."""

    scratch: Path

    def start(self, *arguments: str, program: Path = BED) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.scratch)},
        )

    def run(
        self, *arguments: str, program: Path = BED, deadline_s: float = DEADLINE_S
    ) -> tuple[int, str, str]:
        with self.start(*arguments, program=program) as process:
            try:
                output, errors = process.communicate(timeout=deadline_s)
            finally:
                process.terminate()
        return process.returncode, output, errors

    def qemus(self) -> list[int]:
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(self.scratch) in _text(path)
        ]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def wait_for(predicate: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not predicate():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)
