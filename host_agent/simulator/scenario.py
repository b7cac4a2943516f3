"""What is simulated: a TOML file, parsed once into a frozen value. See docs/simulator.md.

    title = "ten VMs on a host that is too small"
    duration_s = 600.0
    seed = 1

    [host]
    pool = "120GB"
    reserve = "6GB"             # default: 5 % of the pool

    [[guest]]
    name = "vm"
    count = 10                  # vm-01 to vm-10
    memory = "16GB"
    cache_share = 0.3           # of what it needs, page cache
    trace = { kind = "diurnal", low = "4GB", high = "14GB" }
    behaviour = { kind = "slow", factor = 0.1 }

`parse_scenario` is pure. Unknown keys are refused by name; all refusals are a ConfigError of one
line: source, place, key, reason.
"""

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from host_agent.choosing import check_tables
from host_agent.errors import ConfigError
from host_agent.facade.port import MIN_ASSIGNED_BYTES, VmName
from host_agent.policy.registry import PolicyError
from host_agent.sizes import SizeBytes, format_size_exactly
from host_agent.validation import first_fault, reason_of
from host_agent.vm_table import Table, VmMemoryTable
from protocol.units import MIB, PAGE_BYTES

RESERVE_SHARE_OF_POOL: Final = 0.05

MAX_GUESTS: Final = 100_000
"""On one host: ten times what the policies are measured with."""

MAX_HOSTS: Final = 100_000

MAX_LOOKS: Final = 100_000_000
"""Guests times steps of their traces on one host: these are kept, at 4 bytes each."""

DEFAULT_INFLATE_BYTES_PER_S: Final = 1536 * MIB
"""What `balloon bench` measured for 4 KiB frames on a machine of 2 processors, rounded down."""

Factor = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Span = Annotated[float, Field(gt=0, le=10_000_000, allow_inf_nan=False)]
"""Seconds of virtual time, more than none: up to 115 days."""
Moment = Annotated[float, Field(ge=0, le=10_000_000, allow_inf_nan=False)]
Noise = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


# Traces: what a guest needs over time


class Steady(Table):
    """The same need throughout, with a relative noise of a standard deviation of `noise`."""

    kind: Literal["steady"] = "steady"
    level_bytes: SizeBytes = Field(validation_alias="level", ge=0)
    noise: Noise = 0.0


class _LowAndHigh(Table):
    low_bytes: SizeBytes = Field(validation_alias="low", ge=0)
    high_bytes: SizeBytes = Field(validation_alias="high", ge=0)
    noise: Noise = 0.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low_bytes > self.high_bytes:
            raise ValueError(
                f"low is {format_size_exactly(self.low_bytes)}, above high, which is "
                f"{format_size_exactly(self.high_bytes)}"
            )
        return self


class Diurnal(_LowAndHigh):
    """A sine between low and high, highest at `peak_s` and every `period_s` from there.

    Each guest's peak is shifted by a random part of `spread_s`.
    """

    kind: Literal["diurnal"]
    period_s: Span = 86400.0
    peak_s: Moment = 0.0
    spread_s: Moment = 0.0


class Burst(_LowAndHigh):
    """Low, and high for `length_s` at random instants, `every_s` apart in the mean (Poisson)."""

    kind: Literal["burst"]
    every_s: Span
    length_s: Span


class Correlated(Burst):
    """Bursts at the same instants for all guests of the same `group`.

    A guest takes part in each with probability `joins`, delayed by up to `stagger_s`.
    """

    kind: Literal["correlated"]  # type: ignore[assignment]
    group: str = Field(default="all", min_length=1, max_length=64)
    joins: Share = 1.0
    stagger_s: Moment = 0.0


class Steps(Table):
    """Levels and when each begins: [[0, "1GiB"], [60, "3GiB"]]. Before the first: nothing.

    With `from_launch` times count from the guest's own launch, else from the scenario's start.
    """

    kind: Literal["steps"]
    points: tuple[tuple[Moment, SizeBytes], ...] = Field(min_length=1, max_length=100_000)
    from_launch: bool = False
    noise: Noise = 0.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        times_s = [time_s for time_s, _ in self.points]
        if times_s != sorted(set(times_s)):
            raise ValueError("the points are not in the order of time, each at a time of its own")
        return self


class Recorded(Table):
    """A recording of `balloon record`, or any CSV with the same columns.

    `file` is relative to the scenario's. `vm` names the VM in it; without it guest number n takes
    the n-th VM, by name, and begins again with the first. `column` is what counts as need. Times
    count from the first row; beyond its end the recording is played again, or its last value stays.
    """

    kind: Literal["recorded"]
    file: str = Field(min_length=1, max_length=4096)
    vm: str | None = None
    column: Literal["working_set_bytes", "usage_bytes", "demand_bytes"] = "working_set_bytes"
    scale: Factor = 1.0
    repeat: bool = True


Trace = Annotated[
    Steady | Diurnal | Burst | Correlated | Steps | Recorded, Field(discriminator="kind")
]


# Behaviours: how a guest's driver answers


class Honest(Table):
    """As the guest driver: it offers what it can spare, and says what it needs."""

    kind: Literal["honest"] = "honest"


class Slow(Table):
    """It gives what it offered, at `factor` of the host's inflate speed."""

    kind: Literal["slow"]
    factor: Factor = 0.1


class Stuck(Table):
    """From `from_s` on it offers, and then reserves nothing."""

    kind: Literal["stuck"]
    from_s: Moment = 0.0


class Intermittent(Table):
    """Its driver is connected for `on_s`, then gone for `off_s`, and so on."""

    kind: Literal["intermittent"]
    on_s: Span
    off_s: Span


class Lying(Table):
    """It says that it needs `factor` times what it does; `hoards`: and that it can spare nothing.

    A factor below 1 is a guest that hides its need.
    """

    kind: Literal["lying"]
    factor: Factor
    hoards: bool = False


Behaviour = Annotated[Honest | Slow | Stuck | Intermittent | Lying, Field(discriminator="kind")]


class GuestTable(VmMemoryTable):
    """A `[[guest]]` table: `count` guests that are alike.

    `arrives_s`: when the first is launched; the others follow `arrives_every_s` apart. `leaves_s`:
    when all of them are stopped; None is never. `heap_managed`: anonymous memory that it has once
    touched is never free again, as in a JVM. `maximum`, `buffer_percent`, `swap` and
    `balloon_may_swap` are those of a mock VM.
    """

    name: VmName
    count: int = Field(default=1, strict=True, ge=1, le=MAX_GUESTS)
    cache_share: Share = 0.3
    heap_managed: bool = False
    arrives_s: Moment = 0.0
    arrives_every_s: Moment = 0.0
    leaves_s: Moment | None = None
    trace: Trace
    behaviour: Behaviour = Honest()

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.reservation_bytes > self.assigned_bytes:
            raise ValueError(
                f"the reservation of {format_size_exactly(self.reservation_bytes)} is above the "
                f"memory of {format_size_exactly(self.assigned_bytes)}"
            )
        if not self.reservation_bytes <= self.startup_bytes <= self.assigned_bytes:
            raise ValueError(
                f"the startup quota of {format_size_exactly(self.startup_bytes)} is not between "
                f"the reservation of {format_size_exactly(self.reservation_bytes)} and the memory "
                f"of {format_size_exactly(self.assigned_bytes)}"
            )
        maximum = self.maximum_bytes
        if maximum is not None and not self.reservation_bytes <= maximum <= self.assigned_bytes:
            raise ValueError(
                f"the maximum of {format_size_exactly(maximum)} is not between the reservation of "
                f"{format_size_exactly(self.reservation_bytes)} and the memory of "
                f"{format_size_exactly(self.assigned_bytes)}"
            )
        if self.leaves_s is not None and self.leaves_s <= self.arrives_s:
            raise ValueError("leaves_s is not after arrives_s")
        return self

    def names(self) -> list[str]:
        """The guests' names: the table's own for one, numbered for more."""
        if self.count == 1:
            return [self.name]
        digits = len(str(self.count))
        return [f"{self.name}-{number:0{digits}}" for number in range(1, self.count + 1)]


class HostTable(Table):
    """The `[host]` table; `count` hosts that are alike, each with guests and seeds of its own.

    `interval_s` is the agent's; it plans sooner where something has changed, but not within
    `plan_gap_s` of the plan before. What balloons give is credited every `credit_s`. Speeds are in
    bytes per second.
    """

    count: int = Field(default=1, strict=True, ge=1, le=MAX_HOSTS)
    pool_bytes: SizeBytes = Field(validation_alias="pool", ge=MIN_ASSIGNED_BYTES)
    reserve_bytes: SizeBytes = Field(
        validation_alias="reserve",
        default_factory=lambda host: (
            int(host["pool_bytes"] * RESERVE_SHARE_OF_POOL) // PAGE_BYTES * PAGE_BYTES
        ),
        ge=0,
    )
    interval_s: Annotated[float, Field(ge=0.001, le=3600, allow_inf_nan=False)] = 1.0
    plan_gap_s: Annotated[float, Field(ge=0.005, le=3600, allow_inf_nan=False)] = 0.05
    credit_s: Annotated[float, Field(ge=0.001, le=3600, allow_inf_nan=False)] = 0.05
    dry_patience_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 10.0
    inflate_bytes_per_s: SizeBytes = Field(
        validation_alias="inflate_per_s", default=DEFAULT_INFLATE_BYTES_PER_S, ge=MIB
    )

    @model_validator(mode="after")
    def _reserve_fits(self) -> Self:
        if self.reserve_bytes >= self.pool_bytes:
            raise ValueError(
                f"the reserve of {format_size_exactly(self.reserve_bytes)} leaves nothing of the "
                f"pool of {format_size_exactly(self.pool_bytes)}"
            )
        return self


class Scenario(Table):
    """The whole file. `look_s`: how often guests change, and are looked at soon after."""

    title: str = Field(default="", max_length=200)
    duration_s: Span
    look_s: Annotated[float, Field(ge=0.001, le=3600, allow_inf_nan=False)] = 1.0
    seed: int = Field(default=0, strict=True, ge=0, lt=2**63)
    host: HostTable
    policies: dict[str, dict[str, Any]] = Field(default_factory=dict, validation_alias="policy")
    """Options of policies: tables `[policy.NAME]`, as in the agent's configuration."""
    guests: tuple[GuestTable, ...] = Field(validation_alias="guest", min_length=1)

    @property
    def looks(self) -> int:
        """How many steps the traces have, the one at 0 s included."""
        return int(self.duration_s / self.look_s) + 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names: set[str] = set()
        for table in self.guests:
            for name in table.names():
                if name in names:
                    raise ValueError(f"guest {name!r} is there twice")
                names.add(name)
        if len(names) > MAX_GUESTS:
            raise ValueError(f"{len(names)} guests are more than {MAX_GUESTS}")
        if len(names) * self.looks > MAX_LOOKS:
            raise ValueError(
                f"{len(names)} guests with {self.looks} steps each are more than fit into memory: "
                "shorten duration_s or lengthen look_s"
            )
        promised = sum(table.count * table.reservation_bytes for table in self.guests)
        if promised + self.host.reserve_bytes > self.host.pool_bytes:
            raise ValueError(
                f"the reservations ({format_size_exactly(promised)}) and the host reserve "
                f"({format_size_exactly(self.host.reserve_bytes)}) exceed the pool of "
                f"{format_size_exactly(self.host.pool_bytes)}"
            )
        return self


_UNIONS: Final[Mapping[str, tuple[type[BaseModel], ...]]] = {
    "trace": (Steady, Diurnal, Burst, Correlated, Steps, Recorded),
    "behaviour": (Honest, Slow, Stuck, Intermittent, Lying),
}


def parse_scenario(text: str, source: str) -> Scenario:
    """The scenario that `text` says; `source` is named in errors. No I/O.

    Raises:
        ConfigError: one line with the source, the place and the reason.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not TOML: {error}") from error
    try:
        scenario = Scenario.model_validate(tables, by_alias=True, by_name=False)
        check_tables(scenario.policies)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_line(error, tables)}") from error
    except PolicyError as error:
        raise ConfigError(f"{source}: {error}") from error
    return scenario


def _first_line(error: ValidationError, tables: Mapping[str, Any]) -> str:
    fault = first_fault(error.errors())
    location = list(fault["loc"])
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        known = ", ".join(_kinds(str(location[-1])))
        return f"{_place(location, tables)}kind: this must be one of {known}"
    *places, key = location or [""]
    keys = _known_keys(places)
    # A rule over a whole table has the table's own place.
    over_table = not isinstance(key, str) or (
        fault["type"] == "value_error" and (key not in keys or location == ["host"])
    )
    reason = reason_of(fault, known_keys=keys)
    if over_table:
        return f"{_place(location, tables)}{reason}"
    if fault["type"] in ("extra_forbidden", "missing"):
        return f"{_place(places, tables)}{reason}"
    return f"{_place(places, tables)}{key}: {reason}"


def _kinds(union: str) -> list[str]:
    return [get_args(model.model_fields["kind"].annotation)[0] for model in _UNIONS[union]]


def _place(location: list[int | str], tables: Mapping[str, Any]) -> str:
    match location:
        case [] | [""]:
            return ""
        case ["host", *_]:
            return "[host]: "
        case ["guest", int(index), *rest]:
            try:
                name = tables["guest"][index]["name"]
            except (LookupError, TypeError):
                name = None
            called = repr(name) if isinstance(name, str) else f"number {index + 1}"
            # The kind of a union is no key of the file.
            inner = [
                str(part) for at, part in enumerate(rest) if not (at == 1 and rest[0] in _UNIONS)
            ]
            return f"guest {called}: " + (f"{'.'.join(inner)}: " if inner else "")
        case _:
            return f"{'.'.join(map(str, location))}: "


def _known_keys(places: list[int | str]) -> list[str]:
    match places:
        case ["host", *_]:
            table: type[BaseModel] = HostTable
        case ["guest", _, str(union), kind, *_] if union in _UNIONS:
            table = _UNIONS[union][_kinds(union).index(str(kind))]
        case ["guest", *_]:
            table = GuestTable
        case _:
            table = Scenario
    return [str(field.validation_alias or name) for name, field in table.model_fields.items()]
