"""The VM bed: a command as root under cgroup version 2, on a machine that needn't have it.

    python tests/vm/bed.py setup                  install what is missing (Debian packages)
    python tests/vm/bed.py build                  build the image, unless the cache has it
    python tests/vm/bed.py run -- COMMAND...      boot, run, print, power off
    python tests/vm/bed.py suite -- TESTS...      pytest in several VMs, each with its share

`run` boots Debian 12's kernel in QEMU with the memory controller and PSI, puts a copy of this
checkout where the command starts, and ends with the command's exit status: 128 + N if signal N
ended it, 125 if the kernel panicked or the time was up. The VM has no network and nothing
that the command does in there reaches this checkout.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))

from bed_accelerator import ACCELERATORS, default_accelerator
from bed_errors import BedError
from bed_image import image
from bed_machine import Machine
from bed_recipe import MORE_MODULES
from bed_run import run
from bed_suite import run_suite
from bed_tools import install_missing

FAILED_STATUS = 125
"""The machine's failure, not the command's; as timeout(1) and docker-run(1) have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="install what is missing, with apt-get")
    builder = commands.add_parser("build", help="build the image if its inputs have changed")
    runner = commands.add_parser("run", help="run a command in the VM")
    suite = commands.add_parser("suite", help="run pytest in several VMs")
    for each in (builder, runner, suite):
        each.add_argument(
            "--image", choices=MORE_MODULES, default="plain", help="engine: with Docker and systemd"
        )
    for each in (runner, suite):
        each.add_argument("--timeout-s", type=float, default=900.0, help="for boot and command")
        each.add_argument("--memory-mib", type=int, default=2048)
        each.add_argument("--accel", choices=ACCELERATORS, default=None, help="else what works")
    suite.add_argument("--vms", type=int, default=len(os.sched_getaffinity(0)))
    suite.add_argument("argv", nargs="+", metavar="TEST", help="and options of pytest")
    runner.add_argument("--cpus", type=int, default=2)
    runner.add_argument(
        "--own-clock",
        action="store_true",
        help="emulated, one processor: time passes with its instructions, deadlines hold",
    )
    runner.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    runner.add_argument("--console", type=Path, help="keep the kernel's messages in this file")
    runner.add_argument("argv", nargs="+", metavar="COMMAND")
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, _terminated)
    try:
        return _carry_out(options)
    except BedError as error:
        print(f"bed: {error}", file=sys.stderr)
        return FAILED_STATUS
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Nobody reads the output any more; nor what Python would say of it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE


def _carry_out(options: argparse.Namespace) -> int:
    if options.command == "setup":
        install_missing()
        return 0
    built = image(options.image)
    if options.command == "build":
        print(built.directory)
        return 0
    own_clock = options.command == "run" and options.own_clock
    accelerator = options.accel or ("tcg" if own_clock else default_accelerator(built))
    if options.command == "suite":
        shape = (
            *("--cpus", "1", "--memory-mib", str(options.memory_mib), "--accel", accelerator),
            *("--image", options.image),
        )
        return run_suite(options.vms, options.timeout_s, shape, options.argv)
    machine = Machine(
        cpus=1 if own_clock else options.cpus,
        memory_mib=options.memory_mib,
        accelerator=accelerator,
        own_clock=own_clock,
        console=options.console,
        modules=MORE_MODULES[options.image],
    )
    return run(built, machine, options.argv, options.env, options.timeout_s)


def _terminated(number: int, _frame: FrameType | None) -> None:
    """SIGTERM takes the machine down as Ctrl-C does."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
