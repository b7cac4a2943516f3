"""The durable state: what can't be derived after a crash, in one small file.

Limits are the kernel's, claimed frames the guests'; names, sizes, shares and where a mock VM's
processes are is all that stands here. The file is replaced atomically and on disk before `save`
returns, so a reader finds the old state or the new one, never a part.
"""

import os
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from host_agent.facade.port import BackendName, VmSpec
from host_agent.validation import one_line
from protocol.units import HUGE_FRAME_ORDER, PAGE_BYTES

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
    overhead_bytes: int = Field(ge=0, multiple_of=PAGE_BYTES)
    frame_order: int
    command: tuple[str, ...]
    image: str | None = None
    network: str | None = None
    container: str | None = None
    backend: BackendName
    machine: dict[str, Any]
    """What the machine backend needs to find the VM again."""
    pinned_bytes: int | None = Field(default=None, ge=0)
    maximum_bytes: int | None = None
    buffer_percent: float | None = None
    swap_bytes: int = 0
    balloon_may_swap: bool = False

    @property
    def spec(self) -> VmSpec:
        """The mock VM as it was asked for. What it started with matters no more."""
        return VmSpec(
            name=self.name,
            assigned_bytes=self.assigned_bytes,
            reservation_bytes=self.reservation_bytes,
            shares=self.shares,
            startup_bytes=self.assigned_bytes,
            maximum_bytes=self.maximum_bytes,
            buffer_percent=self.buffer_percent,
            swap_bytes=self.swap_bytes,
            balloon_may_swap=self.balloon_may_swap,
            frames="2MiB" if self.frame_order == HUGE_FRAME_ORDER else "4KiB",
            command=self.command,
            image=self.image,
            network=self.network,
            container=self.container,
            backend=self.backend,
        )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        """What no launch would take is damage here."""
        try:
            spec = self.spec
        except ValidationError as error:
            raise ValueError(one_line(error.errors())) from None
        if self.frame_order != spec.frame_order:
            raise ValueError(f"{self.name} has a frame_order of {self.frame_order}")
        if self.pinned_bytes is not None and self.pinned_bytes > spec.assigned_bytes:
            raise ValueError(f"{self.name} is pinned above its assigned size")
        return self


class ReservationState(_Model):
    """What one client has reserved."""

    client: str
    id: str
    size_bytes: int = Field(ge=PAGE_BYTES, multiple_of=PAGE_BYTES)
    vm: str | None = None


class AgentState(_Model):
    """Everything of one agent."""

    version: Literal[1] = STATE_VERSION
    guests: tuple[GuestState, ...] = ()
    reservations: tuple[ReservationState, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [guest.name for guest in self.guests]
        if len(set(names)) != len(names):
            raise ValueError("two VMs have one name")
        ids = [reservation.id for reservation in self.reservations]
        if len(set(ids)) != len(ids):
            raise ValueError("two reservations have one id")
        return self


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
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else f"it is damaged: {one_line(error.errors())}"
        )
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
