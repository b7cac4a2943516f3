"""The process that outlives the agent, so that a dead agent never leaves a guest hung.

While the agent answers dry guests, the kernel's OOM killer is off for them: a task that needs
memory hangs until the agent raises a limit. If the agent dies, or its event loop stops, somebody
must hand the decision back to the kernel. That is all that happens here:

    heartbeat on stdin        the agent lives: nothing to do
    silence for --grace-s     release all guests, go on watching (the agent may only be stopped)
    end of file, or the       the same after --grace-s, and end: until then a new agent may come,
    agent's process ended     find its guests alive, and this one ends, leaving all to it.
                              With --on-death remove, at once: kill everything below the root and
                              delete it and every --remove-path
    "bye" before that         end, leaving everything as it is
    SIGTERM                   end, leaving everything as it is

A new agent is there when the root was locked at SETTLED_LOOKS in a row (2 s): one that fails at
its start has a lock as well, for a moment, and no watchdog of its own yet. An agent that fails has
its lock for a while after it has closed the pipe: while its process is there, no lock counts.

Version 1 holds a guest that runs dry meanwhile by itself. With version 2 that takes somebody who
looks and freezes (cgroup2.py), so this does, until then.

A file run by its path with `python -I -S`: only the standard library, no import of the project,
so that it stays small (4 MB of its own beside an agent) and can't break with it. It makes no
assumption on the cgroup version: to release is to write 0 to memory.oom_control (1), or max to
memory.high and 0 to a workload's cgroup.freeze (2), whichever is there. Then swap is put right: an
agent that died while it made room has left a workload that may not swap. The VM's own directory
still says what it may.

Guests are the directories right below the root, and those that the links in --links lead to: an
engine may have put them elsewhere (machines/vm_slice.py).

It tells the agent on stdout, a line each: `ready`, and `released` after a silence, since the agent
must then arm its guests again. Talk to it through watchdog_client.py.
"""

import itertools
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

GRACE_S = 2.0
REMOVE_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.02
SETTLED_LOOKS = 100
NEAR_WALL_BYTES = 4 << 20
"""As cgroup2_room.py has it."""

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


def guests_of(root: str, links: str) -> list[str]:
    """The directories of the guests: in the root, and where links lead to that is elsewhere."""
    try:
        found = [entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        found = []
    try:
        targets = [os.path.realpath(entry.path) for entry in os.scandir(links)] if links else []
    except OSError:
        targets = []
    return found + [path for path in targets if not path.startswith(root + "/")]


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


def release(guests: list[str]) -> None:
    """Let the kernel decide in every guest, and in every cgroup that inherited the flag in it."""
    for guest in guests:
        for directory in cgroups_below(guest):
            for name, value in RELEASES:
                write(os.path.join(directory, name), value)
            if os.path.basename(directory) == FROZEN_BY_AGENT:
                write(os.path.join(directory, FREEZE), "0")


def read(path: str) -> str:
    """A control file's text; nothing if it is not there."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def restore_swap(guests: list[str]) -> None:
    """In every guest, what making room changes about swap, as it was before."""
    for guest in guests:
        workload = os.path.join(guest, "workload")
        if own := read(os.path.join(guest, "memory.swap.max")):
            write(os.path.join(workload, "memory.swap.max"), own)
        _restore_swappiness(guest, workload)
        figures = [
            read(os.path.join(directory, name))
            for directory in (guest, workload)
            for name in ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes")
        ]
        if all(figure.isdigit() for figure in figures):
            guest_sum, guest_limit, workload_sum, workload_limit = map(int, figures)
            wanted = workload_limit + guest_sum - guest_limit
            if workload_sum != wanted:
                write(os.path.join(workload, "memory.memsw.limit_in_bytes"), str(wanted))


def _restore_swappiness(guest: str, workload: str) -> None:
    """The workload's own is put back last by an agent, and so it is here: see cgroup1_room.py."""
    usual = read(os.path.join(guest, "memory.swappiness"))
    if usual == "0" or read(os.path.join(workload, "memory.swappiness")) != "0":
        return
    for directory in cgroups_below(workload):
        name = os.path.join(directory, "memory.swappiness")
        if usual and read(name) == "0":
            write(name, usual)


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


def remove_cgroups(root: str, links: str) -> bool:
    """Kill all guests and remove them and the root; False if something outlives the deadline."""
    deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
    guests = guests_of(root, links)
    tops = [*guests, root]
    while any(map(os.path.isdir, tops)):
        # Signals first: a guest that is released while it may still run is OOM-killed for it.
        for directory in itertools.chain.from_iterable(map(cgroups_below, tops)):
            kill_once(directory)
        release(guests)
        for directory in itertools.chain.from_iterable(map(cgroups_below, tops)):
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

    def note(_: object, where: str, error: tuple[type, BaseException, object]) -> None:
        if not isinstance(error[1], FileNotFoundError):  # the agent's own end was faster
            problems.append(f"{where}: {error[1]}")

    shutil.rmtree(real, onerror=note)
    return problems[0] if problems else None


def is_locked(root: str) -> bool:
    """Whether a process of our user holds an exclusive flock(2) on the root, as agents do.

    Trying to lock it would tell as well, and turn away an agent that tries in the same instant.
    """
    try:
        status = os.stat(root)
    except OSError:
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for line in read("/proc/locks").splitlines():
        fields = line.split()
        if fields[3:4] == ["WRITE"]:  # those that wait have an arrow before it
            pid, where = fields[4:6]
            if where == f"{device}:{status.st_ino}" and is_ours(pid):
                return True
    return False


def is_ours(pid: str) -> bool:
    """Whether a process belongs to our user."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except OSError:
        return False


def hold(guests: list[str]) -> None:
    """Freeze the workloads that are halfway through their wall; version 2."""
    for guest in guests:
        workload = os.path.join(guest, FROZEN_BY_AGENT)
        figures = [
            read(os.path.join(workload, name))
            for name in ("memory.high", "memory.max", "memory.current")
        ]
        if not all(figure.isdigit() for figure in figures):
            continue
        wall_bytes, limit_bytes, current_bytes = map(int, figures)
        if current_bytes < (wall_bytes + limit_bytes) // 2:
            continue
        lines = read(os.path.join(workload, "memory.stat")).splitlines()
        stat = dict(line.split() for line in lines)
        reclaimable_bytes = sum(
            int(stat.get(key, 0)) for key in ("inactive_file", "active_file", "slab_reclaimable")
        )
        if current_bytes - reclaimable_bytes + NEAR_WALL_BYTES >= wall_bytes:
            write(os.path.join(workload, FREEZE), "1")


def another_comes(root: str, links: str, agent: int | None, patience_s: float) -> bool:
    """Wait for another agent; False when it is time for the kernel to decide.

    `agent` is a pidfd of the one that was. Without a root there is nobody to wait for.
    """
    died_s = time.monotonic()
    looks = 0
    while os.path.isdir(root):
        has_ended = agent is None or bool(select.select([agent], [], [], 0)[0])
        if has_ended and is_locked(root):
            looks += 1
            if looks == SETTLED_LOOKS:
                return True
        else:
            looks = 0
            if time.monotonic() - died_s >= patience_s:
                return False
            hold(guests_of(root, links))
        time.sleep(POLL_INTERVAL_S)
    return True


def agent_died(
    root: str,
    links: str,
    remove: bool,
    paths: list[str],
    agent: int | None,
    patience_s: float,
) -> int:
    """What --on-death says; the exit status."""
    if not remove:
        if another_comes(root, links, agent, patience_s):
            return 0
        release(guests_of(root, links))
        restore_swap(guests_of(root, links))
        return 0
    status = 0
    if not remove_cgroups(root, links):
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


def watch(root: str, links: str, grace_s: float, remove: bool, paths: list[str]) -> int:
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
            release(guests_of(root, links))
            restore_swap(guests_of(root, links))
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
            return agent_died(root, links, remove, paths, agent, grace_s)


def main(arguments: list[str]) -> int:
    """--root DIR [--links DIR] [--grace-s S] [--on-death release|remove] [--remove-path PATH]..."""
    root, links, grace_s, on_death, paths = "", "", GRACE_S, "release", []
    if len(arguments) % 2:
        sys.exit(f"watchdog: an option without its value: {' '.join(arguments)}")
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        if option == "--root" and os.path.isabs(value):
            root = value
        elif option == "--links" and os.path.isabs(value):
            links = value
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
    return watch(root, links, grace_s, on_death == "remove", paths)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
