"""The two that are compared, each in a VM of its own that is stopped while it isn't its turn."""

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bed_errors import BedError
from bed_machine import MONITOR, Machine, Started, started
from bed_monitor import JsonLines, Monitor
from bed_recipe import Image
from bed_run import post_mortem
from bench_vm_report import MIB, OurTurn, VirtioTurn

CONTROL = "control"
TIMEOUT_S = 300.0
"""For a boot, and for one step of a turn."""

POLL_S = 0.002
"""QEMU tells of a change at most once a second, so it is asked; a question costs 0.3 ms."""

TOLERATED_BYTES = 8 * MIB
"""The guest's own use moves meanwhile."""

CARRIER_BYTES = 768 * MIB
"""In memballoon's VM, for the kernel, the agent and all that is not the guest."""

HERE = Path(__file__).parent
IN_GUEST = HERE / "bench_vm_in_guest.py"
IN_HOST = HERE / "bench_vm_in_host.py"


@dataclass(frozen=True, slots=True)
class Peer:
    """A VM that has booted, stopped."""

    vm: Started
    monitor: Monitor
    control: JsonLines
    about: dict[str, Any]
    """What it said of itself when it was ready."""

    @contextmanager
    def running(self) -> Iterator[None]:
        self.monitor.execute("cont")
        try:
            yield
        finally:
            self.monitor.execute("stop")

    def ask(self, **question: Any) -> dict[str, Any]:
        self.control.write(question)
        return _no_error(self.control.read(TIMEOUT_S))


class VirtioBalloon:
    """A guest with QEMU's own device."""

    def __init__(self, peer: Peer, guest_bytes: int, moved_bytes: int) -> None:
        self.peer = peer
        self._guest_bytes = guest_bytes
        self._moved_bytes = moved_bytes

    def turn(self) -> VirtioTurn:
        """Inflate and deflate once. Raises BedError if the memory wasn't seen to move."""
        with self.peer.running():
            full = self.peer.ask(touch=True)
            touched_bytes = _resident_bytes(self.peer.vm.qemu.pid, self._guest_bytes)
            inflate_s = self._move_to(self._guest_bytes - self._moved_bytes)
            small = self.peer.ask(touch=False)
            left_bytes = _resident_bytes(self.peer.vm.qemu.pid, self._guest_bytes)
            deflate_s = self._move_to(self._guest_bytes)
            again = self.peer.ask(touch=False)
        moved = self._moved_bytes
        check_moved("the guest lost", full["total_bytes"] - small["total_bytes"], moved)
        # Pages that the guest never touched are none of QEMU's, and may be in the balloon.
        untouched_bytes = self._guest_bytes - touched_bytes
        check_moved("QEMU dropped", touched_bytes - left_bytes, moved, untouched_bytes)
        check_moved("the guest got back", again["total_bytes"] - small["total_bytes"], moved)
        return VirtioTurn(inflate_s, deflate_s)

    def _move_to(self, left_bytes: int) -> float:
        began_s = time.perf_counter()
        self.peer.monitor.execute("balloon", value=left_bytes)
        while self.peer.monitor.execute("query-balloon")["actual"] != left_bytes:
            if time.perf_counter() > began_s + TIMEOUT_S:
                raise BedError(f"virtio-balloon: not at its target within {TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        return time.perf_counter() - began_s


class Memballoon:
    """An agent and a mock VM; it looks at every frame and at the kernel's limit by itself."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def turn(self) -> OurTurn:
        """Inflate and deflate once, after a plain loop has done as much. Raises BedError."""
        with self.peer.running():
            began_s = time.perf_counter()
            turn = OurTurn(**self.peer.ask())
            took_s = time.perf_counter() - began_s
        if turn.plain_s + turn.inflate_s + turn.deflate_s > took_s:
            raise BedError("the VM's clock runs ahead of the machine's: no times")
        return turn


@contextmanager
def virtio_balloon(
    image: Image, machine: Machine, guest_bytes: int, moved_bytes: int
) -> Iterator[VirtioBalloon]:
    machine = replace(machine, memory_mib=guest_bytes // MIB, has_balloon=True)
    with _booted(image, machine, ["python", "-S", str(IN_GUEST.name)]) as peer:
        yield VirtioBalloon(peer, guest_bytes, moved_bytes)


@contextmanager
def memballoon(
    image: Image, machine: Machine, guest_bytes: int, moved_bytes: int, frames: str
) -> Iterator[Memballoon]:
    machine = replace(machine, memory_mib=(guest_bytes + CARRIER_BYTES) // MIB)
    with _booted(image, machine, ["python", IN_HOST.name, str(moved_bytes), frames]) as peer:
        yield Memballoon(peer)


@contextmanager
def _booted(image: Image, machine: Machine, argv: Sequence[str]) -> Iterator[Peer]:
    machine = replace(machine, ports=(CONTROL,), has_monitor=True)
    command = ["sh", "-c", 'cd tests/vm && PYTHONPATH=../.. exec "$0" "$@"', *argv]
    with started(image, machine, command, ()) as vm, ExitStack() as stack:
        at_monitor = stack.enter_context(closing(vm.connection(MONITOR, TIMEOUT_S)))
        at_control = stack.enter_context(closing(vm.connection(CONTROL, TIMEOUT_S)))
        errors = vm.connection("errors", TIMEOUT_S)
        # It ends with the VM, which ends with this block.
        threading.Thread(target=_pass_on, args=(errors,), daemon=True).start()
        monitor = Monitor(at_monitor, TIMEOUT_S)
        control = JsonLines(at_control, f"{argv[-1]} in the VM")
        try:
            about = _no_error(control.read(TIMEOUT_S))
        except BedError as error:
            vm.end()
            raise BedError(f"{error}: {post_mortem(vm.qemu, vm.console, None)}") from error
        monitor.execute("stop")
        yield Peer(vm, monitor, control, about)


def _pass_on(errors: socket.socket) -> None:
    with errors:
        while data := errors.recv(1 << 16):
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()


def _no_error(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise BedError(f"in the VM: {answer['error']}")
    return answer


def _resident_bytes(pid: int, size_bytes: int) -> int:
    return mapped_bytes(Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8"), size_bytes)


def mapped_bytes(smaps: str, size_bytes: int) -> int:
    """What is resident of the mapping of this size, which is the guest's memory: see proc(5).

    The rest of QEMU, its translated code above all, grows as it likes. Raises BedError.
    """
    found = []
    size_kb = None
    for line in smaps.splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            size_kb = int(value.split()[0])
        elif name == "Rss" and size_kb == size_bytes >> 10:
            found.append(int(value.split()[0]) << 10)
    if len(found) != 1:
        raise BedError(f"{len(found)} mappings of {size_bytes // MIB} MiB in QEMU, not one")
    return found[0]


def check_moved(who: str, seen_bytes: int, moved_bytes: int, unknown_bytes: int = 0) -> None:
    """Raises BedError unless the memory was seen to move: without that a time means nothing.

    Of `unknown_bytes` it can't be told whether they moved.
    """
    least, most = moved_bytes - unknown_bytes - TOLERATED_BYTES, moved_bytes + TOLERATED_BYTES
    if not least <= seen_bytes <= most:
        raise BedError(
            f"virtio-balloon: {who} {seen_bytes // MIB} MiB, and not {moved_bytes // MIB} MiB"
        )
