"""The suite in two VMs side by side: whose output is seen, what status comes of it, how it ends."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bed_recipe import ROOT
from bed_rig import DEADLINE_S, Bed, wait_for

pytestmark = pytest.mark.vm

TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(4))
def test_it(number):
    print(f"<{number}>")
    assert len(os.sched_getaffinity(0)) == 1
    assert number != 1, "this one fails"

def test_skipped(): pytest.skip("no moon")

def test_slow():
    if os.environ.get("MEMBALLOON_TEST_SHARE") == "2/2": time.sleep(1000)
"""


@pytest.fixture
def tests_of_its_own() -> Iterator[str]:
    """In the checkout, as the VMs get that; not one that pytest would collect by itself."""
    path = ROOT / "tests" / "vm" / f"mbtest_{os.getpid()}.py"
    path.write_text(TESTS)
    yield str(path.relative_to(ROOT))
    path.unlink()


def test_both_are_seen_and_one_failure_fails_it(bed: Bed, tests_of_its_own: str) -> None:
    arguments = ("suite", "--vms", "2", "--", "-s", "-k", "not slow", tests_of_its_own)
    status, output, errors = bed.run(*arguments, deadline_s=2 * DEADLINE_S)
    assert status == 1, errors
    assert [output.count(f"<{number}>") for number in range(4)] == [1, 1, 1, 1]
    first, second = output.index("2 passed, 1 skipped"), output.index("1 failed, 1 passed")
    assert first < second
    assert "this one fails" in output
    assert "no moon" in output
    assert "bed: 2 VMs ended with 0, 1 after" in errors


def test_no_vm_outlives_it(bed: Bed, tests_of_its_own: str) -> None:
    arguments = ("suite", "--vms", "2", "--", "-s", "-k", "slow", tests_of_its_own)
    with bed.start(*arguments) as process:
        try:
            wait_for(lambda: len(bed.qemus()) == 2, "two VMs")
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
            wait_for(lambda: not bed.qemus(), "the VMs outlived the suite")
        finally:
            process.kill()


def test_a_killed_one_takes_its_vms_along(bed: Bed, tests_of_its_own: str) -> None:
    with bed.start("suite", "--vms", "2", "--", tests_of_its_own) as process:
        try:
            wait_for(lambda: len(bed.qemus()) == 2, "two VMs")
            process.kill()
            process.wait(DEADLINE_S)
            wait_for(lambda: not bed.qemus(), "the VMs outlived the suite")
            wait_for(lambda: not list(Path(bed.scratch).iterdir()), "their files are removed")
        finally:
            process.kill()
