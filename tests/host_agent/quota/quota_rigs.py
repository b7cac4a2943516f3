"""The same guest for every back end: real processes in real cgroups, or the fake's model.

A rig makes VMs below a root of its own and takes everything down again, hung processes included.
"""

import os
import select
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from host_agent.quota.base import Part, QuotaBackend, VmQuota
from host_agent.quota.cgroup1 import Cgroup1Backend
from host_agent.quota.cgroup2_backend import Cgroup2Backend
from host_agent.quota.cgroup_tree import kill_below, remove_tree, subtree
from host_agent.quota.detect import MOUNTINFO, memory_mounts
from host_agent.quota.fake import FakeBackend, FakeVmQuota
from protocol.units import MIB

DEADLINE_S = 60.0 if os.environ.get("MEMBALLOON_SLOW_MACHINE") else 15.0

# All are there before the first takes anything: with version 1 a full guest can't start a process.
HOLD = """
import mmap, os, signal, sys
processes = int((sys.argv + ["1"])[2])
size = int(sys.argv[1]) // processes // 4096 * 4096
started, start = os.pipe()
told, tell = os.pipe()
is_child = any(os.fork() == 0 for _ in range(processes - 1))
if not is_child:
    signal.signal(signal.SIGCHLD, lambda *_: os._exit(1))
os.close(start)
os.read(started, 1)
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for offset in range(0, size, 4096):
    memory[offset] = 1
os.write(tell, b".")
while not is_child and processes:
    processes -= len(os.read(told, processes))
if not is_child:
    os.write(1, b"done")
signal.pause()
"""
CACHE = """
import os, signal, sys
with open(sys.argv[2], "wb", buffering=0) as file:
    for _ in range(int(sys.argv[1]) >> 20):
        file.write(bytes(1 << 20))
    if sys.argv[3] == "clean":
        os.fsync(file.fileno())
os.write(1, b"done")
signal.pause()
"""

STREAM = """
import os, sys
with open(sys.argv[2], "wb+", buffering=0) as file:
    for _ in range(int(sys.argv[1]) >> 20):
        file.write(bytes(1 << 20))
    os.fsync(file.fileno())
    os.write(1, b"done")
    while True:
        if not file.read(1 << 16):
            file.seek(0)
"""
# Memory that a system call takes, not a page fault. To say no is another one: so by its status.
SYSCALL = """
import os, signal, sys
file = os.memfd_create("shared")
left = int(sys.argv[1]) >> 20
try:
    while left and os.write(file, bytes(1 << 20)):
        left -= 1
    os.write(1, b"done")
except OSError as error:
    os._exit(error.errno)
signal.pause()
"""
SWING = """
import mmap, os, sys
size = int(sys.argv[1])
os.write(1, b"done")
while True:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size, 4096):
        memory[offset] = 1
    memory.close()
"""


def wait_for(predicate: Callable[[], bool], what: str, pause_s: float = 0.005) -> None:
    deadline_s = DEADLINE_S
    end_s = time.monotonic() + deadline_s
    while not predicate():
        assert time.monotonic() < end_s, f"not within {deadline_s} s: {what}"
        time.sleep(pause_s)


def readable(descriptor: int, timeout_s: float = 0.0) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


class Tenant(ABC):
    """A process of a guest."""

    @abstractmethod
    def done(self) -> bool:
        """It has all the memory it asked for."""

    @abstractmethod
    def alive(self) -> bool: ...


class ProcessTenant(Tenant):
    def __init__(self, procs: Path, code: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                'echo $$ > "$0" && exec "$@"',
                str(procs),
                sys.executable,
                "-I",
                "-S",
                "-c",
                code,
                *arguments,
            ],
            stdout=subprocess.PIPE,
        )
        self._done = False

    def done(self) -> bool:
        assert self.process.stdout is not None
        if not self._done and readable(self.process.stdout.fileno()):
            self._done = os.read(self.process.stdout.fileno(), 4) == b"done"
        return self._done

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Rig(ABC):
    protects = True
    """Whether this kernel can protect a reservation."""

    def __init__(self, backend: QuotaBackend) -> None:
        self.backend = backend
        self.quotas: list[VmQuota] = []

    def create(
        self, quota_mib: int = 96, overhead_mib: int = 24, name: str = "vm1", swap_mib: int = 0
    ) -> VmQuota:
        self.quotas.append(
            self.backend.create(name, quota_mib * MIB, overhead_mib * MIB, swap_mib * MIB)
        )
        return self.quotas[-1]

    def close(self) -> None:
        """Twenty descriptors a VM: they would add up over a suite."""
        for quota in self.quotas:
            quota.close()

    @abstractmethod
    def hold(
        self, quota: VmQuota, mib: int, part: Part = Part.WORKLOAD, processes: int = 1
    ) -> Tenant:
        """Takes so much anonymous memory and keeps it; alive as long as all its processes are."""

    @abstractmethod
    def fill_cache(self, quota: VmQuota, mib: int) -> Tenant:
        """A process that leaves so much clean page cache."""

    @abstractmethod
    def stream(self, quota: VmQuota, mib: int) -> Tenant:
        """A process that reads a file of so much again and again, for ever."""

    @abstractmethod
    def down(self) -> None: ...


class CgroupRig(Rig):
    def __init__(self, backend: QuotaBackend, scratch: Path) -> None:
        super().__init__(backend)
        self.protects = backend.cgroup_version == 2
        self.scratch = scratch
        self.tenants: list[ProcessTenant] = []
        backend.prepare()

    def start(self, procs: Path, code: str, *arguments: str) -> ProcessTenant:
        self.tenants.append(ProcessTenant(procs, code, *arguments))
        return self.tenants[-1]

    def hold(
        self, quota: VmQuota, mib: int, part: Part = Part.WORKLOAD, processes: int = 1
    ) -> ProcessTenant:
        return self.start(quota.procs_path(part), HOLD, str(mib * MIB), str(processes))

    def fill_cache(self, quota: VmQuota, mib: int, state: str = "clean") -> ProcessTenant:
        file = str(self.scratch / uuid4().hex)
        return self.start(quota.procs_path(Part.WORKLOAD), CACHE, str(mib * MIB), file, state)

    def stream(self, quota: VmQuota, mib: int) -> ProcessTenant:
        file = str(self.scratch / uuid4().hex)
        return self.start(quota.procs_path(Part.WORKLOAD), STREAM, str(mib * MIB), file)

    def take_by_system_calls(self, quota: VmQuota, mib: int) -> ProcessTenant:
        """A process that takes memory by writing, not by touching."""
        return self.start(quota.procs_path(Part.WORKLOAD), SYSCALL, str(mib * MIB))

    def swing(self, quota: VmQuota, mib: int) -> ProcessTenant:
        """A process that takes so much anonymous memory and gives it back, for ever."""
        return self.start(quota.procs_path(Part.WORKLOAD), SWING, str(mib * MIB))

    def down(self) -> None:
        """Whatever state the test has left: nobody hung, nobody there, no directory."""
        self.close()
        for tenant in self.tenants:
            tenant.process.kill()
        for path in subtree(self.backend.root):
            with suppress(OSError):
                (path / "memory.oom_control").write_text("0")
            with suppress(OSError):
                (path / "memory.high").write_text("max")
            with suppress(OSError):
                (path / "cgroup.freeze").write_text("0")
        wait_for(lambda: not kill_below(self.backend.root), "all processes of the test are dead")
        for tenant in self.tenants:
            tenant.end()
        remove_tree(self.backend.root, time.monotonic() + DEADLINE_S)
        for file in self.scratch.iterdir():
            file.unlink()


class FakeTenant(Tenant):
    def __init__(self, quota: FakeVmQuota, pid: int, part: Part) -> None:
        self.vm, self.pid, self.part = quota.vm, pid, part
        self.vm.pids[part].add(pid)

    def done(self) -> bool:
        return self.alive() and not self.vm.wanted_bytes

    def alive(self) -> bool:
        return self.pid in self.vm.pids[self.part]


class FakeRig(Rig):
    def __init__(self) -> None:
        super().__init__(FakeBackend())
        self.pids = iter(range(100, 1000))

    def hold(
        self, quota: VmQuota, mib: int, part: Part = Part.WORKLOAD, processes: int = 1
    ) -> FakeTenant:
        assert isinstance(quota, FakeVmQuota)
        tenant = FakeTenant(quota, next(self.pids), part)
        if part is Part.DRIVER:
            quota.vm.driver_bytes += mib * MIB
        else:
            quota.vm.allocate(mib * MIB, tenant.pid)
        return tenant

    def fill_cache(self, quota: VmQuota, mib: int) -> FakeTenant:
        assert isinstance(quota, FakeVmQuota)
        quota.vm.fill_cache(mib * MIB)
        return FakeTenant(quota, next(self.pids), Part.WORKLOAD)

    def stream(self, quota: VmQuota, mib: int) -> FakeTenant:
        return self.fill_cache(quota, mib)

    def down(self) -> None:
        self.close()
        for name in self.backend.names():
            self.backend.open_existing(name, 0).close()


def random_root_name() -> str:
    return f"mbtest-{uuid4().hex[:10]}"


def make_rig(kind: str, scratch: Path) -> Rig:
    """The rig, or a skip that says what this machine lacks."""
    if kind == "fake":
        return FakeRig()
    if os.geteuid() != 0:
        pytest.skip("making memory cgroups needs root")
    version_1, version_2 = memory_mounts(MOUNTINFO.read_text())
    if kind == "cgroup1":
        if version_1 is None:
            pytest.skip("no version 1 memory controller is mounted on this machine")
        return CgroupRig(Cgroup1Backend(version_1 / random_root_name()), scratch)
    if version_2 is None:
        pytest.skip("no version 2 hierarchy is mounted on this machine")
    if "memory" not in (version_2 / "cgroup.controllers").read_text().split():
        pytest.skip("the memory controller of this machine is not in its version 2 hierarchy")
    return CgroupRig(Cgroup2Backend(version_2 / random_root_name()), scratch)
