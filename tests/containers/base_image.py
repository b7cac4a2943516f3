"""A base image made of Debian packages, for machines without a registry.

    python tests/containers/base_image.py TAG [PACKAGE...]

makes it and loads it into the engine of $DOCKER_HOST (or the default one). TAG has what is of use
here of python:3-slim (python3 with its venv module, a shell, busybox's tools) and the packages that
are named. TAG-build has the project's requirements as well, in /wheels, where its pip looks for
them and nowhere else. With the two the Dockerfile builds without a network:

    docker build --network none --build-arg BASE_IMAGE=TAG --build-arg BUILD_IMAGE=TAG-build .
"""

import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

from engine import DEFAULT_SOCKET, Engine, EngineUnavailable, running_socket, tool

ROOT: Final = Path(__file__).parent.parent.parent
SUITE: Final = "bookworm"
PYTHON: Final = "3.11"
"""The suite's python3: the wheels must be for it, whatever interpreter runs this."""

PACKAGES: Final = ("python3", "python3-venv", "libstdc++6", "dash", "busybox")
"""numpy's wheels need libstdc++6."""

WITHOUT: Final = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/perl*",
    "/usr/lib/*/perl*",
    "/usr/lib/*/libperl*",
    "/usr/lib/*/gconv/*",
    "/usr/bin/perl*",
)
MAKE_TIMEOUT_S: Final = 600.0

# The packages are unpacked and no more: what their scripts would do is done here. Python starts in
# half of the time when its modules are compiled.
_FINISH: Final = """
set -eu
cd "$1"
mkdir -p tmp var/tmp root proc sys dev run usr/local/bin
chmod 1777 tmp var/tmp
echo 'root:x:0:0:root:/root:/bin/sh' >etc/passwd
echo 'root:x:0:' >etc/group
chroot . /bin/busybox --install -s /usr/local/bin
# The directory has sources that are no valid Python, as test data.
chroot . python3 -m compileall -q -o 0 -o 2 /usr/lib/python@PYTHON@ || :
rm -rf var/lib/apt var/cache/apt var/log
"""

_DOCKERFILE: Final = """
FROM {tag}
COPY wheels /wheels
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_DISABLE_PIP_VERSION_CHECK=1
"""


def make_base(engine: Engine, tag: str, packages: Sequence[str] = ()) -> None:
    """Make the two images, with these packages. Raises EngineUnavailable, AssertionError."""
    with tempfile.TemporaryDirectory(prefix="memballoon-base-") as scratch:
        work = Path(scratch)
        tar, build = work / "tree.tar", work / "build"
        (work / "finish").write_text(_FINISH.replace("@PYTHON@", PYTHON), encoding="utf-8")
        with subprocess.Popen(_tree_command(tar, work / "finish", packages)) as making:
            _get_wheels(build / "wheels")
        if making.returncode:
            raise AssertionError(f"mmdebstrap ended with {making.returncode}")
        engine.docker("import", str(tar), tag)
        (build / "Dockerfile").write_text(_DOCKERFILE.format(tag=tag), encoding="utf-8")
        engine.docker("build", "--quiet", "--network", "none", "--tag", f"{tag}-build", str(build))


def _tree_command(tar: Path, finish: Path, packages: Sequence[str]) -> list[str]:
    """In namespaces of its own: whatever ends this, no mount and no process is left."""
    return [
        *(tool("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *(tool("mmdebstrap"), "--quiet", "--mode=root", "--variant=extract"),
        f"--include={','.join((*PACKAGES, *packages))}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in WITHOUT),
        f'--extract-hook=sh {shlex.quote(str(finish))} "$1"',
        *(SUITE, str(tar)),
    ]


def _get_wheels(directory: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["host"],
        *project["build-system"]["requires"],
    ]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"),
            *("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64"),
            *("--dest", str(directory), *needed),
        ],
        check=True,
        timeout=MAKE_TIMEOUT_S,
        stdout=subprocess.DEVNULL,
    )


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        make_base(_engine_of_user(), arguments[0], arguments[1:])
    except (EngineUnavailable, AssertionError, subprocess.SubprocessError) as error:
        print(f"base_image.py: {error}", file=sys.stderr)
        return 1
    return 0


def _engine_of_user() -> Engine:
    socket_path = running_socket()
    if socket_path is None:
        raise EngineUnavailable(f"none answers on $DOCKER_HOST or {DEFAULT_SOCKET}")
    config_dir = Path(os.environ.get("DOCKER_CONFIG", Path.home() / ".docker"))
    return Engine(socket_path, config_dir, cgroup_parent="")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
