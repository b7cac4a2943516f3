"""The watchdog with real hung guests: whatever happens to the agent, nobody stays hung."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio

from host_agent import watchdog, watchdog_client
from host_agent.quota.base import QuotaBackend, VmQuota
from host_agent.quota.cgroup_tree import kill_below, remove_tree, subtree
from host_agent.quota.detect import detect
from host_agent.quota.errors import QuotaUnavailable
from host_agent.sole_owner import sole_owner
from host_agent.watchdog_client import WATCHDOG_FILE, Watchdog, WatchdogLost
from protocol.units import MIB

DEADLINE_S = 60.0 if os.environ.get("MEMBALLOON_SLOW_MACHINE") else 20.0
GRACE_S = "0.3"
RELEASES = (("memory.oom_control", "0"), ("memory.high", "max"), ("cgroup.freeze", "0"))

HOLD = """
import mmap, signal
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for offset in range(0, len(memory), 4096):
    memory[offset] = 1
signal.pause()
"""

# An agent of which nothing matters but that it beats, and how it ends.
AGENT = """
import subprocess, sys, time
dog = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)
print(dog.pid, flush=True)
while True:
    dog.stdin.write(b"\\n")
    dog.stdin.flush()
    time.sleep(0.05)
"""


def wait_for(predicate: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not predicate():
        assert time.monotonic() < end_s, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.01)


class Signs:
    """Of life that this process gives, and the longest time that anybody may have missed them."""

    def __init__(self) -> None:
        self.longest_gap_s = 0.0
        self._before_s = time.monotonic()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Around one sign: the gap ends when it has been given."""
        before_s = time.monotonic()
        yield
        self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - self._before_s)
        self._before_s = before_s


def is_left_alone(attempt: Callable[[], tuple[bool, Signs]], grace_s: float) -> None:
    """Nothing is done to an agent that is never late; where this one was late, it tries again."""

    def was_on_time() -> bool:
        left_alone, signs = attempt()
        assert left_alone or signs.longest_gap_s >= grace_s
        return signs.longest_gap_s < grace_s

    wait_for(was_on_time, "an attempt without a stall of this machine")


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class House:
    """A root with one VM, its processes, and the processes of the test."""

    def __init__(self, backend: QuotaBackend) -> None:
        self.backend = backend
        self.backend.prepare()
        self.quota: VmQuota = self.backend.create("vm1", 32 * MIB, 16 * MIB)
        self.children: list[subprocess.Popen[str]] = []
        self.watchdogs: list[int] = []

    def spawn(self, *command: str, pipe: bool = False) -> subprocess.Popen[str]:
        out = subprocess.PIPE if pipe else None
        child = subprocess.Popen(command, stdin=out, stdout=out, text=True)
        self.children.append(child)
        return child

    def hang(self) -> subprocess.Popen[str]:
        """A guest's process that hangs at its limit."""
        self.quota.arm_dry_events()
        procs = str(self.quota.directory / "workload" / "cgroup.procs")
        python = (sys.executable, "-I", "-S", "-c", HOLD)
        guest = self.spawn("/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *python)
        wait_for(self.is_held, "the guest hangs")
        return guest

    def command(self, *options: str) -> tuple[str, ...]:
        root = str(self.backend.root)
        python = (sys.executable, "-I", "-S", str(WATCHDOG_FILE))
        return (*python, "--root", root, "--grace-s", GRACE_S, *options)

    def agent(self, *options: str) -> subprocess.Popen[str]:
        """A beating agent with its watchdog."""
        agent = self.spawn(sys.executable, "-c", AGENT, *self.command(*options), pipe=True)
        self.take_in_watchdog(agent)
        return agent

    def take_in_watchdog(self, agent: "subprocess.Popen[str]") -> None:
        """Wait until the watchdog of an agent watches; it ends with the house."""
        assert agent.stdout is not None
        said = {agent.stdout.readline().strip(), agent.stdout.readline().strip()}
        assert "ready" in said
        self.watchdogs.append(int((said - {"ready"}).pop()))

    def watchdog_is_gone(self) -> bool:
        return not any(is_alive(pid) for pid in self.watchdogs)

    def is_held(self) -> bool:
        """Version 2 holds by the freezer, which the agent's looks see to."""
        dry = self.quota.dry_state().under_oom
        return dry and (self.backend.cgroup_version == 1 or self.workload("cgroup.freeze") == "1")

    def workload(self, name: str) -> str:
        return (self.quota.directory / "workload" / name).read_text().strip()

    def is_armed(self) -> bool:
        if self.backend.cgroup_version == 1:
            return "oom_kill_disable 1" in self.workload("memory.oom_control")
        return self.workload("memory.high") != "max" or self.workload("cgroup.freeze") == "1"

    def down(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGCONT)
            child.kill()
        try:
            wait_for(self.watchdog_is_gone, "the watchdogs end with their agents")
        finally:
            for pid in filter(is_alive, self.watchdogs):
                os.kill(pid, signal.SIGKILL)
            self.clear_root()

    def clear_root(self) -> None:
        self.quota.close()
        for path in subtree(self.backend.root):
            for name, value in RELEASES:
                if (path / name).exists():
                    (path / name).write_text(value)
        wait_for(lambda: not kill_below(self.backend.root), "all guests are dead")
        for child in self.children:
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()
        remove_tree(self.backend.root, time.monotonic() + DEADLINE_S)


@pytest.fixture
def house() -> Iterator[House]:
    if os.geteuid() != 0:
        pytest.skip("making memory cgroups needs root")
    try:
        made = House(detect(f"mbtest-{uuid4().hex[:10]}"))
    except QuotaUnavailable as unavailable:
        pytest.skip(str(unavailable))
    try:
        yield made
    finally:
        made.down()


@pytest.mark.effects
def test_a_killed_agent_leaves_nobody_hung(house: House) -> None:
    guest = house.hang()
    agent = house.agent()
    assert house.is_armed()
    agent.kill()
    wait_for(lambda: guest.poll() is not None, "the guest's kernel has decided")
    assert not house.is_armed()
    assert house.quota.oom_kills_total == 1
    wait_for(house.watchdog_is_gone, "the watchdog ends")


@pytest.mark.effects
def test_the_next_agent_finds_a_hung_guest_alive(house: House) -> None:
    guest = house.hang()
    agent = house.agent("--grace-s", "30")
    agent.kill()
    agent.wait()
    with sole_owner(house.backend.root, house.backend.prepare):
        wait_for(house.watchdog_is_gone, "the watchdog leaves all to the next agent")
        assert house.is_armed()
        assert guest.poll() is None


FAILING_AGENT = """
import fcntl, os, signal, subprocess, sys
lock = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(lock, fcntl.LOCK_EX)
dog = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, start_new_session=True)
print(dog.pid, flush=True)
dog.stdin.close()
signal.pause()
"""


@pytest.mark.effects
def test_the_lock_of_an_agent_that_fails_is_not_the_next_ones(house: House) -> None:
    """It ends its control API in order before it lets go of the root: that takes seconds."""
    guest = house.hang()
    root = str(house.backend.root)
    agent = house.spawn(
        *(sys.executable, "-c", FAILING_AGENT, root),
        *house.command("--grace-s", "4"),
        pipe=True,
    )
    house.take_in_watchdog(agent)
    wait_for(lambda: guest.poll() is not None, "the guest's kernel has decided")
    assert agent.poll() is None


@pytest.mark.effects
def test_agents_that_fail_at_their_start_leave_nobody_hung(house: House) -> None:
    """Each of them holds the root for a moment, and starts no watchdog."""
    guest = house.hang()
    agent = house.agent("--grace-s", "1")
    agent.kill()
    agent.wait()
    end_s = time.monotonic() + DEADLINE_S
    while guest.poll() is None:
        assert time.monotonic() < end_s
        with sole_owner(house.backend.root, house.backend.prepare):
            time.sleep(0.1)
        time.sleep(0.1)
    assert house.quota.oom_kills_total == 1


@pytest.mark.effects
def test_a_killed_agent_is_noticed_though_a_child_holds_the_pipe(house: House) -> None:
    house.hang()
    code = "import os\nif os.fork() == 0:\n    import signal; signal.pause()\n"
    code = AGENT.replace("while True:", code + "while True:", 1)
    agent = house.spawn(sys.executable, "-c", code, *house.command(), pipe=True)
    house.take_in_watchdog(agent)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 2, "the child that holds the pipe")
    holder = next(
        int(pid) for pid in children.read_text().split() if int(pid) not in house.watchdogs
    )
    try:
        agent.kill()
        wait_for(house.watchdog_is_gone, "the watchdog has acted and ended")
        assert is_alive(holder)
        assert not house.is_armed()
    finally:
        os.kill(holder, signal.SIGKILL)


@pytest.mark.effects
def test_a_stopped_agent_leaves_nobody_hung_and_is_still_watched(house: House) -> None:
    guest = house.hang()
    agent = house.agent()
    for _ in range(2):
        agent.send_signal(signal.SIGSTOP)
        wait_for(lambda: not house.is_armed(), "all guests are released")
        assert agent.stdout is not None
        assert agent.stdout.readline() == "released\n"
        agent.send_signal(signal.SIGCONT)
        assert not house.watchdog_is_gone()
        house.quota.rearm()
    wait_for(lambda: guest.poll() is not None, "the guest's kernel has decided")


@pytest.mark.parametrize("memsw_mib", [100, 80])
def test_what_a_killed_agent_left_of_swap_is_put_right(house: House, memsw_mib: int) -> None:
    """It died while it made room: the workload must not swap, and memsw was about to be lowered."""
    workload = house.quota.directory / "workload"
    nested = workload / "container"
    nested.mkdir()
    first = house.backend.cgroup_version == 1
    swap = house.backend.create("vm2", 32 * MIB, 16 * MIB, 64 * MIB)
    try:
        (swap.directory / "workload" / "container").mkdir()
        agent = house.agent()
        if first:
            for part in ("workload", "workload/container"):
                (swap.directory / part / "memory.swappiness").write_text("0")
            if (workload / "memory.memsw.limit_in_bytes").exists():
                for guest, mib in ((swap, memsw_mib), (house.quota, 40)):
                    memsw = guest.directory / "workload" / "memory.memsw.limit_in_bytes"
                    memsw.write_text(str(mib * MIB))
        elif (workload / "memory.swap.max").exists():
            (swap.directory / "workload" / "memory.swap.max").write_text("4096")
        agent.kill()
        wait_for(house.watchdog_is_gone, "the watchdog has ended")
        readings = [swap.read_swap(), house.quota.read_swap()]
        limits = [reading.limit_bytes for reading in readings if reading is not None]
        assert limits in ([64 * MIB, 0], [])
        if first:
            usual = (house.backend.root / "memory.swappiness").read_text()
            for part in ("", "workload", "workload/container"):
                assert (swap.directory / part / "memory.swappiness").read_text() == usual
                assert (house.quota.directory / part / "memory.swappiness").read_text() == "0\n"
    finally:
        (swap.directory / "workload" / "container").rmdir()
        nested.rmdir()
        swap.remove()


@pytest.mark.effects
def test_a_beating_agent_is_left_alone(house: House) -> None:
    def attempt() -> tuple[bool, Signs]:
        guest = house.hang()
        signs = Signs()
        dog = house.spawn(*house.command(), pipe=True)
        assert dog.stdin is not None
        end_s = time.monotonic() + 3 * float(GRACE_S)
        while time.monotonic() < end_s:
            with signs.one():
                dog.stdin.write("\n")
                dog.stdin.flush()
            time.sleep(0.05)
        with signs.one():
            left_alone = house.is_armed() and guest.poll() is None
        assert dog.communicate("bye\n", timeout=DEADLINE_S)[0].startswith("ready\n")
        guest.kill()
        guest.wait(DEADLINE_S)
        return left_alone, signs

    is_left_alone(attempt, float(GRACE_S))


@pytest.mark.effects
def test_cgroups_that_inherited_the_flag_are_released(house: House) -> None:
    if house.backend.cgroup_version != 1:
        pytest.skip("nothing is inherited with cgroup version 2")
    house.quota.arm_dry_events()
    nested = house.quota.directory / "workload" / "container"
    nested.mkdir()
    assert "oom_kill_disable 1" in (nested / "memory.oom_control").read_text()
    house.agent().kill()
    wait_for(house.watchdog_is_gone, "the watchdog ends")
    assert "oom_kill_disable 0" in (nested / "memory.oom_control").read_text()


@pytest.mark.effects
def test_what_somebody_else_froze_in_a_workload_stays_so(house: House) -> None:
    """An engine that paused a container; version 2, where the agent uses the freezer itself."""
    if house.backend.cgroup_version != 2:
        pytest.skip("version 1 has a freezer of its own, which nothing here uses")
    house.quota.arm_dry_events()
    nested = house.quota.directory / "workload" / "container"
    nested.mkdir()
    (nested / "cgroup.freeze").write_text("1")
    house.agent().kill()
    wait_for(house.watchdog_is_gone, "the watchdog ends")
    assert not house.is_armed()
    assert (nested / "cgroup.freeze").read_text() == "1\n"
    (nested / "cgroup.freeze").write_text("0")


@pytest.mark.effects
@pytest.mark.parametrize("goodbye", [b"bye\n", b"\n\nbye\n", b"\n" * 5000 + b"bye\n"])
def test_after_a_goodbye_nothing_is_touched(house: House, goodbye: bytes) -> None:
    house.hang()
    done = subprocess.run(house.command("--on-death", "remove"), input=goodbye, check=False)
    assert done.returncode == 0
    assert house.is_armed()
    assert house.backend.names() == ("vm1",)


@pytest.mark.effects
def test_a_goodbye_byte_by_byte(house: House) -> None:
    house.quota.arm_dry_events()
    dog = house.spawn(*house.command(), pipe=True)
    assert dog.stdin is not None
    for character in "\nbye\n":
        dog.stdin.write(character)
        dog.stdin.flush()
        time.sleep(0.01)
    assert dog.wait(timeout=DEADLINE_S) == 0
    assert house.is_armed()


@pytest.mark.effects
def test_sigterm_ends_it_and_a_ctrl_c_does_not(house: House) -> None:
    house.quota.arm_dry_events()
    dog = house.spawn(*house.command("--grace-s", "60"), pipe=True)
    assert dog.stdout is not None
    assert dog.stdout.readline() == "ready\n"
    dog.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        dog.wait(timeout=0.2)
    dog.terminate()
    assert dog.wait(timeout=DEADLINE_S) == -signal.SIGTERM
    assert house.is_armed()


@pytest.mark.effects
def test_a_killed_demo_leaves_nothing_behind(house: House, tmp_path: Path) -> None:
    # Made before: a directory is charged to its parent, and a full one has no room for it.
    (house.quota.directory / "workload" / "container").mkdir()
    guest = house.hang()
    run_dir, disk, kept = tmp_path / "run", tmp_path / "disk.img", tmp_path / "kept"
    (run_dir / "vm1").mkdir(parents=True)
    (run_dir / "vm1" / "log").write_text("x")
    kept.mkdir()
    (kept / "data").write_text("somebody's own")
    (run_dir / "link").symlink_to(kept)
    disk.write_text("x")
    options = ["--on-death", "remove"]
    for path in (run_dir, disk, tmp_path / "never-made"):
        options += ["--remove-path", str(path)]
    house.agent(*options).kill()
    wait_for(house.watchdog_is_gone, "the watchdog has cleared up")
    assert guest.wait(timeout=DEADLINE_S) == -signal.SIGKILL
    assert not house.backend.root.exists()
    assert not run_dir.exists()
    assert not disk.exists()
    assert (kept / "data").read_text() == "somebody's own"


@pytest.mark.parametrize("path", ["mbtest-relative", "/mbtest-never-made", ""])
def test_paths_that_nobody_can_mean_are_left_alone(tmp_path: Path, path: str) -> None:
    """Paths that do not exist: a watchdog that forgets to refuse them must do no harm here."""
    root = str(tmp_path / "none")
    done = run_watchdog("--root", root, "--on-death", "remove", "--remove-path", path)
    assert done.returncode == 1
    assert "left behind" in done.stderr


def test_a_path_that_goes_while_it_is_removed_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that was interrupted clears up as well."""
    rmtree, path = shutil.rmtree, tmp_path / "run"
    (path / "guests").mkdir(parents=True)

    def after_the_agent(real: str, **options: Any) -> None:
        rmtree(real)
        rmtree(real, **options)

    monkeypatch.setattr(shutil, "rmtree", after_the_agent)
    assert watchdog.remove_path(str(path)) is None
    assert not path.exists()


@pytest.mark.effects
def test_a_path_with_a_mount_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "mounted").mkdir(parents=True)
    options = ("--root", str(tmp_path / "none"), "--on-death", "remove")
    code = 'mount -t tmpfs none "$0" && exec "$@"'
    python = (sys.executable, "-I", "-S", str(WATCHDOG_FILE))
    command = ("unshare", "--mount", "/bin/sh", "-c", code, str(tmp_path / "run" / "mounted"))
    done = subprocess.run(
        [*command, *python, *options, "--remove-path", str(tmp_path / "run")],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "mounted is mounted" in done.stderr
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--root",),
        ("--root", "relative"),
        ("--root", "/x", "--on-death", "explode"),
        ("--root", "/x", "--grace-s", "0"),
        ("--roof", "/x"),
    ],
)
def test_options_it_cannot_use(options: tuple[str, ...]) -> None:
    done = run_watchdog(*options)
    assert done.returncode == 1
    assert done.stderr.startswith("watchdog: ")
    assert done.stderr.count("\n") == 1


def run_watchdog(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(WATCHDOG_FILE), *options],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )


def test_high_is_released_where_the_cgroups_are_version_2(tmp_path: Path) -> None:
    workload = tmp_path / "vm1" / "workload"
    workload.mkdir(parents=True)
    (workload / "memory.high").write_text("100")
    assert run_watchdog("--root", str(tmp_path), "--grace-s", "0.1").returncode == 0
    assert (workload / "memory.high").read_text() == "max"


def test_who_runs_dry_while_no_agent_is_there_is_frozen_with_version_2(tmp_path: Path) -> None:
    """And nobody else: not who has room, nor who streams through its cache."""
    stats = {"dry": "inactive_file 1000000\n", "reader": f"active_file {60 * MIB}\n", "roomy": ""}
    for name, stat in stats.items():
        workload = tmp_path / name / "workload"
        workload.mkdir(parents=True)
        (workload / "memory.high").write_text(f"{96 * MIB}\n")
        (workload / "memory.max").write_text(f"{100 * MIB}\n")
        (workload / "memory.current").write_text(f"{(97 if name == 'roomy' else 99) * MIB}\n")
        (workload / "memory.stat").write_text(f"anon 1\n{stat}")
        (workload / "cgroup.freeze").write_text("0")

    def frozen() -> list[str]:
        names = sorted(stats)
        return [n for n in names if (tmp_path / n / "workload/cgroup.freeze").read_text() == "1"]

    command = (sys.executable, "-I", "-S", str(WATCHDOG_FILE), "--root", str(tmp_path))
    with subprocess.Popen((*command, "--grace-s", "1000"), stdin=subprocess.DEVNULL) as dog:
        try:
            wait_for(frozen, "it to be frozen")
            assert frozen() == ["dry"]
        finally:
            dog.kill()
    assert run_watchdog("--root", str(tmp_path), "--grace-s", "0.1").returncode == 0
    assert frozen() == []


def test_a_guest_elsewhere_is_found_by_its_link(tmp_path: Path) -> None:
    """And one below the root has a link as well, where its container is somebody else's."""
    root, links, elsewhere = tmp_path / "root", tmp_path / "links", tmp_path / "x.scope" / "web1"
    links.mkdir()
    for place in (root / "db1", elsewhere):
        (place / "workload").mkdir(parents=True)
        (place / "workload" / "memory.high").write_text("100")
        (place / "workload" / "cgroup.freeze").write_text("1")
        (links / place.name).symlink_to(place)
    (links / "gone").symlink_to(tmp_path / "gone")
    options = ("--root", str(root), "--links", str(links), "--grace-s", "0.1")
    assert run_watchdog(*options).returncode == 0
    for place in (root / "db1", elsewhere):
        assert (place / "workload" / "memory.high").read_text() == "max"
        assert (place / "workload" / "cgroup.freeze").read_text() == "0"
    assert not (tmp_path / "gone").exists()


# The agent's side


class SignedWatchdog(Watchdog):
    """A client that beats often, and whose beats are signs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, grace_s=float(GRACE_S), beat_interval_s=0.05)
        self.signs = Signs()

    async def _beat(self, pipe: trio.abc.SendStream) -> None:
        send_all = pipe.send_all

        async def signed(data: bytes) -> None:
            with self.signs.one():
                await send_all(data)

        pipe.send_all = signed  # type: ignore[method-assign, assignment]
        await super()._beat(pipe)


@pytest.mark.effects
def test_the_client_beats_and_says_goodbye(house: House) -> None:
    async def main() -> tuple[bool, Signs]:
        house.quota.arm_dry_events()
        async with SignedWatchdog(house.backend.root) as dog:
            assert dog.pid is not None
            await trio.sleep(3 * float(GRACE_S))
            assert os.getsid(dog.pid) == dog.pid
        with dog.signs.one():
            left_alone = house.is_armed()
        assert not is_alive(dog.pid)
        return left_alone, dog.signs

    is_left_alone(lambda: trio.run(main), float(GRACE_S))


@pytest.mark.effects
def test_the_client_is_told_when_guests_were_released(house: House) -> None:
    house.quota.arm_dry_events()

    async def main() -> None:
        armed = trio.Event()

        def rearm() -> None:
            house.quota.rearm()
            armed.set()

        dog = Watchdog(house.backend.root, grace_s=0.2, beat_interval_s=0.05, on_released=rearm)
        async with trio.open_nursery() as nursery:
            await nursery.start(dog.run)
            # The event loop stands still until somebody else has released them.
            wait_for(lambda: not house.is_armed(), "all guests are released")
            with trio.fail_after(DEADLINE_S):
                await armed.wait()
            dog.dismiss()

    trio.run(main)


class AgentFault(Exception):
    pass


@pytest.mark.effects
def test_an_agent_that_fails_says_no_goodbye(house: House) -> None:
    house.quota.arm_dry_events()

    async def main() -> None:
        async with Watchdog(house.backend.root, grace_s=float(GRACE_S)):
            raise AgentFault

    with pytest.raises(AgentFault):
        trio.run(main)
    wait_for(lambda: not house.is_armed(), "the kernel decides")


@pytest.mark.effects
def test_an_agent_that_is_cancelled_says_no_goodbye(house: House) -> None:
    house.quota.arm_dry_events()

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with Watchdog(house.backend.root, grace_s=float(GRACE_S)):
                scope.cancel()
                await trio.sleep_forever()

    trio.run(main)
    wait_for(lambda: not house.is_armed(), "the kernel decides")


@pytest.mark.effects
def test_a_watchdog_that_was_killed_is_started_again(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.quota.arm_dry_events()
    pids: list[int] = []

    async def main() -> None:
        armed = trio.Event()

        def rearm() -> None:
            house.quota.rearm()
            armed.set()

        async with Watchdog(house.backend.root, beat_interval_s=0.05, on_released=rearm) as dog:
            for _ in range(2):
                assert dog.pid is not None
                pids.append(dog.pid)
                armed = trio.Event()
                house.quota.let_kernel_decide()
                os.kill(dog.pid, signal.SIGKILL)
                with trio.fail_after(DEADLINE_S):
                    await armed.wait()
                assert house.is_armed()
                assert dog.pid not in pids
                assert is_alive(dog.pid)
            pids.append(dog.pid)

    trio.run(main)
    assert len(set(pids)) == 3
    assert not any(map(is_alive, pids))
    assert house.is_armed()  # it said goodbye to the last one
    assert [record.getMessage() for record in caplog.records] == [
        "the watchdog has ended: it is started again"
    ] * 2


@pytest.mark.effects
def test_the_one_that_was_started_again_watches(house: House) -> None:
    house.quota.arm_dry_events()

    async def main() -> None:
        async with Watchdog(house.backend.root, grace_s=float(GRACE_S)) as dog:
            first = dog.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            with trio.fail_after(DEADLINE_S):
                while dog.pid == first:
                    await trio.sleep(0.01)
            raise AgentFault

    with pytest.raises(AgentFault):
        trio.run(main)
    wait_for(lambda: not house.is_armed(), "the kernel decides")


def test_one_that_can_not_be_started_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "watchdog.py"
    file.write_text(WATCHDOG_FILE.read_text())
    monkeypatch.setattr(watchdog_client, "WATCHDOG_FILE", file)
    monkeypatch.setattr(watchdog_client, "RESTART_PAUSE_S", 0.001)

    async def main() -> None:
        async with Watchdog(tmp_path / "none") as dog:
            assert dog.pid is not None
            starts = tmp_path / "starts"
            file.write_text(f"open({str(starts)!r}, 'a').write('x')\n")
            os.kill(dog.pid, signal.SIGKILL)
            with trio.fail_after(DEADLINE_S):
                await trio.sleep_forever()

    with pytest.raises(WatchdogLost, match="did not start"):
        trio.run(main)
    assert (tmp_path / "starts").read_text() == "x" * watchdog_client.MOST_RESTARTS


def test_a_watchdog_that_cannot_start_is_said() -> None:
    async def main() -> None:
        async with Watchdog(Path("relative")):
            raise AssertionError("it started")

    with pytest.raises(WatchdogLost, match="did not start"):
        trio.run(main)


@pytest.mark.effects
def test_a_block_that_is_cancelled_is_watched_to_its_end(house: House) -> None:
    """Ending guests in order takes longer than the grace; nobody is to interfere meanwhile."""

    async def main() -> tuple[bool, Signs]:
        house.quota.arm_dry_events()
        left_alone = False
        with trio.CancelScope() as scope:
            async with SignedWatchdog(house.backend.root) as dog:
                assert dog.pid is not None
                house.watchdogs.append(dog.pid)
                try:
                    scope.cancel()
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(3 * float(GRACE_S))
                        with dog.signs.one():
                            left_alone = house.is_armed()
        wait_for(house.watchdog_is_gone, "it has taken the agent for dead when that was gone")
        assert not house.is_armed()
        return left_alone, dog.signs

    is_left_alone(lambda: trio.run(main), float(GRACE_S))
