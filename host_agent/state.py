"""The durable state: what can't be derived after a crash, in one small file.

Limits are the kernel's, claimed frames the guests'; names, sizes, shares and where a mock VM's
processes are is all that stands here. The file is replaced atomically and on disk before `save`
returns, so a reader finds the old state or the new one, never a part.
"""

import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

STATE_FILE: Final = "state.json"
STATE_VERSION: Final = 1


class StateError(Exception):
    """The state file can't be read or written; one line says why and what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GuestState(_Model):
    """One mock VM."""

    name: str
    assigned_bytes: int
    reservation_bytes: int
    shares: int
    overhead_bytes: int
    frame_order: int
    command: tuple[str, ...]
    backend: str
    machine: dict[str, Any]
    """What the machine backend needs to find the VM again."""
    pinned_bytes: int | None = None


class AgentState(_Model):
    """Everything of one agent."""

    version: Literal[1] = STATE_VERSION
    guests: tuple[GuestState, ...] = ()


def load_state(state_dir: Path) -> AgentState:
    """The state of the agent that used `state_dir` before; empty if there was none.

    Raises StateError if the file is there but can't be read.
    """
    path = state_dir / STATE_FILE
    try:
        return AgentState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return AgentState()
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise StateError(
            f"the state file {path} can't be read ({reason}): stop its VMs and remove it"
        ) from error


def save_state(state_dir: Path, state: AgentState) -> None:
    """Replace the state file; when this returns, it is on disk. Raises StateError."""
    path = state_dir / STATE_FILE
    new = path.with_suffix(".new")
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new.open("wb") as file:
            file.write(state.model_dump_json(indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StateError(f"the state file {path} can't be written: {error.strerror}") from error
