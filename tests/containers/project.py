"""One project of docker-compose.yml in a test: names and places of its own, and nothing left."""

import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from base_image import ROOT
from compose_tool import FILE, Compose, compose_command
from engine import Engine, cgroups_named, mounts_below, remove_empty_cgroups, until

from host_agent.client import AgentClient
from host_agent.config import Config, control_socket_in, load_config
from host_agent.errors import AgentNotRunning
from host_agent.facade.views import VitalsView, VmView

GUESTS: Final = ("redis", "batch", "greedy", "idle")
CONFIG: Final = ROOT / "compose" / "host.toml"
SLOW_S: Final = 120.0
"""For what takes ten seconds on an idle machine."""

_MOVE: Final = re.compile(r"(\w+) got ([\d.]+) MiB from (\w+)")
_BALLOON: Final = "from host_agent.cli import main; main()"


class Project:
    """A project that is up. `name` is also that of the agent's root cgroup."""

    def __init__(self, engine: Engine, compose: Compose, base: Path) -> None:
        self.engine = engine
        self.compose = compose
        self.name = compose.project
        self.run_dir = base / "run"
        self.config: Config = load_config(base / "host.toml")

    def container(self, guest: str) -> str:
        return f"{self.name}-{guest}"

    def exec(self, guest: str, *command: str, check: bool = True) -> str:
        """What a command prints in a guest's container; it is charged to that guest."""
        return self.engine.run("exec", self.container(guest), *command, check=check).stdout

    def log(self) -> str:
        """The agent's."""
        done = self.engine.run("logs", self.container("agent"))
        return done.stdout + done.stderr

    def story(self) -> str:
        """What the agent and each driver's container have said so far, for a failure's message."""
        logs = [self.engine.run("logs", self.container(guest), check=False) for guest in GUESTS]
        drivers = "".join(log.stderr for log in logs)
        return f"{self.connected()} are connected:\n{self.log()}\n{drivers}"

    def balloon(self, *arguments: str) -> str:
        """`balloon` on the host, through the run directory."""
        done = subprocess.run(
            [sys.executable, "-c", _BALLOON, *arguments, "--run-dir", str(self.run_dir)],
            capture_output=True,
            text=True,
            timeout=SLOW_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def vms(self) -> dict[str, VmView]:
        with self.client() as client:
            return {vm.name: vm for vm in client.vms()}

    def vitals(self, guest: str) -> VitalsView | None:
        """The last statistics of a guest whose driver is connected."""
        with self.client() as client:
            return client.vitals(guest)

    def oom_kills(self) -> int:
        with self.client() as client:
            return client.host().oom_kills

    def client(self) -> AgentClient:
        return AgentClient(control_socket_in(self.run_dir))

    def moves(self) -> list[tuple[str, float, str]]:
        """Taker, MiB and giver of all moves so far."""
        return [(taker, float(mib), giver) for taker, mib, giver in _MOVE.findall(self.log())]

    def connected(self) -> list[str]:
        """Guests whose driver has told of its guest's memory."""
        with suppress(AgentNotRunning):
            return [name for name in GUESTS if self.vitals(name) is not None]
        return []

    def limit(self, guest: str, part: str = ".") -> int:
        """As the kernel has it."""
        for file in ("memory.limit_in_bytes", "memory.max"):
            for directory in cgroups_named(f"{self.name}/{guest}"):
                if directory.name == guest and (directory / file).exists():
                    return int((directory / part / file).read_text())
        raise AssertionError(f"{guest} has no limit")

    def leftovers(self) -> list[str]:
        """What should be gone after `down`, the agent's state file apart."""
        found = [
            f"{kind} {name}"
            for kind in ("container", "volume", "network")
            for name in self.engine.docker(
                *(kind, "ls", "--quiet"),
                *(("--all",) if kind == "container" else ()),
                *("--filter", f"label=com.docker.compose.project={self.name}"),
            ).split()
        ]
        found += [f"cgroup {path}" for path in cgroups_named(self.name)]
        found += [f"mount {path}" for path in mounts_below(self.run_dir)]
        found += [f"socket {path}" for path in self.run_dir.rglob("*") if path.is_socket()]
        found += [f"file {path}" for path in self.run_dir.glob("guests/*")]
        found += [f"link {path}" for path in self.run_dir.glob("cgroup/*")]
        for path in Path("/proc").glob("[0-9]*/cgroup"):
            with suppress(OSError):
                if f"/{self.name}/" in path.read_text():
                    found.append(f"process {path.parent.name}")
        return found


@contextmanager
def project_of(
    engine: Engine,
    images_prefix: str,
    name: str,
    generation: int,
    *,
    services: tuple[str, ...] = GUESTS,
    more_files: tuple[Path, ...] = (),
    slow_s: float = SLOW_S,
) -> Iterator[Project]:
    """The project, its `services` up and with their drivers connected; taken down in any case.

    `more_files` are merged into docker-compose.yml. Raises ComposeUnavailable.
    """
    command = compose_command(engine, generation)
    base = Path("/tmp") / f"mbc-{secrets.token_hex(3)}"  # sockets' paths are short
    (base / "run").mkdir(parents=True)
    environment = {
        "MEMBALLOON_NAME": name,
        "MEMBALLOON_IMAGES": images_prefix,
        "MEMBALLOON_RUN_DIR": str(base / "run"),
        "MEMBALLOON_CONFIG": str(base / "host.toml"),
    }
    text = CONFIG.read_text(encoding="utf-8").replace('"memballoon', f'"{name}')
    (base / "host.toml").write_text(text, encoding="utf-8")
    compose = Compose(command, engine, name, environment, (FILE, *more_files))
    project = Project(engine, compose, base)
    try:
        compose.run("up", "--detach", "--no-build", *services)
        until(
            lambda: set(project.connected()) == set(services),
            lambda: f"all drivers connect: {project.story()}",
            slow_s,
        )
        yield project
    finally:
        compose.run("down", "--volumes", "--timeout", "5", check=False)
        remove_empty_cgroups(name)
        shutil.rmtree(base)
