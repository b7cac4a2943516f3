"""What the whole suite shares: what can't run here and why, and nothing left behind.

- `effects` tests are skipped, with the reason, where this machine or this user can't do them.
- `soak` tests are deselected unless `-m` names them.
- MEMBALLOON_TEST_SHARE=1/2 runs every second test, 2/2 the others: for machines side by side.
- At the end a short list says what was not run, and why.
- A cgroup of this run that is still there at the end fails the run. With MEMBALLOON_TEST_ALONE=1
  (nobody else tests on this machine) so does any new cgroup of a test, whoever named it.
"""

import ctypes
import functools
import mmap
import os
import secrets
import signal
import struct
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

RUN_PREFIX = f"mbtest-{secrets.token_hex(4)}"
ALONE = os.environ.get("MEMBALLOON_TEST_ALONE") == "1"
CGROUP_DEPTH = 2
"""An agent's root and the VMs below it."""

CAP_IPC_LOCK = 14

settings.register_profile(
    "default",
    deadline=None,  # a shared machine stalls; correctness is not a matter of milliseconds
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "ci", parent=settings.get_profile("default"), max_examples=150, derandomize=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_before = pytest.StashKey[set[Path]]()
_left = pytest.StashKey[list[Path]]()
_soak = pytest.StashKey[int]()


@pytest.fixture
def cgroup_name() -> str:
    """A name for a cgroup that no other test has, now or in another run."""
    return f"{RUN_PREFIX}-{secrets.token_hex(3)}"


def pytest_configure(config: pytest.Config) -> None:
    # A shell's job in the background ignores it, and so would all that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_before] = set(cgroups_of_tests())
    config.stash[_left] = []
    config.stash[_soak] = 0


@pytest.hookimpl(trylast=True)  # a share is one of what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.getoption("markexpr"):
        soaking = [item for item in items if item.get_closest_marker("soak")]
        if soaking:
            config.stash[_soak] = len(soaking)
            config.hook.pytest_deselected(items=soaking)
            items[:] = [item for item in items if not item.get_closest_marker("soak")]
    number, count = share()
    items[:] = items[number - 1 :: count]
    effects = [item for item in items if item.get_closest_marker("effects")]
    if effects and (missing := missing_for_effects()):
        reason = "effects need " + "; ".join(missing)
        for item in effects:
            item.add_marker(pytest.mark.skip(reason=reason))


def missing_systemd() -> str | None:
    """Why this is no machine for tests of systemd itself, which would not do any other one good."""
    if os.environ.get("MEMBALLOON_IN_VM") == "1" and Path("/run/systemd/system").is_dir():
        return None
    return "needs systemd, in a VM: make test-vm"


def share() -> tuple[int, int]:
    """This run's number and how many there are, from MEMBALLOON_TEST_SHARE."""
    wanted = os.environ.get("MEMBALLOON_TEST_SHARE", "1/1")
    number, slash, count = wanted.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"MEMBALLOON_TEST_SHARE={wanted}: it is a share such as 1/2")
    return int(number), int(count)


def pytest_report_header() -> str | None:
    number, count = share()
    return None if count == 1 else f"share {number} of {count} of the tests"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    left = [
        path
        for path in cgroups_of_tests()
        if path.name.startswith(RUN_PREFIX) or (ALONE and path not in session.config.stash[_before])
    ]
    session.config.stash[_left] = left
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
        reasons[reason.removeprefix("Skipped: ")] += 1
    if config.stash[_soak]:
        reasons["they take minutes: `make soak`"] = config.stash[_soak]
    if reasons:
        terminalreporter.section("not run here, and why")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5} {'test ' if count == 1 else 'tests'}: {reason}")
    if config.stash[_left]:
        terminalreporter.section("left behind", red=True)
        for path in config.stash[_left]:
            terminalreporter.line(f"cgroup {path}", red=True)


@functools.cache
def missing_for_effects() -> tuple[str, ...]:
    """What real cgroups and real pages need and this machine, or this user, hasn't got."""
    if os.geteuid() != 0:
        return ("root",)
    missing = []
    memory_roots = [root for root in cgroup_mounts() if _has_memory(root)]
    if not memory_roots:
        missing.append("a memory cgroup controller")
    elif not any(os.access(root, os.W_OK) for root in memory_roots):
        missing.append(f"a writable {memory_roots[0]}")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    capabilities = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    if not int(capabilities.split()[1], 16) >> CAP_IPC_LOCK & 1:
        missing.append("CAP_IPC_LOCK")
    if not (frame := _own_frame()):
        missing.append("page frame numbers in pagemap (CAP_SYS_ADMIN)")
    for path in ("/proc/kpageflags", "/proc/kpagecgroup"):
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(frame * 8)
                file.read(8)
        except OSError as error:
            missing.append(f"{path} ({error.strerror})")
    return tuple(missing)


def _own_frame() -> int:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        view = ctypes.c_char.from_buffer(page)
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                pagemap.seek(ctypes.addressof(view) // mmap.PAGESIZE * 8)
                (entry,) = struct.unpack("<Q", pagemap.read(8))
        except OSError:
            return 0
        finally:
            del view
    return int(entry & ((1 << 55) - 1))


def _has_memory(root: Path) -> bool:
    controllers = root / "cgroup.controllers"
    if controllers.exists():  # version 2
        return "memory" in controllers.read_text(encoding="ascii").split()
    return (root / "memory.limit_in_bytes").exists()


def cgroup_mounts() -> list[Path]:
    """Every mounted cgroup hierarchy, of either version."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mount, _, source = line.partition(" - ")
        if source.split(" ")[0] in ("cgroup", "cgroup2"):
            mounts.append(Path(mount.split(" ")[4]))
    return mounts


def cgroups_of_tests() -> list[Path]:
    """Cgroups of any run's tests, outermost first."""
    found: list[Path] = []
    for root in cgroup_mounts():
        below = [root]
        for _ in range(CGROUP_DEPTH):
            below = [entry for parent in below for entry in _directories(parent)]
            found += [entry for entry in below if entry.name.startswith("mbtest-")]
    return found


def _directories(parent: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir()]
    except OSError:  # gone since it was listed
        return []
