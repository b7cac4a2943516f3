"""The programs that the bed needs, and the Debian packages that have them."""

import os
import shutil
import subprocess
from pathlib import Path

from bed_errors import BedError

PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "mkfs.ext4": "e2fsprogs",
    "busybox": "busybox-static",
    "qemu-system-x86_64": "qemu-system-x86",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
SETUP = "python tests/vm/bed.py setup"


def tool(name: str) -> str:
    """Where a program is. Raises BedError with the package to install."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")
    if found is None:
        raise BedError(f"{name} is missing: `{SETUP}` (or apt-get install {PACKAGES[name]})")
    return found


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
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
    ):
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise BedError(f"{' '.join(command)} failed with status {done.returncode}")
