"""The control socket's life: mode, a living owner, a dead one's file, the end."""

import logging
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
import trio
from facade_fixtures import NumbersAgent, served, spec
from pydantic import BaseModel

from host_agent.client import AgentClient
from host_agent.errors import AgentError, BadRequest, SocketInUse
from host_agent.facade import server
from host_agent.facade.port import ClientRequest
from host_agent.facade.server import is_answered
from protocol.units import MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_it_is_private_and_gone_at_the_end(path: Path) -> None:
    with served(NumbersAgent(), path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert is_answered(path)
    assert not path.exists()


def test_a_quiet_life_leaves_nothing_in_the_log(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with served(NumbersAgent(), path), AgentClient(path) as client:
        client.vms()
    assert [record for record in caplog.records if record.name.startswith("memballoon")] == []


def test_no_child_inherits_it(path: Path) -> None:
    with served(NumbersAgent(), path):
        inode_of = {
            fd: os.readlink(f"/proc/self/fd/{fd}")
            for fd in map(int, os.listdir("/proc/self/fd"))
            if os.path.lexists(f"/proc/self/fd/{fd}")
        }
        sockets = [fd for fd, target in inode_of.items() if target.startswith("socket:")]
        assert sockets
        assert not [fd for fd in sockets if os.get_inheritable(fd)]


def test_a_living_agent_keeps_its_socket(path: Path) -> None:
    with served(NumbersAgent(), path):
        with (
            pytest.raises(SocketInUse, match="another agent answers"),
            served(NumbersAgent(), path),
        ):
            pass
        with AgentClient(path) as client:
            assert client.vms() == []


def test_a_busy_owner_is_a_living_one(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as owner, socket.socket(socket.AF_UNIX) as waiting:
        owner.bind(str(path))
        owner.listen(0)
        waiting.connect(str(path))
        assert is_answered(path)
        with pytest.raises(SocketInUse), served(NumbersAgent(), path):
            pass


def test_a_dead_agents_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen(1)
    assert not is_answered(path)
    with served(NumbersAgent(), path), AgentClient(path) as client:
        assert client.vms() == []


def test_anything_else_there_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(BadRequest, match="is no socket"), served(NumbersAgent(), path):
        pass
    assert path.read_text() == "precious"


def test_a_successors_socket_is_not_removed(path: Path) -> None:
    with served(NumbersAgent(), path) as loop:
        path.unlink()
        with served(NumbersAgent(), path):
            loop.stop()
            with AgentClient(path) as client:
                assert client.vms() == []


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120) / "control.sock"
    with pytest.raises(BadRequest, match="longer than the 107 bytes"), served(NumbersAgent(), long):
        pass
    assert not long.parent.exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest), served(NumbersAgent(), tmp_path / "file" / "control.sock"):
        pass


def test_a_request_in_progress_ends_before_the_server(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GRACE_S", 60.0)
    agent = NumbersAgent()
    agent.hold = trio.Event()
    seen: list[object] = []
    with served(agent, path) as loop:

        def ask() -> None:
            with AgentClient(path) as client:
                seen.append(client.launch(spec("late")))

        asking = threading.Thread(target=ask)
        asking.start()
        assert agent.held.wait(20)
        loop.stop()
        # The server stops listening at once, while the request goes on.
        while is_answered(path):
            pass
        assert not seen
        loop.soon(agent.hold.set)
        asking.join(20)
    assert seen == [agent.views["late"]]


def test_a_request_that_never_ends_does_not_keep_the_server(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GRACE_S", 0.05)
    agent = NumbersAgent()
    agent.hold = trio.Event()
    refused: list[BaseException] = []
    with served(agent, path) as loop:

        def ask() -> None:
            with AgentClient(path) as client:
                try:
                    client.launch(spec("never"))
                except AgentError as error:
                    refused.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert agent.held.wait(20)
        loop.stop()
        asking.join(20)
    assert not path.exists()
    assert [type(error) for error in refused] == [AgentError]
    assert "went away" in str(refused[0]) or "HTTP status" in str(refused[0])


@pytest.mark.parametrize(
    ("route", "wanted"),
    [
        ("vms", spec("unwanted")),
        ("reservations", ClientRequest(client="xapi", size_bytes=64 * MIB)),
    ],
)
def test_what_takes_long_ends_with_the_client_that_asked_for_it(
    path: Path, caplog: pytest.LogCaptureFixture, route: str, wanted: BaseModel
) -> None:
    agent = NumbersAgent()
    agent.hold = trio.Event()
    body = wanted.model_dump_json().encode()
    head = f"POST /v1/{route} HTTP/1.1\r\nHost: agent\r\nContent-Type: application/json\r\n"
    with served(agent, path) as loop:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert agent.held.wait(20)
            assert not agent.cancelled.wait(0.2)
        assert agent.cancelled.wait(20)
        loop.soon(agent.hold.set)
        with AgentClient(path) as other:
            assert (other.vms(), other.reservations()) == ([], [])
            assert other.launch(spec("wanted")).name == "wanted"
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
