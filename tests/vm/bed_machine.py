"""One run of the VM: QEMU, its ports, its deadline, and its end.

The command's output, its errors and its status leave the VM by a virtio-serial port each. Each is a
Unix socket that QEMU connects to. QEMU is a child that the kernel kills with us.
"""

import selectors
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bed_checkout import add_checkout
from bed_errors import BedError
from bed_image import Image
from bed_initrd import Initrd, module_files
from bed_tools import tool

PORTS = ("output", "errors", "status")
PANIC_LINES = 15
"""Of what the kernel said before it panicked or was ended."""

TCG_CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"
"""x86-64-v2, which NumPy's wheels ask for. `max` makes mlock seven times slower. Kernel 6.12 would
crash at boot under QEMU 7.2's TCG unless cx16 is taken away."""

_POLL_S = 0.2
_QUIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: int
    memory_mib: int
    accelerator: str
    own_clock: bool
    """Time in the VM passes with its instructions, 1 ns each: see _accelerator."""

    console: Path | None


def run(
    image: Image, machine: Machine, argv: Sequence[str], env: Sequence[str], timeout_s: float
) -> int:
    """Boot, run, give the command's exit status. Raises BedError for a panic or a time-out."""
    deadline_s = time.monotonic() + timeout_s
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memballoon-vm-")))
        initrd = scratch / "initrd"
        initrd.write_bytes(_initrd(image, machine, argv, env))
        console = machine.console or scratch / "console"
        listeners = {name: _listen(scratch / name, stack) for name in PORTS}
        qemu = subprocess.Popen(
            _qemu(image, machine, initrd, scratch, console),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Ctrl-C is for us: we end it, after its output has been read.
            start_new_session=True,
        )
        stack.callback(_end, qemu)
        status = _converse(qemu, listeners, deadline_s, stack)
        if status.isdigit():
            return int(status)
        time_is_up = time.monotonic() >= deadline_s
        _end(qemu)
        raise BedError(_post_mortem(qemu, console, timeout_s if time_is_up else None))


def _initrd(image: Image, machine: Machine, argv: Sequence[str], env: Sequence[str]) -> bytes:
    initrd = Initrd()
    initrd.add("init", (Path(__file__).parent / "bed_guest_init.sh").read_bytes(), 0o755)
    initrd.add("bin/busybox", Path(tool("busybox")).read_bytes(), 0o755)
    for order, module in enumerate(module_files(image.modules)):
        initrd.add(f"modules/{order:02}-{module.name}", module.read_bytes())
    is_slow = machine.accelerator == "tcg" and not machine.own_clock
    slow = ["MEMBALLOON_SLOW_MACHINE=1"] if is_slow else []
    exports = [f"export {shlex.quote(entry)}" for entry in ("MEMBALLOON_IN_VM=1", *slow, *env)]
    command = "\n".join([*exports, f"exec {shlex.join(argv)}", ""])
    initrd.add("command", command.encode())
    add_checkout(initrd)
    return bytes(initrd)


def _qemu(image: Image, machine: Machine, initrd: Path, scratch: Path, console: Path) -> list[str]:
    ports = [
        argument
        for name in PORTS
        for argument in (
            *("-chardev", f"socket,id={name},path={scratch / name}"),
            *("-device", f"virtserialport,chardev={name},name={name}"),
        )
    ]
    return [
        *(tool("setpriv"), "--pdeathsig", "KILL", tool("qemu-system-x86_64")),
        *_accelerator(machine),
        *("-smp", str(machine.cpus), "-m", f"{machine.memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-nic", "none", "-display", "none"),
        *("-serial", f"file:{console}"),
        *("-kernel", str(image.kernel), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 loglevel=4 panic=-1 psi=1 rdinit=/init"),
        *("-drive", f"file={image.disk},format=raw,if=virtio,snapshot=on,cache=unsafe"),
        *("-device", "virtio-serial-pci", *ports),
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


def _converse(
    qemu: subprocess.Popen[bytes],
    listeners: dict[str, socket.socket],
    deadline_s: float,
    stack: ExitStack,
) -> str:
    """Pass the output on until the status is known; what there is of it otherwise."""
    selector = stack.enter_context(selectors.DefaultSelector())
    sinks = {"output": sys.stdout.buffer, "errors": sys.stderr.buffer}
    status = b""
    for name, listener in listeners.items():
        selector.register(listener, selectors.EVENT_READ, name)
    while time.monotonic() < deadline_s:
        ended = qemu.poll() is not None
        ready = selector.select(0 if ended or status.endswith(b"\n") else _POLL_S)
        if not ready and (ended or status.endswith(b"\n")):
            break
        for key, _ in ready:
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is listeners[key.data]:
                accepted, _ = connection.accept()
                stack.enter_context(accepted)
                selector.unregister(connection)
                selector.register(accepted, selectors.EVENT_READ, key.data)
            elif not (data := connection.recv(1 << 16)):
                selector.unregister(connection)
            elif key.data == "status":
                status += data
            else:
                sinks[key.data].write(data)
                sinks[key.data].flush()
    return status.decode(errors="replace").strip()


def _end(qemu: subprocess.Popen[bytes]) -> None:
    """Its disk is a snapshot: nothing is lost by an abrupt end."""
    if qemu.poll() is None:
        qemu.terminate()
        try:
            qemu.wait(_QUIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            qemu.kill()
    qemu.wait()


def _post_mortem(qemu: subprocess.Popen[bytes], console: Path, timeout_s: float | None) -> str:
    assert qemu.stderr is not None
    complaint = qemu.stderr.read().decode(errors="replace").strip()
    what = "the VM ended without a status (a panic?)"
    if timeout_s is not None:
        what = f"not within {timeout_s:.0f} s: the VM was ended"
    lines = console.read_text(errors="replace").splitlines() if console.exists() else []
    panic = next((at for at, line in enumerate(lines) if "Kernel panic" in line), len(lines))
    lines = lines[max(panic - PANIC_LINES, 0) : panic + 1]
    last = "".join(f"\n  console: {line}" for line in lines)
    return f"{what}{': ' if complaint else ''}{complaint}{last}"
