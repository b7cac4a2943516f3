"""Compose of both generations: 1.29, and 2, which is a plugin of the docker client.

Debian 12 has the first as its package `docker-compose`, Debian 13 the second under the same name: a
static program. Where no plugin is installed, Debian 13's is downloaded into the engine's own
configuration and nothing else on the machine changes.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from base_image import ROOT
from engine import Engine, EngineUnavailable, tool

FILE: Final = ROOT / "docker-compose.yml"
PLUGIN_SUITE: Final = "trixie"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CALL_DEADLINE_S: Final = 300.0


class ComposeUnavailable(Exception):
    """This generation can't be had here; one line says why."""


@dataclass(frozen=True, slots=True)
class Compose:
    """One project of docker-compose.yml."""

    command: tuple[str, ...]
    engine: Engine
    project: str
    environment: Mapping[str, str]
    files: tuple[Path, ...] = (FILE,)

    def run(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """`docker compose ARGUMENTS` in this project."""
        done = subprocess.run(
            [
                *self.command,
                *(word for file in self.files for word in ("--file", str(file))),
                *("--project-name", self.project, *arguments),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CALL_DEADLINE_S,
            check=False,
            env=self.engine.client_environment(**self.environment),
        )
        if check and done.returncode:
            raise AssertionError(f"compose {' '.join(arguments)}: {done.stderr.strip()}")
        return done


def compose_command(engine: Engine, generation: int) -> tuple[str, ...]:
    """How to call Compose of that generation. Raises ComposeUnavailable."""
    return _old() if generation == 1 else _plugin(engine)


def _old() -> tuple[str, ...]:
    try:
        program = tool("docker-compose")
    except EngineUnavailable as error:
        raise ComposeUnavailable(str(error)) from error
    if not (version := _version(program)).startswith("1."):
        raise ComposeUnavailable(f"docker-compose is {version or 'broken'} here, not 1.29")
    return (program,)


def _plugin(engine: Engine) -> tuple[str, ...]:
    command = (tool("docker"), "compose")
    environment = engine.client_environment()
    if not _version(*command, environment=environment).startswith("2."):
        plugins = engine.config_dir / "cli-plugins"
        plugins.mkdir(exist_ok=True)
        _download("docker-compose", "usr/libexec/docker/cli-plugins/docker-compose", plugins)
        if not (version := _version(*command, environment=environment)).startswith("2."):
            raise ComposeUnavailable(f"the plugin that was downloaded says {version!r}")
    return command


def _version(*command: str, environment: Mapping[str, str] = os.environ) -> str:
    done = subprocess.run(
        [*command, "version", "--short"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.stdout.strip().removeprefix("v")


def _download(package: str, member: str, directory: Path) -> None:
    """One file of a newer Debian's package, by apt with lists and a cache of its own."""
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise ComposeUnavailable("no Compose 2, and no Debian's apt-get to download it with")
    with tempfile.TemporaryDirectory(prefix="memballoon-apt-") as scratch:
        work = Path(scratch)
        for name in ("lists/partial", "cache/archives/partial", "parts", "tree"):
            (work / name).mkdir(parents=True)
        source = f"deb [signed-by={KEYRING}] {_mirror()} {PLUGIN_SUITE} main\n"
        (work / "sources.list").write_text(source, encoding="utf-8")
        options = {
            "APT::Sandbox::User": "root",
            "Dir::Etc::sourcelist": work / "sources.list",
            "Dir::Etc::sourceparts": work / "parts",
            "Dir::Etc::preferencesparts": work / "parts",
            "Dir::State::lists": work / "lists",
            "Dir::Cache": work / "cache",
        }
        apt = ("apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items()))
        for call in ((*apt, "update"), (*apt, "download", package)):
            done = subprocess.run(call, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or "silent").splitlines()[-1]
                raise ComposeUnavailable(f"Compose 2 can't be downloaded: {last}")
        [archive] = work.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "tree")], check=True)
        shutil.move(work / "tree" / member, directory)


def _mirror() -> str:
    """The machine's own Debian archive."""
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    for address in done.stdout.split():
        if address.rstrip("/").endswith("/debian"):
            return address
    raise ComposeUnavailable("no Compose 2, and no Debian archive among the sources of apt")
