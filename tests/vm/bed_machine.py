"""The VM as a machine: QEMU, what it is made of, its ports, and its end.

What leaves or enters the VM does so by virtio-serial ports. Each is a Unix socket that QEMU
connects to. QEMU is a child that the kernel kills with us.
"""

import os
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bed_checkout import add_checkout
from bed_initrd import MODULES, Initrd, module_files
from bed_recipe import Image
from bed_tools import tool

PORTS = ("output", "errors", "status")
"""Of every machine: what the command prints, that it has begun, and its exit status."""

MONITOR = "monitor"
BALLOON_MODULE = "virtio_balloon"

TCG_CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"
"""x86-64-v2, which NumPy's wheels ask for. `max` makes mlock seven times slower. Kernel 6.12 would
crash at boot under QEMU 7.2's TCG unless cx16 is taken away."""

KERNEL_OPTIONS = "console=ttyS0 loglevel=4 panic=-1 psi=1 mitigations=off apparmor=0 rdinit=/init"
"""Nobody in there has secrets, and each return through a retpoline is dear to emulate. Where
AppArmor is, an engine wants its tools as well."""

_QUIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: int
    memory_mib: int
    accelerator: str
    own_clock: bool = False
    """Time in the VM passes with its instructions, 1 ns each: see _accelerator."""

    console: Path | None = None
    """Where the kernel's messages are to be kept."""

    ports: tuple[str, ...] = ()
    """Further ones, both ways: /bed/NAME inside."""

    has_monitor: bool = False
    """QEMU's (QMP), as MONITOR."""

    has_balloon: bool = False
    """QEMU's own balloon device."""

    modules: tuple[str, ...] = ()
    """Of the kernel, to be loaded at its start beside those that it needs."""


@dataclass(frozen=True, slots=True)
class Started:
    """A machine that QEMU was started for; nothing says that it has booted."""

    qemu: "subprocess.Popen[bytes]"
    listeners: dict[str, socket.socket]
    """By the port's name, and MONITOR: QEMU connects at once and once."""

    console: Path

    def connection(self, name: str, timeout_s: float) -> socket.socket:
        """QEMU's end of a port or the monitor; the caller closes it. Raises TimeoutError."""
        self.listeners[name].settimeout(timeout_s)
        return self.listeners[name].accept()[0]

    def end(self) -> None:
        """Its disk is a snapshot: nothing is lost by an abrupt end."""
        if self.qemu.poll() is None:
            self.qemu.terminate()
            try:
                self.qemu.wait(_QUIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.qemu.kill()
        self.qemu.wait()


@contextmanager
def started(
    image: Image, machine: Machine, argv: Sequence[str], env: Sequence[str]
) -> Iterator[Started]:
    """A machine that boots and runs a command; ended with the block. Raises BedError."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memballoon-vm-")))
        initrd = scratch / "initrd"
        initrd.write_bytes(_initrd(image, machine, argv, env))
        console = machine.console or scratch / "console"
        names = (*PORTS, *machine.ports, *((MONITOR,) if machine.has_monitor else ()))
        listeners = {name: _listen(scratch / name, stack) for name in names}
        qemu = subprocess.Popen(
            _qemu(image, machine, initrd, scratch, console),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # It keeps the snapshot there; killed early, it wouldn't remove it.
            env={**os.environ, "TMPDIR": str(scratch)},
            # Ctrl-C is for us: we end it, after its output has been read.
            start_new_session=True,
        )
        made = Started(qemu, listeners, console)
        stack.callback(made.end)
        yield made


def _initrd(image: Image, machine: Machine, argv: Sequence[str], env: Sequence[str]) -> bytes:
    initrd = Initrd()
    initrd.add("init", (Path(__file__).parent / "bed_guest_init.sh").read_bytes(), 0o755)
    initrd.add("bin/busybox", image.busybox.read_bytes(), 0o755)
    modules = (*MODULES, *machine.modules, *((BALLOON_MODULE,) if machine.has_balloon else ()))
    for order, module in enumerate(module_files(image.modules, modules)):
        initrd.add(f"modules/{order:02}-{module.name}", module.read_bytes())
    is_slow = machine.accelerator == "tcg" and not machine.own_clock
    slow = ["MEMBALLOON_SLOW_MACHINE=1"] if is_slow else []
    # Unbuffered: of a run that never ends, all is seen up to where it hangs.
    always = ("MEMBALLOON_IN_VM=1", "PYTHONUNBUFFERED=1")
    exports = [f"export {shlex.quote(entry)}" for entry in (*always, *slow, *env)]
    command = "\n".join([*exports, f"exec {shlex.join(argv)}", ""])
    initrd.add("command", command.encode())
    add_checkout(initrd)
    return bytes(initrd)


def _qemu(image: Image, machine: Machine, initrd: Path, scratch: Path, console: Path) -> list[str]:
    ports = [
        argument
        for name in (*PORTS, *machine.ports)
        for argument in (
            *("-chardev", f"socket,id={name},path={scratch / name}"),
            *("-device", f"virtserialport,chardev={name},name={name}"),
        )
    ]
    monitor = (
        *("-chardev", f"socket,id={MONITOR},path={scratch / MONITOR}"),
        *("-mon", f"chardev={MONITOR},mode=control"),
    )
    return [
        *(tool("setpriv"), "--pdeathsig", "KILL", tool("qemu-system-x86_64")),
        *_accelerator(machine),
        *("-smp", str(machine.cpus), "-m", f"{machine.memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-nic", "none", "-display", "none"),
        *("-serial", f"file:{console}"),
        *("-kernel", str(image.kernel), "-initrd", str(initrd)),
        *("-append", KERNEL_OPTIONS),
        *("-drive", f"file={image.disk},format=raw,if=virtio,snapshot=on,cache=unsafe"),
        *("-device", "virtio-serial-pci", *ports),
        *(monitor if machine.has_monitor else ()),
        *(("-device", "virtio-balloon-pci") if machine.has_balloon else ()),
    ]


def _accelerator(machine: Machine) -> tuple[str, ...]:
    """KVM; or TCG with the host's clock; or TCG with its own.

    By the host's clock an emulated machine is ten times slower than any real one, and misses every
    deadline that is meant for those. By its own it is an ordinary machine that takes longer to run;
    it has one processor, as Linux doesn't get a second one started under -icount.
    """
    if machine.accelerator == "kvm":
        return "-accel", "kvm", "-cpu", "host"
    if machine.own_clock:
        return "-accel", "tcg,thread=single,tb-size=512", "-cpu", TCG_CPU, "-icount", "shift=0"
    return "-accel", "tcg,thread=multi,tb-size=512", "-cpu", TCG_CPU


def _listen(path: Path, stack: ExitStack) -> socket.socket:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen(1)
    return listener
