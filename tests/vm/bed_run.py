"""One run of a command in the VM: its output, its status, its deadline."""

import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bed_errors import BedError
from bed_machine import PORTS, Machine, Started, started
from bed_recipe import Image

PANIC_LINES = 15
"""Of what the kernel said before it panicked or was ended."""

BEGAN = "began"
"""What the VM says on its status port when the command starts; its exit status comes next."""

_POLL_S = 0.2


def run(
    image: Image, machine: Machine, argv: Sequence[str], env: Sequence[str], timeout_s: float
) -> int:
    """Boot, run, give the command's exit status. Raises BedError for a panic or a time-out."""
    began_s = time.monotonic()
    with started(image, machine, argv, env) as vm:
        status = _converse(vm, began_s, timeout_s)
        if status is not None:
            return status
        time_is_up = time.monotonic() >= began_s + timeout_s
        vm.end()
        raise BedError(post_mortem(vm.qemu, vm.console, timeout_s if time_is_up else None))


def _converse(vm: Started, began_s: float, timeout_s: float) -> int | None:
    """Pass the output on until the status is known; None if the end comes first."""
    sinks = {"output": sys.stdout.buffer, "errors": sys.stderr.buffer}
    said = b""
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for name in PORTS:
            selector.register(vm.listeners[name], selectors.EVENT_READ, name)
        while time.monotonic() < began_s + timeout_s:
            is_over = vm.qemu.poll() is not None or _status(said) is not None
            ready = selector.select(0 if is_over else _POLL_S)
            if not ready and is_over:
                break
            for key, _ in ready:
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is vm.listeners[key.data]:
                    accepted, _ = connection.accept()
                    stack.enter_context(accepted)
                    selector.unregister(connection)
                    selector.register(accepted, selectors.EVENT_READ, key.data)
                elif not (data := connection.recv(1 << 16)):
                    selector.unregister(connection)
                elif key.data == "status":
                    if not said:
                        _say_booted(time.monotonic() - began_s)
                    said += data
                else:
                    sinks[key.data].write(data)
                    sinks[key.data].flush()
    return _status(said)


def _status(said: bytes) -> int | None:
    began, _, status = said.decode(errors="replace").partition("\n")
    is_whole = began == BEGAN and status.endswith("\n") and status[:-1].isdigit()
    return int(status) if is_whole else None


def _say_booted(took_s: float) -> None:
    print(f"bed: booted to the command in {took_s:.1f} s", file=sys.stderr, flush=True)


def post_mortem(qemu: subprocess.Popen[bytes], console: Path, timeout_s: float | None) -> str:
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
