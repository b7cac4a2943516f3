"""The shell scripts of a mock VM: who starts it, what sets it up, and what is its process 1.

Three stages, POSIX sh and util-linux alone, no interpreter to be loaded (a mock VM is ready in
tens of milliseconds, and its init has 0.1 MiB of its own):

supervisor  on the host, in the driver's cgroup: makes the namespaces, waits for their end, and
            writes down the exit status. It outlives the agent.
setup       first process of the pid namespace, still with all rights: builds the VM's file tree
            beside the host's, changes into it, gives up every capability but IPC_LOCK.
init        what setup becomes: runs the driver (again and again) and the workload, reaps orphans,
            ends with the workload. It has moved the workload into its own cgroup before the
            workload's program is loaded, so nothing of it is charged to the driver.

On descriptor 3 the launching agent hears "pid N", then "failed TEXT" or "ready". Descriptor 4 is
the workload's cgroup.procs, opened while the host's files could still be seen. Both are closed
before anything of the guest runs.

The file tree: the host's root without what is mounted on it, read-only; more mounts read-only where
asked for; /proc, /sys, /dev, /run of its own; the VM's disk at /var/tmp and /tmp. It is entered by
pivot_root and the host's tree is unmounted, so there is nothing beneath to be uncovered.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from host_agent.machines.base import MachineSpec

ROOT_DIR: Final = ".root"
"""Where the VM's tree is put together; an empty directory to everybody else."""

EXIT_FILE: Final = ".exit"

RESPAWN_DELAY_S: Final = 1
"""A driver that can't start must not eat the processor."""

OWN_TREES: Final = tuple(
    map(Path, ("/proc", "/sys", "/dev", "/run", "/var/run", "/tmp", "/var/tmp"))
)
"""Where the VM has something else than the host."""

_SUPERVISOR: Final = """
exec 3>&1 1>&2
echo $$ >@DRIVER_PROCS@ || { echo "failed can't join the driver's cgroup" >&3; exit 125; }
unshare --mount --propagation private --pid --fork --kill-child --ipc --uts --net \
    -- sh -c @SETUP@ memballoon-setup 4>@WORKLOAD_PROCS@
echo $? >@EXIT_FILE@
"""

_SETUP: Final = """
set -eu
# /proc is still the host's: so this is our pid as the host sees it.
read -r pid rest </proc/self/stat
echo "pid $pid" >&3

echo @NAME@ >/proc/sys/kernel/hostname
ip link set lo up 2>/dev/null || :

root=@ROOT@
mount --bind -o ro,nodev,nosuid / "$root"
@READ_ONLY_MOUNTS@
mount -t proc -o nodev,nosuid,noexec proc "$root/proc"
# Root may write here without any capability, and would change the host.
for name in sys sysrq-trigger irq bus fs; do
    [ ! -e "$root/proc/$name" ] || mount --bind -o ro "$root/proc/$name" "$root/proc/$name"
done
mount -t sysfs -o ro,nodev,nosuid,noexec sysfs "$root/sys"
mount --bind -o ro @CGROUP@ "$root/sys/fs/cgroup"

# A device of the host's could be opened by root without any capability, the disk included.
mount -t tmpfs -o mode=755,nosuid,noexec dev "$root/dev"
for name in null zero full random urandom tty; do
    : >"$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir -m 1777 "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"

mount -t tmpfs -o mode=755,nodev,nosuid run "$root/run"
mkdir "$root/run/host"
mount --bind -o nodev,nosuid @DISK@ "$root/var/tmp"
mount --bind -o nodev,nosuid @DISK@/tmp "$root/tmp"
@LATER_MOUNTS@
printf %s @INIT@ >"$root/run/init"

cd "$root"
pivot_root . run/host
umount -l /run/host
rmdir /run/host
cd /
exec setpriv --bounding-set=-all,+ipc_lock --inh-caps=-all --ambient-caps=-all --clear-groups \
    --no-new-privs -- sh /run/init
"""

_INIT: Final = """
workload= stopping=
trap 'stopping=1; [ -z "$workload" ] || kill -TERM "$workload"' TERM

runs() {
    case $1 in
    */*) [ -f "$1" ] && [ -x "$1" ] ;;
    *)  (
            IFS=:
            for dir in $PATH; do [ -f "$dir/$1" ] && [ -x "$dir/$1" ] && exit 0; done
            exit 1
        ) ;;
    esac
}

set -- @COMMAND@
if ! runs "$1"; then
    echo "failed no program $1 in the mock VM" >&3
    exit 127
fi
(
    echo 0 >&4 || { echo "failed can't join the workload's cgroup" >&3; exit 126; }
    echo ready >&3
    exec "$@" 3>&- 4>&-
) &
workload=$!
exec 3>&- 4>&-
[ -z "$stopping" ] || kill -TERM "$workload"
@DRIVER_LOOP@
while :; do
    wait "$workload"
    status=$?
    # A signal to us ends the wait as well: then the workload is still there.
    kill -0 "$workload" 2>/dev/null || exit "$status"
done
"""

_DRIVER_LOOP: Final = """
while :; do
    @DRIVER@
    echo "memballoon: the driver ended ($?), again in @DELAY@ s" >&2
    sleep @DELAY@
done &
"""


@dataclass(frozen=True, slots=True)
class FileTree:
    """What else of the host's files a mock VM sees or does not see."""

    read_only: tuple[Path, ...] = ()
    """Directories shown read-only at their own place: other file systems, or parts of OWN_TREES."""
    hidden: tuple[Path, ...] = ()
    """Directories that are empty inside."""


def supervisor_script(spec: MachineSpec, tree: FileTree) -> str:
    """The whole, for `sh -c`: its stdout is what the agent hears, its stderr the log."""
    return _fill(
        _SUPERVISOR,
        DRIVER_PROCS=_quote(spec.driver_procs),
        WORKLOAD_PROCS=_quote(spec.workload_procs),
        EXIT_FILE=_quote(spec.socket_dir / EXIT_FILE),
        SETUP=shlex.quote(_setup_script(spec, tree)),
    )


def is_own_tree(path: Path) -> bool:
    """Whether the VM has something of its own where the host has `path`."""
    return any(path.is_relative_to(own) for own in OWN_TREES)


def _setup_script(spec: MachineSpec, tree: FileTree) -> str:
    early = [_bind(path) for path in tree.read_only if not is_own_tree(path)]
    later = [_bind(path) for path in tree.read_only if is_own_tree(path)]
    later += [
        f'[ ! -d "$root"{_quote(path)} ] || '
        f'mount -t tmpfs -o ro,mode=755,size=4k hidden "$root"{_quote(path)}'
        for path in tree.hidden
    ]
    # Last: the agent's run directory may lie in a directory that is shown or hidden.
    later.append(_bind(spec.socket_dir, spec.run_dir))
    return _fill(
        _SETUP,
        NAME=shlex.quote(spec.name),
        ROOT=_quote(spec.socket_dir / ROOT_DIR),
        CGROUP=_quote(spec.cgroup_dir),
        DISK=_quote(spec.disk_dir),
        READ_ONLY_MOUNTS="\n".join(early),
        LATER_MOUNTS="\n".join(later),
        INIT=shlex.quote(_init_script(spec)),
    )


def _init_script(spec: MachineSpec) -> str:
    loop = ""
    if spec.driver_argv:
        loop = _fill(_DRIVER_LOOP, DRIVER=_join(spec.driver_argv), DELAY=str(RESPAWN_DELAY_S))
    return _fill(_INIT, COMMAND=_join(spec.command), DRIVER_LOOP=loop)


def _bind(source: Path, place: Path | None = None) -> str:
    """Shell line that shows `source` read-only at `place` inside."""
    target = f'"$root"{_quote(place or source)}'
    return (
        f"[ -e {target} ] || mkdir -p {target}\n"
        f"mount --bind -o ro,nodev,nosuid {_quote(source)} {target}"
    )


def _fill(template: str, **values: str) -> str:
    """Replace each @NAME@, in one pass: what is filled in is never looked at again."""
    return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], template)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))


def _join(argv: Sequence[str]) -> str:
    return shlex.join(argv)
