"""The guest's view of its memory: parsed from files of both cgroup versions, then the real ones."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_driver.vitals import GuestMemory, VitalsReader
from protocol.units import KIB, MIB, PAGE_BYTES

NO_SWAP = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
SWAPS = NO_SWAP + (
    "/dev/sda2 partition 2048 1024 -2\n/var/my swap file\\040x file 1000 0 -3\n"  # KiB
)
V1_STAT = {
    "cache": 1,  # the local figures must not be taken for the hierarchical ones
    "rss": 1,
    "inactive_file": 1,
    "total_cache": 30 * MIB,
    "total_rss": 40 * MIB,
    "total_shmem": 2 * MIB,
    "total_mapped_file": 3 * MIB,
    "total_dirty": 8192,
    "total_writeback": 4096,
    "total_workingset_refault_anon": 5,
    "total_workingset_refault_file": 7,
    "total_swap": 6 * MIB,
    "total_pgmajfault": 11,
    "total_inactive_anon": 38 * MIB,
    "total_active_anon": 4 * MIB,
    "total_inactive_file": 20 * MIB,
    "total_active_file": 8 * MIB,
    "total_unevictable": 12288,
}
V2_STAT = {
    "anon": 40 * MIB,
    "file": 30 * MIB,
    "kernel": 5 * MIB,
    "shmem": 2 * MIB,
    "file_mapped": 3 * MIB,
    "file_dirty": 8192,
    "file_writeback": 4096,
    "inactive_anon": 38 * MIB,
    "active_anon": 4 * MIB,
    "inactive_file": 20 * MIB,
    "active_file": 8 * MIB,
    "unevictable": 12288,
    "workingset_refault_anon": 5,
    "workingset_refault_file": 7,
    "pgmajfault": 11,
}
EXPECTED = GuestMemory(
    limit_bytes=100 * MIB,
    usage_bytes=76 * MIB,
    anon_bytes=40 * MIB,
    shmem_bytes=2 * MIB,
    file_bytes=30 * MIB,
    mapped_file_bytes=3 * MIB,
    inactive_file_bytes=20 * MIB,
    active_file_bytes=8 * MIB,
    inactive_anon_bytes=38 * MIB,
    active_anon_bytes=4 * MIB,
    dirty_bytes=8192,
    writeback_bytes=4096,
    unevictable_bytes=12288,
    kernel_bytes=5 * MIB,
    refault_bytes_total=7 * PAGE_BYTES,
    refault_anon_bytes_total=5 * PAGE_BYTES,
    major_faults_total=11,
    swap_used_bytes=6 * MIB,
    swap_free_bytes=0,
    oom_kills_total=3,
)


def _text(stat: dict[str, int]) -> str:
    return "".join(f"{name} {value}\n" for name, value in stat.items())


def _write(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def _v1_files() -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{100 * MIB}\n",
        "memory.usage_in_bytes": f"{76 * MIB}\n",
        "memory.stat": _text(V1_STAT),
        "memory.kmem.usage_in_bytes": f"{5 * MIB}\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        "memory.memsw.limit_in_bytes": f"{120 * MIB}\n",
    }


def _v2_files() -> dict[str, str]:
    return {
        "memory.max": f"{100 * MIB}\n",
        "memory.current": f"{76 * MIB}\n",
        "memory.stat": _text(V2_STAT),
        "memory.events": "low 0\nhigh 9\nmax 8\noom 4\noom_kill 3\n",
        "memory.swap.current": f"{6 * MIB}\n",
        "memory.swap.max": "max\n",
    }


def _read(root: Path, swaps: str = NO_SWAP) -> GuestMemory:
    (root / "swaps").write_text(swaps)
    with VitalsReader(root, swaps_path=root / "swaps") as reader:
        return reader.read()


@pytest.mark.parametrize("files", [_v1_files(), _v2_files()], ids=["v1", "v2"])
def test_both_versions_give_the_same_view(tmp_path: Path, files: dict[str, str]) -> None:
    _write(tmp_path / "workload", files)
    assert _read(tmp_path) == EXPECTED


def test_the_workload_may_be_the_mounted_directory_itself(tmp_path: Path) -> None:
    _write(tmp_path, _v1_files())
    with VitalsReader(tmp_path, ".") as reader:
        assert reader.read().usage_bytes == 76 * MIB
        assert reader.version == 1


def test_no_limit_is_none(tmp_path: Path) -> None:
    _write(tmp_path / "workload", _v1_files() | {"memory.limit_in_bytes": "9223372036854771712\n"})
    assert _read(tmp_path).limit_bytes is None
    _write(tmp_path / "workload", _v2_files() | {"memory.max": "max\n"})
    assert _read(tmp_path).limit_bytes is None


def test_the_wall_below_the_limit(tmp_path: Path) -> None:
    _write(tmp_path / "v2" / "workload", _v2_files() | {"memory.high": "max\n"})
    assert _read(tmp_path / "v2").wall_bytes is None
    _write(tmp_path / "v2" / "workload", _v2_files() | {"memory.high": f"{96 * MIB}\n"})
    assert _read(tmp_path / "v2").wall_bytes == 96 * MIB
    _write(tmp_path / "workload", _v1_files())
    assert _read(tmp_path).wall_bytes is None


def test_swap_free_is_bounded_by_the_guests_own_limit(tmp_path: Path) -> None:
    _write(tmp_path / "workload", _v1_files())
    assert _read(tmp_path, SWAPS).swap_free_bytes == 2024 * KIB  # the areas' own
    # 6 MiB are swapped already.
    _write(tmp_path / "workload", {"memory.memsw.limit_in_bytes": f"{107 * MIB}\n"})
    assert _read(tmp_path, SWAPS).swap_free_bytes == MIB
    _write(tmp_path / "workload", {"memory.memsw.limit_in_bytes": f"{100 * MIB}\n"})
    assert _read(tmp_path, SWAPS).swap_free_bytes == 0
    _write(tmp_path / "v2" / "workload", _v2_files() | {"memory.swap.max": f"{6 * MIB}\n"})
    assert _read(tmp_path / "v2", SWAPS).swap_free_bytes == 0


def test_pressure_of_the_cgroup_itself(tmp_path: Path) -> None:
    pressure = (
        "some avg10=12.50 avg60=1.00 avg300=0.00 total=1500000\n"
        "full avg10=3.25 avg60=0.10 avg300=0.00 total=2\n"
    )
    _write(tmp_path / "workload", _v2_files() | {"memory.pressure": pressure})
    memory = _read(tmp_path)
    assert (memory.pressure_some_avg10, memory.pressure_full_avg10) == (12.5, 3.25)
    assert memory.pressure_some_total_s == 1.5


@pytest.mark.parametrize("garbage", ["", "x", "oom_kill\n", "total_rss -\n\0"])
def test_unreadable_statistics_are_none_and_never_zero(tmp_path: Path, garbage: str) -> None:
    _write(tmp_path / "workload", dict.fromkeys(_v1_files(), garbage))
    memory = _read(tmp_path)
    assert memory == GuestMemory(swap_free_bytes=0)


def test_missing_files_are_none(tmp_path: Path) -> None:
    _write(tmp_path / "workload", {"memory.usage_in_bytes": "4096\n"})
    with VitalsReader(tmp_path, swaps_path=tmp_path / "none") as reader:
        assert reader.read() == GuestMemory(usage_bytes=4096)


def test_old_kernels_on_v2_give_the_kernels_parts(tmp_path: Path) -> None:
    stat = {name: value for name, value in V2_STAT.items() if name != "kernel"}
    stat |= {"kernel_stack": MIB, "pagetables": 2 * MIB, "percpu": 4096, "slab": 8192}
    _write(tmp_path / "workload", _v2_files() | {"memory.stat": _text(stat)})
    assert _read(tmp_path).kernel_bytes == 3 * MIB + 12288


def test_a_cgroup_that_does_not_exist_yet_is_found_later(tmp_path: Path) -> None:
    with VitalsReader(tmp_path) as reader:
        assert reader.read() == GuestMemory()
        assert reader.version is None
        _write(tmp_path / "workload", _v2_files())
        assert reader.read().usage_bytes == 76 * MIB


def test_closing_gives_back_every_descriptor(tmp_path: Path) -> None:
    _write(tmp_path / "workload", _v2_files())
    before = len(os.listdir("/proc/self/fd"))
    reader = VitalsReader(tmp_path)
    reader.read()
    assert len(os.listdir("/proc/self/fd")) > before
    reader.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


SLOWNESS = 6 if os.environ.get("MEMBALLOON_SLOW_MACHINE") else 1
V1_ROOT, V2_ROOT = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
VERSION = 1 if V1_ROOT.is_dir() else 2
LIMIT = "memory.limit_in_bytes" if VERSION == 1 else "memory.max"


@pytest.fixture
def vm_cgroup() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = (V1_ROOT if VERSION == 1 else V2_ROOT) / f"mbtest-{secrets.token_hex(4)}"
    path.mkdir()
    if VERSION == 2:
        for directory in (V2_ROOT, path):
            (directory / "cgroup.subtree_control").write_text("+memory")
    (path / "workload").mkdir()
    yield path
    for directory in (path / "workload", path):
        if directory.exists():
            directory.rmdir()


CHARGE = """
import mmap, os, sys, tempfile
cgroup, directory = sys.argv[1:3]
anon_bytes, file_bytes = map(int, sys.argv[3:5])
open(cgroup + "/cgroup.procs", "w").write(str(os.getpid()))
memory = mmap.mmap(-1, anon_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[0:anon_bytes:4096] = bytes(anon_bytes // 4096)
with tempfile.TemporaryFile(dir=directory) as file:  # not in a tmpfs: that would be shmem
    file.write(bytes(file_bytes))
    file.flush()
    os.fsync(file.fileno())
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.effects
def test_the_kernels_own_figures(vm_cgroup: Path) -> None:
    (vm_cgroup / "workload" / LIMIT).write_text(str(64 * MIB))
    sizes = [str(16 * MIB), str(8 * MIB)]
    command = [
        sys.executable,
        "-c",
        CHARGE,
        str(vm_cgroup / "workload"),
        str(Path(__file__).parent),
    ]
    with subprocess.Popen(
        command + sizes, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            with VitalsReader(vm_cgroup) as reader:
                memory = reader.read()
                assert reader.version == VERSION
        finally:
            child.kill()
    assert memory.limit_bytes == 64 * MIB
    assert memory.anon_bytes is not None
    assert 16 * MIB <= memory.anon_bytes <= 20 * MIB
    assert memory.file_bytes is not None
    assert 8 * MIB - 512 * KIB <= memory.file_bytes <= 14 * MIB
    assert memory.usage_bytes is not None
    assert memory.usage_bytes >= 24 * MIB - 512 * KIB
    assert memory.kernel_bytes is not None
    assert memory.kernel_bytes > 0
    assert memory.oom_kills_total == 0
    # A guest must not take the host's pressure for its own: version 1 has none for a cgroup.
    cgroups_own = (vm_cgroup / "workload" / "memory.pressure").exists()
    assert (memory.pressure_some_avg10 is not None) == cgroups_own


@pytest.mark.effects
def test_a_cgroup_made_anew_under_the_same_name_is_read(vm_cgroup: Path) -> None:
    workload = vm_cgroup / "workload"
    with VitalsReader(vm_cgroup) as reader:
        assert reader.read().limit_bytes is None
        workload.rmdir()
        assert reader.read().usage_bytes is None
        workload.mkdir()
        (workload / LIMIT).write_text(str(8 * MIB))
        assert reader.read().limit_bytes == 8 * MIB


@pytest.mark.effects
def test_reading_is_cheap(vm_cgroup: Path) -> None:
    with VitalsReader(vm_cgroup) as reader:
        costs_s = []
        for _ in range(200):
            before_s = time.process_time()
            reader.read()
            costs_s.append(time.process_time() - before_s)
    # Measured 50-80 us; ten reads a second of ten guests then cost 1 % of a CPU. The bound is
    # loose because machines differ: it catches a reader that does much else. The least of them,
    # since an emulated processor's time goes on while the real one is somebody else's.
    assert min(costs_s) < 1e-3 * SLOWNESS
