"""What of the bed can be tested without a VM."""

import os
import shutil
import subprocess
from pathlib import Path

import bed_image
import bed_recipe
import bed_tools
import pytest
from bed_checkout import add_checkout
from bed_errors import BedError
from bed_initrd import Initrd, module_files


def test_a_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(bed_tools, "SBIN", "/nonexistent")
    with pytest.raises(BedError, match="apt-get install qemu-system-x86"):
        bed_tools.tool("qemu-system-x86_64")
    assert {"qemu-system-x86", "mmdebstrap"} <= set(bed_tools.missing_packages())


APT_GET = """#!/bin/sh
echo "$@" >> "$0.called"
case "$*" in *update*) exit 100;; esac
echo "Reading package lists..."
echo "E: Unable to locate package mmdebstrap"
echo "E: Unable to locate package qemu-system-x86"
exit 100
"""


def test_no_package_source_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apt_get = tmp_path / "apt-get"
    apt_get.write_text(APT_GET)
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(bed_tools, "missing_packages", lambda: ["mmdebstrap", "qemu-system-x86"])
    monkeypatch.setattr(bed_tools.os, "geteuid", lambda: 0)
    with pytest.raises(BedError) as raised:
        bed_tools.install_missing()
    assert str(raised.value) == (
        "cannot install mmdebstrap qemu-system-x86: Unable to locate package mmdebstrap "
        "(does `apt-get update` reach its servers?)"
    )
    update, install = (tmp_path / "apt-get.called").read_text().splitlines()
    assert "update" in update
    assert install.endswith("install -y --no-install-recommends mmdebstrap qemu-system-x86")


def test_the_wheels_are_those_of_the_project() -> None:
    names = {requirement.split(">")[0] for requirement in bed_recipe.requirements()}
    assert {"numpy", "trio", "fastapi", "pytest", "hypothesis"} <= names
    assert not names & {"mypy", "ruff", "memballoon[host]"}


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    for name, depends in (("a", "b,c-d"), ("b", "c-d"), ("c_d", ""), ("other", "")):
        content = b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
        (tmp_path / f"{name.replace('_', '-')}.ko").write_bytes(content)
    (tmp_path / "a.ko").write_bytes(b"\x7fELF\0depends=b,c_d\0")
    (tmp_path / "b.ko").write_bytes(b"\x7fELF\0depends=c_d\0")
    names = [path.name for path in module_files(tmp_path, ("a", "ext4", "b"))]
    assert names == ["c-d.ko", "b.ko", "a.ko"]
    with pytest.raises(BedError, match="no module nothing"):
        module_files(tmp_path, ("nothing",))


def test_another_reader_understands_the_archive(tmp_path: Path) -> None:
    in_vm_tests = os.environ.get("MEMBALLOON_VM") == "1"
    busybox = bed_image.image().busybox if in_vm_tests else shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox to read a cpio archive with")
    initrd = Initrd()
    initrd.add("a/b/c", b"abc", 0o755)
    initrd.add("a/empty", b"")
    initrd.add_link("a/link", "b/c")
    add_checkout(initrd)
    subprocess.run(
        [busybox, "cpio", "-i"], input=bytes(initrd), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "a/b/c").read_bytes() == b"abc"
    assert os.access(tmp_path / "a/b/c", os.X_OK)
    assert (tmp_path / "a/empty").read_bytes() == b""
    assert (tmp_path / "a/link").readlink() == Path("b/c")
    here = Path(__file__)
    inside = tmp_path / "checkout" / here.relative_to(bed_recipe.ROOT)
    assert inside.read_bytes() == here.read_bytes()
    assert not (tmp_path / "checkout" / ".git").exists()
    assert not list((tmp_path / "checkout").rglob("__pycache__"))
    assert "Name: memballoon\n" in (tmp_path / "site/memballoon.dist-info/METADATA").read_text()
