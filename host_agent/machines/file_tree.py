"""The files that a mock VM sees, as the list of its mounts.

The host's root without what is mounted on it, and its other real file systems, read-only; /proc,
/sys, /dev and /run of its own; its disk at /var/tmp and /tmp; its own cgroup; its own channel's
directory in the place of the agent's run directory. It is put together beside the host's tree and
entered by pivot_root, and the host's tree is unmounted: there is nothing beneath to be uncovered.

Hazards that read-only alone does not answer, since root in there is root by number: device nodes
(the disk), sockets in /run (a container engine's), /proc/sys. So /dev and /run are not the host's,
the root is mounted without devices, and the writable parts of /proc are bound read-only.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import protocol
from host_agent.machines.base import MachineSpec
from host_agent.machines.init_script import Workshop

OWN_TREES: Final = tuple(
    map(Path, ("/proc", "/sys", "/dev", "/run", "/var/run", "/tmp", "/var/tmp"))
)
"""Where the VM has something else than the host."""

SKIPPED_TYPES: Final = frozenset(
    {
        *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts"),
        *("devtmpfs", "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "overlay", "proc"),
        *("pstore", "ramfs", "rpc_pipefs", "securityfs", "squashfs", "sysfs", "tmpfs", "tracefs"),
    }
)
"""File systems of the kernel's or of containers' making: nothing there is for a mock VM."""

DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")

DEV_LINKS: Final = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}

READ_ONLY_IN_PROC: Final = ("sys", "sysrq-trigger", "irq", "bus", "fs")
"""Root may write there without any capability, and would change the host."""


def prepare(spec: MachineSpec) -> None:
    """Make the directories of a mock VM, and what mounts need to stand on. Raises OSError."""
    shop = Workshop.of(spec.socket_dir)
    shop.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("shm", "pts"):
        (shop.dev / name).mkdir(parents=True, exist_ok=True)
    for name in DEVICES:
        (shop.dev / name).touch()
    for name, target in DEV_LINKS.items():
        link = shop.dev / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    shop.exit_file.unlink(missing_ok=True)
    spec.log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = spec.disk_dir / "tmp"
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    for shared in (spec.disk_dir, scratch):
        shared.chmod(0o1777)


def write_fstab(
    spec: MachineSpec, mountinfo: str, hidden: Iterable[Path], shown: Iterable[Path]
) -> None:
    """Write the list of mounts into the workshop, for `mount --all`. Raises OSError.

    `mountinfo` is the text of the host's /proc/self/mountinfo (proc(5)). `hidden` directories are
    empty inside; `shown` ones are visible though they lie in one of OWN_TREES.
    """
    lines = _lines(spec, mountinfo, tuple(hidden), tuple(shown))
    Workshop.of(spec.socket_dir).fstab_file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def interpreter_dirs() -> tuple[Path, ...]:
    """What this Python needs to run the driver: it may live in a place that the VM does not see."""
    project = Path(protocol.__file__).resolve().parent.parent
    executable = Path(sys.executable)
    found = {Path(sys.prefix), Path(sys.base_prefix), project, executable.parent}
    found |= {path.resolve() for path in found} | {executable.resolve().parent}
    return tuple(sorted(found))


def real_mounts(mountinfo: str) -> list[Path]:
    """Mount points of the host's other real file systems, parents before children."""
    found = set()
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_unescaped(before.split()[4]))
        own = any(map(point.is_relative_to, OWN_TREES))
        if after.split()[0] not in SKIPPED_TYPES and not own and point != Path("/"):
            found.add(point)
    return sorted(found)


def _lines(
    spec: MachineSpec, mountinfo: str, hidden: tuple[Path, ...], shown: tuple[Path, ...]
) -> Iterator[str]:
    shop = Workshop.of(spec.socket_dir)

    def inside(path: Path | str) -> Path:
        return Path(f"{shop.root}{path}")

    def bind(source: Path, place: Path | str, options: str = "ro,nodev,nosuid") -> str:
        return _line(source, inside(place), "none", f"bind,{options}")

    yield bind(Path("/"), "")
    for point in real_mounts(mountinfo):
        if point.is_dir() and not any(map(point.is_relative_to, hidden)):
            yield bind(point, point)
    for path in hidden:
        if path.is_dir() and not any(map(path.is_relative_to, OWN_TREES)):
            yield _line("hidden", inside(path), "tmpfs", "ro,mode=755,size=4k")
    yield _line("proc", inside("/proc"), "proc", "nodev,nosuid,noexec")
    for name in READ_ONLY_IN_PROC:
        if Path("/proc", name).exists():
            yield _line(inside(f"/proc/{name}"), inside(f"/proc/{name}"), "none", "bind,ro")
    yield _line("sysfs", inside("/sys"), "sysfs", "ro,nodev,nosuid,noexec")
    yield bind(spec.cgroup_dir, "/sys/fs/cgroup")
    yield bind(shop.dev, "/dev", "ro,nosuid,noexec")
    for name in DEVICES:
        yield bind(Path("/dev", name), f"/dev/{name}", "nosuid,noexec")
    yield _line("shm", inside("/dev/shm"), "tmpfs", "mode=1777,nodev,nosuid")
    yield _line("devpts", inside("/dev/pts"), "devpts", "mode=620,ptmxmode=666,nosuid,noexec")
    yield _line("run", inside("/run"), "tmpfs", "mode=755,nodev,nosuid")
    yield bind(spec.disk_dir, "/var/tmp", "nodev,nosuid")
    yield bind(spec.disk_dir / "tmp", "/tmp", "nodev,nosuid")
    for path in _outermost(shown):
        yield bind(path, path, "ro,nodev,nosuid,X-mount.mkdir")
    # Last: the agent's run directory may lie in a directory that is shown.
    yield bind(spec.socket_dir, spec.run_dir, "ro,nodev,nosuid,X-mount.mkdir")


def _outermost(paths: tuple[Path, ...]) -> list[Path]:
    """Those in OWN_TREES, without those below another one: they come with it."""
    own = {path for path in paths if any(path.is_relative_to(tree) for tree in OWN_TREES)}
    return sorted(path for path in own if not own & set(path.parents))


def _line(source: Path | str, target: Path, fs_type: str, options: str) -> str:
    return f"{_escaped(str(source))} {_escaped(str(target))} {fs_type} {options} 0 0"


def _escaped(text: str) -> str:
    """Text as a field of fstab(5)."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\#" else char for char in text)


def _unescaped(field: str) -> str:
    """A field of mountinfo as text."""
    for char in " \t\n#":
        field = field.replace(f"\\{ord(char):03o}", char)
    return field.replace("\\134", "\\")
