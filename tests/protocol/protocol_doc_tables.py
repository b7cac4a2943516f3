"""The tables of docs/protocol.md, made from the code.

`python tests/protocol/protocol_doc_tables.py` writes them into the document, between the marks;
test_protocol_doc.py holds that they are there.
"""

import dataclasses
import re
from enum import StrEnum
from pathlib import Path

from protocol import transitions, vocabulary
from protocol.fields import is_required
from protocol.messages import MESSAGES, Message
from protocol.transitions import CROSSED, HEARING, INFLATION, REPORT, SENDERS, SESSION
from protocol.vocabulary import RefusalReason, RejectionReason, Role, Urgency

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def sender(message: type[Message]) -> str:
    roles = SENDERS[message]
    return "either" if len(roles) == len(Role) else next(iter(roles)).value


def session() -> str:
    rows = []
    for state, row in SESSION.items():
        by_message = {cls: after for cls, after in row.items() if cls not in _inner()}
        rows += [[state, name(cls), sender(cls), after] for cls, after in by_message.items()]
        if len(by_message) < len(row):
            inner = ", ".join(name(cls) for cls in row if cls in _inner())
            rows.append([state, inner, "see messages", transitions.SessionState.RUNNING])
        if not row:
            rows.append([state, "nothing", "", ""])
    return table(["state", "message", "sender", "next state"], rows)


def inflation() -> str:
    rows = [
        [state, name(cls), sender(cls), after]
        for state, row in INFLATION.items()
        for cls, after in row.items()
    ]
    return table(["state", "message", "sender", "next state"], rows)


def report() -> str:
    rows = [[state, step, after] for state, row in REPORT.items() for step, after in row.items()]
    return table(["state", "step", "next state"], [["(none)", "Report", "REPORTED"], *rows])


def hearing() -> str:
    rows = [[state, step, after] for state, row in HEARING.items() for step, after in row.items()]
    return table(["state", "step", "next state"], rows)


def crossed() -> str:
    return table(["message", "at the host"], [[name(cls), what] for cls, what in CROSSED.items()])


def messages() -> str:
    rows = []
    for cls in MESSAGES:
        for index, field in enumerate(cls.FIELDS):
            first = [f"`{cls.WIRE_NAME}`", sender(cls)] if index == 0 else ["", ""]
            default = "" if is_required(field) else f"`{_plain(field.default)}`"
            rows.append([*first, f"`{field.name}`", field.kind.describe(), default])
    return table(["type", "sender", "field", "value", "default"], rows)


def words() -> str:
    enums: tuple[type[StrEnum], ...] = (Urgency, RefusalReason, RejectionReason)
    rows = [[enum.__name__, ", ".join(f"`{member}`" for member in enum)] for enum in enums]
    return table(["words", "values on the wire"], rows)


def bounds() -> str:
    names = [key for key in vars(vocabulary) if key.startswith(("MAX_", "MIN_"))]
    return table(["bound", "value"], [[key, f"{getattr(vocabulary, key):,}"] for key in names])


TABLES = {
    make.__name__: make
    for make in (session, inflation, report, hearing, crossed, messages, words, bounds)
}


def with_tables(document: str) -> str:
    """The document with each marked table made anew. KeyError for a table nobody makes."""
    return MARKED.sub(
        lambda found: found[1] + "\n" + TABLES[found[2]]() + "\n" + found[3], document
    )


def name(cls: type[Message]) -> str:
    return cls.__name__


def _inner() -> tuple[type[Message], ...]:
    return transitions.WHILE_RUNNING


def _plain(default: object) -> str:
    assert default is not dataclasses.MISSING
    return "absent" if default is None else repr(default)


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
