"""Can this machine run mock VMs? One check for each thing that the agent needs or likes.

A check looks and judges; it changes nothing, and none ends the others. `warn` is for what only
some uses need, `fail` for what every mock VM needs. What to do is said wherever something can be.
"""

import ctypes
import mmap
import os
import resource
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from host_agent.config import DEFAULT_RUN_DIR, control_socket_in, default_pool
from host_agent.facade.server import MAX_SOCKET_PATH_BYTES, is_answered
from host_agent.quota.base import QuotaBackend
from host_agent.quota.cgroup1 import Cgroup1Backend
from host_agent.quota.cgroup2_backend import Cgroup2Backend
from host_agent.quota.delegation import HOW
from host_agent.quota.detect import ROOT_NAME, detect
from host_agent.quota.errors import QuotaUnavailable
from host_agent.quota.swap_space import is_accounted
from host_agent.sizes import format_size
from protocol.units import KIB, MIB, PAGE_BYTES

LEAST_KERNEL: Final = (5, 18)
"""MADV_DONTNEED_LOCKED came with it; MADV_POPULATE_WRITE is older (5.14)."""

LEAST_POOL_BYTES: Final = 256 * MIB
"""What the demonstration needs to show anything."""

CAP_IPC_LOCK: Final = 14
"""Its bit in CapEff of /proc/self/status; capabilities(7)."""

AGENT_CHECK: Final = "agent"

TOOLS: Final = ("unshare", "nsenter", "setpriv")
DOCKER_SOCKET: Final = Path("/var/run/docker.sock")
SYSTEMD_RUNS: Final = Path("/run/systemd/system")
"""There while systemd is process 1; sd_booted(3)."""
PROBE_TIMEOUT_S: Final = 5.0

_PFN_MASK: Final = (1 << 55) - 1  # proc_pid_pagemap(5)
_PAGE_FILES: Final = ("/proc/kpageflags", "/proc/kpagecgroup")


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What one check looked for, how that came out, and what to do (None: nothing)."""

    name: str
    verdict: Verdict
    found: str
    what_to_do: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """For JSON."""
        return asdict(self)


def _ok(name: str, found: str) -> Check:
    return Check(name, Verdict.OK, found)


def is_fit(checks: Iterable[Check]) -> bool:
    """Whether mock VMs can run here: what the machine has, whatever directory was chosen."""
    return all(check.verdict is not Verdict.FAIL for check in checks if check.name != AGENT_CHECK)


def run_checks(run_dir: Path = DEFAULT_RUN_DIR, cgroup_root: str = ROOT_NAME) -> list[Check]:
    """All checks in a fixed order. A check that breaks is a failed check, never an exception.

    `run_dir` and `cgroup_root` are those of the agent that is asked after.
    """
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("root", check_root),
        ("kernel", lambda: judge_kernel(os.uname().release)),
        ("page size", lambda: judge_page_size(os.sysconf("SC_PAGE_SIZE"))),
        ("memory cgroup", lambda: check_memory_cgroup(cgroup_root)),
        ("locked memory", check_locked_memory),
        ("page frames", check_page_frames),
        ("namespaces", check_namespaces),
        ("free memory", lambda: judge_free_memory(_meminfo())),
        ("swap", check_swap),
        ("pressure", check_pressure),
        ("huge pages", check_huge_pages),
        ("docker", check_docker),
        (AGENT_CHECK, lambda: check_agent(run_dir, cgroup_root)),
    )
    return [_caught(name, check) for name, check in checks]


def _caught(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (OSError, ValueError, LookupError) as error:
        return Check(name, Verdict.FAIL, f"can't be looked at: {error}")


def check_root() -> Check:
    """Limits of cgroups and the page files are root's."""
    if os.geteuid() == 0:
        return _ok("root", "yes")
    return Check("root", Verdict.FAIL, f"no, uid {os.geteuid()}", "run as root (sudo)")


def judge_kernel(release: str) -> Check:
    """Is the kernel new enough, going by its release (`6.1.0-18-amd64`)?"""
    numbers = release.split("-", maxsplit=1)[0].split(".")
    if tuple(int(number) for number in numbers[:2]) >= LEAST_KERNEL:
        return _ok("kernel", release)
    least = ".".join(map(str, LEAST_KERNEL))
    return Check("kernel", Verdict.FAIL, release, f"boot Linux {least} or newer")


def judge_page_size(page_bytes: int) -> Check:
    """Are base pages 4 KiB?"""
    if page_bytes == PAGE_BYTES:
        return _ok("page size", format_size(page_bytes))
    return Check(
        "page size", Verdict.FAIL, format_size(page_bytes), "boot a kernel with 4 KiB pages"
    )


def check_memory_cgroup(cgroup_root: str = ROOT_NAME) -> Check:
    """Is there a memory controller, and may this process make cgroups under it?

    An agent that systemd starts has another place than this process: that is said.
    """
    try:
        backend = detect(cgroup_root)
    except QuotaUnavailable as error:
        return Check("memory cgroup", Verdict.FAIL, "none", str(error))
    found = f"version {_version_of(backend)} at {backend.base}"
    if isinstance(backend, Cgroup2Backend) and backend.delegated:
        found += ", delegated"
    if not os.access(backend.base, os.W_OK):
        return Check(
            "memory cgroup",
            Verdict.FAIL,
            f"{found}, not writable",
            "run as root; in a container mount /sys/fs/cgroup read-write",
        )
    if isinstance(backend, Cgroup2Backend) and not backend.delegated and SYSTEMD_RUNS.exists():
        found += f", beside systemd's own; `{HOW}` has a part delegated"
    return _ok("memory cgroup", found)


def _version_of(backend: QuotaBackend) -> int:
    return 1 if isinstance(backend, Cgroup1Backend) else 2


def check_locked_memory() -> Check:
    """May a process lock memory without a limit?"""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    capabilities = next(
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")
    )
    return judge_locked_memory(capabilities, limit_bytes)


def judge_locked_memory(capabilities: int, limit_bytes: int) -> Check:
    """By the effective capabilities' bits and RLIMIT_MEMLOCK (-1: none)."""
    if capabilities >> CAP_IPC_LOCK & 1:
        return _ok("locked memory", "CAP_IPC_LOCK: no limit")
    if limit_bytes == resource.RLIM_INFINITY:
        return _ok("locked memory", "no limit")
    return Check(
        "locked memory",
        Verdict.FAIL,
        f"{format_size(limit_bytes)} at most, and no CAP_IPC_LOCK",
        "run as root; in a container add the capability IPC_LOCK",
    )


def check_page_frames() -> Check:
    """Can frames be seen as the kernel sees them, with their numbers, flags and cgroup?"""
    advice = "run as root in the initial user namespace; a container needs CAP_SYS_ADMIN"
    with _one_page() as address, Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE_BYTES * 8)
        (entry,) = struct.unpack("<Q", pagemap.read(8))
    frame = entry & _PFN_MASK
    if not frame:
        return Check("page frames", Verdict.FAIL, "pagemap hides the frame numbers", advice)
    for path in _PAGE_FILES:
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(frame * 8)
                if len(file.read(8)) != 8:
                    return Check("page frames", Verdict.FAIL, f"{path} ends too early", advice)
        except FileNotFoundError:
            return Check(
                "page frames",
                Verdict.FAIL,
                f"no {path}",
                "boot a kernel with CONFIG_PROC_PAGE_MONITOR and CONFIG_MEMCG",
            )
        except OSError as error:
            return Check("page frames", Verdict.FAIL, f"{path}: {error.strerror}", advice)
    return _ok("page frames", "pagemap, kpageflags and kpagecgroup can be read")


@contextmanager
def _one_page() -> Iterator[int]:
    with mmap.mmap(-1, PAGE_BYTES) as page:
        page[0] = 1  # or there is no frame behind it
        view = ctypes.c_char.from_buffer(page)
        try:
            yield ctypes.addressof(view)
        finally:
            del view  # the mapping can't be closed while it is looked at


def check_namespaces() -> Check:
    """Are the tools that make mock VMs of processes there, and do they work?"""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return Check(
            "namespaces",
            Verdict.FAIL,
            f"no {', no '.join(missing)}",
            "apt-get install util-linux",
        )
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "true"],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("namespaces", Verdict.FAIL, f"unshare hung for {PROBE_TIMEOUT_S:g} s")
    if done.returncode != 0:
        return Check(
            "namespaces",
            Verdict.FAIL,
            " ".join(done.stderr.split()) or f"unshare ended with {done.returncode}",
            "run as root; a container needs CAP_SYS_ADMIN and a seccomp profile with unshare",
        )
    return _ok("namespaces", ", ".join(TOOLS))


def judge_free_memory(meminfo: str) -> Check:
    """Is there enough for a pool, going by the text of /proc/meminfo?"""
    pool_bytes = default_pool(meminfo)
    if pool_bytes is None:
        return Check("free memory", Verdict.FAIL, "/proc/meminfo names no MemAvailable")
    found = f"a pool of {format_size(pool_bytes)} unless configured"
    if pool_bytes >= LEAST_POOL_BYTES:
        return _ok("free memory", found)
    return Check("free memory", Verdict.WARN, found, "end something that holds memory")


def check_swap() -> Check:
    """Is there swap space, and does the kernel keep each VM to its own?"""
    try:
        accounted = is_accounted(detect().root)
    except QuotaUnavailable:
        accounted = None
    return judge_swap(_meminfo(), accounted)


def judge_swap(meminfo: str, accounted: bool | None) -> Check:
    """By the text of /proc/meminfo, and whether swap is counted by cgroup (None: unknown).

    Swap is no fault, and none is none either: a VM has swap where it was given some.
    """
    total_bytes = 0
    for line in meminfo.splitlines():
        if line.startswith("SwapTotal:"):
            total_bytes = int(line.split()[1]) * KIB
    if not total_bytes:
        return _ok("swap", "none: what a guest holds in anonymous memory it can't give")
    found = f"{format_size(total_bytes)}: a VM swaps as much of it as its `swap` says"
    if accounted is not False:
        return _ok("swap", found)
    return Check(
        "swap",
        Verdict.WARN,
        f"{format_size(total_bytes)}, not accounted by cgroup: any VM may swap, and none can be "
        "given swap of its own",
        "boot with swapaccount=1, or swapoff -a",
    )


def check_pressure() -> Check:
    """Pressure stall information makes estimates better and is required for nothing."""
    if Path("/proc/pressure/memory").exists():
        return _ok("pressure", "pressure stall information is there")
    return Check("pressure", Verdict.WARN, "no /proc/pressure", "boot with psi=1 (optional)")


def check_huge_pages() -> Check:
    """2 MiB frames need transparent huge pages by madvise at least."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    choices = path.read_text(encoding="ascii").strip() if path.exists() else "[never]"
    if "[never]" in choices:
        return Check(
            "huge pages", Verdict.WARN, "off", f"for 2 MiB frames: echo madvise > {path} (optional)"
        )
    return _ok("huge pages", choices)


def check_docker() -> Check:
    """Information alone: mock VMs are processes, whether or not there is an engine."""
    path = _docker_socket(os.environ.get("DOCKER_HOST", ""))
    if path is None:
        state = "DOCKER_HOST names no Unix socket"
    else:
        state = f"{'an' if _answers_ping(path) else 'no'} engine answers at {path}"
    return _ok("docker", f"not needed, mock VMs here are processes; {state}")


def _docker_socket(docker_host: str) -> Path | None:
    if not docker_host:
        return DOCKER_SOCKET
    scheme, _, path = docker_host.partition("://")
    return Path(path) if scheme == "unix" and path else None


def _answers_ping(path: Path) -> bool:
    # Two lines of HTTP: no client of 0.3 s import for them.
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
            engine.settimeout(PROBE_TIMEOUT_S)
            engine.connect(os.fspath(path))
            engine.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in engine.recv(64).partition(b"\r\n")[0]
    except OSError:
        return False


def check_agent(run_dir: Path, cgroup_root: str = ROOT_NAME) -> Check:
    """Is an agent running, or did a dead one leave VMs behind below its root?"""
    socket_path = control_socket_in(run_dir)
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
        return Check(
            AGENT_CHECK,
            Verdict.FAIL,
            f"no socket can be at {socket_path}: more than {MAX_SOCKET_PATH_BYTES} bytes",
            "choose a shorter run directory",
        )
    if is_answered(socket_path):
        return _ok(AGENT_CHECK, f"one answers at {socket_path}")
    try:
        left = detect(cgroup_root).names()
    except QuotaUnavailable:
        left = ()
    if not left:
        return _ok(AGENT_CHECK, f"none at {socket_path}, no VM left behind in {cgroup_root}")
    return Check(
        AGENT_CHECK,
        Verdict.WARN,
        f"none at {socket_path}, but VMs are left in {cgroup_root}: {', '.join(left)}",
        "start `balloon agent`: it takes them over, or removes what is dead",
    )


def _meminfo() -> str:
    return Path("/proc/meminfo").read_text(encoding="ascii")
