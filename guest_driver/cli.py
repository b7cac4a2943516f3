"""`balloon-guest`: what runs inside a mock VM.

    balloon-guest driver --socket PATH --cgroup PATH --assigned-pages N [--frame-order 0|9]
    balloon-guest workload ...   the demonstration's workload; see `workload --help`

argparse instead of click: the driver's memory is the guest's loss, and the pseudo-process has to be
forked before anything heavy is imported.
"""

import argparse
import sys
from typing import NoReturn

EXIT_USAGE = 2
EXIT_FAILED = 1


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["workload"]:
        from guest_driver.workload import main as workload_main

        return workload_main(arguments[1:])
    if arguments[:1] == ["driver"]:
        return _run_driver(_driver_options(arguments[1:]))
    print("usage: balloon-guest driver|workload [options]", file=sys.stderr)
    return EXIT_USAGE


def _driver_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="balloon-guest driver", description="The balloon driver.")
    parser.add_argument("--socket", required=True, help="the private channel to the host agent")
    parser.add_argument("--cgroup", required=True, help="where the guest sees its own cgroups")
    parser.add_argument("--assigned-pages", required=True, type=int, help="size in 4 KiB pages")
    parser.add_argument(
        "--frame-order", type=int, choices=(0, 9), default=0, help="9: 2 MiB frames"
    )
    parser.add_argument("--verbose", action="store_true", help="say more on standard error")
    return parser.parse_args(argv)


def _run_driver(options: argparse.Namespace) -> int:
    # Before trio and numpy are imported: a fork of this small process is all that the
    # pseudo-process needs, and numpy starts no threads that the guest has no use for.
    from guest_driver import diet, memory, pseudo_process

    diet.before_imports()
    try:
        process = pseudo_process.start(options.assigned_pages, options.frame_order)
    except (memory.ArenaError, ValueError) as error:
        _fail(str(error))
    import logging

    import trio

    from guest_driver.driver import Driver, DriverConfig
    from guest_driver.reservoir import PseudoProcessDied

    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(name)s: %(message)s",
    )
    diet.after_imports()
    config = DriverConfig(options.socket, options.cgroup, options.assigned_pages)
    try:
        trio.run(Driver(config, process).run)
    except* PseudoProcessDied as errors:
        _fail(str(errors.exceptions[0]))
    return 0


def _fail(message: str) -> NoReturn:
    print(f"balloon-guest: {message}", file=sys.stderr)
    sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main())
