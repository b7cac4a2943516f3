"""What guests of docker-compose.yml can do to each other: nothing. One project for all tests."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from compose_tool import ComposeUnavailable
from engine import Engine, until
from images import Images
from project import GUESTS, SLOW_S, Project, project_of

from protocol.units import MIB
from tests.conftest import RUN_PREFIX

pytestmark = pytest.mark.effects


@pytest.fixture(scope="module")
def project(engine: Engine, images: Images) -> Iterator[Project]:
    name = f"{RUN_PREFIX}-guests"
    for generation in (2, 1):
        with contextlib.suppress(ComposeUnavailable):
            with project_of(engine, RUN_PREFIX, name, generation) as project:
                yield project
            return
    pytest.skip("no Compose of either generation")


# What each guest is given


def test_a_guest_sees_its_own_socket_and_no_other(project: Project) -> None:
    for guest in GUESTS:
        shown = project.exec(guest, "find", "/run", "-type", "s")
        assert shown.split() == ["/run/memballoon/channel.sock"], guest


@pytest.mark.parametrize(
    "write",
    [
        "touch /run/memballoon/mine",
        "ln -s / /run/memballoon/link",
        "touch /etc/mine",
        "mkdir /run/memballoon-cgroup/mine",
        "echo max > /run/memballoon-cgroup/memory.max",
        "echo -1 > /run/memballoon-cgroup/workload/memory.limit_in_bytes",
        "mount -t tmpfs none /mnt",
    ],
)
def test_a_guest_can_not_write_there(project: Project, write: str) -> None:
    done = project.engine.run("exec", project.container("idle"), "sh", "-c", write, check=False)
    assert done.returncode != 0, done.stdout


def test_a_guest_has_the_one_capability(project: Project) -> None:
    ipc_lock = 1 << 14
    for guest in GUESTS:
        status = project.exec(guest, "cat", "/proc/1/status")
        found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == ipc_lock, guest
        assert found["NoNewPrivs"] == "1"
        assert project.exec(guest, "cat", "/proc/net/dev").count("\n") == 3  # loopback alone


def test_the_drivers_memory_is_not_the_workloads(project: Project) -> None:
    """What it charged before it was moved would be the guest's for ever."""
    assert (project.vms()["idle"].usage_bytes or 0) < 8 * MIB


# Strangers


SPEAKS = """
import socket
with socket.socket(socket.AF_UNIX) as stranger:
    stranger.connect("/run/memballoon/channel.sock")
    print("heard", stranger.recv(100))
"""


def stranger(project: Project, of: str, at: str) -> str:
    """What a container of VM `of` hears that has got the socket of VM `at`."""
    return project.engine.docker(
        *("run", "--rm", "--init", "--network=none", "--cap-drop=ALL"),
        *("--cgroup-parent", f"/{project.name}/{of}/workload"),
        *("--volume", f"{project.run_dir}/guests/{at}:/run/memballoon:ro"),
        *("--entrypoint", "python3", f"{RUN_PREFIX}-guest", "-c", SPEAKS),
    )


def test_a_container_that_claims_anothers_name_is_turned_away(project: Project) -> None:
    before = project.vitals("redis")
    assert stranger(project, of="idle", at="redis") == "heard b''"
    until(lambda: "belongs to idle" in project.log(), project.log)
    after = project.vitals("redis")
    assert before is not None
    assert after is not None
    # A new driver's statistics would begin anew: the same one goes on speaking.
    assert after.refault_bytes_total >= before.refault_bytes_total


# A greedy guest


def test_a_greedy_guest_gets_what_the_others_can_spare_and_no_more(project: Project) -> None:
    """It reads more than its quota for ever: it is slowed, not killed, and the others live."""
    config = {vm.name: vm for vm in project.config.vms}
    most_bytes = project.config.host.pool_bytes

    def greedy_wants_more() -> bool:
        vm = project.vms()["greedy"]
        return (vm.demand_bytes or 0) > vm.quota_bytes > 96 * MIB

    until(greedy_wants_more, lambda: f"{project.vms()['greedy']}", SLOW_S)
    for _ in range(20):
        quotas = {name: vm.quota_bytes for name, vm in project.vms().items()}
        assert all(quotas[name] >= config[name].reservation_bytes for name in GUESTS), quotas
        # Two passes that are equal: what moves in the midst of one would be seen twice.
        passes = [[project.limit(name, "workload") for name in GUESTS] for _ in range(2)]
        assert sum(passes[0]) <= most_bytes or passes[0] != passes[1], passes
        time.sleep(0.1)
    assert project.oom_kills() == 0


# Redis


HUNG_UP = "redis has hung up"


@dataclass
class Clients:
    """Small clients of Redis: each writes and reads back its own keys, and checks each answer."""

    path: Path
    stop: threading.Event = field(default_factory=threading.Event)
    answers: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, number: int) -> None:
        value = bytes([65 + number]) * 512
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(SLOW_S)
                connection.connect(str(self.path))
                replies = connection.makefile("rb")
                turn = 0
                while not self.stop.is_set():
                    key = b"test:%d:%d" % (number, turn % 5_000)
                    connection.sendall(_command(b"SET", key, value) + _command(b"GET", key))
                    self._check(replies.readline(), (b"+OK\r\n",))
                    # Its neighbour in the container flushes now and then: so it may be gone.
                    head = replies.readline()
                    self._check(head, (b"$512\r\n", b"$-1\r\n"))
                    if head == b"$512\r\n":
                        self._check(replies.read(514), (value + b"\r\n",))
                    self.answers += 2
                    turn += 1
        except ConnectionError:
            self.faults.append(HUNG_UP)
        except OSError as error:
            self.faults.append(repr(error))

    def _check(self, answer: bytes, expected: tuple[bytes, ...]) -> None:
        if not answer:
            raise ConnectionResetError
        if answer not in expected:
            self.faults.append(repr(answer[:80]))


def _command(*words: bytes) -> bytes:
    parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)]
    return b"".join(parts)


@contextlib.contextmanager
def clients_of(project: Project, count: int = 3) -> Iterator[Clients]:
    pid = project.engine.inspect(project.container("redis"))["State"]["Pid"]
    clients = Clients(Path(f"/proc/{pid}/root/tmp/redis.sock"))
    threads = [threading.Thread(target=clients.run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        clients.stop.set()
        for thread in threads:
            thread.join()


STEPS = (("greedy", 184), ("redis", 48), ("redis", 64), ("redis", 48))
"""Balloons of so many MiB, one after the other: its neighbour's and its own, up and down."""


def test_redis_answers_without_an_error_while_all_are_ballooned(project: Project) -> None:
    with clients_of(project) as clients:
        until(lambda: clients.answers > 2000, "redis answers", SLOW_S)
        for guest, mib in STEPS:
            project.balloon("set", guest, "--target", f"{mib}MiB")
            until(
                lambda guest=guest, mib=mib: abs(_balloon_mib(project, guest) - mib) <= 8,
                lambda guest=guest, mib=mib: f"{mib} MiB: {project.vms()[guest]}",
                SLOW_S,
            )
            answered = clients.answers
            until(lambda answered=answered: clients.answers > answered + 500, "redis goes on")
        for guest in ("redis", "greedy"):
            project.balloon("set", guest, "--auto")
        answered = clients.answers
        until(lambda: clients.answers > answered + 2000, "redis goes on", SLOW_S)
    assert clients.faults == [], project.log()
    assert project.oom_kills() == 0


def _balloon_mib(project: Project, guest: str) -> float:
    return project.vms()[guest].balloon_actual_bytes / MIB


# The end of one


def test_an_agent_that_dies_finds_its_guests_again(project: Project) -> None:
    """Nobody is killed meanwhile: who runs dry waits.

    On cgroup v1 a `read` that needs memory doesn't wait, it fails (docs/architecture.md). Redis
    hangs up on such a client, so those that it has while no agent is there may be hung up on.
    """
    agent = project.container("agent")
    pid = project.engine.inspect(agent)["State"]["Pid"]
    redis = project.engine.inspect(project.container("redis"))["State"]["Pid"]
    with clients_of(project) as clients:
        until(lambda: clients.answers > 500, "redis answers", SLOW_S)
        os.kill(pid, signal.SIGKILL)
        until(lambda: project.engine.inspect(agent)["State"]["Pid"] not in (0, pid), project.log)
        until(lambda: set(project.connected()) == set(GUESTS), project.story, SLOW_S)
    assert set(clients.faults) <= {HUNG_UP}
    with clients_of(project) as clients:
        until(lambda: clients.answers > 500, "redis goes on", SLOW_S)
    assert clients.faults == []
    assert project.oom_kills() == 0
    assert project.engine.inspect(project.container("redis"))["State"]["Pid"] == redis
    for guest in GUESTS:
        assert f"{guest} was running and is taken over" in project.log()


def test_a_guest_that_is_killed_comes_back_below_its_limits(project: Project) -> None:
    container = project.container("idle")
    project.engine.docker("kill", "--signal=KILL", container)
    until(lambda: "idle" not in project.connected(), "its driver is gone")
    others = {"redis", "batch", "greedy"}
    until(lambda: set(project.connected()) == others, project.story)
    quota_bytes = project.vms()["idle"].quota_bytes
    assert project.limit("idle", "workload") <= quota_bytes
    project.engine.docker("start", container)
    until(lambda: "idle" in project.connected(), project.log, SLOW_S)
    pid = project.engine.inspect(container)["State"]["Pid"]
    assert f"/{project.name}/idle/workload/" in Path(f"/proc/{pid}/cgroup").read_text()


def test_down_leaves_nothing(project: Project) -> None:
    project.compose.run("down", "--volumes")
    assert project.leftovers() == []
