"""What of this checkout goes into the VM: all that git would keep, as it is on the disk now."""

import os
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

from bed_initrd import Initrd
from bed_recipe import ROOT

LEFT_OUT = {".git", ".venv", "build", "__pycache__", ".hypothesis"}


def add_checkout(initrd: Initrd) -> None:
    for path in sorted(_files()):
        name = f"checkout/{path.relative_to(ROOT)}"
        try:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                initrd.add_link(name, os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                mode = stat.S_IMODE(status.st_mode)
                initrd.add(name, path.read_bytes(), mode, int(status.st_mtime))
        except FileNotFoundError:  # removed since it was listed
            continue
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    initrd.add("site/memballoon.dist-info/METADATA", metadata.encode())
    for script, target in project["scripts"].items():
        module, _, function = target.partition(":")
        source = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\n"
        initrd.add(f"bin/{script}", f"{source}sys.exit({function}())\n".encode(), 0o755)


def _files() -> Iterator[Path]:
    git = shutil.which("git")
    if git is not None and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        if done.returncode == 0:
            yield from (ROOT / os.fsdecode(name) for name in done.stdout.split(b"\0") if name)
            return
    for directory, subdirectories, names in os.walk(ROOT):
        subdirectories[:] = [name for name in subdirectories if name not in LEFT_OUT]
        yield from (Path(directory, name) for name in names)
