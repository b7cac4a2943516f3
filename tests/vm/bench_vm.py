"""memballoon beside QEMU's own virtio-balloon, each in a VM of the same kind: `make bench-vm`.

    python tests/vm/bench_vm.py [--scale small] [--json]

Both inflate and deflate by the same size, in turns, each while the other VM is stopped. What is and
what isn't comparable is said with the table (bench_vm_report.py).
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from bed_accelerator import ACCELERATORS, default_accelerator
from bed_errors import BedError
from bed_image import image
from bed_machine import Machine
from bench_vm_peers import memballoon, virtio_balloon
from bench_vm_report import MIB, Round, Setting, table, to_json

from host_agent.bench.inflation import guest_bytes

PROCESSORS = 2
FRAMES = ("4KiB", "2MiB")
FAILED_STATUS = 125


@dataclass(frozen=True, slots=True)
class Scale:
    moved_bytes: int
    turns: int


SCALES = {"full": Scale(1024 * MIB, turns=5), "small": Scale(64 * MIB, turns=1)}


def measure(scale: Scale, accelerator: str | None) -> tuple[Setting, list[Round]]:
    """Raises BedError."""
    built = image()
    accelerator = accelerator or default_accelerator(built)
    machine = Machine(PROCESSORS, memory_mib=0, accelerator=accelerator)
    size, guest = scale.moved_bytes, guest_bytes(scale.moved_bytes)
    rounds = []
    _say(f"booting a guest with virtio-balloon ({machine.accelerator})")
    with virtio_balloon(built, machine, guest, size) as theirs:
        for frames in FRAMES:
            _say(f"booting memballoon, {frames} frames")
            with memballoon(built, machine, guest, size, frames) as ours:
                turns = []
                for number in range(scale.turns + 1):
                    _say(f"{frames}: {f'turn {number}' if number else 'warming up'}")
                    turns.append((theirs.turn(), ours.turn()))
            virtio, own = zip(*turns[1:], strict=True)
            rounds.append(Round(frames, virtio, own))
        setting = Setting(
            qemu=theirs.peer.monitor.version,
            kernel=theirs.peer.about["kernel"],
            accelerator=machine.accelerator,
            processors=theirs.peer.about["processors"],
            guest_bytes=guest,
            moved_bytes=size,
            turns=scale.turns,
        )
    return setting, rounds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="the figures as JSON alone")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--accel", choices=ACCELERATORS, default=None, help="else what works here")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        setting, rounds = measure(SCALES[options.scale], options.accel)
    except BedError as error:
        print(f"bed: {error}", file=sys.stderr)
        return FAILED_STATUS
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if options.json:
        print(json.dumps(to_json(setting, rounds), indent=1))
    else:
        print(table(setting, rounds))
    return 0


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def _terminated(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
