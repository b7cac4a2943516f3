"""Mock VMs in the scopes of an engine that leaves cgroups to systemd, and nothing left of them."""

import subprocess
from pathlib import Path

from docker_rig import DockerRig

from host_agent.machines.cgroup_layout import slice_name, slice_path

TOP = Path("/sys/fs/cgroup")


class SystemdRig(DockerRig):
    """A rig whose VMs are below slices of systemd's."""

    def place(self, name: str) -> Path:
        """Where the agent's own link says it is."""
        return (self.run_dir / "cgroup" / name).resolve()

    def slice(self, name: str) -> Path:
        return TOP / slice_path(self.cgroup.name, name)

    def scope(self, name: str) -> Path:
        return self.slice(name) / f"docker-{self.engine.inspect(self.container(name))['Id']}.scope"

    def units(self) -> list[str]:
        """Of systemd's, with this test's name in theirs."""
        prefix = slice_name(self.cgroup.name).removesuffix(".slice")
        listed = systemctl("list-units", "--all", "--plain", "--no-legend", "--type=slice,scope")
        return [
            word for line in listed.splitlines() if (word := line.split()[0]).startswith(prefix)
        ]

    def leftovers(self) -> list[str]:
        found = super().leftovers()
        if found:
            return found
        if (TOP / slice_path(self.cgroup.name)).exists():
            return ["its slice"]
        return [f"unit {unit}" for unit in self.units()]

    def take_down(self) -> None:
        top = TOP / slice_path(self.cgroup.name)
        if top.exists():
            for path in sorted(top.rglob("cgroup.kill")):
                path.write_text("1\n")
        super().take_down()
        for unit in self.units():
            systemctl("stop", unit)


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
