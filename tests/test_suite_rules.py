"""The suite's own rules, held by suites in miniature: see conftest.py."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class Miniature:
    """A suite of one file under the project's conftest and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tests").mkdir()
        shutil.copy(ROOT / "pyproject.toml", folder)
        shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")

    def run(self, source: str, *arguments: str, **environment: str) -> tuple[int, str]:
        (self.folder / "tests" / "test_it.py").write_text("import pytest\n" + source)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **environment},
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def suite(tmp_path: Path) -> Miniature:
    return Miniature(tmp_path)


SOAK = """
def test_short(): pass
@pytest.mark.soak
def test_long(): print("soaked")
"""


def test_soak_is_left_out_and_said_so(suite: Miniature) -> None:
    status, output = suite.run(SOAK)
    assert status == 0
    assert "1 passed, 1 deselected" in output
    assert "1 test : they take minutes: `make soak`" in output


def test_soak_alone(suite: Miniature) -> None:
    status, output = suite.run(SOAK, "-m", "soak")
    assert status == 0
    assert "1 passed, 1 deselected" in output
    assert "they take minutes" not in output


EFFECTS = """
@pytest.mark.effects
def test_real(): assert False, "ran"
@pytest.mark.effects
def test_real_too(): assert False, "ran"
def test_pure(): pass
def test_other(): pytest.skip("no engine")
"""


def test_what_cannot_run_here_is_skipped_and_listed(suite: Miniature) -> None:
    with (suite.folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write("\nmissing_for_effects = lambda: ('root', 'CAP_IPC_LOCK')\n")
    status, output = suite.run(EFFECTS)
    assert status == 0
    assert "1 passed, 3 skipped" in output
    assert "not run here, and why" in output
    assert "    2 tests: effects need root; CAP_IPC_LOCK" in output
    assert "    1 test : no engine" in output


@pytest.mark.effects
def test_effects_run_where_they_can(suite: Miniature) -> None:
    status, output = suite.run(EFFECTS)
    assert status == 1
    assert "2 failed, 1 passed, 1 skipped" in output


LEAVES = """
from pathlib import Path
import conftest
def test_it(cgroup_name):
    assert cgroup_name.startswith("mbtest-")
    root = next(root for root in conftest.cgroup_mounts() if conftest._has_memory(root))
    Path({made!r}).write_text(str(root / ({prefix} + "-left")))
    (root / ({prefix} + "-left")).mkdir()
"""


@pytest.mark.effects
@pytest.mark.parametrize(
    ("prefix", "alone", "status"),
    [("cgroup_name", "0", 1), ("'mbtest-stray'", "1", 1), ("'mbtest-stray'", "0", 0)],
)
def test_a_cgroup_left_behind_fails_the_run(
    suite: Miniature, prefix: str, alone: str, status: int
) -> None:
    made = suite.folder / "made"
    if prefix.startswith("'"):
        prefix = repr(f"mbtest-stray-{os.getpid()}")
    source = LEAVES.format(made=str(made), prefix=prefix)
    try:
        ended, output = suite.run(source, MEMBALLOON_TEST_ALONE=alone)
    finally:
        if made.exists():
            Path(made.read_text()).rmdir()
    assert "1 passed" in output
    assert ended == status, output
    assert (f"cgroup {made.read_text()}" in output) == bool(status)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "path").mkdir()
    for tool in ("sh", "echo", "touch"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / "path" / tool).symlink_to(found)
    return tmp_path


def make(checkout: Path, target: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("make")
    if found is None:
        pytest.skip("no make")
    return subprocess.run(
        [found, target],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": str(checkout / "path")},
    )


def interpreter(checkout: Path, name: str, script: str) -> None:
    path = checkout / "path" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


NO_VENV = 'case "$2" in *ensurepip*) exit 1;; esac'


def test_no_python_is_one_line(checkout: Path) -> None:
    interpreter(checkout, "python3", "exit 1  # 3.10")
    interpreter(checkout, "python3.13", "exit 127  # a version manager's shim")
    done = make(checkout, "test")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "memballoon needs Python 3.11 or newer on PATH: apt-get install python3 python3-venv"
    )
    assert not (checkout / ".venv").exists()


def test_no_venv_is_one_line(checkout: Path) -> None:
    interpreter(checkout, "python3", NO_VENV)
    done = make(checkout, "demo")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "python3 has no venv module: apt-get install python3-venv"


def test_the_newest_python_with_venv_is_taken(checkout: Path) -> None:
    interpreter(checkout, "python3.14", NO_VENV)
    interpreter(checkout, "python3.12", 'echo "$0 $*" >> used')
    interpreter(checkout, "python3", "exit 0")
    make(checkout, "test")
    used = (checkout / "used").read_text().splitlines()
    assert used[-1].endswith("path/python3.12 -m venv --clear .venv")


def test_it_is_installed_again_only_when_pyproject_has_changed(checkout: Path) -> None:
    copies_itself = '[ "$2" = venv ] && /bin/mkdir -p .venv/bin && /bin/cp "$0" .venv/bin/python'
    interpreter(checkout, "python3", f'echo "$*" >> used; {copies_itself}; exit 0')
    pyproject, stamp = checkout / "pyproject.toml", checkout / ".venv" / ".installed"
    for installs, pyproject_s in ((1, 100), (1, 100), (2, 300)):
        os.utime(pyproject, (pyproject_s, pyproject_s))
        assert make(checkout, "test").returncode == 0
        os.utime(stamp, (200, 200))
        assert (checkout / "used").read_text().count("-m pip install") == installs
    assert (checkout / "used").read_text().count("-m pytest") == 3


MANY = """
@pytest.mark.parametrize("number", range(5))
def test_it(number): print(f"<{number}>")
@pytest.mark.soak
def test_long(): pass
"""


@pytest.mark.parametrize(("share", "ran"), [("1/2", "024"), ("2/2", "13"), ("1/1", "01234")])
def test_shares_are_all_of_it_and_nothing_twice(suite: Miniature, share: str, ran: str) -> None:
    status, output = suite.run(MANY, "-s", MEMBALLOON_TEST_SHARE=share)
    assert status == 0
    assert "".join(re.findall(r"<(\d)>", output)) == ran
    assert (f"share {share[0]} of 2 of the tests" in output) == (share != "1/1")
    assert f"{len(ran)} passed, 1 deselected" in output


def test_a_share_is_one_of_what_was_chosen(suite: Miniature) -> None:
    arguments = ("-s", "-k", "test_it and not 1 and not 3")
    _, output = suite.run(MANY, *arguments, MEMBALLOON_TEST_SHARE="2/2")
    assert re.findall(r"<(\d)>", output) == ["2"]


@pytest.mark.parametrize("share", ["2", "0/2", "3/2", "one/two", ""])
def test_a_share_that_is_none_is_refused(suite: Miniature, share: str) -> None:
    status, output = suite.run(MANY, MEMBALLOON_TEST_SHARE=share)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert f"MEMBALLOON_TEST_SHARE={share}: it is a share such as 1/2" in output
