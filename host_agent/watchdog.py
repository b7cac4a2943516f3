"""The process that outlives the agent, so that a dead agent never leaves a guest hung.

While the agent answers dry guests, the kernel's OOM killer is off for them: a task that needs
memory hangs until the agent raises a limit. If the agent dies, or its event loop stops, somebody
must hand the decision back to the kernel. That is all that happens here:

    heartbeat on stdin        the agent lives: nothing to do
    silence for --grace-s     release all guests, go on watching (the agent may only be stopped)
    end of file, or the       release all guests and end; with --on-death remove also kill
    agent's process ended     everything below the root and delete it and every --remove-path
    "bye" before that         end, leaving everything as it is
    SIGTERM                   end, leaving everything as it is

A file run by its path with `python -I -S`: only the standard library, no import of the project,
so that it stays small (4 MB of its own beside an agent) and can't break with it. It makes no
assumption on the cgroup version: to release is to write 0 to memory.oom_control (1), or max to
memory.high and 0 to a workload's cgroup.freeze (2), whichever is there.

It tells the agent on stdout, a line each: `ready`, and `released` after a silence, since the agent
must then arm its guests again. Talk to it through watchdog_client.py.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator

GRACE_S = 2.0
REMOVE_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.02
RELEASES = (("memory.oom_control", "0"), ("memory.high", "max"))
FREEZE = "cgroup.freeze"
FROZEN_BY_AGENT = "workload"
"""Only this part of a VM is ever frozen by the agent; what is frozen below is its engine's."""


def cgroups_below(root: str) -> Iterator[str]:
    """The root and every directory below it, children first; nothing if it is not there."""
    try:
        children = [entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for child in children:
        yield from cgroups_below(child)
    yield root


def write(path: str, value: str) -> bool:
    """Write to an existing control file; False if it is not there or will not have it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        os.write(descriptor, value.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def release(root: str) -> None:
    """Let the kernel decide in every guest, and in every cgroup that inherited the flag in it."""
    for directory in cgroups_below(root):
        if directory != root:
            for name, value in RELEASES:
                write(os.path.join(directory, name), value)
            if os.path.basename(directory) == FROZEN_BY_AGENT:
                write(os.path.join(directory, FREEZE), "0")


def pids_of(directory: str) -> set[int]:
    """Pids in one cgroup; 0 (a process outside of our pid namespace) and our own left out."""
    try:
        with open(os.path.join(directory, "cgroup.procs")) as file:
            return {int(line) for line in file} - {0, os.getpid()}
    except OSError:
        return set()


def kill_once(directory: str) -> None:
    """SIGKILL to each process in one cgroup; pinned first, as a pid may be used again."""
    for pid in pids_of(directory):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            if pid in pids_of(directory):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError:
            pass
        finally:
            os.close(pidfd)


def remove_cgroups(root: str) -> bool:
    """Kill everything below the root and remove it; False if something outlives the deadline."""
    deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
    while os.path.isdir(root):
        # Signals first: a guest that is released while it may still run is OOM-killed for it.
        for directory in cgroups_below(root):
            kill_once(directory)
        release(root)
        for directory in cgroups_below(root):
            write(os.path.join(directory, FREEZE), "0")
            try:  # noqa: SIM105  (contextlib is not imported here: it has to stay small)
                os.rmdir(directory)
            except OSError:
                pass  # its tasks are on their way out
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def remove_path(path: str) -> str | None:
    """Delete a file or directory; what stands in the way, or None.

    A directory with something mounted in it is left alone: that may be somebody's own data.
    """
    real = os.path.realpath(path)
    if not os.path.isabs(path) or real.count("/") < 2:
        return f"{path} is not an absolute path of two parts or more"
    if os.path.islink(path) or not os.path.isdir(path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            return str(error)
        return None
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            point = line.split(" ")[4].replace("\\040", " ")
            if point == real or point.startswith(real + "/"):
                return f"{point} is mounted"
    import shutil  # noqa: PLC0415  (half a megabyte that is needed once, at the end)

    problems: list[str] = []
    shutil.rmtree(real, onerror=lambda _, where, error: problems.append(f"{where}: {error[1]}"))
    return problems[0] if problems else None


def agent_died(root: str, remove: bool, paths: list[str]) -> int:
    """What --on-death says; the exit status."""
    if not remove:
        release(root)
        return 0
    status = 0
    if not remove_cgroups(root):
        print(f"watchdog: processes below {root} do not die; kill them by hand", file=sys.stderr)
        status = 1
    for path in paths:
        problem = remove_path(path)
        if problem is not None:
            print(f"watchdog: {path} is left behind: {problem}", file=sys.stderr)
            status = 1
    return status


def tell(word: bytes) -> None:
    """One line to the agent, if it is there to read it."""
    try:  # noqa: SIM105
        os.write(1, word + b"\n")
    except OSError:
        pass


def watch(root: str, grace_s: float, remove: bool, paths: list[str]) -> int:
    """The loop; returns the exit status when there is nothing more to watch."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    # The pipe alone is not enough: a child that the agent forked may hold its other end.
    agent = os.pidfd_open(os.getppid()) if os.getppid() > 1 else None
    if agent is not None:
        poll.register(agent, select.POLLIN)
    os.set_blocking(0, False)
    os.set_blocking(1, False)
    tell(b"ready")
    tail = b""
    while True:
        ready = poll.poll(grace_s * 1000)
        if not ready:
            release(root)
            tell(b"released")
            continue
        try:
            said = os.read(0, 65536)
        except BlockingIOError:
            said = b"" if agent in dict(ready) else b"."
        # Heartbeats are single newlines; the goodbye is "bye" on a line of its own.
        tail = (tail + said)[-5:]
        if tail.endswith(b"bye\n"):
            return 0
        if not said:
            return agent_died(root, remove, paths)


def main(arguments: list[str]) -> int:
    """--root DIR [--grace-s S] [--on-death release|remove] [--remove-path PATH]..."""
    root, grace_s, on_death, paths = "", GRACE_S, "release", []
    if len(arguments) % 2:
        sys.exit(f"watchdog: an option without its value: {' '.join(arguments)}")
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        if option == "--root" and os.path.isabs(value):
            root = value
        elif option == "--grace-s" and float(value) > 0:
            grace_s = float(value)
        elif option == "--on-death" and value in ("release", "remove"):
            on_death = value
        elif option == "--remove-path":
            paths.append(value)
        else:
            sys.exit(f"watchdog: cannot use {option} {value}")
    if not root:
        sys.exit("watchdog: --root is missing: the directory that holds the guests' cgroups")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a ^C is for the agent, which then says bye
    write("/proc/self/oom_score_adj", "-900")
    return watch(root, grace_s, on_death == "remove", paths)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
