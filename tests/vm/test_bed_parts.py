"""What of the bed can be tested without a VM."""

import os
import shutil
import subprocess
from pathlib import Path

import bed_image
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
    assert {"busybox-static", "mmdebstrap"} <= set(bed_tools.missing_packages())


def test_the_image_is_another_when_its_inputs_change(monkeypatch: pytest.MonkeyPatch) -> None:
    before = bed_image.inputs_hash()
    assert bed_image.inputs_hash() == before
    monkeypatch.setattr(bed_image, "PACKAGES", (*bed_image.PACKAGES, "docker.io"))
    assert bed_image.inputs_hash() != before


def test_the_wheels_are_those_of_the_project() -> None:
    names = {requirement.split(">")[0] for requirement in bed_image.requirements()}
    assert {"numpy", "trio", "fastapi", "pytest", "hypothesis"} <= names
    assert not names & {"mypy", "ruff", "memballoon[host]"}


def test_the_cache_is_where_the_user_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bed_image.cache_directory() == tmp_path / "memballoon-vm"


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
    busybox = shutil.which("busybox")
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
    inside = tmp_path / "checkout" / here.relative_to(bed_image.ROOT)
    assert inside.read_bytes() == here.read_bytes()
    assert not (tmp_path / "checkout" / ".git").exists()
    assert not list((tmp_path / "checkout").rglob("__pycache__"))
    assert "Name: memballoon\n" in (tmp_path / "site/memballoon.dist-info/METADATA").read_text()
