"""Drivers forked from the template: what one has, who pays for it, and what if there is none."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trio
from machine_rig import SLOWNESS, MachineRig, until

from host_agent.audit.kernel_pages import kernel_pages, plan_reads
from host_agent.guest_command import guest_python
from host_agent.machines import driver_template
from host_agent.machines.base import MachineSpec
from host_agent.machines.driver_template import DriverTemplate
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.process import ProcessBackend
from protocol.units import PAGE_BYTES

pytestmark = pytest.mark.effects

TEMPLATE = guest_python("guest_driver.template")
NO_TEMPLATE = ("sh", "-c", "exit 3")
NAMESPACES = ("mnt", "pid", "pid_for_children", "ipc", "uts", "net", "user", "cgroup")
RIGHTS = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Umask")
CAPABILITIES = ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")

ANONYMOUS_AND_ALONE = np.uint64(1 << 63 | 1 << 56)
FILE_OR_SHARED = np.uint64(1 << 61)
PFN_BITS = np.uint64((1 << 55) - 1)
"""Of an entry of /proc/PID/pagemap: Documentation/admin-guide/mm/pagemap.rst."""


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(120 * SLOWNESS):
            await scenario()

    trio.run(main)


@asynccontextmanager
async def template_of(
    rig: MachineRig, command: tuple[str, ...] = TEMPLATE
) -> AsyncIterator[DriverTemplate]:
    """A template that the rig's drivers are forked from."""
    template = DriverTemplate(command)
    rig.backend = ProcessBackend(hidden_dirs=(rig.base / "state",), template=template)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(template.run)
        yield template
        nursery.cancel_scope.cancel()


def driven(
    rig: MachineRig,
    *command: str,
    name: str = "vm1",
    forkable: bool = True,
) -> MachineSpec:
    """A mock VM with a real driver, whose channel nobody answers."""
    arguments = (
        *("driver", f"--socket={rig.run_dir}/channel.sock", "--cgroup=/sys/fs/cgroup"),
        "--assigned-pages=4096",
    )
    return rig.spec(
        *(command or ("sleep", "60")),
        name=name,
        driver_argv=guest_python("guest_driver.cli", *arguments),
        driver_arguments=arguments if forkable else (),
    )


def has_children(pid: int) -> bool:
    """Zombies among them."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())


async def driver_of(spec: MachineSpec) -> tuple[int, int]:
    """Host pids of a VM's driver and pseudo-process, once its event loop runs."""
    found: list[tuple[int, int]] = []

    def runs() -> bool:
        for pid in map(int, spec.driver_procs.read_text().split()):
            with contextlib.suppress(OSError):  # one that was on its way
                if status(pid)["Name"] == "balloon":
                    driver = parent(pid)
                    if "anon_inode:[eventpoll]" in links(driver).values():
                        found.append((driver, pid))
        return bool(found)

    await until(runs, "the driver runs")
    return found[0]


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs}


def links(pid: int) -> dict[int, str]:
    """Where each open descriptor leads."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def other_files(pid: int) -> list[str]:
    """Open files, pipes and directories; no sockets, epoll and the like."""
    return [link for fd, link in links(pid).items() if fd > 2 and link.startswith(("/", "pipe:"))]


def parent(pid: int) -> int:
    return int(status(pid)["PPid"])


def sockets(pid: int) -> int:
    return sum("socket" in link for link in links(pid).values())


def is_forked(pid: int) -> bool:
    return b"guest_driver.template" in Path(f"/proc/{pid}/cmdline").read_bytes()


def what_it_has(pid: int, init_pid: int) -> dict[str, object]:
    """What a process is to the kernel, as far as it is the same in each mock VM."""
    process = Path(f"/proc/{pid}")
    environment = (process / "environ").read_text().split("\0")
    return {
        "rights": {name: status(pid)[name] for name in RIGHTS + CAPABILITIES},
        "limits": (process / "limits").read_text(),
        "oom_score_adj": (process / "oom_score_adj").read_text(),
        "environment": {line for line in environment if line and "PWD=" not in line},
        "directory": os.readlink(process / "cwd"),
        "tree": os.stat(process / "root" / "tmp").st_ino
        == os.stat(f"/proc/{init_pid}/root/tmp").st_ino,
        "standard": [links(pid)[fd].rpartition("/")[0] for fd in range(3)],
        "not its init's": [
            name
            for name in NAMESPACES
            if os.readlink(process / "ns" / name) != os.readlink(f"/proc/{init_pid}/ns/{name}")
        ],
    }


def test_it_has_what_a_started_one_has(rig: MachineRig) -> None:
    async def scenario() -> None:
        has = []
        async with template_of(rig):
            for forkable in (True, False):
                spec = driven(rig, forkable=forkable)
                async with rig.running(spec) as machine:
                    driver, balloon = await driver_of(spec)
                    assert is_forked(driver) == forkable
                    has.append([what_it_has(pid, machine.init_pid) for pid in (driver, balloon)])
                    # It opens the guest's statistics now and then, and holds none of them.
                    await until(lambda: not other_files(driver), "its files to be closed")  # noqa: B023
                    assert other_files(balloon) == []
                    # Nor more sockets for good: it tries to connect now and then.
                    await until(lambda: sockets(driver) <= 6, "its attempt to end")  # noqa: B023
                    # Its init reaps it, as it does with whatever the init starts.
                    if forkable:
                        await until(lambda: parent(driver) == machine.init_pid, "its adoption")  # noqa: B023
        assert has[0] == has[1]
        assert has[0][0]["not its init's"] == []

    play(scenario)


def test_the_guests_root_can_not_get_at_it(rig: MachineRig) -> None:
    # It maps the host's Python through mounts that are not read-only.
    script = (
        "import ctypes, os, sys, time\n"
        "names = {}\n"
        "while not {'balloon', 'balloon-driver'} <= set(names.values()):\n"
        "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        try: names[pid] = open(f'/proc/{pid}/comm').read().strip()\n"
        "        except OSError: pass\n"
        "    time.sleep(0.01)\n"
        "def tried(what, *arguments):\n"
        "    try: return what(*arguments)\n"
        "    except OSError as error: return type(error).__name__\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for pid, name in names.items():\n"
        "    if name.startswith('balloon'):\n"
        "        print(name, *(tried(os.open, f'/proc/{pid}/{file}', os.O_RDONLY)\n"
        "            for file in ('exe', 'mem', 'root', 'fd/2', 'environ', 'maps')),\n"
        "            libc.ptrace(16, int(pid), None, None))\n"
        "print('done')\n"
    )

    async def scenario() -> None:
        async with template_of(rig):
            spec = driven(rig, sys.executable, "-S", "-c", script)
            machine = await rig.backend.launch(spec)
            await machine.wait_exited()
            lines = spec.log_path.read_text().splitlines()
            refused = " PermissionError" * 6 + " -1"
            assert {line.partition(" ")[0]: line for line in lines} == {
                "balloon": f"balloon{refused}",
                "balloon-driver": f"balloon-driver{refused}",
                "done": "done",
            }

    play(scenario)


def own_pages(pid: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Page frame numbers of the anonymous memory that nobody else maps."""
    found = []
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(part, 16) // PAGE_BYTES for part in line.split()[0].split("-"))
            if "vsyscall" in line:
                continue
            pagemap.seek(start * 8)
            entries = np.frombuffer(pagemap.read((end - start) * 8), np.uint64)
            alone = entries & (ANONYMOUS_AND_ALONE | FILE_OR_SHARED) == ANONYMOUS_AND_ALONE
            found.append(entries[alone] & PFN_BITS)
    return np.sort(np.concatenate(found)).astype(np.int64)


def test_what_it_does_not_share_its_guest_pays_for(rig: MachineRig) -> None:
    async def scenario() -> None:
        async with template_of(rig):
            spec = driven(rig)
            async with rig.running(spec):
                driver_cgroup = spec.driver_procs.parent.stat().st_ino
                for pid in await driver_of(spec):
                    payers = kernel_pages().cgroup_inodes(plan_reads(own_pages(pid)))
                    assert payers.size > 100
                    # Where the template writes it gets a copy: the original becomes a driver's.
                    assert np.count_nonzero(payers == driver_cgroup) > 0.8 * payers.size

    play(scenario)


def test_it_ends_with_its_guest_and_another_one_comes_if_it_is_killed(rig: MachineRig) -> None:
    async def scenario() -> None:
        async with template_of(rig):
            spec = driven(rig)
            async with rig.running(spec):
                first, _ = await driver_of(spec)
                os.kill(first, signal.SIGKILL)
                await until(lambda: not Path(f"/proc/{first}").exists(), "its end")
                second, _ = await driver_of(spec)
                assert not is_forked(second)
                log = spec.log_path.read_text()
                assert log == "memballoon: the driver ended, another one in 1 s\n"
            assert not rig.processes()

    play(scenario)


def test_a_template_that_is_killed_takes_no_driver_along_and_is_started_again(
    rig: MachineRig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = DriverTemplate._live
    may_live = trio.Event()
    may_live.set()

    async def live_when_it_may(template: DriverTemplate) -> None:
        await may_live.wait()
        await live(template)

    monkeypatch.setattr(DriverTemplate, "_live", live_when_it_may)

    async def scenario() -> None:
        nonlocal may_live
        async with template_of(rig) as template:
            one = driven(rig, name="one")
            async with rig.running(one):
                forked, _ = await driver_of(one)
                pid = template.pid
                assert pid is not None
                may_live = trio.Event()
                os.kill(pid, signal.SIGKILL)
                await until(lambda: template.pid is None, "its end")
                two = driven(rig, name="two")
                async with rig.running(two):  # while there is none
                    started, _ = await driver_of(two)
                    assert not is_forked(started)
                may_live.set()
                await until(lambda: template.pid is not None, "another template")
                three = driven(rig, name="three")
                async with rig.running(three):
                    assert is_forked((await driver_of(three))[0])
                assert await driver_of(one) == (forked, (await driver_of(one))[1])

    play(scenario)
    assert caplog.messages == [
        "no driver template (it ended): drivers start by themselves, slower",
    ]


def test_without_a_template_it_is_started_and_that_is_said_once(
    rig: MachineRig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_template, "FIRST_PAUSE_S", 0.01)

    async def scenario() -> None:
        async with template_of(rig, NO_TEMPLATE):
            spec = driven(rig)
            async with rig.running(spec):
                assert not is_forked((await driver_of(spec))[0])

    play(scenario)
    assert caplog.messages == [
        "no driver template (it ended): drivers start by themselves, slower",
    ]


def test_one_that_does_not_answer_is_given_up(
    rig: MachineRig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with template_of(rig) as template:
            async with rig.running(driven(rig, name="one")):
                pid = template.pid  # it has answered
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            monkeypatch.setattr(driver_template, "ANSWER_DEADLINE_S", 0.1)
            two = driven(rig, name="two")
            async with rig.running(two):
                assert not is_forked((await driver_of(two))[0])
            await until(lambda: template.pid not in (None, pid), "another one")
            assert template.pid is not None
            os.kill(template.pid, signal.SIGSTOP)  # which keeps nobody from ending it

    play(scenario)
    assert "the driver template has not answered in 0.1 s" in caplog.messages


def test_one_that_ends_at_once_is_started_instead(rig: MachineRig) -> None:
    async def scenario() -> None:
        async with template_of(rig):
            spec = replace(driven(rig), driver_arguments=("driver", "--nonsense=1"))
            async with rig.running(spec):
                assert not is_forked((await driver_of(spec))[0])
                assert "balloon-guest: bad or missing option" in spec.log_path.read_text()

    play(scenario)


def log_of_a_driver_for(rig: MachineRig, init: ProcessHandle, procs: Path) -> str:
    """What is said when a driver is to be forked into a process's namespaces and a cgroup."""
    log_path = rig.base / "driver.log"

    async def scenario() -> None:
        async with template_of(rig) as template:
            template.want()
            await until(lambda: template.pid is not None, "the template")
            ours, theirs = socket.socketpair()
            with ours, theirs:
                assert await template.fork(("driver",), init, procs, log_path, theirs)
                theirs.close()
                assert await trio.to_thread.run_sync(ours.recv, 1) == b""

    play(scenario)
    return log_path.read_text()


def test_nothing_is_said_of_a_guest_that_has_ended(rig: MachineRig) -> None:
    child = subprocess.Popen(["true"])
    init = ProcessHandle.of(child.pid)
    child.wait()
    assert log_of_a_driver_for(rig, init, driven(rig).driver_procs) == ""
    init.close()


def test_why_one_can_not_be_forked_is_in_its_log(rig: MachineRig) -> None:
    ourselves = ProcessHandle.of(os.getpid())
    assert log_of_a_driver_for(rig, ourselves, Path("/dev/full")) == (
        "balloon-guest: the driver can't be forked: [Errno 28] No space left on device\n"
    )
    ourselves.close()


@pytest.mark.parametrize("delay_ms", [10, 20, 30])
def test_a_cancelled_launch_leaves_nothing(rig: MachineRig, delay_ms: int) -> None:
    async def scenario() -> None:
        async with template_of(rig):
            async with rig.running(driven(rig, name="first")):
                pass  # the template has imported all
            with trio.move_on_after(delay_ms / 1000):
                machine = await rig.backend.launch(driven(rig))
                with trio.CancelScope(shield=True):
                    await machine.stop(0)
            await until(lambda: not rig.processes(), "the last one's end")

    play(scenario)


def test_many_at_once(rig: MachineRig) -> None:
    async def scenario() -> None:
        async with template_of(rig) as template:
            specs = [driven(rig, name=f"vm{number}") for number in range(5)]
            async with contextlib.AsyncExitStack() as machines, trio.open_nursery() as nursery:

                async def launch(spec: MachineSpec) -> None:
                    await machines.enter_async_context(rig.running(spec))
                    assert is_forked((await driver_of(spec))[0])

                for spec in specs:
                    nursery.start_soon(launch, spec)
            assert template.pid is not None
            await until(lambda: not has_children(template.pid or 0), "nothing of them to be left")

    play(scenario)
