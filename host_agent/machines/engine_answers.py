"""What a container engine answers, made into values that are valid once built.

An engine is trusted to run containers, not to write JSON: another program may speak at its socket,
or one that is cut short, half updated or broken. Whatever it says that makes no sense is an
OddAnswer of one line, never another exception. Pure: bytes in, values out.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from host_agent.machines.base import MachineError
from protocol.vocabulary import MAX_PID, one_line

MAX_ANSWER_BYTES: Final = 8 << 20
"""A list of a thousand containers is 2 MiB; one container is described in 8 KiB."""

MAX_EVENT_BYTES: Final = 1 << 20
"""One event is about 1 KiB; labels of somebody's container may be long."""

MAX_ERROR_BYTES: Final = 4096

MAX_EXIT_CODE: Final = 255
"""Of a process of Linux."""

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
"""An id becomes a part of an address, and of a path in the tree of cgroups."""


_SHOWN_BYTES: Final = 64
_SHOWN_CHARS: Final = 80
"""Of what makes no sense."""


class OddAnswer(MachineError):
    """The engine answered, with something that makes no sense."""


@dataclass(frozen=True, slots=True)
class ContainerView:
    """A container as the engine knows it."""

    container_id: str
    name: str
    """As people write it, without a slash."""
    running: bool
    """It has a process 1 now; one that waits for its engine to start it again has none."""
    pid: int
    """The host's pid of its process 1; 0 if it does not run."""
    exit_code: int
    oom_killed: bool
    error: str
    """Why the engine could not start it, empty if it could."""
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EngineView:
    """What matters of the engine itself."""

    cgroup_driver: str
    """cgroupfs or systemd."""


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something happened to a container."""

    action: str
    container_id: str


def parse_engine(raw: bytes) -> EngineView:
    """The answer to /info. Raises OddAnswer, as all of these do."""
    return EngineView(cgroup_driver=_text(_table(_decoded(raw), "the answer"), "CgroupDriver"))


def parse_id(raw: bytes) -> str:
    """The answer to /containers/create: the id of what was made."""
    return _id(_table(_decoded(raw), "the answer"), "Id")


def parse_ids(raw: bytes) -> list[str]:
    """The answer to /containers/json: the ids of those that are listed."""
    found = _decoded(raw)
    if not isinstance(found, list):
        raise OddAnswer(f"the container engine answers {_shown(found)}, which is no list")
    return [_id(_table(entry, "an entry"), "Id") for entry in found]


def parse_container(raw: bytes) -> ContainerView:
    """The answer to /containers/ID/json."""
    found = _table(_decoded(raw), "the answer")
    state, config = _table(found.get("State"), "State"), _table(found.get("Config"), "Config")
    pid = _number(state, "Pid", MAX_PID)
    running = _flag(state, "Running") and pid > 0
    return ContainerView(
        container_id=_id(found, "Id"),
        name=one_line(_text(found, "Name")).removeprefix("/"),
        running=running,
        pid=pid if running else 0,
        exit_code=_number(state, "ExitCode", MAX_EXIT_CODE),
        oom_killed=_flag(state, "OOMKilled"),
        error=one_line(_text(state, "Error", absent="")),
        labels=_labels(config.get("Labels")),
    )


def parse_event(line: bytes) -> EngineEvent:
    """One line of /events."""
    found = _table(_decoded(line), "an event")
    return EngineEvent(
        # "exec_create: sh -c ..." and the like: the first word names the event.
        action=_text(found, "Action").partition(":")[0],
        container_id=_id(_table(found.get("Actor"), "Actor"), "ID"),
    )


def parse_refusal(raw: bytes) -> str:
    """What the engine says of why it refused, as one line; empty if it says nothing."""
    try:
        said = _text(_table(_decoded(raw), "the answer"), "message")
    except OddAnswer:
        said = raw[:MAX_ERROR_BYTES].decode(errors="replace")
    return one_line(said.strip())


def unframed(raw: bytes) -> bytes:
    """A container's output without the headers of 8 bytes (stream, length) before each part."""
    text = b""
    while len(raw) > 8 and raw[0] in (0, 1, 2) and raw[1:4] == b"\0\0\0":
        length = int.from_bytes(raw[4:8], "big")
        text, raw = text + raw[8 : 8 + length], raw[8 + length :]
    return text + raw


def _decoded(raw: bytes) -> Any:
    if len(raw) > MAX_ANSWER_BYTES:
        raise OddAnswer(f"the container engine answers more than {MAX_ANSWER_BYTES >> 20} MiB")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise OddAnswer(f"the container engine answers what is not JSON: {_shown(raw)}") from error


def _table(found: object, what: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise OddAnswer(f"the container engine answers what makes no sense: {what} is no table")
    return found


def _text(table: Mapping[str, Any], key: str, *, absent: str | None = None) -> str:
    found = table.get(key)
    if found is None and absent is not None:
        return absent
    if not isinstance(found, str):
        raise _odd(key, found, "text")
    return _sound(found)


def _id(table: Mapping[str, Any], key: str) -> str:
    found = _text(table, key)
    if not _ID.fullmatch(found):
        raise _odd(key, found, "an id")
    return found


def _number(table: Mapping[str, Any], key: str, most: int) -> int:
    """0 to `most`; 0 where it is not said."""
    found = table.get(key)
    if found is None:
        return 0
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= most:
        raise _odd(key, found, f"a number from 0 to {most}")
    return found


def _flag(table: Mapping[str, Any], key: str) -> bool:
    """False where it is not said."""
    found = table.get(key)
    if found is None:
        return False
    if not isinstance(found, bool):
        raise _odd(key, found, "true or false")
    return found


def _labels(found: object) -> dict[str, str]:
    labels = _table({} if found is None else found, "Labels")
    return {_sound(key): _text(labels, key) for key in labels}


def _sound(text: str) -> str:
    """JSON can hold half of a character (a lone surrogate), which nothing can print."""
    return text.encode(errors="replace").decode()


def _odd(key: str, found: object, wanted: str) -> OddAnswer:
    # The key of a label is the engine's as well.
    where = one_line(key)[:_SHOWN_CHARS]
    return OddAnswer(
        f"the container engine answers what makes no sense: {where} is {_shown(found)}, "
        f"not {wanted}"
    )


def _shown(found: object) -> str:
    text = found[:_SHOWN_BYTES].decode(errors="replace") if isinstance(found, bytes) else found
    try:
        return one_line(ascii(text))[:_SHOWN_CHARS]
    except (ValueError, RecursionError):  # a number of too many digits, a tree that is too deep
        return f"a {type(found).__name__}"
