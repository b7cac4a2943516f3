"""The template of docs/writing_a_policy.md, installed as pip leaves it: found, and it passes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from host_agent.ledger.columns import HostColumns
from host_agent.policy.registry import ENTRY_POINT_GROUP

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "docs" / "policy_template"

CHOOSE = """
from host_agent.policy.registry import policy_names
from host_agent.policy_settings import make_policy
assert "even" in policy_names(), policy_names()
policy = make_policy("even", {"even": {"rate": "8MiB"}})
print(type(policy).__module__, policy.settings.rate_bytes)
try:
    make_policy("even", {"even": {"rate": "4KiB"}})
except Exception as error:
    print(error)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory of installed packages with the template in it: its modules and its dist-info."""
    project = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())
    name, version = project["project"]["name"], project["project"]["version"]
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = project["project"]["entry-points"][ENTRY_POINT_GROUP]
    lines = [f"[{ENTRY_POINT_GROUP}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module in project["tool"]["setuptools"]["py-modules"]:
        shutil.copy(TEMPLATE / f"{module}.py", tmp_path)
    return tmp_path


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(site), str(ROOT)))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_is_found_by_its_entry_point(site: Path) -> None:
    done = run(site, "-c", CHOOSE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"memballoon_even {8 << 20}",
        "[policy.even]: rate must be 1MiB or more",
    ]


def test_it_passes_its_tests(site: Path) -> None:
    tests = shutil.copytree(TEMPLATE / "tests", site / "tests")
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1[0-9] passed", done.stdout, re.MULTILINE), done.stdout


def test_the_document_names_every_column() -> None:
    document = (ROOT / "docs" / "writing_a_policy.md").read_text()
    for column in fields(HostColumns):
        assert f"`{column.name}`" in document or column.name == "names", column.name
