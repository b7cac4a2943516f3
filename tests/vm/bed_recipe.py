"""What the VM's disk and kernel are made of, from Debian packages and wheels, and how.

Nothing but this file, and what pyproject.toml asks for, decides what an image is: both are hashed
for the image's name, so that any change here makes another image.
"""

import shlex
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bed_errors import BedError
from bed_tools import KEYRING, call, tool

ROOT = Path(__file__).parent.parent.parent
SUITE = "bookworm"
PYTHON = "3.11"
"""The suite's python3: the wheels must be for it, whatever interpreter runs the bed."""

PACKAGES = ("python3", "util-linux", "mount", "procps", "busybox-static")
MORE_PACKAGES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "engine": ("docker.io", "docker-compose", "systemd", "dbus"),
}
"""What each kind of image has beyond them. Where systemd is, it is the VM's init."""

MORE_MODULES = {"plain": (), "engine": ("overlay",)}
"""Of the kernel, beyond those for the disk and the ports."""

KERNEL = "linux-image-cloud-amd64"
DISK_BYTES = 3 << 30
"""A sparse file; what isn't the system is room for the tests' own files."""

WITHOUT = ("doc", "man", "locale", "info", "lintian")
NOT_IN_THE_VM = ("memballoon", "mypy", "ruff")
"""The checkout itself, and tools whose verdict on the sources needs no VM."""


@dataclass(frozen=True, slots=True)
class Image:
    """A directory with all that a VM is booted from."""

    directory: Path

    @property
    def disk(self) -> Path:
        """ext4, no partitions; to be opened as a snapshot, never written."""
        return self.directory / "root.ext4"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """lib/modules/<release> of the kernel's package."""
        return self.directory / "modules"

    @property
    def busybox(self) -> Path:
        """The static one, for the initial RAM disk; a machine's own may need libraries."""
        return self.directory / "busybox"


def requirements() -> list[str]:
    """What the tests inside need, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    named = [*project["dependencies"], *optional["host"], *optional["dev"]]
    return sorted(requirement for requirement in named if not requirement.startswith(NOT_IN_THE_VM))


def make(made: Image, work: Path, kind: str) -> None:
    """Into `made`'s directory, with `work` for what is on the way. Raises BedError."""
    made.directory.mkdir()
    tree = work / "tree"
    _make_tree(tree, work, (*PACKAGES, *MORE_PACKAGES[kind]))
    _add_wheels(tree)
    _take_kernel(work, made)
    shutil.copy(tree / "bin/busybox", made.busybox)
    _make_disk(tree, made.disk)


def _make_tree(tree: Path, work: Path, packages: Sequence[str]) -> None:
    """A minimal Debian; the kernel's package is downloaded beside it, by the tree's own sources.

    In namespaces of its own: whatever ends this, no mount and no process is left.
    """
    fetch = (
        f'cd {shlex.quote(str(work))} && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && '
        f"apt-get download -qq -o APT::Sandbox::User=root "
        f"$(apt-cache depends --important {KERNEL} | sed -n 's/.*Depends: //p' | head -n 1)"
    )
    call(
        [
            *(tool("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(tool("mmdebstrap"), "--quiet", "--mode=root", "--variant=minbase"),
            # Else it asks gpg, which needn't be there, on a machine that isn't a Debian.
            f"--keyring={KEYRING}",
            # The tree is whole or thrown away: no need to wait for the disk after each file.
            "--dpkgopt=force-unsafe-io",
            f"--include={','.join(packages)}",
            *(f"--dpkgopt=path-exclude=/usr/share/{directory}/*" for directory in WITHOUT),
            f"--customize-hook={fetch}",
            *(SUITE, str(tree)),
        ],
        f"make a Debian {SUITE}",
    )


def _add_wheels(tree: Path) -> None:
    """Into the directory that Debian's python3 looks into.

    With bytecode of these and of Python's own modules, dear to make inside: plain, and as -OO has
    it, which drivers run with.
    """
    target = tree / f"usr/local/lib/python{PYTHON}/dist-packages"
    call(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--root-user-action=ignore", "--no-compile", "--only-binary=:all:"),
            *("--python-version", PYTHON, "--implementation", "cp"),
            *("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64"),
            *("--target", str(target), *requirements()),
        ],
        "get the wheels",
    )
    inside = str(target.relative_to(tree))
    call(
        [
            *(tool("unshare"), "--mount", "--pid", "--fork", "--kill-child"),
            *("chroot", str(tree), "python3", "-m", "compileall", "-q", "-j", "0"),
            *("-o", "0", "-o", "2", f"/{inside}", f"/usr/lib/python{PYTHON}"),
        ],
        "compile the wheels",
        # Some packages carry sources that are no valid Python, as test data.
        may_fail=True,
    )


def _take_kernel(work: Path, made: Image) -> None:
    packages = list(work.glob("linux-image-*.deb"))
    if len(packages) != 1:
        raise BedError(f"{len(packages)} kernels were downloaded for {KERNEL}, not one")
    unpacked = work / "kernel"
    call([tool("dpkg-deb"), "-x", str(packages[0]), str(unpacked)], "unpack the kernel")
    [kernel] = (unpacked / "boot").glob("vmlinuz-*")
    [modules] = (unpacked / "lib" / "modules").iterdir()
    kernel.rename(made.kernel)
    modules.rename(made.modules)


def _make_disk(tree: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    call(
        # No journal: the disk is a snapshot that nobody looks at after a crash.
        [tool("mkfs.ext4"), "-q", "-m", "0", "-O", "^has_journal", "-d", str(tree), str(disk)],
        "make the disk",
    )
