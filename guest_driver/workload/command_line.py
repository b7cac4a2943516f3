"""The command line of the workload, and its signals."""

import argparse
import re
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from guest_driver.workload.control import CommandError, Rate, Set
from guest_driver.workload.loop import Workload
from guest_driver.workload.memory import MAX_BYTES, MAX_CACHE_BYTES

_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = None if match is None else _UNITS.get("" if match[2] == "b" else match[2])
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; say 40MiB, or bytes")
    return int(float(match[1]) * unit)


def _bounded(size_bytes: int, most_bytes: int, name: str) -> int:
    if size_bytes > most_bytes:
        raise CommandError(f"{name} is more than {most_bytes} bytes")
    return size_bytes


def _nothing(signal_number: int, frame: FrameType | None) -> None:
    """The wake-up socket carries the signal; this only keeps it from killing."""


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or a stop command; 0 then, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="workload", description="A known appetite.")
    parser.add_argument("--files", type=Path, required=True, help="directory for the cache's files")
    parser.add_argument("--control", type=Path, required=True, help="path of the control socket")
    parser.add_argument("--anon", type=_size_bytes, default=0, help="anonymous set, as 40MiB")
    parser.add_argument("--cache", type=_size_bytes, default=0, help="page cache, as 40MiB")
    parser.add_argument("--rate", type=_size_bytes, help="bytes touched a second (all, once)")
    parser.add_argument("--grow-rate", type=_size_bytes, help="bytes grown a second (unbounded)")
    parser.add_argument("--keep-files", action="store_true", help="leave the files at the end")
    arguments = parser.parse_args(argv)

    wakeup, woken = socket.socketpair()
    with wakeup, woken:
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _nothing)
        try:
            first = Set(
                _bounded(arguments.anon, MAX_BYTES, "--anon"),
                _bounded(arguments.cache, MAX_CACHE_BYTES, "--cache"),
                Rate(arguments.rate or None),
            )
            workload = Workload(arguments.files, arguments.control, keep_files=arguments.keep_files)
            workload.run(first, woken, arguments.grow_rate or None)
        except (OSError, CommandError) as error:
            print(f"workload: {error}", file=sys.stderr)
            return 2
    return 0
