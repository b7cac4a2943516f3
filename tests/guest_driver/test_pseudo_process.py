"""The pseudo-process as its driver and the kernel see it: commands, states, rights, ends."""

import errno
import os
import posix
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_pages import MLOCKED, all_have, flags, present, require_root, unshared_kib, wait_until

from guest_driver import pseudo_process
from guest_driver.memory import ArenaError
from guest_driver.pseudo_process import (
    CLAIMED,
    COMMAND,
    FREE,
    RELEASE,
    REPLY,
    RESERVE,
    RESERVED,
    PseudoProcess,
)
from protocol.page_frames import PageFrames
from protocol.units import GIB, PAGE_BYTES

PAGES = 4096
ROOT = str(Path(pseudo_process.__file__).parent.parent)
IDLE_USS_LIMIT_KIB = 2048
USS_AFTER_IMPORTS_LIMIT_KIB = 6144

DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from guest_driver import pseudo_process
process = pseudo_process.start(int(sys.argv[2]), 0)
print(process.pid, flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""

FORK_A_KEEPER = (
    "import os, time; pid = os.fork(); pid or (time.sleep(60), os._exit(0)); print(pid)\n"
)

WITHOUT_RIGHTS = """
import ctypes, os, resource, sys
sys.path.insert(0, sys.argv[1])
from guest_driver import pseudo_process
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as if started by that user
try:
    pseudo_process.start(4096, 0)
except pseudo_process.ArenaError as error:
    print(error)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left")
"""


@pytest.fixture
def started() -> Iterator[Callable[..., PseudoProcess]]:
    require_root()
    processes: list[PseudoProcess] = []

    def make(pages: int = PAGES, order: int = 0) -> PseudoProcess:
        processes.append(pseudo_process.start(pages, order))
        return processes[-1]

    yield make
    for process in processes:
        process.stop()


@pytest.fixture
def drivers() -> Iterator[Callable[[int], "subprocess.Popen[str]"]]:
    require_root()
    running: list[subprocess.Popen[str]] = []

    def make(pages: int = PAGES) -> "subprocess.Popen[str]":
        command = [sys.executable, "-OO", "-c", DRIVER, ROOT, str(pages)]
        driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(driver)
        return driver

    yield make
    for driver in running:
        driver.kill()
        driver.communicate()


def ask(
    process: PseudoProcess, operation: int, frames: PageFrames, state: int = 0, request_id: int = 1
) -> tuple[int, int]:
    """Errno and pages of the answer to one command."""
    header = COMMAND.pack(request_id, operation, state)
    process.connection.send(header + frames.to_wire())
    answered_id, code, pages, busy_s = REPLY.unpack(process.connection.recv(REPLY.size))
    assert answered_id == request_id
    assert busy_s >= 0
    return code, pages


def present_in(process: PseudoProcess) -> PageFrames:
    return present(process.pid, process.arena_address, process.arena_pages)


def test_impossible_arenas_are_refused() -> None:
    for pages, order in ((0, 0), (-5, 0), (512, 3)):
        with pytest.raises((ValueError, ArenaError), match=r"pages|order"):
            pseudo_process.start(pages, order)


def test_a_reply_waits_for_a_message_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a cgroup at its limit does to a Unix socket; there it can't be had on demand.
    refusals = [errno.ENOBUFS, errno.ENOBUFS]
    write = os.write

    def write_or_refuse(fd: int, data: bytes) -> int:
        if refusals:
            raise OSError(refusals.pop(), "refused")
        return write(fd, data)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        monkeypatch.setattr(posix, "write", write_or_refuse)
        pseudo_process._answer(theirs.fileno(), b"reply")
        assert ours.recv(64) == b"reply"
        refusals.append(errno.EIO)
        with pytest.raises(OSError, match="refused"):
            pseudo_process._answer(theirs.fileno(), b"reply")


def test_only_the_main_thread_may_fork_it() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main"):
        pool.submit(pseudo_process.start, PAGES, 0).result()


@pytest.mark.effects
class TestCommands:
    @pytest.mark.parametrize("order", [0, 9])
    def test_frames_come_and_go(self, started: Callable[..., PseudoProcess], order: int) -> None:
        process = started(PAGES, order)
        frames = PageFrames.from_ranges([512, 2048], [1024, 512])
        claimed = PageFrames.from_ranges([512, 2048], [512, 512])
        assert ask(process, RESERVE, frames) == (0, 1536)
        assert present_in(process) == frames
        assert process.states[:] == bytes(512) + b"\1" * 1024 + bytes(512) + b"\1" * 512 + bytes(
            PAGES - 2560
        )
        assert ask(process, RELEASE, claimed, CLAIMED) == (0, 1024)
        assert present_in(process) == PageFrames.span(1024, 512)
        assert {process.states[512], process.states[2559]} == {CLAIMED}
        assert {process.states[1024], process.states[1535]} == {RESERVED}
        assert ask(process, RELEASE, PageFrames.span(1024, 512), FREE) == (0, 512)
        assert not present_in(process)
        assert process.states[1024:1536] == bytes(512)

    def test_reserved_frames_are_locked(self, started: Callable[..., PseudoProcess]) -> None:
        process = started()
        frames = PageFrames.span(7, 300)
        ask(process, RESERVE, frames)
        assert all_have(flags(process.pid, process.arena_address, frames), MLOCKED)

    def test_both_workers_answer_many_commands(self, started: Callable[..., PseudoProcess]) -> None:
        process = started()
        for number in range(64):
            command = COMMAND.pack(number, RESERVE, 0) + PageFrames.span(number * 64, 33).to_wire()
            process.connection.send(command)
        replies = [REPLY.unpack(process.connection.recv(REPLY.size)) for _ in range(64)]
        assert {reply[0] for reply in replies} == set(range(64))
        assert {reply[1:3] for reply in replies} == {(0, 33)}
        assert present_in(process).page_count == 64 * 33

    def test_a_command_outside_the_arena_ends_it(
        self, started: Callable[..., PseudoProcess], capfd: pytest.CaptureFixture[str]
    ) -> None:
        process = started()
        command = COMMAND.pack(1, RESERVE, 0) + PageFrames.span(PAGES - 1, 2).to_wire()
        process.connection.send(command)
        assert process.connection.recv(REPLY.size) == b""
        assert process.reap() == 1
        assert "leave the arena" in capfd.readouterr().err


@pytest.mark.effects
class TestProcess:
    def test_how_it_looks(self, started: Callable[..., PseudoProcess]) -> None:
        process = started()
        proc = Path(f"/proc/{process.pid}")
        assert (proc / "comm").read_text() == "balloon\n"
        assert (proc / "oom_score_adj").read_text() == "1000\n"
        assert sorted(int(fd.name) for fd in (proc / "fd").iterdir()) == [0, 1, 2, 3]
        wait_until(
            lambda: len(list((proc / "task").iterdir())) == pseudo_process.WORKERS, "both workers"
        )

    def test_sigint_is_the_drivers_business(self, started: Callable[..., PseudoProcess]) -> None:
        process = started()
        os.kill(process.pid, signal.SIGINT)
        assert ask(process, RESERVE, PageFrames.span(0, 1)) == (0, 1)

    def test_it_ends_when_the_driver_hangs_up(self, started: Callable[..., PseudoProcess]) -> None:
        process = started()
        process.connection.close()
        assert process.reap() == 0

    def test_stop_leaves_nothing(self, started: Callable[..., PseudoProcess]) -> None:
        process = started()
        process.stop()
        process.stop()
        assert process.exit_code == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)

    def test_it_dies_with_its_driver(self, drivers: Callable[..., "subprocess.Popen[str]"]) -> None:
        driver = drivers()
        assert driver.stdin
        assert driver.stdout
        pidfd = os.pidfd_open(int(driver.stdout.readline()))
        # A second child keeps the driver's end of the connection open, so that no end of file
        # tells the pseudo-process: only the kernel's signal can.
        driver.stdin.write(FORK_A_KEEPER)
        driver.stdin.flush()
        keeper_pid = int(driver.stdout.readline())
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            assert not poller.poll(0)
            driver.send_signal(signal.SIGKILL)
            assert poller.poll(20_000), "the pseudo-process outlives its driver"
        finally:
            os.kill(keeper_pid, signal.SIGKILL)
            os.close(pidfd)

    def test_without_the_right_to_lock(self) -> None:
        require_root()
        run = subprocess.run(
            [sys.executable, "-OO", "-c", WITHOUT_RIGHTS, ROOT],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        message, last = run.stdout.splitlines()
        assert "refuses to lock 16384 KiB" in message
        assert "CAP_IPC_LOCK" in message
        assert "now 64 KiB" in message
        assert last == "no child is left"

    def test_its_own_memory(
        self,
        drivers: Callable[..., "subprocess.Popen[str]"],
        record_property: Callable[[str, object], None],
    ) -> None:
        driver = drivers(GIB // PAGE_BYTES)
        assert driver.stdin
        assert driver.stdout
        pid = int(driver.stdout.readline())
        idle_kib = unshared_kib(pid)
        driver.stdin.write("import trio, numpy, msgpack\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "done\n"
        later_kib = unshared_kib(pid)
        print(f"pseudo-process, idle arena of 1 GiB: {idle_kib} KiB of its own; {later_kib} KiB")
        print(
            "once its driver has imported trio and numpy (the fork's pages, copied by the driver)"
        )
        record_property("idle_kib", idle_kib)
        record_property("later_kib", later_kib)
        assert idle_kib < IDLE_USS_LIMIT_KIB
        assert later_kib < USS_AFTER_IMPORTS_LIMIT_KIB
