"""The bench beside virtio-balloon, small: both move their memory, and it is seen to move."""

import json
from pathlib import Path

import pytest
from bed_rig import Bed

pytestmark = pytest.mark.vm
BENCH = Path(__file__).parent / "bench_vm.py"
MOVED_BYTES = 64 << 20


def test_a_small_bench(bed: Bed) -> None:
    status, output, errors = bed.run("--scale", "small", "--json", program=BENCH, deadline_s=600.0)
    assert status == 0, errors
    found = json.loads(output)
    assert found["setting"]["moved_bytes"] == MOVED_BYTES
    who = [(figure["frames"], figure["who"]) for figure in found["figures"]]
    peers = ("virtio-balloon", "memballoon", "plain loop")
    assert who == [(frames, peer) for frames in ("4KiB", "2MiB") for peer in peers]
    assert all(figure["inflate_gib_per_s"] > 0 for figure in found["figures"])
    assert "warming up" in errors
