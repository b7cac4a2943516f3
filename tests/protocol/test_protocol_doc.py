"""docs/protocol.md says what the code does: its tables are the code's."""

import re

from protocol_doc_tables import DOCUMENT, MARKED, TABLES, with_tables

from protocol import errors, transitions
from protocol.vocabulary import PROTOCOL_VERSION


def test_the_documents_tables_are_the_codes_tables() -> None:
    document = DOCUMENT.read_text()
    assert document == with_tables(document), "run python tests/protocol/protocol_doc_tables.py"


def test_every_table_is_there_once() -> None:
    assert sorted(found[2] for found in MARKED.finditer(DOCUMENT.read_text())) == sorted(TABLES)


def test_the_documents_version_is_the_codes() -> None:
    assert f"version {PROTOCOL_VERSION}" in DOCUMENT.read_text()


def test_no_state_goes_unmentioned() -> None:
    document = DOCUMENT.read_text()
    for states in (
        transitions.SessionState,
        transitions.InflationState,
        transitions.ReportState,
        transitions.Hearing,
    ):
        for state in states:
            assert re.search(rf"\b{state}\b", document)


def test_every_error_is_explained() -> None:
    document = DOCUMENT.read_text()
    for error in (errors.LocalProtocolError, errors.RemoteProtocolError, errors.ChannelBroken):
        assert error.__name__ in document
