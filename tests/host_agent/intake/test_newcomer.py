"""A container's process that knocks: who it is for the kernel, and that no other one is moved."""

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from host_agent.balance import Balancer
from host_agent.blocking import Threads
from host_agent.facade.port import VmSpec
from host_agent.guest import Guest
from host_agent.intake import reception
from host_agent.intake.listener import guest_socket, peer_pid, peer_process
from host_agent.intake.newcomer import make_driver, memory_cgroup_of
from host_agent.ledger.ledger import Ledger
from host_agent.machines.identity import ProcessHandle, parent_of
from host_agent.policy.shares import Shares
from host_agent.quota.base import Part
from host_agent.quota.detect import detect
from protocol.units import MIB


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("4:memory:/docker/abc\n3:cpu,cpuacct:/x\n0::/y\n", "/docker/abc"),
        ("0::/y\n4:cpu,memory:/m/web1/workload/abc\n", "/m/web1/workload/abc"),
        ("0::/system.slice/docker-abc.scope\n", "/system.slice/docker-abc.scope"),
        ("1:name=systemd:/x\n0::/with:colon\n", "/with:colon"),
        ("1:name=systemd:/x\n", None),
        ("", None),
        ("nonsense\n", None),
    ],
)
def test_a_memory_cgroup_of_either_version(text: str, place: str | None) -> None:
    assert memory_cgroup_of(text) == place


KNOCK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as knocking:
    knocking.connect(sys.argv[1])
    knocking.recv(1)
"""


class Dying(ProcessHandle):
    """One that ends, and whose number is another's, while it is being moved."""

    lives = 1

    def is_alive(self) -> bool:
        self.lives -= 1
        return self.lives >= 0


class Place:
    """A VM for somebody's container, and processes in its workload."""

    def __init__(self, name: str) -> None:
        self._backend = detect(name)
        self._backend.prepare()
        self.guest = Guest(VmSpec(name="web1", assigned_bytes=64 * MIB, container="somebodys"))
        self.guest.quota = self._backend.create("web1", 64 * MIB, 40 * MIB)
        self.children: list[subprocess.Popen[bytes]] = []

    def process(self, part: Part | None = Part.WORKLOAD) -> int:
        """A new one, in this part or in none."""
        child = subprocess.Popen(["sleep", "1000"])
        self.children.append(child)
        if part is not None:
            self.guest.live_quota.procs_path(part).write_text(str(child.pid))
        return child.pid

    def in_driver(self) -> tuple[int, ...]:
        return self.guest.live_quota.processes(Part.DRIVER)

    def take_down(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        quota = self.guest.live_quota
        quota.kill_all()
        quota.remove()
        self._backend.remove_root()


@pytest.fixture
def place(cgroup_name: str) -> Iterator[Place]:
    made = Place(cgroup_name)
    try:
        yield made
    finally:
        made.take_down()


@pytest.mark.effects
def test_who_knocks_is_moved(place: Place) -> None:
    pid = place.process()
    process = ProcessHandle.of(pid)
    make_driver(place.guest, process)
    assert place.in_driver() == (pid,)
    process.close()


@pytest.mark.effects
@pytest.mark.parametrize("where", [Part.WORKLOAD, None])
def test_a_number_that_is_anothers_now_is_not_moved(place: Place, where: Part | None) -> None:
    knocked = ProcessHandle.of(place.process())
    place.children[0].kill()
    place.children[0].wait()
    knocked.pid = place.process(where)
    with pytest.raises(ProcessLookupError, match=f"pid {knocked.pid} of its container has ended"):
        make_driver(place.guest, knocked)
    assert place.in_driver() == ()
    knocked.close()


@pytest.mark.effects
def test_a_process_that_left_the_workload_is_not_moved(place: Place) -> None:
    knocked = ProcessHandle.of(place.process(None))
    with pytest.raises(ProcessLookupError):
        make_driver(place.guest, knocked)
    assert place.in_driver() == ()
    knocked.close()


@pytest.mark.effects
def test_a_number_that_changes_hands_in_between_is_put_back(place: Place) -> None:
    pid = place.process()
    process = Dying.of(pid)
    with pytest.raises(ProcessLookupError):
        make_driver(place.guest, process)
    assert place.in_driver() == ()
    ours = memory_cgroup_of(Path("/proc/self/cgroup").read_text())
    assert memory_cgroup_of(Path(f"/proc/{pid}/cgroup").read_text()) == ours
    process.close()


def test_a_parent() -> None:
    assert parent_of(os.getpid()) == os.getppid()
    with pytest.raises(ProcessLookupError):
        parent_of(2**22 + 1)


def test_the_process_that_connected_is_held(tmp_path: Path) -> None:
    async def main() -> None:
        async with guest_socket(tmp_path) as listener:
            command = (sys.executable, "-c", KNOCK, str(tmp_path / "channel.sock"))
            child = await trio.lowlevel.open_process(command)
            with trio.fail_after(60):
                async with await listener.accept() as stream:
                    assert peer_pid(stream) == child.pid
                    process = peer_process(stream, child.pid)
                    assert (process.pid, process.is_alive()) == (child.pid, True)
                    child.kill()
                    await child.wait()
                    assert not process.is_alive()
                    process.close()
                    with pytest.raises(ProcessLookupError):
                        peer_process(stream, child.pid)

    trio.run(main)


def test_a_kernel_that_says_it_has_ended() -> None:
    class Ended:
        def getsockopt(self, *_: int) -> bytes:
            raise OSError(errno.EINVAL, "")

    with pytest.raises(ProcessLookupError):
        peer_process(Ended(), os.getpid())  # type: ignore[arg-type]


def test_a_number_is_not_who_connected(tmp_path: Path) -> None:
    """Another process has the number of the one that connected and ended."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            os.close(probe.getsockopt(socket.SOL_SOCKET, 77))
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                pytest.skip("a kernel before 6.5 remembers no more than the number")

    async def main() -> None:
        async with guest_socket(tmp_path) as listener:
            command = (sys.executable, "-c", KNOCK, str(tmp_path / "channel.sock"))
            child = await trio.lowlevel.open_process(command)
            with trio.fail_after(60):
                async with await listener.accept() as stream:
                    child.kill()
                    await child.wait()
                    with pytest.raises(ProcessLookupError):
                        peer_process(stream, os.getpid())

    trio.run(main)


def test_a_process_is_held_for_as_long_as_it_is_being_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer than anybody waits for it; after that it is let go."""
    began, may_go_on, closed = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def slow_make_driver(_guest: Guest, process: ProcessHandle) -> None:
        began.set()
        assert may_go_on.wait(60)
        assert not closed.is_set()
        seen.append(process.is_alive())

    close = ProcessHandle.close

    def closing(process: ProcessHandle) -> None:
        close(process)
        closed.set()

    monkeypatch.setattr(reception, "may_become_driver", lambda *_: True)
    monkeypatch.setattr(reception, "make_driver", slow_make_driver)
    monkeypatch.setattr(ProcessHandle, "close", closing)
    clock = trio.testing.MockClock()
    guest = Guest(VmSpec(name="web1", assigned_bytes=64 * MIB, container="somebodys"))
    host = reception.Reception(Balancer(Ledger(1, 0), Shares(), interval_s=1.0), Threads())

    async def main() -> None:
        async with guest_socket(tmp_path) as listener:
            stays = f"{KNOCK}\nimport signal\nsignal.pause()"
            command = (sys.executable, "-c", stays, str(tmp_path / "channel.sock"))
            child = await trio.lowlevel.open_process(command)
            try:
                async with await listener.accept() as stream, trio.open_nursery() as nursery:
                    nursery.start_soon(host._meet, guest, stream, child.pid)
                    assert await trio.to_thread.run_sync(began.wait, 60)
                    clock.jump(reception.OPEN_DEADLINE_S + 1)
                may_go_on.set()
                assert await trio.to_thread.run_sync(closed.wait, 60)
            finally:
                may_go_on.set()
                child.kill()
                await child.wait()

    trio.run(main, clock=clock)
    assert seen == [True]
    assert "can't be put into its cgroup: no end after 20 s" in caplog.text
