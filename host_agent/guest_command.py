"""The command lines that run inside a mock VM with the agent's own Python.

A guest pays for every module that its Python loads, so its `site` stays out (-S), and with it what
path files of the agent's environment import: 2 MiB in the driver and as much in the pseudo-process.
-I keeps the guest's environment variables out; -OO leaves the docstrings on disk.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from host_agent.guest import Guest

GUEST_CODE: Final = (
    "import sys; sys.path[:0] = {paths!r}; from {module} import main; sys.exit(main())"
)

DISK_IN_GUEST: Final = "/var/tmp"
WORKLOAD_SOCKET: Final = "workload.sock"
"""Name of the built-in workload's control socket on the guest's disk."""

CGROUP_IN_GUEST: Final = "/sys/fs/cgroup"


def guest_python(module: str, *arguments: str) -> tuple[str, ...]:
    """A command that runs `main()` of a module of guest_driver with `arguments`."""
    # Found, not imported: the host's side knows where the guest's is, never what is in it.
    found = find_spec("guest_driver")
    tops = [str(Path(place).parent) for place in (found and found.submodule_search_locations) or ()]
    paths = list(dict.fromkeys([*tops, *(path for path in sys.path if Path(path).is_dir())]))
    code = GUEST_CODE.format(paths=paths, module=module)
    return (sys.executable, "-OO", "-I", "-S", "-c", code, *arguments)


def driver_command(guest: Guest, socket_path: Path) -> tuple[str, ...]:
    """The guest's balloon driver; `socket_path` is where the guest sees its private socket."""
    return guest_python("guest_driver.cli", *driver_arguments(guest, socket_path))


def driver_arguments(guest: Guest, socket_path: Path) -> tuple[str, ...]:
    """What follows the program in `driver_command`, and all that a forked driver is told."""
    return (
        "driver",
        f"--socket={socket_path}",
        f"--cgroup={CGROUP_IN_GUEST}",
        f"--assigned-pages={guest.assigned_pages}",
        f"--frame-order={guest.spec.frame_order}",
    )


def template_command(run_dir: Path) -> tuple[str, ...]:
    """What forks drivers. `run_dir` is for whoever looks whose it is, and whose its drivers are."""
    return guest_python("guest_driver.template", str(run_dir))


def idle_workload_command() -> tuple[str, ...]:
    """The built-in workload, holding nothing until it is told to."""
    return guest_python(
        "guest_driver.workload",
        f"--files={DISK_IN_GUEST}",
        f"--control={DISK_IN_GUEST}/{WORKLOAD_SOCKET}",
    )
