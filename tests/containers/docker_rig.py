"""Mock VMs of the docker backend in one test: an image without Python, and nothing left of them."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import Engine, cgroups_named

sys.path.insert(0, str(Path(__file__).parent.parent / "scenarios"))

from scenario_rig import Rig

from host_agent.facade.port import VmSpec
from protocol.units import MIB

TOOLS = ("sh", "sleep", "cat", "echo", "head", "tail", "tr")

STAYS = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
"""A workload that ends when it is told to."""


class DockerRig(Rig):
    """A scenario's rig whose agent finds the engine, and that looks there for leftovers."""

    def __init__(self, cgroup_name: str, engine: Engine, image: str) -> None:
        super().__init__(cgroup_name)
        self.engine = engine
        self.image = image

    def vm(self, name: str, mib: int = 64, **changes: Any) -> VmSpec:
        values = {"image": self.image, "command": STAYS, **changes}
        return VmSpec.model_validate({"name": name, "assigned_bytes": mib * MIB, **values})

    def container(self, name: str) -> str:
        """What a VM's container is called."""
        return f"{self.cgroup.name}-{name}"

    def containers(self) -> list[str]:
        names = self.engine.docker("ps", "--all", "--format", "{{.Names}}").split()
        return [name for name in names if name.startswith(f"{self.cgroup.name}-")]

    def leftovers(self) -> list[str]:
        found = super().leftovers()
        found += [f"container {name}" for name in self.containers()]
        found += [f"cgroup {path}" for path in cgroups_named(self.cgroup.name)]
        return found

    def take_down(self) -> None:
        if left := self.containers():
            self.engine.run("rm", "--force", "--volumes", *left, check=False)
        super().take_down()
        for path in reversed(cgroups_named(self.cgroup.name)):
            path.rmdir()


def make_small_image(engine: Engine, tag: str, tools: Sequence[str] = TOOLS) -> None:
    """An image of this machine's own shell and a few tools: no Python, no package, 5 MB."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        for directory in ("bin", "tmp", "proc", "sys", "dev", "etc"):
            (root / directory).mkdir()
        (root / "tmp").chmod(0o1777)
        for tool in tools:
            found = shutil.which(tool, path="/bin:/usr/bin")
            assert found is not None, tool
            shutil.copy(found, root / "bin" / tool)
            linked = subprocess.run(["ldd", found], capture_output=True, text=True, check=False)
            for word in linked.stdout.split():
                if word.startswith("/"):
                    (root / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(word, root / word[1:])
        archive = root.parent / f"{root.name}.tar"
        try:
            with tarfile.open(archive, "w") as tar:
                tar.add(root, arcname="/")
            config = 'CMD ["sh", "-c", "echo the image; exec sleep 1000000"]'
            engine.docker("import", "--change", config, str(archive), tag)
        finally:
            archive.unlink(missing_ok=True)
