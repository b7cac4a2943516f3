"""The VM's disk and kernel: built from Debian packages and wheels, kept in a cache.

The cache has one directory for each set of inputs, named by their hash: an image is either whole or
not there, and a change of the inputs makes another. The checkout is no part of it.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bed_errors import BedError
from bed_tools import tool

ROOT = Path(__file__).parent.parent.parent
SUITE = "bookworm"
PYTHON = "3.11"
"""The suite's python3: the wheels must be for it, whatever interpreter runs the bed."""

PACKAGES = ("python3", "util-linux", "mount", "procps")
KERNEL = "linux-image-cloud-amd64"
DISK_BYTES = 3 << 30
"""A sparse file; what isn't the system is room for the tests' own files."""

WITHOUT = ("doc", "man", "locale", "info", "lintian")
NOT_IN_THE_VM = ("memballoon", "mypy", "ruff")
"""The checkout itself, and tools whose verdict on the sources needs no VM."""

KEPT = 2
"""Images kept beside each other, for two branches with different inputs."""

BUILD_TIMEOUT_S = 900.0
LAYOUT = 1
"""To be raised when what an image consists of changes in a way that the hash doesn't see."""


@dataclass(frozen=True, slots=True)
class Image:
    """A directory of the cache."""

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


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "memballoon-vm"


def requirements() -> list[str]:
    """What the tests inside need, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    named = [*project["dependencies"], *optional["host"], *optional["dev"]]
    return sorted(requirement for requirement in named if not requirement.startswith(NOT_IN_THE_VM))


def inputs_hash() -> str:
    inputs = [str(LAYOUT), SUITE, PYTHON, *PACKAGES, KERNEL, str(DISK_BYTES), *requirements()]
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]


def image() -> Image:
    """The image for the inputs as they are now, built if need be. Raises BedError."""
    cache = cache_directory()
    wanted = Image(cache / inputs_hash())
    if wanted.directory.exists():
        os.utime(wanted.directory)
        return wanted
    if os.geteuid() != 0:
        raise BedError("building the image needs root: it is a tree of files that root owns")
    cache.mkdir(parents=True, exist_ok=True)
    with _only_builder(cache):
        if not wanted.directory.exists():
            _build(wanted, cache)
        _prune(cache)
    return wanted


@contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only the holder of the lock builds: these are of builds that were killed.
        for dead in cache.glob("building-*"):
            shutil.rmtree(dead)
        yield


def _build(wanted: Image, cache: Path) -> None:
    print(f"bed: building the VM's image in {wanted.directory} (once)", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as scratch:
        work = Path(scratch)
        made = Image(work / "image")
        made.directory.mkdir()
        tree = work / "tree"
        _make_tree(tree, work)
        _add_wheels(tree)
        _take_kernel(work, made)
        _make_disk(tree, made.disk)
        made.directory.rename(wanted.directory)


def _make_tree(tree: Path, work: Path) -> None:
    """A minimal Debian; the kernel's package is downloaded beside it, by the tree's own sources.

    In namespaces of its own: whatever ends this, no mount and no process is left.
    """
    fetch = (
        f'cd {shlex.quote(str(work))} && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" && '
        f"apt-get download -qq -o APT::Sandbox::User=root "
        f"$(apt-cache depends --important {KERNEL} | sed -n 's/.*Depends: //p' | head -n 1)"
    )
    _call(
        [
            *(tool("unshare"), "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(tool("mmdebstrap"), "--quiet", "--mode=root", "--variant=minbase"),
            f"--include={','.join(PACKAGES)}",
            *(f"--dpkgopt=path-exclude=/usr/share/{directory}/*" for directory in WITHOUT),
            f"--customize-hook={fetch}",
            *(SUITE, str(tree)),
        ],
        f"make a Debian {SUITE}",
    )


def _add_wheels(tree: Path) -> None:
    """Into the directory that Debian's python3 looks into; with bytecode, dear to make inside."""
    target = tree / f"usr/local/lib/python{PYTHON}/dist-packages"
    _call(
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
    _call(
        [
            *(tool("unshare"), "--mount", "--pid", "--fork", "--kill-child"),
            *("chroot", str(tree), "python3", "-m", "compileall", "-q", f"/{inside}"),
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
    _call([tool("dpkg-deb"), "-x", str(packages[0]), str(unpacked)], "unpack the kernel")
    [kernel] = (unpacked / "boot").glob("vmlinuz-*")
    [modules] = (unpacked / "lib" / "modules").iterdir()
    kernel.rename(made.kernel)
    modules.rename(made.modules)


def _make_disk(tree: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    _call(
        # No journal: the disk is a snapshot that nobody looks at after a crash.
        [tool("mkfs.ext4"), "-q", "-m", "0", "-O", "^has_journal", "-d", str(tree), str(disk)],
        "make the disk",
    )


def _prune(cache: Path) -> None:
    images = [path for path in cache.iterdir() if path.is_dir()]
    images.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in images[KEPT:]:
        shutil.rmtree(old)


def _call(command: Sequence[str], what: str, *, may_fail: bool = False) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise BedError(f"cannot {what}: not within {BUILD_TIMEOUT_S:.0f} s") from expired
    if done.returncode and not may_fail:
        lines = "\n  ".join(done.stdout.strip().splitlines()[-12:])
        raise BedError(f"cannot {what} (status {done.returncode}):\n  {lines}")
