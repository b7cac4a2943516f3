"""docs/cgroups.md names the tests that hold what it says: these have to exist."""

import re
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
DOC = ROOT / "docs" / "cgroups.md"


def test_every_test_that_the_table_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOC.read_text(encoding="utf-8")))
    assert len(named) > 20
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", sources))
    assert named - defined == set()


def test_every_difference_has_its_test() -> None:
    head, _, rest = DOC.read_text(encoding="utf-8").partition("| held by |\n")
    assert head
    table = list(takewhile(lambda line: line.startswith("|"), rest.splitlines()))[1:]
    assert len(table) > 20
    assert [row for row in table if "`test_" not in row] == []
