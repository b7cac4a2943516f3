"""A Docker engine for tests: the one that runs here, or one of the tests' own.

An engine of our own has a network namespace, a data root and a socket for itself, so that it
touches no link, no firewall rule and no image of this machine. It ends with the `with` block, or
with the process that started it, and leaves no mount, no cgroup and no file behind.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

DEFAULT_SOCKET: Final = Path("/var/run/docker.sock")
SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"

PACKAGES: Final = {
    "docker": "docker.io",
    "dockerd": "docker.io",
    "docker-compose": "docker-compose",
    "mmdebstrap": "mmdebstrap",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
"""Debian's, of the programs that are used here."""

READY_DEADLINE_S: Final = 60.0
"""An idle machine needs 0.4 s."""

END_DEADLINE_S: Final = 60.0
CALL_DEADLINE_S: Final = 300.0
PING_DEADLINE_S: Final = 60.0
"""Of one that took the connection; where there is none nobody waits."""

LOOK_S: Final = 0.05

_START: Final = 'ip link set lo up 2>/dev/null; exec dockerd "$@"'


class EngineUnavailable(Exception):
    """No engine runs here and none can be started; one line says why."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine."""

    socket_path: Path
    config_dir: Path
    """$DOCKER_CONFIG of its clients: nothing of the user's own leaks in."""
    cgroup_parent: str
    """Below it are the containers that name no parent of their own ("" is the engine's choice)."""

    @property
    def is_own(self) -> bool:
        """Whether it is the tests' own: all that is in it ends with it."""
        return bool(self.cgroup_parent)

    def forget_images(self, *tags: str) -> None:
        """Remove images from an engine that goes on without us."""
        if not self.is_own:
            self.run("image", "rm", "--force", *tags, check=False)

    @property
    def url(self) -> str:
        """As $DOCKER_HOST has it."""
        return f"unix://{self.socket_path}"

    def client_environment(self, **more: str) -> dict[str, str]:
        """The environment of a client of this engine."""
        mine = {"DOCKER_HOST": self.url, "DOCKER_CONFIG": str(self.config_dir)}
        return {**os.environ, **mine, **more}

    def run(
        self, *arguments: str, check: bool = True, timeout_s: float = CALL_DEADLINE_S
    ) -> "subprocess.CompletedProcess[str]":
        """`docker ARGUMENTS`; a failure raises AssertionError with what it said."""
        done = subprocess.run(
            [tool("docker"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self.client_environment(),
        )
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise AssertionError(f"docker {' '.join(arguments)}: {done.returncode}: {said}")
        return done

    def docker(self, *arguments: str) -> str:
        """What `docker ARGUMENTS` prints, stripped."""
        return self.run(*arguments).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        """A container or an image, as the engine describes it."""
        [found] = json.loads(self.docker("inspect", name))
        return dict(found)

    def container_ids(self) -> set[str]:
        """All containers, running or not."""
        return set(self.docker("ps", "--all", "--quiet", "--no-trunc").split())


def tool(name: str) -> str:
    """Where a program is. Raises EngineUnavailable."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if found is None:
        raise EngineUnavailable(f"{name} is missing (apt-get install {PACKAGES[name]})")
    return found


def answers(socket_path: Path) -> bool:
    """Whether an engine answers `GET /_ping` there."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(PING_DEADLINE_S)
        asking.connect(str(socket_path))
        asking.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
        return asking.recv(64).split(b" ")[1:2] == [b"200"]
    return False


def running_socket() -> Path | None:
    """The socket of an engine that runs already: $DOCKER_HOST's, or the default one."""
    host = os.environ.get("DOCKER_HOST", f"unix://{DEFAULT_SOCKET}")
    path = Path(host.removeprefix("unix://"))
    return path if host.startswith("unix://") and answers(path) else None


def missing_for_engine() -> str | None:
    """Why no engine can be had here, as far as that is known without starting one."""
    try:
        tool("docker")
        if running_socket() is None:
            if os.geteuid() != 0:
                return "no Docker engine runs, and to start one needs root"
            tool("dockerd")
    except EngineUnavailable as error:
        return f"no Docker engine: {error}"
    return None


@contextlib.contextmanager
def engine_for_tests(name: str, cgroup_driver: str = "") -> Iterator[Engine]:
    """The engine that runs here, or one of our own. Raises EngineUnavailable.

    `name` becomes the cgroup of the containers that name no parent. Where the cgroup driver matters
    it is one of our own in each case.
    """
    base = Path("/tmp") / f"mbd-{secrets.token_hex(3)}"  # sockets' paths are short
    base.mkdir(mode=0o700)
    config_dir = base / "config"
    config_dir.mkdir()
    try:
        found = None if cgroup_driver else running_socket()
        if found is not None:
            yield Engine(found, config_dir, cgroup_parent="")
        else:
            with _own_engine(base, name, cgroup_driver or "cgroupfs") as socket_path:
                yield Engine(socket_path, config_dir, cgroup_parent=f"/{name}")
    finally:
        shutil.rmtree(base)


@contextlib.contextmanager
def _own_engine(base: Path, name: str, cgroup_driver: str) -> Iterator[Path]:
    socket_path, log_path = base / "docker.sock", base / "log"
    options = {
        "data-root": base / "data",
        "exec-root": base / "exec",
        "pidfile": base / "pid",
        "host": f"unix://{socket_path}",
        "cgroup-parent": f"{name}.slice" if cgroup_driver == "systemd" else f"/{name}",
        "exec-opt": f"native.cgroupdriver={cgroup_driver}",
        "bridge": "none",
        "iptables": "false",
        "ip6tables": "false",
        "ip-forward": "false",
        "ip-masq": "false",
        "log-level": "warn",
    }
    tool("dockerd")
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [
                *(tool("setpriv"), "--pdeathsig=TERM", tool("unshare"), "--net", "--"),
                *("sh", "-c", _START, "sh"),
                *(f"--{option}={value}" for option, value in options.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:{SBIN}"},
        )
    try:
        until(
            lambda: child.poll() is not None or answers(socket_path),
            "the engine answers",
            READY_DEADLINE_S,
        )
        if child.returncode is not None:
            lines = log_path.read_text(errors="replace").strip().splitlines()
            raise EngineUnavailable(f"dockerd can't run here: {lines[-1] if lines else 'silent'}")
        yield socket_path
    finally:
        _end(child, base, socket_path)
        remove_empty_cgroups(name)


def _end(child: "subprocess.Popen[bytes]", base: Path, socket_path: Path) -> None:
    """Stop the engine with all of its containers, and unmount what is left below `base`."""
    if child.poll() is None:
        engine = Engine(socket_path, base / "config", cgroup_parent="")
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if ids := engine.container_ids():
                engine.run("rm", "--force", "--volumes", *ids, check=False)
        child.send_signal(signal.SIGTERM)
    try:
        child.wait(END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for point in reversed(mounts_below(base)):
        subprocess.run(["umount", "--lazy", str(point)], check=False)


def mounts_below(base: Path) -> list[Path]:
    """Mount points at and below `base`, outermost first."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    points = (Path(line.split(" ")[4]) for line in lines)
    return [point for point in points if point.is_relative_to(base)]


def cgroups_named(name: str) -> list[Path]:
    """`name` and all below it in every cgroup hierarchy, parents first."""
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mount, _, source = line.partition(" - ")
        if source.split(" ")[0] in ("cgroup", "cgroup2"):
            top = Path(mount.split(" ")[4]) / name
            if top.is_dir():
                found += [top, *sorted(path for path in top.rglob("*") if path.is_dir())]
    return found


def remove_empty_cgroups(name: str) -> None:
    """Remove `name` from every hierarchy, with all below it that has no process."""
    for path in reversed(cgroups_named(name)):
        with contextlib.suppress(OSError):
            path.rmdir()


def until(
    predicate: Callable[[], object],
    what: str | Callable[[], object],
    timeout_s: float = READY_DEADLINE_S,
) -> None:
    """Wait for what other processes do."""
    end_s = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() >= end_s:
            raise AssertionError(f"waited in vain for: {what() if callable(what) else what}")
        time.sleep(LOOK_S)
