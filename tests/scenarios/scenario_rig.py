"""Where an agent and its mock VMs live in one test, and what the kernel says of them."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from host_agent.agent import Agent
from host_agent.client import AgentClient
from host_agent.config import Config, HostConfig
from host_agent.demo.watch import LimitWatch
from host_agent.facade.port import VmSpec
from host_agent.guest import overhead_of
from host_agent.quota.detect import detect
from host_agent.service import running
from host_agent.workload_client import WorkloadClient, WorkloadError
from protocol.units import MIB, bytes_of

SLOWNESS = 6.0 if os.environ.get("MEMBALLOON_SLOW_MACHINE") else 1.0
PATIENCE_S = 20.0 * SLOWNESS
"""For what takes a second on an idle machine."""

LOOK_S = 0.01
RELEASES = (("memory.oom_control", "0"), ("memory.high", "max"), ("cgroup.freeze", "0"))

BALLOON = "from host_agent.cli import main; main()"
"""The command, whether or not it is on PATH."""


class Rig:
    """One agent's root cgroup and directories. Nothing exists before the agent makes it."""

    def __init__(self, cgroup_name: str) -> None:
        quotas = detect(cgroup_name)
        self.cgroup = quotas.root
        self.version = quotas.cgroup_version
        # A socket's path has 107 bytes, pytest's own directories are too deep for that.
        self.base = Path("/tmp") / f"mbs-{secrets.token_hex(3)}"
        self.base.mkdir()
        self.run_dir, self.state_dir = self.base / "run", self.base / "state"
        self.children: list[subprocess.Popen[str]] = []

    # The agent, in this process or as one of its own

    def config(self, pool_mib: int = 512, reserve_mib: int = 16, **changes: Any) -> Config:
        host = HostConfig(
            pool_bytes=pool_mib * MIB,
            reserve_bytes=reserve_mib * MIB,
            run_dir=self.run_dir,
            state_dir=self.state_dir,
            cgroup_root=self.cgroup.name,
            **changes,
        )
        return Config(host=host)

    @contextlib.asynccontextmanager
    async def agent(
        self, pool_mib: int = 512, reserve_mib: int = 16, **changes: Any
    ) -> AsyncIterator[Agent]:
        """A working agent; the books are compared with the kernel when the block ends."""
        async with running(self.config(pool_mib, reserve_mib, **changes)) as agent:
            yield agent
            await until(lambda: not self.differences(agent), lambda: self.differences(agent))

    def play(self, scenario: Callable[[], Awaitable[None]], deadline_s: float = 90.0) -> None:
        async def main() -> None:
            with trio.fail_after(deadline_s * SLOWNESS):
                await scenario()

        trio.run(main)

    def agent_process(
        self, pool_mib: int = 512, reserve_mib: int = 16, **keys: Any
    ) -> "subprocess.Popen[str]":
        """`balloon agent`, when it answers."""
        lines = [
            "[host]",
            f'pool = "{pool_mib}MiB"',
            f'reserve = "{reserve_mib}MiB"',
            f'run_dir = "{self.run_dir}"',
            f'state_dir = "{self.state_dir}"',
            f'cgroup_root = "{self.cgroup.name}"',
            *(f"{key} = {json.dumps(value)}" for key, value in keys.items()),
        ]
        path = self.base / "agent.toml"
        path.write_text("\n".join(lines) + "\n")
        child = self.balloon("agent", "--config", str(path))
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(Exception), self.client() as client:
                client.host()
                return child
            assert child.poll() is None, self.stderr()
            assert time.monotonic() < deadline_s, "the agent does not answer"
            time.sleep(0.05)

    def balloon(self, *arguments: str) -> "subprocess.Popen[str]":
        """The command as a process, which ends with the test."""
        child = subprocess.Popen(
            [sys.executable, "-c", BALLOON, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.stderr_path(len(self.children)).open("w"),
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.base)},
        )
        self.children.append(child)
        return child

    def stderr_path(self, number: int) -> Path:
        return self.base / f"stderr-{number}"

    def stderr(self) -> str:
        """What the command that was started last has said there."""
        return self.stderr_path(len(self.children) - 1).read_text()

    def client(self) -> AgentClient:
        return AgentClient(self.run_dir / "control.sock", answer_timeout_s=60.0)

    # What the kernel says

    def place(self, name: str) -> Path:
        """A VM's cgroup."""
        return self.cgroup / name

    def limit(self, name: str, part: str = ".") -> int:
        file = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        return int((self.place(name) / part / file).read_text())

    def usage(self, name: str, part: str) -> int:
        file = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.place(name) / part / file).read_text())

    def is_armed(self, name: str) -> bool:
        """A workload that runs dry is held, not killed in."""
        workload = self.place(name) / "workload"
        if self.version == 1:
            return "oom_kill_disable 1" in (workload / "memory.oom_control").read_text()
        return (workload / "memory.high").read_text() != "max\n"

    def quota(self, name: str, assigned_mib: int) -> int:
        """The VM's quota by its own limit."""
        return self.limit(name) - overhead_of(assigned_mib * MIB)

    def pids(self, name: str, part: str) -> list[int]:
        return [int(pid) for pid in (self.place(name) / part / "cgroup.procs").read_text().split()]

    def pid_of(self, name: str, program: str) -> int:
        """Host pid of the driver or the pseudo-process ("balloon") of a VM."""
        for pid in self.pids(name, "driver"):
            with contextlib.suppress(OSError):
                comm = Path(f"/proc/{pid}/comm").read_text().strip()
                command = Path(f"/proc/{pid}/cmdline").read_text()
                kind = (
                    "balloon"
                    if comm == "balloon"
                    else "driver"
                    if "guest_driver" in command
                    else ""
                )
                # Process 1 and its shells name the driver in their scripts, not as their program.
                if kind == program and not comm.startswith("sh"):
                    return pid
        raise LookupError(f"{name} has no {program} now")

    def watchdogs(self) -> list[int]:
        """Host pids of the watchdogs of this test's agents."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_text(errors="replace").split("\0")
                if str(self.cgroup) in words and any(
                    word.endswith("watchdog.py") for word in words
                ):
                    found.append(int(path.parent.name))
        return found

    def differences(self, agent: Agent) -> list[str]:
        """Where the books and the kernel don't agree; nothing when they do."""
        found = []
        ledger = agent.ledger
        ledger.check()
        total = 0
        for name, guest in agent.balancer.guests.items():
            if guest.quota is None:
                continue
            view = ledger.view(name)
            quota = self.limit(name) - guest.overhead_bytes
            total += max(quota, self.limit(name, "workload"))
            if quota != bytes_of(view.quota_pages):
                found.append(f"{name}: kernel {quota / MIB} MiB, ledger {view.quota_pages / 256}")
            workload = self.limit(name, "workload")
            if workload != bytes_of(view.workload_pages):
                found.append(f"{name}: W {workload / MIB} MiB, ledger {view.workload_pages / 256}")
        pool_pages = ledger.pool_pages + ledger.overdrawn_pages
        if total + bytes_of(ledger.reserve_left_pages) > bytes_of(pool_pages):
            found.append(f"the limits come to {total / MIB} MiB and exceed the pool")
        return found

    @contextlib.asynccontextmanager
    async def watched(self, agent: Agent, assigned_mib: int) -> AsyncIterator[LimitWatch]:
        """The kernel's own sum of all limits, sampled for as long as the block runs."""
        watch = LimitWatch(self.cgroup, overhead_of(assigned_mib * MIB))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            yield watch
            nursery.cancel_scope.cancel()
        assert watch.samples > 10
        assert watch.highest_bytes <= bytes_of(agent.ledger.pool_pages)

    # The end

    def processes(self) -> set[int]:
        found: set[int] = set()
        for path in self.cgroup.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= set(map(int, path.read_text().split()))
        return found

    def leftovers(self) -> list[str]:
        """Everything that should be gone when no VM is meant to run any more."""
        found = [f"process {pid}" for pid in self.processes()]
        found += [f"process {command}" for command in self._commands()]
        if self.cgroup.exists():
            found.append(f"cgroup {self.cgroup}")
        mounts = Path("/proc/self/mountinfo").read_text()
        if str(self.base) in mounts:
            found.append("a mount")
        for path in self._things():
            found.append(f"file {path}")
        return found

    def _commands(self) -> Iterator[str]:
        """Command lines that name this test's places: agents and watchdogs among them."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = path.read_text(errors="replace").replace("\0", " ")
                if str(self.base) in command or str(self.cgroup) in command:
                    yield command

    def _things(self) -> Iterator[Path]:
        """Sockets, disks and logs of VMs, and the temporary directories of commands."""
        for pattern in ("run/*.sock", "run/guests/*", "state/disks/*", "state/logs/*"):
            yield from self.base.glob(pattern)
        yield from self.base.glob("memballoon-*")

    def assert_nothing_left(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while left := self.leftovers():
            assert time.monotonic() < deadline_s, left
            time.sleep(0.02)

    def take_down(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        deadline_s = time.monotonic() + PATIENCE_S
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for file, value in RELEASES:
                for path in self.cgroup.rglob(file):
                    with contextlib.suppress(OSError):
                        path.write_text(value)
            assert time.monotonic() < deadline_s, left
            time.sleep(0.02)
        while self.cgroup.exists() and time.monotonic() < deadline_s:
            for path in sorted(self.cgroup.rglob("*"), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                self.cgroup.rmdir()
            time.sleep(0.02)
        shutil.rmtree(self.base, ignore_errors=True)


def spec(name: str, mib: int = 128, **changes: Any) -> VmSpec:
    """A mock VM of so many MiB with the workload, idle."""
    return VmSpec.model_validate({"name": name, "assigned_bytes": mib * MIB, **changes})


def workload(agent: Agent, name: str) -> WorkloadClient:
    return WorkloadClient(agent.places.disk_dir(name) / "workload.sock")


async def appetite(client: WorkloadClient, anon_mib: int, cache_mib: int = 0) -> None:
    """Set what a workload wants, once it listens."""
    deadline_s = trio.current_time() + PATIENCE_S
    while True:
        try:
            await client.set(anon_bytes=anon_mib * MIB, cache_bytes=cache_mib * MIB)
        except WorkloadError:
            assert trio.current_time() < deadline_s, "the workload does not answer"
            await trio.sleep(LOOK_S)
        else:
            return


async def touched(client: WorkloadClient, anon_mib: int) -> None:
    """Until it really holds so much."""
    with trio.fail_after(PATIENCE_S):
        while (await client.stats())["anon"]["touched_bytes"] < anon_mib * MIB:
            await trio.sleep(LOOK_S)


async def until(
    predicate: Callable[[], object],
    what: str | Callable[[], object],
    deadline_s: float = PATIENCE_S,
) -> None:
    """Wait for what other processes and the kernel do."""
    with trio.move_on_after(deadline_s):
        while not predicate():
            await trio.sleep(LOOK_S)
        return
    raise AssertionError(f"waited in vain for: {what() if callable(what) else what}")


def until_blocking(
    predicate: Callable[[], object], what: str, timeout_s: float = PATIENCE_S
) -> None:
    """The same where no event loop runs."""
    end_s = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < end_s, f"waited in vain for: {what}"
        time.sleep(LOOK_S)
