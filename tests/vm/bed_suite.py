"""The suite in several VMs side by side, each with its share of the tests.

An emulated processor is slow, and two of one VM get in each other's way; so each VM has one, and
there are as many VMs as the machine has processors for. The first one's output is seen as it comes,
the others' when they have ended.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from bed_errors import BedError
from bed_tools import tool

BED = Path(__file__).parent / "bed.py"
GRACE_S = 30.0
"""For a VM to be taken down in, after its own deadline or ours."""


def run_suite(vms: int, timeout_s: float, options: Sequence[str], pytest: Sequence[str]) -> int:
    """The tests that `pytest` names, in `vms` machines; the status of the first that failed.

    Raises BedError.
    """
    began_s = time.monotonic()
    statuses = []
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(vms - 1)]
        children = [
            stack.enter_context(_ended(_start(number, vms, timeout_s, options, pytest, output)))
            for number, output in enumerate((None, *outputs), 1)
        ]
        for child, output in zip(children, (None, *outputs), strict=True):
            try:
                statuses.append(child.wait(timeout_s + GRACE_S))
            except subprocess.TimeoutExpired as expired:
                raise BedError("a VM's bed hangs: it was ended") from expired
            if output is not None:
                output.seek(0)
                sys.stdout.buffer.write(output.read())
                sys.stdout.buffer.flush()
    took_s = time.monotonic() - began_s
    said = ", ".join(str(status) for status in statuses)
    print(f"bed: {vms} VMs ended with {said} after {took_s:.0f} s", file=sys.stderr, flush=True)
    return next((status for status in statuses if status), 0)


class _ended:
    """A context that ends with its process: by SIGTERM, at which the bed takes its VM down."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child

    def __enter__(self) -> "subprocess.Popen[bytes]":
        return self._child

    def __exit__(self, *_: object) -> None:
        self._child.terminate()
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _start(
    number: int,
    vms: int,
    timeout_s: float,
    options: Sequence[str],
    pytest: Sequence[str],
    output: IO[bytes] | None,
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [
            *(tool("setpriv"), "--pdeathsig", "TERM", sys.executable, str(BED), "run"),
            *("--timeout-s", str(timeout_s), *options),
            *("--env", f"MEMBALLOON_TEST_SHARE={number}/{vms}", "--", "python", "-m", "pytest"),
            *pytest,
        ],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
    )
