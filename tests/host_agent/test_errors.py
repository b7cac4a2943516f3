"""Errors are one line, and survive the way over the control API."""

import json

import pytest

from host_agent import errors
from host_agent.errors import (
    AgentError,
    BadRequest,
    ConfigError,
    MethodNotAllowed,
    MissingRight,
    NoSuchRoute,
    NoSuchVm,
    NotEnoughMemory,
    UserError,
    VmExists,
    error_from_problem,
)
from protocol.units import MIB

CROSSING = [
    AgentError("broken"),
    UserError("no", what_to_do="do that"),
    ConfigError("bad key"),
    BadRequest("nonsense"),
    NoSuchRoute("GET /v2", what_to_do="see /openapi.json"),
    MethodNotAllowed("PUT /v1/host"),
    MissingRight("no root", what_to_do="run as root"),
    NoSuchVm("web1"),
    VmExists("web1"),
    NotEnoughMemory(3 * MIB, ["a", "b"]),
    NotEnoughMemory(0, message="own words", what_to_do="wait"),
]


@pytest.mark.parametrize("error", CROSSING, ids=lambda error: type(error).__name__)
def test_there_and_back(error: AgentError) -> None:
    back = error_from_problem(json.loads(json.dumps(error.to_problem())))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert back.exit_code == error.exit_code


def test_kinds_differ() -> None:
    kinds = [
        value.kind
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, AgentError)
    ]
    assert len(kinds) == len(set(kinds)) == 14


@pytest.mark.parametrize("problem", [{}, {"kind": "from the future", "error": "x"}, {"detail": 1}])
def test_an_unknown_problem_is_still_an_error(problem: dict[str, object]) -> None:
    error = error_from_problem(problem)
    assert type(error) is AgentError
    assert error.message


def test_one_line_whatever_was_said() -> None:
    error = UserError("a\nb\t c", what_to_do="d\n\ne")
    assert error.one_line() == "a b c: d e"


def test_who_refused_is_said() -> None:
    message = NotEnoughMemory(3 * MIB, ["a", "b"]).message
    assert message == "not enough memory: 3MiB missing; asked in vain: a, b"
