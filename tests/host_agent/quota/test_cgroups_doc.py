"""docs/cgroups.md names the tests that hold what it says: these have to exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
DOC = ROOT / "docs" / "cgroups.md"


def test_every_test_that_the_table_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOC.read_text(encoding="utf-8")))
    assert len(named) > 20
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", sources))
    assert named - defined == set()
