"""Engines that answer nonsense: one line of a MachineError, and no agent that ends by it."""

import contextlib
import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from engine_server import DEADLINE_S, answering, asked, http, raw_http, serving
from hypothesis import given
from hypothesis import strategies as st
from test_machines_docker import spec

from host_agent.machines.base import ExitStatus, MachineError
from host_agent.machines.docker import DockerBackend
from host_agent.machines.docker_machine import DockerMachine
from host_agent.machines.engine import Engine
from host_agent.machines.engine_answers import (
    MAX_ANSWER_BYTES,
    MAX_EVENT_BYTES,
    OddAnswer,
    parse_container,
    parse_engine,
    parse_event,
    parse_id,
    parse_ids,
    parse_refusal,
)
from host_agent.machines.identity import ProcessHandle
from host_agent.machines.outside_driver import OutsideDriver

ID = "f" * 64
CONTAINER = {
    "Id": ID,
    "Name": "/lab-web1",
    "State": {"Running": True, "Pid": 4711, "ExitCode": 0, "OOMKilled": False, "Error": ""},
    "Config": {"Labels": {"memballoon.agent": "lab", "memballoon.vm": "web1"}},
}
INFO = {"CgroupDriver": "cgroupfs"}
EVENT = {"Action": "die", "Actor": {"ID": ID, "Attributes": {"name": "lab-web1"}}}
OK = "200 OK"

ASKING: dict[str, tuple[Any, ...]] = {
    "view": (),
    "create": ("lab-web1", {}),
    "inspect": (ID,),
    "wait_ended": (ID,),
    "containers": ("a=b",),
}
"""All that has an answer to be read."""

ORDERING: dict[str, tuple[Any, ...]] = {
    "start": (ID,),
    "stop": (ID, 1.0),
    "remove": (ID,),
    "last_words": (ID,),
}
"""All that has none, or one of any form."""

NO_HTTP = {
    "nothing": b"",
    "a greeting of another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeros": bytes(4096),
    "a header without an end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000,
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a body that is cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "chunks that are none": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a status that is none": b"HTTP/1.1 ok OK\r\n\r\n{}",
    "another protocol from now on": b"HTTP/1.1 101 Switching Protocols\r\n\r\n{}",
    "patience and no more": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
}

REFUSALS = {
    "a way elsewhere": raw_http("302 Found", b"", more="Location: http://[::\r\n"),
    "an unknown status": raw_http("799 Whatever", b"\xff\xfe" * 5000),
    "a refusal that is a number": http("500 No", 1),
    "a refusal with half a character": raw_http("500 No", b'{"message": "\\ud800"}'),
    "a long refusal": http("500 No", {"message": "no\n" * 100_000}),
    "a refusal that is packed": raw_http(
        "500 No", b"\x1f\x8b\x08", more="Content-Encoding: br\r\n"
    ),
}

ODD_BODIES = {
    "nothing": b"",
    "no JSON": b"<html>",
    "no text": b"\xff\xfe\x00\xd8",
    "half of it": b'{"Id": "f',
    "null": b"null",
    "a number": b"1",
    "a number without an end": b"1" * 100_000,
    "a tree without an end": b"[" * 200_000,
    "another kind of tree": b'{"Id":' * 100_000,
    "nothing in it": b"{}",
    "a list of nothing": b"[null]",
    "a list of lists": b"[[]]",
    "wrong kinds": b'{"Id": 7, "State": [], "Config": 1, "CgroupDriver": {}}',
    "an id that is a path": b'{"Id": "../../etc"}',
    "ids that are paths": b'[{"Id": "a/b"}]',
    "too much": b"[" + b" " * MAX_ANSWER_BYTES + b"]",
}


def is_one_line(error: MachineError) -> bool:
    text = str(error)
    text.encode()
    return 0 < len(text) < 1000 and text.isprintable()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "e.sock"


@pytest.mark.parametrize("method", ASKING)
@pytest.mark.parametrize("body", ODD_BODIES)
def test_an_answer_that_makes_no_sense(path: Path, method: str, body: str) -> None:
    if method == "wait_ended":  # what is said there is of no interest
        answers = [http(OK, {}), raw_http(OK, ODD_BODIES[body])]
    else:
        answers = [raw_http(OK, ODD_BODIES[body])]
    with answering(path, *answers), pytest.raises(OddAnswer) as refused:
        asked(path, method, *ASKING[method])
    assert is_one_line(refused.value)


@pytest.mark.parametrize("method", [*ASKING, *ORDERING])
@pytest.mark.parametrize("kind", [*NO_HTTP, *REFUSALS])
def test_what_is_no_answer(path: Path, method: str, kind: str) -> None:
    answer = {**NO_HTTP, **REFUSALS}[kind]
    arguments = {**ASKING, **ORDERING}[method]
    with serving(path, lambda _: answer), pytest.raises(MachineError) as refused:
        asked(path, method, *arguments)
    assert is_one_line(refused.value)


def test_what_was_not_asked_for_is_not_unpacked(path: Path) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    packed = raw_http(OK, bomb, more="Content-Encoding: gzip\r\n")
    with answering(path, packed), pytest.raises(OddAnswer, match="not JSON"):
        asked(path, "inspect", ID)


def test_output_without_an_end_is_cut(path: Path) -> None:
    with answering(path, raw_http(OK, b"words " * (2 << 20))):
        assert asked(path, "last_words", ID).startswith("words words ")


def test_a_name_that_can_not_stand_in_an_address(path: Path) -> None:
    with pytest.raises(MachineError) as refused:
        asked(path, "inspect", "a\nb")
    assert is_one_line(refused.value)


# Any shape at all

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**31)
    | st.floats()
    | st.text(max_size=8)
    | st.just("\ud800")
    | st.just("f" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, whole: Any) -> Any:
    """`whole` with something else in one place of it, or without that place."""
    if not isinstance(whole, dict) or not whole or draw(st.integers(0, 3)) == 0:
        return draw(JSON_VALUES)
    key = draw(st.sampled_from(sorted(whole)))
    if draw(st.integers(0, 4)) == 0:
        return {name: value for name, value in whole.items() if name != key}
    return {**whole, key: draw(spoilt(whole[key]))}


def read_or_refused(parse: Any, found: Any) -> Any:
    read, refused = None, None
    try:
        read = parse(json.dumps(found).encode())
    except MachineError as error:
        refused = error
    assert refused is None or is_one_line(refused)
    return read


@given(found=spoilt(CONTAINER))
def test_a_container_of_any_shape(found: Any) -> None:
    view = read_or_refused(parse_container, found)
    if view is not None:
        assert view.running == (view.pid > 0)
        assert 0 <= view.exit_code <= 255
        assert view.container_id.replace("/", "") == view.container_id != ""
        texts = (view.name, view.error, *view.labels, *view.labels.values())
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)


@given(found=spoilt(EVENT))
def test_an_event_of_any_shape(found: Any) -> None:
    event = read_or_refused(parse_event, found)
    assert event is None or (isinstance(event.action, str) and "/" not in event.container_id)


@given(found=spoilt(INFO) | spoilt([{"Id": ID}]) | JSON_VALUES)
def test_other_answers_of_any_shape(found: Any) -> None:
    for parse in (parse_engine, parse_id, parse_ids):
        read_or_refused(parse, found)


@given(raw=st.binary(max_size=200))
def test_bytes_of_any_kind(raw: bytes) -> None:
    for parse in (parse_engine, parse_id, parse_ids, parse_container, parse_event):
        with contextlib.suppress(MachineError):
            parse(raw)
    said = parse_refusal(raw)
    assert said == "" or said.isprintable()


def test_half_a_character_is_none() -> None:
    config = {"Labels": {"memballoon.vm": "web\ud800", "\udfff": ""}}
    view = parse_container(json.dumps({**CONTAINER, "Config": config}).encode())
    assert view.labels == {"memballoon.vm": "web?", "?": ""}


def test_a_container_that_waits_to_be_started_again_does_not_run() -> None:
    state = {"Running": True, "Restarting": True, "Pid": 0, "ExitCode": 1}
    view = parse_container(json.dumps({**CONTAINER, "State": state}).encode())
    assert (view.running, view.pid) == (False, 0)


# The events, and who follows them


async def forever(_: OutsideDriver) -> None:
    """In place of a driver's start."""
    await trio.sleep_forever()


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: bytes) -> bytes:
    return f"{len(text):x}\r\n".encode() + text + b"\r\n"


ODD_STREAMS = {
    **NO_HTTP,
    **REFUSALS,
    **{kind: STREAM + chunk(body + b"\n") for kind, body in ODD_BODIES.items() if body},
    "an event without an end": STREAM + chunk(b"x" * (MAX_EVENT_BYTES + 1)),
    "a packed one": raw_http(OK, gzip.compress(b"{}\n"), more="Content-Encoding: gzip\r\n"),
}


@pytest.mark.parametrize("kind", ODD_STREAMS)
def test_events_that_make_no_sense(path: Path, kind: str) -> None:
    async def main() -> None:
        engine = Engine(path)
        with trio.fail_after(DEADLINE_S):
            async with contextlib.aclosing(engine), engine.events() as events:
                async for _ in events:
                    pass

    with serving(path, lambda _: ODD_STREAMS[kind]), pytest.raises(MachineError) as refused:
        trio.run(main)
    assert is_one_line(refused.value)


@pytest.mark.parametrize(
    "kind", ["zeros", "a body that is cut off", "a long refusal", "no JSON", "too much"]
)
def test_the_agent_goes_on_and_asks_again(
    path: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OutsideDriver, "start", forever)

    def answer_to(line: str) -> bytes:
        if "/events" in line:
            return ODD_STREAMS[kind]
        return http(OK, INFO) if "/info" in line else http(OK, [])

    async def main(heard: list[str]) -> None:
        backend = DockerBackend("lab", Engine(path))
        with trio.fail_after(DEADLINE_S):
            async with contextlib.aclosing(backend), trio.open_nursery() as nursery:
                nursery.start_soon(backend.run)
                with pytest.raises(MachineError):  # no container is made, but the engine is heard
                    await backend.launch(spec(tmp_path))
                while sum("/events" in line for line in heard) < 3:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    with serving(path, answer_to) as heard:
        trio.run(main, heard)
    assert caplog.text.count("its VMs run on, it is asked again") == 1


# Who asks for a container


def test_a_container_that_was_made_without_a_word_is_removed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutsideDriver, "start", forever)

    async def main() -> None:
        async with contextlib.aclosing(DockerBackend("lab", Engine(path))) as backend:
            with trio.fail_after(DEADLINE_S), pytest.raises(OddAnswer, match="Id is 7"):
                await backend.launch(spec(tmp_path))

    answers = (http(OK, INFO), http("201 Created", {"Id": 7}), http(OK, CONTAINER))
    with answering(path, *answers, http("204 No Content")) as heard:
        trio.run(main)
    assert [line.partition("?")[0] for line in heard[2:]] == [
        "GET /v1.41/containers/lab-web1/json HTTP/1.1",
        f"DELETE /v1.41/containers/{ID}",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        raw_http(OK, b"{}"),
        http(OK, {**CONTAINER, "State": {"Running": True, "Pid": 2**22 + 1}}),
        http(OK, {**CONTAINER, "State": {"Running": False, "ExitCode": -1}}),
        raw_http("500 No", b"\xff"),
    ],
    ids=["nothing", "a pid that is none", "a status that is none", "a refusal"],
)
def test_an_end_of_which_the_engine_tells_nonsense(path: Path, answer: bytes) -> None:
    files = OutsideDriver("web1", path.parent, path.parent / "log")

    async def main(init: ProcessHandle) -> ExitStatus:
        engine = Engine(path)
        machine = DockerMachine(
            *(engine, lambda _: None, "web1", ID, path.parent, files, init, None)
        )
        with trio.fail_after(DEADLINE_S):
            async with contextlib.aclosing(engine):
                return await machine.wait_exited()

    with serving(path, lambda _: answer):
        child = subprocess.Popen(["sleep", "1000"])
        init = ProcessHandle.of(child.pid)
        child.kill()
        child.wait()
        assert trio.run(main, init) == ExitStatus(
            detail="exit status unknown: its container or its engine is gone"
        )
