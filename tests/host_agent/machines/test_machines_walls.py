"""A mock VM's workload tries to get out, or at others."""

import os
import socket
import sys
from pathlib import Path

import pytest
import trio
from machine_rig import MachineRig, until

from host_agent.machines.file_tree import interpreter_dirs, real_mounts
from host_agent.machines.process import ProcessBackend

pytestmark = pytest.mark.effects

NAMESPACES = ("mnt", "pid", "ipc", "uts", "net")


def test_namespaces_are_its_own(rig: MachineRig) -> None:
    async def main() -> None:
        async with rig.running(rig.spec("sleep", "60")) as machine:
            for name in NAMESPACES:
                own = os.readlink(f"/proc/{machine.init_pid}/ns/{name}")
                assert own != os.readlink(f"/proc/self/ns/{name}"), name

    trio.run(main)


def test_it_has_ipc_lock_and_no_other_capability(rig: MachineRig) -> None:
    found = trio.run(rig.output, "cat /proc/self/status")
    fields = dict(line.split(":\t", 1) for line in found.splitlines() if ":\t" in line)
    ipc_lock = f"{1 << 14:016x}"
    assert [fields[f"Cap{which}"] for which in ("Eff", "Prm", "Bnd")] == [ipc_lock] * 3
    assert [fields[f"Cap{which}"] for which in ("Inh", "Amb")] == ["0" * 16] * 2
    assert fields["NoNewPrivs"] == "1"


def test_it_sees_its_own_processes_and_name_alone(rig: MachineRig) -> None:
    found = trio.run(rig.output, "cat /proc/sys/kernel/hostname; echo /proc/[0-9]*")
    name, pids = found.splitlines()
    assert name == "vm1"
    assert len(pids.split()) <= 3


def test_it_has_no_network_but_its_loopback(rig: MachineRig) -> None:
    found = trio.run(rig.output, "cat /proc/net/dev; ls /sys/class/net")
    devices = [line.split(":")[0].strip() for line in found.splitlines() if ":" in line]
    assert devices == ["lo"]
    assert found.splitlines()[-1] == "lo"


def test_the_hosts_abstract_sockets_are_out_of_reach(rig: MachineRig) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{rig.cgroup.name}")
        listener.listen()
        script = f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{rig.cgroup.name}')"
        found = trio.run(rig.output, f'{sys.executable} -S -c "{script}"')
    assert "ConnectionRefusedError" in found


def test_it_reaches_its_own_channel_and_no_other_socket(rig: MachineRig) -> None:
    # The agent's control socket, the guest's channel, and another guest's.
    (rig.run_dir / "guests" / "vm1").mkdir(parents=True)
    (rig.run_dir / "guests" / "vm2").mkdir(parents=True)
    paths = [
        rig.run_dir / "control.sock",
        rig.run_dir / "guests" / "vm1" / "channel.sock",
        rig.run_dir / "guests" / "vm2" / "channel.sock",
    ]
    inside = [paths[0], rig.run_dir / "channel.sock", paths[2]]
    listeners = []
    for path in paths:
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(path))
        listeners[-1].listen()
    script = (
        "import socket, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: socket.socket(socket.AF_UNIX).connect(path); print('reached')\n"
        "    except OSError as error: print(type(error).__name__)\n"
    )

    async def main() -> str:
        spec = rig.spec(sys.executable, "-S", "-c", script, *map(str, inside))
        machine = await rig.backend.launch(spec)
        await machine.wait_exited()
        return spec.log_path.read_text()

    try:
        assert trio.run(main).split() == ["FileNotFoundError", "reached", "FileNotFoundError"]
    finally:
        for listener in listeners:
            listener.close()


def test_its_socket_directory_can_not_be_written(rig: MachineRig) -> None:
    found = trio.run(rig.output, f"cd {rig.run_dir}; touch x; rm -rf .vm; ln -s / y; ls -A")
    assert found.count("Read-only file system") >= 3
    assert found.splitlines()[-1] == ".vm"


def test_the_disk_is_its_own_and_writable(rig: MachineRig) -> None:
    script = (
        "echo one >/var/tmp/a && echo two >/tmp/b && ls -d /var/tmp/tmp/b && echo 3 >/dev/shm/c"
    )
    assert trio.run(rig.output, script) == "/var/tmp/tmp/b\n"
    disk = rig.base / "state" / "disks" / "vm1"
    assert (disk / "a").read_text() == "one\n"
    assert (disk / "tmp" / "b").read_text() == "two\n"


def test_hidden_directories_are_empty_inside(rig: MachineRig) -> None:
    # On the root file system: what lies in /tmp or /var/tmp is not seen anyway.
    hidden = Path("/etc/apt") if Path("/etc/apt").is_dir() else Path("/etc/ssl")
    rig.backend = ProcessBackend(hidden_dirs=(hidden, Path("/no/such/directory")))
    found = trio.run(rig.output, f"ls -A {hidden}; echo x >{hidden}/x; ls {rig.base / 'state'}")
    assert "Read-only file system" in found
    assert "No such file" in found
    assert len(found.splitlines()) == 2


@pytest.mark.parametrize(
    "path",
    ["/mbtest", "/etc/mbtest", "/usr/mbtest", "/root/mbtest", "/sys/mbtest", "/dev/mbtest"],
)
def test_the_hosts_files_can_not_be_written(rig: MachineRig, path: str) -> None:
    found = trio.run(rig.output, f"echo x >{path}")
    assert "Read-only file system" in found or "Permission denied" in found
    assert not Path(path).exists()


@pytest.mark.parametrize(
    "path",
    [
        "/proc/sys/vm/drop_caches",
        "/proc/sys/kernel/core_pattern",
        "/proc/sysrq-trigger",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ],
)
def test_the_kernels_switches_can_not_be_opened(rig: MachineRig, path: str) -> None:
    # opened for appending, nothing written: should it succeed, nothing happens
    found = trio.run(rig.output, f": >>{path} && echo open")
    assert "open\n" not in found.replace("cannot open", "")


def test_the_hosts_devices_are_not_there(rig: MachineRig) -> None:
    found = trio.run(rig.output, "ls /dev; mknod /tmp/sda b 8 0; echo $?")
    names = found.split()
    assert {"null", "zero", "urandom", "shm", "pts"} <= set(names)
    assert not [name for name in names if name.startswith(("sd", "vd", "nvme", "mem", "kmsg"))]
    assert names[-1] == "1"


@pytest.mark.parametrize(
    "attempt",
    [
        "umount /sys/fs/cgroup",
        "umount -l /run",
        "umount /proc/sys",
        "mount -o remount,rw /",
        "mount -o remount,rw,bind /sys/fs/cgroup",
        "mount -t tmpfs none /tmp",
        "mount --bind / /tmp",
        "unshare --mount true",
        "unshare --user true",
        "unshare --user --map-root-user --mount true",
        "unshare --user --keep-caps --mount --cgroup true",
        "unshare --cgroup true",
        "nsenter --target 1 --mount true",
        "nsenter --target 1 --pid true",
        "chroot /tmp true",
        "pivot_root / /tmp",
    ],
)
def test_the_walls_can_not_be_taken_down(rig: MachineRig, attempt: str) -> None:
    found = trio.run(rig.output, f"{attempt} && echo it worked; echo done")
    assert "it worked" not in found
    assert found.endswith("done\n")
    assert "not found" not in found


def test_no_call_makes_a_user_namespace(rig: MachineRig) -> None:
    # clone and clone3 by number, which no program of util-linux tries
    script = (
        "import ctypes, os, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "numbers = {'x86_64': (56, 272), 'aarch64': (220, 97)}[os.uname().machine]\n"
        "for number in (*numbers, 435, numbers[1] | 0x40000000):\n"
        "    child = libc.syscall(number, ctypes.c_ulong(0x10000000 | 17), 0, 0, 0, 0)\n"
        "    print(child, errno.errorcode[ctypes.get_errno()])\n"
        "pid = os.fork() or os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1])\n"
    )

    async def main() -> str:
        spec = rig.spec(sys.executable, "-S", "-c", script)
        await (await rig.backend.launch(spec)).wait_exited()
        return spec.log_path.read_text()

    assert trio.run(main).split() == ["-1", "EPERM"] * 2 + ["-1", "ENOSYS"] * 2 + ["0"]


def test_the_filter_stays_off_the_agent(rig: MachineRig) -> None:
    assert "Seccomp:\t2" in trio.run(rig.output, "cat /proc/self/status")
    for task in Path("/proc/self/task").iterdir():
        assert "Seccomp:\t0" in (task / "status").read_text()


def test_the_hosts_tree_is_not_mounted_anywhere(rig: MachineRig) -> None:
    found = trio.run(rig.output, "ls -A /dev/shm /run; cat /proc/self/mountinfo")
    points = [line.split()[4] for line in found.splitlines() if " - " in line]
    assert points[0] == "/"
    assert len(points) == len(set(points))
    assert found.startswith("/dev/shm:\n\n/run:")


def test_its_cgroup_is_seen_and_can_not_be_written(rig: MachineRig) -> None:
    limit = (
        "memory.limit_in_bytes" if (rig.cgroup / "memory.limit_in_bytes").exists() else "memory.max"
    )
    found = trio.run(
        rig.output,
        f"cd /sys/fs/cgroup; ls -d workload driver; cat workload/{limit}; echo 1 >{limit};"
        f"echo 1 >workload/{limit}; echo $$ >driver/cgroup.procs; mkdir x; ls /sys/fs/cgroup/..",
    )
    lines = found.splitlines()
    assert lines[:2] == ["driver", "workload"]
    assert lines[2].isdigit() or lines[2] == "max"
    assert found.count("Read-only file system") == 4


def test_no_descriptor_of_the_host_is_left_open(rig: MachineRig) -> None:
    async def main() -> None:
        spec = rig.spec("sleep", "60", driver_argv=("sleep", "61"))
        async with rig.running(spec) as machine:
            await until(lambda: sleepers() == 2, "workload and driver run")
            inside = [pid for pid in rig.processes() if "\t1\n" in ns_pids(pid) or inner(pid)]
            assert machine.init_pid in inside
            for pid in inside:
                for number in os.listdir(f"/proc/{pid}/fd"):
                    target = os.readlink(f"/proc/{pid}/fd/{number}")
                    assert "cgroup" not in target, (pid, target)
                    # The init alone keeps one, to tell the exit status.
                    assert pid == machine.init_pid or not target.startswith("pipe:"), (pid, target)

    def sleepers() -> int:
        names = [Path(f"/proc/{pid}/comm").read_text() for pid in rig.processes()]
        return names.count("sleep\n")

    def ns_pids(pid: int) -> str:
        return next(
            line + "\n"
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("NSpid:")
        )

    def inner(pid: int) -> bool:
        return len(ns_pids(pid).split()) > 2

    trio.run(main)


def test_what_python_needs_is_visible(rig: MachineRig) -> None:
    script = "import numpy, trio, protocol.units, guest_driver; print('fine')"
    found = trio.run(rig.output, f'{sys.executable} -OO -c "{script}"')
    assert found == "fine\n"
    assert Path(sys.prefix) in interpreter_dirs()


def test_other_file_systems_are_found_and_the_kernels_own_are_not() -> None:
    text = (
        "22 27 0:21 / /proc rw - proc proc rw\n"
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "28 27 8:1 / /srv/my\\040disk rw shared:1 - xfs /dev/sda1 rw\n"
        "29 27 0:9 / /home rw - btrfs /dev/sdb rw\n"
        "30 27 0:9 / /tmp/x rw - ext4 /dev/sdc rw\n"
        "31 27 0:9 / /var/lib/docker/x rw - overlay overlay rw\n"
        "32 27 0:9 / /home/back\\134slash rw - ext4 /dev/sdd rw\n"
    )
    assert real_mounts(text) == [
        Path("/home"),
        Path("/home/back\\slash"),
        Path("/srv/my disk"),
    ]
