"""`balloon-guest`: what runs inside a mock VM.

    balloon-guest driver --socket=PATH --cgroup=PATH --assigned-pages=N [--frame-order=0|9]
    balloon-guest run ...        a container's first program; see `run --help`
    balloon-guest workload ...   the demonstration's workload; see `workload --help`

Neither click nor argparse: the driver's memory is the guest's loss, and all that is imported before
the pseudo-process is forked is paid for twice.
"""

import sys

EXIT_USAGE = 2
EXIT_FAILED = 1

USAGE = """usage: balloon-guest driver --socket=PATH --cgroup=PATH --assigned-pages=N [...]
       balloon-guest run --help
       balloon-guest workload --help

driver    the balloon driver of this guest
  --socket          the private channel to the host agent
  --cgroup          where the guest sees its own cgroups
  --assigned-pages  size of the guest in 4 KiB pages
  --frame-order     0 for frames of 4 KiB (default), 9 for 2 MiB
run       a container's first program: the driver beside a command
workload  the demonstration's workload"""


def main(argv: "list[str] | None" = None) -> int:
    """Run a subcommand; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["workload"]:
        from guest_driver.workload import main as workload_main

        return workload_main(arguments[1:])
    if arguments[:1] == ["run"]:
        from guest_driver import container

        try:
            return container.run(arguments[1:])
        except container.RunError as error:
            return _fail(str(error), EXIT_USAGE)
    if arguments[:1] == ["driver"]:
        options = {"--frame-order": "0"}
        options.update(_split(argument) for argument in arguments[1:])
        try:
            return _run_driver(
                socket_path=options.pop("--socket"),
                cgroup_path=options.pop("--cgroup"),
                assigned_pages=int(options.pop("--assigned-pages")),
                frame_order=int(options.pop("--frame-order")),
                unknown=options,
            )
        except (KeyError, ValueError) as error:
            return _fail(f"bad or missing option: {error}; see --help", EXIT_USAGE)
    wants_help = arguments[:1] in (["--help"], ["-h"])
    print(USAGE, file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else EXIT_USAGE


def load_driver() -> None:
    """Import what a driver needs; nothing to do in one that was forked with all of it."""
    if "guest_driver.driver" in sys.modules:
        return
    from importlib import import_module

    from guest_driver import diet

    diet.before_imports()
    import_module("guest_driver.driver")
    diet.after_imports()


def _split(argument: str) -> "tuple[str, str]":
    name, _, value = argument.partition("=")
    return name, value


def _run_driver(
    *,
    socket_path: str,
    cgroup_path: str,
    assigned_pages: int,
    frame_order: int,
    unknown: "dict[str, str]",
) -> int:
    if unknown:
        raise ValueError(f"unknown option {min(unknown)}")
    # Before trio and numpy are imported: a fork of this small process is all that the
    # pseudo-process needs, and what is imported before the fork is paid for twice.
    from guest_driver import memory, pseudo_process

    try:
        process = pseudo_process.start(assigned_pages, frame_order)
    except memory.ArenaError as error:
        return _fail(str(error), EXIT_FAILED)
    load_driver()
    import logging

    import trio

    from guest_driver.driver import Driver, DriverConfig
    from guest_driver.reservoir import PseudoProcessDied

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = DriverConfig(socket_path, cgroup_path, assigned_pages)
    status = 0
    try:
        trio.run(Driver(config, process).run)
    except* PseudoProcessDied as errors:
        status = _fail(str(errors.exceptions[0]), EXIT_FAILED)
    return status


def _fail(message: str, status: int) -> int:
    print(f"balloon-guest: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
