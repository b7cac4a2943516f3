"""Whether KVM works here: found out by booting with it, not by looking for /dev/kvm.

In some nested machines KVM makes a VM and then never runs it. So the kernel is booted once, with no
disk: it must come as far as its panic for want of one. The answer is kept until the host reboots.
"""

import contextlib
import os
import subprocess
from pathlib import Path

from bed_errors import BedError
from bed_recipe import Image
from bed_tools import tool

ACCELERATORS = ("kvm", "tcg")
PROBE_TIMEOUT_S = 8.0
"""With KVM the kernel is there in less than one."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def default_accelerator(image: Image) -> str:
    """kvm where it works, else tcg; MEMBALLOON_VM_ACCEL overrides. Raises BedError."""
    if named := os.environ.get("MEMBALLOON_VM_ACCEL"):
        if named not in ACCELERATORS:
            raise BedError(f"MEMBALLOON_VM_ACCEL={named}: it may be {' or '.join(ACCELERATORS)}")
        return named
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    known = image.directory / "accelerator"
    boot = _BOOT_ID.read_text().strip()
    if known.exists() and known.read_text().startswith(f"{boot} "):
        return known.read_text().split()[1]
    found = "kvm" if _boots_with_kvm(image) else "tcg"
    with contextlib.suppress(OSError):  # somebody else's cache: found out again next time
        known.write_text(f"{boot} {found}\n")
    return found


def _boots_with_kvm(image: Image) -> bool:
    qemu = subprocess.Popen(
        [
            *(tool("setpriv"), "--pdeathsig", "KILL", tool("qemu-system-x86_64")),
            *("-accel", "kvm", "-cpu", "host", "-m", "256M", "-nodefaults", "-no-user-config"),
            *("-no-reboot", "-nic", "none", "-display", "none"),
            *("-kernel", str(image.kernel), "-append", "panic=-1"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return qemu.wait(PROBE_TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        qemu.kill()
        qemu.wait()
