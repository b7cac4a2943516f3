"""What a table of a TOML file says of a VM's memory: in the agent's file and in a scenario."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from host_agent.facade.port import (
    DEFAULT_SHARES,
    MAX_BUFFER_PERCENT,
    MIN_ASSIGNED_BYTES,
    Shares,
    quarter_of,
)
from host_agent.sizes import SizeBytes


class Table(BaseModel):
    """A table of a TOML file: unknown keys are refused."""

    # In the file a key has its alias alone; in Python an attribute has its unit.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True
    )


class VmMemoryTable(Table):
    """The keys of a VM's memory; what they mean, VmSpec says."""

    assigned_bytes: SizeBytes = Field(validation_alias="memory", ge=MIN_ASSIGNED_BYTES)
    reservation_bytes: SizeBytes = Field(
        validation_alias="reservation",
        default_factory=lambda table: quarter_of(table["assigned_bytes"]),
        ge=0,
    )
    startup_bytes: SizeBytes = Field(
        validation_alias="startup", default_factory=lambda table: table["assigned_bytes"], ge=0
    )
    maximum_bytes: SizeBytes | None = Field(
        validation_alias="maximum", default=None, ge=MIN_ASSIGNED_BYTES
    )
    buffer_percent: Annotated[float, Field(ge=0, le=MAX_BUFFER_PERCENT)] | None = None
    shares: Shares = DEFAULT_SHARES
    swap_bytes: SizeBytes = Field(validation_alias="swap", default=0, ge=0)
    balloon_may_swap: Annotated[bool, Field(strict=True)] = False
