"""The container engine's API: addresses, answers and errors, with a server of few words."""

import contextlib
import json
from pathlib import Path

import pytest
import trio
from engine_server import answering, asked, http

from host_agent.machines.base import MachineError
from host_agent.machines.engine import (
    DEFAULT_SOCKET,
    Engine,
    EngineError,
    NoEngine,
    engine_socket,
)
from host_agent.machines.engine_answers import EngineEvent, parse_event, unframed

EVENT = {"Action": "start", "Actor": {"ID": "f" * 64, "Attributes": {"name": "web1"}}}


def test_the_engine_is_where_docker_host_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    assert engine_socket() == DEFAULT_SOCKET
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/other.sock")
    assert engine_socket() == Path("/run/other.sock")
    assert engine_socket("") == DEFAULT_SOCKET


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:2375", "ssh://box", "/run/docker.sock", "unix://", "unix://a"]
)
def test_an_engine_that_is_not_on_this_machine_is_refused(address: str) -> None:
    with pytest.raises(MachineError, match="mock VMs need an engine on this machine"):
        engine_socket(address)


def test_an_event_is_its_first_word() -> None:
    assert parse_event(json.dumps(EVENT).encode()) == EngineEvent("start", "f" * 64)
    long = {**EVENT, "Action": "exec_create: sh -c 'a: b'"}
    assert parse_event(json.dumps(long).encode()).action == "exec_create"


@pytest.mark.parametrize("line", [b"no json", b"[]", b"{}", b'{"Action": "x", "Actor": 1}'])
def test_what_is_no_event(line: bytes) -> None:
    with pytest.raises(MachineError, match="the container engine answers what "):
        parse_event(line)


def test_output_comes_without_its_frames() -> None:
    def frame(stream: int, text: bytes) -> bytes:
        return bytes([stream, 0, 0, 0]) + len(text).to_bytes(4, "big") + text

    assert unframed(frame(1, b"one\n") + frame(2, b"two\n")) == b"one\ntwo\n"
    assert unframed(b"a terminal's is plain") == b"a terminal's is plain"
    assert unframed(frame(1, b"cut off")[:-3]) == b"cut "
    assert unframed(b"") == b""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "e.sock"


def test_nobody_answers(path: Path) -> None:
    with pytest.raises(NoEngine, match=f"no container engine answers at {path}: start one"):
        asked(path, "view")


def test_an_engine_that_goes_away_in_the_middle(path: Path) -> None:
    with (
        answering(path, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
        pytest.raises(NoEngine, match="went away"),
    ):
        asked(path, "view")


def test_a_refusal_is_one_line_with_its_status(path: Path) -> None:
    refused = http("500 Internal Server Error", {"message": "no\nspace \x07left"})
    with answering(path, refused), pytest.raises(EngineError) as error:
        asked(path, "start", "x")
    assert str(error.value) == "the container engine says: no space  left"
    assert error.value.status == 500


@pytest.mark.parametrize("body", ["", "<html>", "[]"])
def test_a_refusal_in_no_known_form(path: Path, body: str) -> None:
    with (
        answering(path, http("503 Service Unavailable", body, "text/plain")),
        pytest.raises(EngineError, match="the container engine says: "),
    ):
        asked(path, "start", "x")


def test_one_that_is_started_already_is_started(path: Path) -> None:
    with answering(path, b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n"):
        asked(path, "start", "x")


@pytest.mark.parametrize("status", ["404 Not Found", "409 Conflict", "204 No Content"])
def test_removing_what_is_gone_is_no_error(path: Path, status: str) -> None:
    with answering(path, http(status, {"message": "gone"})):
        asked(path, "remove", "x")


def test_events_in_any_pieces_until_the_engine_ends(path: Path) -> None:
    line = json.dumps(EVENT).encode()
    chunks = (line[:10], line[10:] + b"\n" + line, b"\n")
    body = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    heard: list[EngineEvent] = []

    async def main() -> None:
        engine = Engine(path)
        with trio.fail_after(30):
            async with contextlib.aclosing(engine), engine.events("a=b") as events:
                async for event in events:
                    heard.append(event)

    with answering(path, head + body + b"0\r\n\r\n"), pytest.raises(NoEngine):
        trio.run(main)
    assert heard == [EngineEvent("start", "f" * 64)] * 2
