"""`balloon-guest run`: the first program of a guest's container; see USAGE.

It becomes the workload's program itself: so signals reach that without a go-between, and its exit
status is the container's. Before that it leaves a keeper behind, which runs the driver again and
again: a shell, since an interpreter would cost the guest 8 MiB for as long as it lives. The keeper
is a child of the container's init, which reaps it (`init: true`); when the workload ends, so does
the init, and the kernel ends all the rest.

A container is born in its workload's cgroup. So the keeper knocks first: it connects to the private
socket, the agent sees by the kernel's eyes who that is, puts it into the driver's cgroup and hangs
up. All drivers are its children, and are there from their first instruction.
"""

import os
import re
import select
import shlex
import shutil
import signal
import socket
import sys
import time

SOCKET = "/run/memballoon/channel.sock"
CGROUP = "/run/memballoon-cgroup"
"""Where docker-compose.yml mounts them."""

USAGE = f"""usage: balloon-guest run --memory=SIZE [OPTIONS] -- COMMAND [ARGUMENT...]

Run COMMAND with the balloon driver of this container beside it.

  --memory=SIZE     size of the guest, as the host agent's configuration has it: 512MiB
  --socket=PATH     the private channel to the host agent ({SOCKET})
  --cgroup=PATH     where the guest sees its own cgroups ({CGROUP})
  --frame-order=N   0 for frames of 4 KiB (default), 9 for 2 MiB"""

PAGE_BYTES = 4096
MOST_BYTES = 2**32 * PAGE_BYTES
"""What pfns of 32 bits can name."""

FRAME_ORDERS = ("0", "9")
RESPAWN_DELAY_S = 1
"""A driver that can't start must not eat the processor."""

FIRST_KNOCK_S = 0.05
LAST_KNOCK_S = 2.0
"""Between knocks at a host that is not there yet; it doubles."""

LOOK_S = 0.02
ANSWER_DEADLINE_S = 10.0

CANNOT_RUN = 126
NO_SUCH_PROGRAM = 127
"""As a shell has it."""

_DRIVER = (
    "import sys; sys.path.insert(0, {top!r}); from guest_driver.cli import main; sys.exit(main())"
)

_KEEPER = """while :; do
    {driver}
    echo "memballoon: the driver ended ($?), again in {delay_s} s" >&2
    sleep {delay_s}
done"""

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]i?b?|b)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


class RunError(Exception):
    """It can't be started like that: one line says why."""


def run(arguments: list[str]) -> int:
    """Start the keeper and become the workload; returns only where that can't be.

    Raises RunError for options that make no sense.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    options, command = parse(arguments)
    if not (os.path.isfile(command[0]) or shutil.which(command[0])):
        print(f"balloon-guest: no program {command[0]} in this container", file=sys.stderr)
        return NO_SUCH_PROGRAM
    if _fork_to_init():
        _keep(options)
    return _become(command)


def parse(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of the driver, and the command. Raises RunError."""
    if "--" not in arguments:
        raise RunError("no `--` before the command; see `balloon-guest run --help`")
    middle = arguments.index("--")
    given, command = arguments[:middle], arguments[middle + 1 :]
    if not command:
        raise RunError("no command after `--`")
    options = {"--socket": SOCKET, "--cgroup": CGROUP, "--frame-order": "0"}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not equals or name not in (*options, "--memory"):
            raise RunError(f"unknown option {argument}; see `balloon-guest run --help`")
        options[name] = value
    if options["--frame-order"] not in FRAME_ORDERS:
        raise RunError(f"--frame-order={options['--frame-order']}: it is 0 (4 KiB) or 9 (2 MiB)")
    if "--memory" not in options:
        raise RunError("--memory is missing: say --memory=512MiB, as the host agent's file has it")
    options["--assigned-pages"] = str(pages_of(options.pop("--memory")))
    return options, command


def pages_of(size: str) -> int:
    """A size as people write it, in whole pages. Raises RunError where it is none.

    Read as the host agent reads it: `512M` is 512 MiB, `512MB` is 512,000,000 bytes.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise RunError(f"--memory={size} is no size; say --memory=512MiB")
    unit = (match[2] or "b").lower()
    step = 1000 if unit[1:] == "b" else 1024
    size_bytes = float(match[1]) * step ** _POWERS.get(unit[0], 0)
    if size_bytes > MOST_BYTES:
        raise RunError(f"--memory={size[:40]} is more than a guest can have; say --memory=512MiB")
    pages = int(size_bytes) // PAGE_BYTES
    if not pages:
        raise RunError(f"--memory={size} is less than a page of 4 KiB; say --memory=512MiB")
    return pages


def driver_command(options: dict[str, str]) -> list[str]:
    """The driver as the process backend starts it: without `site`, which would cost 4 MiB."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    arguments = [f"{name}={value}" for name, value in options.items()]
    code = _DRIVER.format(top=top)
    return [sys.executable, "-OO", "-I", "-S", "-c", code, "driver", *arguments]


def _fork_to_init() -> bool:
    """Fork a process whose parent is the container's init; True in there."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            return True
        os._exit(0)
    os.waitpid(child, 0)
    return False


def _keep(options: dict[str, str]) -> None:
    """Never returns."""
    try:
        knock(options["--socket"])
        driver = shlex.join(driver_command(options))
        script = _KEEPER.format(driver=driver, delay_s=RESPAWN_DELAY_S)
        os.execv("/bin/sh", ["sh", "-c", script])
    except BaseException as error:
        os.write(2, f"balloon-guest: no driver: {error!r}\n".encode())
    finally:
        os._exit(1)


def knock(socket_path: str) -> None:
    """Connect until the host agent has put this process into another cgroup."""
    born_in = _own_cgroups()
    pause_s = FIRST_KNOCK_S
    while True:
        with socket.socket(socket.AF_UNIX) as knocking:
            try:
                knocking.connect(socket_path)
            except OSError:
                pass
            else:
                end_s = time.monotonic() + ANSWER_DEADLINE_S
                while time.monotonic() < end_s:
                    hung_up = select.select([knocking], [], [], LOOK_S)[0]
                    if _own_cgroups() != born_in:
                        return
                    if hung_up:
                        break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_KNOCK_S)


def _own_cgroups() -> str:
    with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
        return file.read()


def _become(command: list[str]) -> int:
    # The interpreter ignores it, and what is ignored stays so over an exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"balloon-guest: {command[0]}: {error.strerror}", file=sys.stderr)
    return CANNOT_RUN
