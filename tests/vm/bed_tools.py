"""The programs that the bed needs, and the Debian packages that have them."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bed_errors import BedError

PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "mkfs.ext4": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
SETUP = "python tests/vm/bed.py setup"

CALL_TIMEOUT_S = 900.0
APT_LOCK_TIMEOUT_S = 300
"""Another apt-get at work is waited for."""

SAID_LINES = 12
"""Of what a program said before it failed."""


def tool(name: str) -> str:
    """Where a program is. Raises BedError with the package to install."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if found is None:
        raise BedError(f"{name} is missing: `{SETUP}` (or apt-get install {PACKAGES[name]})")
    return found


def call(command: Sequence[str], what: str, *, may_fail: bool = False) -> None:
    """Run a program to its end. Raises BedError with the last of what it said."""
    try:
        done = _run(command)
    except subprocess.TimeoutExpired as expired:
        raise BedError(f"cannot {what}: not within {CALL_TIMEOUT_S:.0f} s") from expired
    if done.returncode and not may_fail:
        lines = "\n  ".join(done.stdout.strip().splitlines()[-SAID_LINES:])
        raise BedError(f"cannot {what} (status {done.returncode}):\n  {lines}")


def missing_packages() -> list[str]:
    missing = set() if KEYRING.exists() else {"debian-archive-keyring"}
    for name, package in PACKAGES.items():
        try:
            tool(name)
        except BedError:
            missing.add(package)
    return sorted(missing)


def install_missing() -> None:
    """apt-get install, if anything is missing. Raises BedError."""
    if not (missing := missing_packages()):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BedError(f"as root, on Debian or Ubuntu: apt-get install {' '.join(missing)}")
    apt = ("apt-get", "-qq", "-o", f"DPkg::Lock::Timeout={APT_LOCK_TIMEOUT_S}")
    try:
        # One source of many that fails is no harm as long as the packages are found.
        _run([*apt, "update"])
        done = _run([*apt, "install", "-y", "--no-install-recommends", *missing])
    except subprocess.TimeoutExpired as expired:
        raise BedError(f"cannot install {' '.join(missing)}: apt-get hangs") from expired
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if line.startswith("E:")]
        why = errors[0].removeprefix("E:").strip() if errors else f"status {done.returncode}"
        raise BedError(
            f"cannot install {' '.join(missing)}: {why} (does `apt-get update` reach its servers?)"
        )


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=CALL_TIMEOUT_S,
        check=False,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
    )
