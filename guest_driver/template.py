"""The template: a process that has imported all that a driver needs, and forks drivers.

Starting Python and importing trio and numpy takes half a second of processor time; a fork takes
milliseconds, and shares what was imported with all other drivers. One template serves all mock VMs
of one host agent, which starts it with few rights, no new ones to be had, and the system call
filter that a driver is to have; it ends with the agent's end of its socket. It has one thread.

    request  the driver's arguments, each ended by a null character, with four descriptors: a pidfd
             of the process 1 of the namespaces that the driver is to live in, cgroup.procs of its
             cgroup, its log, its lifeline
    answer   "forked", or "failed TEXT"; one to each request, in order

A driver is the template's great-grandchild:

    first    joins the driver's cgroup and enters the namespaces, but for the pid namespace, which
             is for children only; waits for
    second   the first process that is born in both; it leaves
    third    to the namespace's process 1, which reaps it like any other: the driver. It is born in
             its cgroup, so nothing that it touches is charged to anybody else, and what it shares
             is the template's.

Whoever holds the other end of the lifeline hears when the driver has ended, or could not be made.

Hazards. What is forked here still maps the host's Python, through the host's mounts, where nothing
is read-only: a guest's root could write to it through /proc/PID/exe, or make the driver do so. So
neither is dumpable (prctl(2)): to other processes of the guest, their files in /proc are closed and
ptrace is refused. And nothing of one driver may reach the next: no descriptor, no random numbers
that matter (trio's own order of tasks is none).

Sources: setns(2), capabilities(7), PR_SET_DUMPABLE in prctl(2).
"""

import ctypes
import errno
import gc
import os
import select
import signal
import socket
import sys
import traceback
from typing import Final, NoReturn

from guest_driver import cli

REQUEST_BYTES: Final = 65_536
REQUEST_FDS: Final = 4

END_PATIENCE_S: Final = 2.0
"""Until a process 1 that is ending has ended; only a driver that can't be forked waits for that."""

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_CAP_IPC_LOCK: Final = 14
_CAPABILITY_VERSION_3: Final = 0x20080522

_NAMESPACES: Final = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET: setns(2) takes them together from a pidfd."""

_LIFELINE_FD: Final = 3


class _Capabilities(ctypes.Structure):
    """Two of struct __user_cap_data_struct, low words first, as capset(2) takes them."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
        ("high", ctypes.c_uint32 * 3),
    )


def main() -> int:
    """Serve requests on descriptor 0, a SOCK_SEQPACKET socket, until its other end is closed."""
    cli.load_driver()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        print(f"balloon-guest: a template with {threads} threads forks nothing", file=sys.stderr)
        return cli.EXIT_FAILED
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call("prctl", _PR_SET_NAME, b"driver-template", 0, 0, 0)
    # What a driver's collector looks at it would write to, and so make its own.
    gc.collect()
    gc.freeze()
    # The kernel reaps: nobody asks how they ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=0) as requests:
        while True:
            message, fds, _, _ = socket.recv_fds(requests, REQUEST_BYTES, REQUEST_FDS)
            if not message:
                return 0
            try:
                answer = _fork_driver(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            try:
                requests.send(answer)
            except BrokenPipeError:
                return 0


def _fork_driver(message: bytes, fds: list[int]) -> bytes:
    """The answer; in the forked process it never returns."""
    try:
        pid = os.fork()
    except OSError as error:
        return f"failed {error.strerror}".encode()
    if pid == 0:
        _run(message, fds)
    return b"forked"


def _run(message: bytes, fds: list[int]) -> NoReturn:
    """From the template's child to the driver's end."""
    status = cli.EXIT_FAILED
    try:
        if _is_born_in_its_place(*fds):
            _give_up_rights()
            _call("prctl", _PR_SET_NAME, b"balloon-driver", 0, 0, 0)
            status = cli.main(message.decode().split("\0")[:-1])
    except BaseException:
        traceback.print_exc()
    finally:
        # The template's own exit handlers are none of ours.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _is_born_in_its_place(init: int, cgroup_procs: int, log: int, lifeline: int) -> bool:
    """Become the driver, with its descriptors and no other; False in those that came before it.

    The guest may end meanwhile: nothing is said of that, since its log ends with its own words.
    """
    for standard in (1, 2):
        os.dup2(log, standard)
    try:
        os.setsid()
        os.write(cgroup_procs, b"0")
        _call("setns", init, _NAMESPACES)
        # The VM's own: the template's is the host's. It takes the place of the template's socket.
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if second := os.fork():
            os.waitpid(second, 0)
            return False
        if os.fork():
            return False
    except OSError as error:
        if not _has_ended(init, error):
            print(f"balloon-guest: the driver can't be forked: {error}", file=sys.stderr)
        return False
    os.dup2(lifeline, _LIFELINE_FD)
    os.closerange(_LIFELINE_FD + 1, os.sysconf("SC_OPEN_MAX"))
    return True


def _has_ended(init: int, error: OSError) -> bool:
    """Whether an error comes of the end of a guest, whose process 1 may be still on its way out."""
    # Without namespaces it is not a process any more, to setns; a pid namespace that ends takes
    # nobody in, which fork calls a want of memory, and waits for those in it.
    if error.errno == errno.ESRCH:
        return True
    patience_s = END_PATIENCE_S if error.errno == errno.ENOMEM else 0.0
    return bool(select.select([init], [], [], patience_s)[0])


def _give_up_rights() -> None:
    """Every capability but IPC_LOCK, from all sets; the ambient one is empty since the start."""
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while (is_bounding := libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0)) >= 0:
        if is_bounding and capability != _CAP_IPC_LOCK:
            _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    kept = _Capabilities(effective=1 << _CAP_IPC_LOCK, permitted=1 << _CAP_IPC_LOCK)
    _call("capset", ctypes.byref(header), ctypes.byref(kept))


def _call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
