"""What the control API asks of an agent, and the values that it asks with.

The agent implements AgentPort; the facade knows nothing else of it. What is answered stands in
views.py. Values are frozen, sizes are in bytes, absent is None. A request's value is valid once
built: its rules are here and nowhere else, so that the configuration file, the command line and
the API refuse the same things.
"""

from typing import Annotated, Any, Final, Literal, Protocol, Self

from pydantic import AfterValidator, Field, model_validator

from host_agent.facade.views import (
    DecisionView,
    HostView,
    PolicyView,
    ReservationView,
    TransferView,
    Value,
    VitalsView,
    VmView,
)
from host_agent.sizes import SizeBytes, format_size_exactly
from protocol.units import HUGE_FRAME_ORDER, MIB, PAGE_BYTES

DEFAULT_RESERVATION_SHARE: Final = 0.25
"""Part of the assigned memory that is guaranteed when nobody says how much."""

DEFAULT_SHARES: Final = 1000
MAX_SHARES: Final = 1_000_000
"""As in ESX: enough for any ratio, small enough that no product of it overflows."""

MAX_BUFFER_PERCENT: Final = 2000.0
"""As in Hyper-V."""

MIN_ASSIGNED_BYTES: Final = 8 * MIB
"""Less than that holds no process worth the name; it is a size with its unit forgotten."""

MAX_SWAP_PER_ASSIGNED: Final = 8
"""A swap disk of more than that many times the memory is a size with a wrong unit."""

VM_NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,31}$"

IMAGE_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.:/@-]*$"
MAX_IMAGE_CHARS: Final = 512
"""A name of 255 characters, a tag of 128 and a digest: the engine knows the finer rules."""

CONTAINER_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
MAX_CONTAINER_CHARS: Final = 255
"""As Docker has it."""

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
Image = Annotated[
    str,
    Field(
        pattern=IMAGE_PATTERN,
        max_length=MAX_IMAGE_CHARS,
        description="An image that the container engine has, as `docker run` takes it.",
    ),
]
ContainerName = Annotated[
    str,
    Field(
        pattern=CONTAINER_PATTERN,
        max_length=MAX_CONTAINER_CHARS,
        description="A container that somebody else starts, in this VM's cgroup.",
    ),
]
Network = Annotated[
    str,
    Field(
        pattern=CONTAINER_PATTERN,
        max_length=MAX_CONTAINER_CHARS,
        description="A network that the container engine has, as `docker run --network` takes it.",
    ),
]
BackendName = Literal["process", "docker", "attached"]
Shares = Annotated[int, Field(strict=True, ge=1, le=MAX_SHARES)]


def _backend_of(spec: dict[str, Any]) -> BackendName:
    if spec.get("container") is not None:
        return "attached"
    return "docker" if spec.get("image") is not None else "process"


class VmSpec(Value):
    """A mock VM as it was asked for.

    `reservation_bytes` is a quarter of the assigned memory unless given. `startup_bytes` is the
    quota that the VM would like to begin with (all of the assigned memory unless given); it begins
    with less where the pool has less, but never with less than its reservation.

    `maximum_bytes` is the most that a policy gives the VM (all of the assigned memory unless
    given); an operator's fixed quota and a loan to a VM that runs dry may exceed it.
    `buffer_percent` is what it is to have beyond its demand, for policies that give one.

    `swap_bytes` is the swap that the VM has, out of the machine's swap space and beside its quota:
    like a real VM's swap disk, and none unless given. `balloon_may_swap` lets its balloon make use
    of that when memory is short; else only the VM's own need does.

    An `image` makes it a container of that image (`backend` docker), in the engine's `network` of
    that name, without any unless given. An empty `command` stands for
    the image's own, or where there is no image for the built-in workload, idle. With `container` it
    is a container that somebody else starts with this VM's cgroup as its parent (`backend`
    attached): the agent makes its place and waits for nobody.
    """

    name: VmName
    assigned_bytes: SizeBytes = Field(ge=MIN_ASSIGNED_BYTES)
    reservation_bytes: SizeBytes = Field(
        default_factory=lambda spec: quarter_of(spec["assigned_bytes"]), ge=0
    )
    shares: Shares = DEFAULT_SHARES
    startup_bytes: SizeBytes = Field(default_factory=lambda spec: spec["assigned_bytes"], ge=0)
    maximum_bytes: SizeBytes | None = Field(default=None, ge=MIN_ASSIGNED_BYTES)
    buffer_percent: Annotated[float, Field(ge=0, le=MAX_BUFFER_PERCENT)] | None = None
    swap_bytes: SizeBytes = Field(default=0, ge=0)
    balloon_may_swap: Annotated[bool, Field(strict=True)] = False
    frames: Literal["4KiB", "2MiB"] = "4KiB"
    command: tuple[Argument, ...] = Field(default=(), max_length=MAX_ARGUMENTS)
    image: Image | None = None
    network: Network | None = None
    container: ContainerName | None = None
    backend: BackendName = Field(default_factory=_backend_of)

    @property
    def frame_order(self) -> int:
        """0 for 4 KiB frames, 9 for 2 MiB frames."""
        return HUGE_FRAME_ORDER if self.frames == "2MiB" else 0

    @model_validator(mode="after")
    def _has_its_image(self) -> Self:
        if self.backend == "docker" and self.image is None:
            raise ValueError("the docker backend needs an image")
        if self.backend != "docker" and self.image is not None:
            raise ValueError(f"an image is for the docker backend, not for {self.backend}")
        if self.network is not None and self.image is None:
            raise ValueError("a network is for a container of an image; others have none")
        if (self.backend == "attached") != (self.container is not None):
            raise ValueError("the attached backend, and no other, has a container of another's")
        if self.container is not None and self.command:
            raise ValueError("whoever starts the container chooses its command")
        return self

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
        maximum = self.maximum_bytes
        if maximum is not None and not reservation <= maximum <= self.assigned_bytes:
            raise ValueError(
                f"the maximum of {format_size_exactly(maximum)} is not between the "
                f"reservation of {format_size_exactly(reservation)} and the assigned "
                f"{format_size_exactly(self.assigned_bytes)}"
            )
        most_swap_bytes = MAX_SWAP_PER_ASSIGNED * self.assigned_bytes
        if self.swap_bytes > most_swap_bytes:
            raise ValueError(
                f"a swap of {format_size_exactly(self.swap_bytes)} is more than "
                f"{MAX_SWAP_PER_ASSIGNED} times the assigned "
                f"{format_size_exactly(self.assigned_bytes)}"
            )
        if self.balloon_may_swap and not self.swap_bytes:
            raise ValueError("its balloon may swap, but the VM has no swap: give it some")
        return self


def quarter_of(assigned_bytes: int) -> int:
    """The default reservation: 25 % of the assigned memory, in whole pages."""
    return int(assigned_bytes * DEFAULT_RESERVATION_SHARE) // PAGE_BYTES * PAGE_BYTES


class VmChange(Value):
    """What an operator wants changed; None leaves a thing as it is.

    At most one of `target_bytes` (a balloon size, which pins the VM), `quota_bytes` (the same said
    as the memory that stays) and `automatic` (true: the policy decides again).
    """

    target_bytes: SizeBytes | None = Field(default=None, ge=0)
    quota_bytes: SizeBytes | None = Field(default=None, ge=0)
    shares: Shares | None = None
    reservation_bytes: SizeBytes | None = Field(default=None, ge=0)
    maximum_bytes: SizeBytes | None = Field(default=None, ge=MIN_ASSIGNED_BYTES)
    automatic: Literal[True] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        ways = [self.target_bytes, self.quota_bytes, self.automatic]
        chosen = sum(way is not None for way in ways)
        if chosen > 1:
            raise ValueError("only one of target_bytes, quota_bytes and automatic can be given")
        others = (self.shares, self.reservation_bytes, self.maximum_bytes)
        if chosen == 0 and all(other is None for other in others):
            raise ValueError("nothing to change")
        return self


class PolicyChange(Value):
    """Which policy is to decide from now on; its settings are those of its configuration table."""

    name: str = Field(min_length=1, max_length=64)


class ClientRequest(Value):
    """A client wants so much memory kept free for it."""

    client: VmName
    size_bytes: SizeBytes = Field(ge=PAGE_BYTES)


class ClientTransfer(Value):
    """The VM that a reservation is handed over to; it need not be there yet."""

    vm: VmName


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

    async def decisions(self, name: str) -> list[DecisionView]:
        """What was decided about a VM lately, newest first. NoSuchVm."""
        ...

    def policy(self) -> PolicyView:
        """The policy in force, and which there are."""
        ...

    def reservations(self) -> list[ReservationView]:
        """What clients have reserved, in the order in which they did."""
        ...

    async def login(self, client: str) -> list[ReservationView]:
        """A client begins anew; answers with what it had reserved, all of which is free now."""
        ...

    async def reserve(self, request: ClientRequest) -> ReservationView:
        """Keep memory free for a client; answers when it is. NotEnoughMemory."""
        ...

    async def transfer(self, reservation_id: str, vm: str) -> TransferView:
        """Hand a reservation over to a VM. NoSuchReservation, BadRequest, NotEnoughMemory."""
        ...

    async def release(self, reservation_id: str) -> None:
        """A reservation is free again. NoSuchReservation."""
        ...

    async def use_policy(self, name: str) -> PolicyView:
        """Let another policy decide; answers when it has been asked once. BadRequest."""
        ...
