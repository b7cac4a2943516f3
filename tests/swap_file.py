"""Swap space for tests: a file of their own, there for as long as a block runs.

Swap is the whole machine's. A test that turns it on changes nothing for mock VMs without swap of
their own (that is one of the things to be tested), but leaves every other cgroup free to swap.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.units import MIB

SWAP_MIB = 320
SWAP_DIRECTORY = "/var/tmp"
"""On a disk: the kernel takes no swap file on tmpfs or overlayfs."""


@contextmanager
def swap_file(size_mib: int = SWAP_MIB) -> Iterator[Path]:
    """Skips, with the reason, where this machine or this user can't swap to a file."""
    if os.geteuid() != 0:
        pytest.skip("swap space needs root")
    descriptor, name = tempfile.mkstemp(prefix="mbtest-swap-", dir=SWAP_DIRECTORY)
    path = Path(name)
    try:
        # Written, since a file with holes is refused.
        for _ in range(size_mib):
            os.write(descriptor, bytes(MIB))
        os.fsync(descriptor)
        os.close(descriptor)
        for command in (["mkswap", name], ["swapon", name]):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip(f"swap space needs {command[0]} (mount, util-linux)")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no swap space can be had here: {error.stderr.strip()}")
        yield path
    finally:
        if name in Path("/proc/swaps").read_text(encoding="utf-8"):
            subprocess.run(["swapoff", name], check=True)
        path.unlink()
