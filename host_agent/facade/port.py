"""What the control API asks of an agent, and the values that cross it.

The agent implements AgentPort; the facade knows nothing else of it. Values are frozen, sizes are
in bytes, absent is None. A request's value is valid once built: its rules are here and nowhere
else, so that the configuration file, the command line and the API refuse the same things.
"""

from enum import StrEnum
from typing import Annotated, Final, Literal, Protocol, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from host_agent.sizes import SizeBytes, format_size_exactly
from protocol.units import HUGE_FRAME_ORDER, MIB, PAGE_BYTES

DEFAULT_RESERVATION_SHARE: Final = 0.25
"""Part of the assigned memory that is guaranteed when nobody says how much."""

DEFAULT_SHARES: Final = 1000
MAX_SHARES: Final = 1_000_000
"""As in ESX: enough for any ratio, small enough that no product of it overflows."""

MIN_ASSIGNED_BYTES: Final = 8 * MIB
"""Less than that holds no process worth the name; it is a size with its unit forgotten."""

VM_NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,31}$"

MAX_ARGUMENTS: Final = 1024
MAX_ARGUMENT_CHARS: Final = 131_072
"""The kernel's own bound on one argument (MAX_ARG_STRLEN)."""


def _argument(text: str) -> str:
    # execve would cut the argument there.
    if "\0" in text:
        raise ValueError("an argument holds a NUL character")
    return text


VmName = Annotated[
    str,
    Field(
        pattern=VM_NAME_PATTERN,
        description="Lower-case letters, digits and dashes, 32 at most; names the VM's cgroup.",
    ),
]
Argument = Annotated[str, Field(max_length=MAX_ARGUMENT_CHARS), AfterValidator(_argument)]
Shares = Annotated[int, Field(strict=True, ge=1, le=MAX_SHARES)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VmSpec(_Value):
    """A mock VM as it was asked for.

    `reservation_bytes` is a quarter of the assigned memory unless given. `startup_bytes` is the
    quota that the VM would like to begin with (all of the assigned memory unless given); it begins
    with less where the pool has less, but never with less than its reservation. An empty `command`
    stands for the built-in workload, idle.
    """

    name: VmName
    assigned_bytes: SizeBytes = Field(ge=MIN_ASSIGNED_BYTES)
    reservation_bytes: SizeBytes = Field(
        default_factory=lambda spec: quarter_of(spec["assigned_bytes"]), ge=0
    )
    shares: Shares = DEFAULT_SHARES
    startup_bytes: SizeBytes = Field(default_factory=lambda spec: spec["assigned_bytes"], ge=0)
    frames: Literal["4KiB", "2MiB"] = "4KiB"
    command: tuple[Argument, ...] = Field(default=(), max_length=MAX_ARGUMENTS)

    @property
    def frame_order(self) -> int:
        """0 for 4 KiB frames, 9 for 2 MiB frames."""
        return HUGE_FRAME_ORDER if self.frames == "2MiB" else 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        reservation, startup = self.reservation_bytes, self.startup_bytes
        if reservation > self.assigned_bytes:
            raise ValueError(
                f"the reservation of {format_size_exactly(reservation)} is above the assigned "
                f"{format_size_exactly(self.assigned_bytes)}"
            )
        if not reservation <= startup <= self.assigned_bytes:
            raise ValueError(
                f"the startup quota of {format_size_exactly(startup)} is not between the "
                f"reservation of {format_size_exactly(reservation)} and the assigned "
                f"{format_size_exactly(self.assigned_bytes)}"
            )
        return self


def quarter_of(assigned_bytes: int) -> int:
    """The default reservation: 25 % of the assigned memory, in whole pages."""
    return int(assigned_bytes * DEFAULT_RESERVATION_SHARE) // PAGE_BYTES * PAGE_BYTES


class VmChange(_Value):
    """What an operator wants changed; None leaves a thing as it is.

    At most one of `target_bytes` (a balloon size, which pins the VM), `quota_bytes` (the same said
    as the memory that stays) and `automatic` (true: the policy decides again).
    """

    target_bytes: SizeBytes | None = Field(default=None, ge=0)
    quota_bytes: SizeBytes | None = Field(default=None, ge=0)
    shares: Shares | None = None
    reservation_bytes: SizeBytes | None = Field(default=None, ge=0)
    automatic: Literal[True] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        ways = [self.target_bytes, self.quota_bytes, self.automatic]
        chosen = sum(way is not None for way in ways)
        if chosen > 1:
            raise ValueError("only one of target_bytes, quota_bytes and automatic can be given")
        if chosen == 0 and self.shares is None and self.reservation_bytes is None:
            raise ValueError("nothing to change")
        return self


class VmState(StrEnum):
    """A mock VM in one word.

    `waiting` waits for memory before it is made; `dry` has or just had no memory left in its
    quota; `stuck` did not reach its target, `uncooperative` again and again.
    """

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    STUCK = "stuck"
    UNCOOPERATIVE = "uncooperative"
    DRY = "dry"
    STOPPING = "stopping"


class VmView(_Value):
    """A mock VM as the agent sees it now.

    `last_reason` is why its driver last gave less than the target; `pinned` means that an operator
    chose the target.
    """

    name: str
    state: VmState
    backend: str
    assigned_bytes: int
    reservation_bytes: int
    shares: int
    quota_bytes: int
    balloon_actual_bytes: int
    balloon_target_bytes: int
    lent_bytes: int
    overhead_bytes: int
    usage_bytes: int | None = None
    working_set_bytes: int | None = None
    demand_bytes: int | None = None
    oom_kills: int
    connected: bool
    last_reason: str | None = None
    pinned: bool = False


class VitalsView(_Value):
    """The last statistics that a VM's driver sent, `age_s` seconds ago; None is unknown."""

    age_s: float
    limit_bytes: int | None = None
    usage_bytes: int | None = None
    anon_bytes: int | None = None
    file_bytes: int | None = None
    inactive_file_bytes: int | None = None
    active_file_bytes: int | None = None
    dirty_bytes: int | None = None
    unevictable_bytes: int | None = None
    kernel_bytes: int | None = None
    refault_bytes_total: int | None = None
    refault_anon_bytes_total: int | None = None
    major_faults_total: int | None = None
    swap_used_bytes: int | None = None
    swap_free_bytes: int | None = None
    pressure_some_avg10: float | None = None
    pressure_full_avg10: float | None = None
    oom_kills_total: int | None = None
    working_set_bytes: int | None = None
    demand_bytes: int | None = None
    spare_bytes: int | None = None


class HostView(_Value):
    """The pool and what became of it. `free_bytes` is in nobody's quota and not in the reserve."""

    pool_bytes: int
    reserve_bytes: int
    reserve_left_bytes: int
    free_bytes: int
    quotas_bytes: int
    assigned_bytes: int
    overcommit_ratio: float
    policy: str
    shortage: bool
    shortage_bytes: int
    oom_kills: int
    moves_total: int
    version: str
    cgroup_version: int
    uptime_s: float


class AgentPort(Protocol):
    """The agent, as the control API needs it.

    Every method raises the errors of host_agent.errors; whatever else it raises is a defect. The
    plain methods answer from memory and don't block the event loop.
    """

    async def launch(self, spec: VmSpec) -> VmView:
        """Start a mock VM and answer when it runs. VmExists, NotEnoughMemory, BadRequest."""
        ...

    async def stop(self, name: str) -> None:
        """Stop a mock VM and answer when its memory is back in the pool. NoSuchVm."""
        ...

    async def change(self, name: str, change: VmChange) -> VmView:
        """Apply an operator's wish. NoSuchVm, BadRequest, NotEnoughMemory."""
        ...

    def vms(self) -> list[VmView]:
        """All mock VMs, ordered by name."""
        ...

    def vm(self, name: str) -> VmView:
        """One mock VM. NoSuchVm."""
        ...

    def host(self) -> HostView:
        """The pool."""
        ...

    def vitals(self, name: str) -> VitalsView | None:
        """A VM's last statistics, None before the first. NoSuchVm."""
        ...
