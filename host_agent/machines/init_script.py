"""The shell scripts of a mock VM: who starts it, what sets it up, and what is its process 1.

Three stages, POSIX sh and util-linux alone, no interpreter to be loaded (a mock VM is ready in
tens of milliseconds, and its init has 0.1 MiB of its own):

supervisor  on the host, in the driver's cgroup: makes the namespaces, waits for their end, and
            writes down the exit status. It outlives the agent.
setup       first process of the pid namespace, still with all rights: mounts the VM's file tree
            (see file_tree.py), changes into it, gives up every capability but IPC_LOCK.
init        what setup becomes: runs the driver (again and again) and the workload, reaps orphans,
            ends with the workload. It has moved the workload into its own cgroup before the
            workload's program is loaded, so nothing of it is charged to the driver.

On descriptor 3, a socket, the launching agent hears "pid N", answers with a line, and hears "ready"
or "failed TEXT". Then it has a driver forked, whose lifeline the other end becomes
(driver_template.py), and says "forked"; or it says nothing and closes its end. When that end is
closed for good there is no driver, and the init starts one, again and again. Descriptor 4 is the
workload's cgroup.procs, opened while the host's files could still be seen. On descriptor 5 the init
tells the supervisor the workload's exit status at the end: it tells nothing if it was killed. None
of them reaches a driver that the init starts, or the workload.

A driver that comes from outside, for a container that an engine makes, has the same stages but the
workload's: `write_outside_scripts`. It does not wait for the container: its supervisor hears the
host's pid of the container's process 1 on descriptor 0 when there is one, and puts a leash there, a
process that the kernel ends with the container's pid namespace, whether or not an agent is there.
Supervisor, driver and leash are one process group: each takes the others with it.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from host_agent.machines.base import MachineSpec

RESPAWN_DELAY_S: Final = 1
"""A driver that can't start must not eat the processor."""

_SUPERVISE: Final = """
exec 3>&1 1>&2
echo $$ >@DRIVER_PROCS@ || { echo "failed can't join the driver's cgroup" >&3; exit 125; }
# unshare's own status is of no use: when the init is killed, version 2.38 ends with 1.
status=$(unshare --mount --propagation private --pid --fork --kill-child --ipc --uts --net \
    -- sh @SETUP_FILE@ 4>@WORKLOAD_PROCS@ 5>&1 1>&2)
echo "$status" >@EXIT_FILE@
"""

_SETUP: Final = """
set -eu
# /proc is still the host's: so this is our pid as the host sees it.
read -r pid rest </proc/self/stat
echo "pid $pid" >&3
# The agent answers when it has hold of us; without it there shall be no VM.
read -r answer <&3
exec </dev/null
@OWN_NAMES@
# Without mtab, mount and umount leave no /run/mount behind, on whichever /run it would be.
mount --no-mtab --all --fstab @FSTAB_FILE@
cd @ROOT@
pivot_root . dev/shm
umount --no-mtab --lazy /dev/shm
cd /
exec setpriv --bounding-set=-all,+ipc_lock --inh-caps=-all --ambient-caps=-all --clear-groups \
    --no-new-privs -- sh @INIT_FILE@
"""

_OWN_NAMES: Final = """
echo @NAME@ >/proc/sys/kernel/hostname
ip link set lo up 2>/dev/null || :
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
    exec "$@" 3>&- 4>&- 5>&-
) &
workload=$!
exec 4>&-
[ -z "$stopping" ] || kill -TERM "$workload"
@DRIVER_LOOP@
exec 3>&-
while :; do
    wait "$workload"
    status=$?
    # A signal to us ends the wait as well: then the workload is still there.
    kill -0 "$workload" 2>/dev/null || break
done
echo "$status" >&5
"""

_DRIVER_LOOP: Final = """
{
    if read -r forked <&3; then
        read -r ended <&3
        echo "memballoon: the driver ended, another one in @DELAY@ s" >&2
        sleep @DELAY@
    fi
    exec 3>&-
    while :; do
        @DRIVER@
        echo "memballoon: the driver ended ($?), again in @DELAY@ s" >&2
        sleep @DELAY@
    done
} 5>&- &
"""

_SUPERVISE_OUTSIDE: Final = """
exec 3>&1 1>&2
echo $$ >@DRIVER_PROCS@ || { echo "failed can't join the driver's cgroup" >&3; exit 125; }
{
    unshare --mount --propagation private --pid --fork --kill-child --ipc --uts --net \
        -- sh @SETUP_FILE@
    kill -KILL 0
} &
exec 3>&-
read -r init || kill -KILL 0
# Nobody's and without rights: what is in the container may see it, and it may do nothing.
nsenter --target "$init" --pid -- setpriv --reuid=65534 --regid=65534 --clear-groups \
    --inh-caps=-all --bounding-set=-all --no-new-privs -- sleep infinity
kill -KILL 0
"""

_INIT_OUTSIDE: Final = """
echo ready >&3
@DRIVER_LOOP@
exec 3>&-
wait
"""


@dataclass(frozen=True, slots=True)
class Workshop:
    """The backend's own files of one mock VM, in its socket directory: they end with that."""

    directory: Path
    """The host's path. The VM sees it too, read-only; there is nothing in it that it may not."""

    @classmethod
    def of(cls, socket_dir: Path) -> Self:
        """That of the mock VM with this socket directory."""
        return cls(socket_dir / ".vm")

    @property
    def root(self) -> Path:
        """Where the VM's tree is put together; an empty directory to everybody else."""
        return self.directory / "root"

    @property
    def dev(self) -> Path:
        """What becomes its /dev."""
        return self.directory / "dev"

    @property
    def exit_file(self) -> Path:
        """The exit status, written by the supervisor at the end."""
        return self.directory / "exit"

    @property
    def supervise_file(self) -> Path:
        """Script of the first stage."""
        return self.directory / "supervise"

    @property
    def setup_file(self) -> Path:
        """Script of the second stage."""
        return self.directory / "setup"

    @property
    def init_file(self) -> Path:
        """Script of the third stage."""
        return self.directory / "init"

    @property
    def fstab_file(self) -> Path:
        """All mounts of the VM, in order: one process makes them all."""
        return self.directory / "fstab"


def write_scripts(spec: MachineSpec) -> None:
    """Write the three scripts into the workshop, which exists. Raises OSError."""
    shop = Workshop.of(spec.socket_dir)
    supervise = _fill(
        _SUPERVISE,
        DRIVER_PROCS=_quote(spec.driver_procs),
        WORKLOAD_PROCS=_quote(spec.workload_procs),
        EXIT_FILE=_quote(shop.exit_file),
        SETUP_FILE=_quote(shop.setup_file),
    )
    init = _fill(_INIT, COMMAND=shlex.join(spec.command), DRIVER_LOOP=_driver_loop(spec))
    shop.supervise_file.write_text(supervise, encoding="utf-8")
    shop.setup_file.write_text(_setup(spec, _OWN_NAMES), encoding="utf-8")
    shop.init_file.write_text(init, encoding="utf-8")


def write_outside_scripts(spec: MachineSpec) -> None:
    """Write the scripts of a driver from outside into the workshop. Raises OSError."""
    shop = Workshop.of(spec.socket_dir)
    supervise = _fill(
        _SUPERVISE_OUTSIDE,
        DRIVER_PROCS=_quote(spec.driver_procs),
        SETUP_FILE=_quote(shop.setup_file),
    )
    init = _fill(_INIT_OUTSIDE, DRIVER_LOOP=_driver_loop(spec))
    shop.supervise_file.write_text(supervise, encoding="utf-8")
    shop.setup_file.write_text(_setup(spec, ""), encoding="utf-8")
    shop.init_file.write_text(init, encoding="utf-8")


def _setup(spec: MachineSpec, own_names: str) -> str:
    shop = Workshop.of(spec.socket_dir)
    return _fill(
        _SETUP,
        OWN_NAMES=_fill(own_names, NAME=shlex.quote(spec.name)),
        ROOT=_quote(shop.root),
        FSTAB_FILE=_quote(shop.fstab_file),
        # The VM sees its socket directory where the agent's run directory is.
        INIT_FILE=_quote(Workshop.of(spec.run_dir).init_file),
    )


def _driver_loop(spec: MachineSpec) -> str:
    if not spec.driver_argv:
        return ""
    return _fill(_DRIVER_LOOP, DRIVER=shlex.join(spec.driver_argv), DELAY=str(RESPAWN_DELAY_S))


def _fill(template: str, **values: str) -> str:
    """Replace each @NAME@, in one pass: what is filled in is never looked at again."""
    return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], template)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
