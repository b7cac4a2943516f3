"""The agent's configuration: a TOML file, parsed once into a frozen value.

    [host]
    pool = "1200MiB"            # default: 75 % of the memory that is available at the start
    reserve = "60MiB"           # default: 5 % of the pool
    policy = "shares"

    [policy.shares]             # the options of a policy, whether it is in force or not
    step = "2MiB"

    [[vm]]
    name = "web1"
    memory = "160MiB"           # the assigned size
    reservation = "40MiB"       # default: 25 % of the memory
    swap = "64MiB"              # default: none
    command = ["redis-server"]  # default: the built-in workload, idle

`parse_config` is pure; `load_config` reads the file and the memory that is available. Unknown keys
are refused by name. All refusals are a ConfigError of one line: source, place, key, reason.
"""

import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from host_agent.choosing import check_tables, choose
from host_agent.errors import ConfigError
from host_agent.facade.port import MIN_ASSIGNED_BYTES, VmSpec
from host_agent.policy.registry import PolicyError
from host_agent.quota.base import check_cgroup_path
from host_agent.sizes import SizeBytes, format_size, format_size_exactly
from host_agent.validation import first_fault, reason_of
from host_agent.vm_table import Table, VmMemoryTable
from protocol.units import KIB, MIB, PAGE_BYTES

LOG = logging.getLogger("memballoon.config")

DEFAULT_RUN_DIR: Final = Path("/run/memballoon")
DEFAULT_STATE_DIR: Final = Path("/var/lib/memballoon")

POOL_SHARE_OF_AVAILABLE: Final = 0.75
"""The rest stays with the machine: its own page cache, and the drivers' overhead, which is
counted beside the pool."""

RESERVE_SHARE_OF_POOL: Final = 0.05


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class VmTable(VmMemoryTable, VmSpec):
    """A `[[vm]]` table: the same value as a launch request, under the file's names."""


class HostConfig(Table):
    """The `[host]` table.

    `on_exit` says what becomes of the VMs when the agent ends in order: `stop` ends them, `keep`
    leaves them running with the quotas that they have. `cgroup_root` is the path of the agent's
    own cgroup, as `quota.detect` reads it. A guest that has run dry is answered by
    its own kernel's OOM killer when the agent could not help it for `dry_patience_s`.
    """

    pool_bytes: SizeBytes = Field(validation_alias="pool", ge=MIN_ASSIGNED_BYTES)
    reserve_bytes: SizeBytes = Field(
        validation_alias="reserve",
        default_factory=lambda host: (
            int(host["pool_bytes"] * RESERVE_SHARE_OF_POOL) // PAGE_BYTES * PAGE_BYTES
        ),
        ge=0,
    )
    policy: str = Field(default="shares", min_length=1, max_length=64)
    run_dir: AbsolutePath = DEFAULT_RUN_DIR
    state_dir: AbsolutePath = DEFAULT_STATE_DIR
    cgroup_root: Annotated[str, AfterValidator(check_cgroup_path)] = "memballoon"
    on_exit: Literal["stop", "keep"] = "stop"
    dry_patience_s: Seconds = 10.0
    interval_s: Seconds = 0.25

    @property
    def control_socket(self) -> Path:
        """Where the control API listens."""
        return control_socket_in(self.run_dir)

    @model_validator(mode="after")
    def _reserve_fits(self) -> Self:
        if self.reserve_bytes >= self.pool_bytes:
            raise ValueError(
                f"the reserve of {format_size_exactly(self.reserve_bytes)} leaves nothing of the "
                f"pool of {format_size_exactly(self.pool_bytes)}"
            )
        return self


class Config(Table):
    """The whole file: the host and the VMs to launch at the start."""

    host: HostConfig
    policies: dict[str, dict[str, Any]] = Field(default_factory=dict, validation_alias="policy")
    vms: tuple[VmTable, ...] = Field(default=(), validation_alias="vm")

    @model_validator(mode="after")
    def _promises_fit(self) -> Self:
        seen: set[str] = set()
        owners: dict[str, str] = {}
        for vm in self.vms:
            if vm.name in seen:
                raise ValueError(f"vm {vm.name!r} is there twice")
            seen.add(vm.name)
            if vm.container is None:
                continue
            if owner := owners.get(vm.container):
                raise ValueError(
                    f"vm {vm.name!r}: the container {vm.container!r} is that of vm {owner!r}"
                )
            owners[vm.container] = vm.name
        promised_bytes = sum(vm.reservation_bytes for vm in self.vms)
        if promised_bytes + self.host.reserve_bytes > self.host.pool_bytes:
            raise ValueError(
                f"the reservations ({format_size_exactly(promised_bytes)}) and the host reserve "
                f"({format_size_exactly(self.host.reserve_bytes)}) exceed the pool of "
                f"{format_size_exactly(self.host.pool_bytes)}"
            )
        return self


def control_socket_in(run_dir: Path) -> Path:
    """The control API's socket in a run directory."""
    return run_dir / "control.sock"


def load_config(path: Path | None, meminfo: str | None = None) -> Config:
    """The configuration in the file at `path`; None stands for an empty file.

    `meminfo` is the text of /proc/meminfo, read if it is not given.

    Raises:
        ConfigError: the file can't be read or used, or the machine has less memory than the pool.
    """
    if meminfo is None:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    source, text = "defaults", ""
    if path is not None:
        source = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not a text file in UTF-8") from error
    config = parse_config(text, source, default_pool_bytes=default_pool(meminfo))
    _check_pool(config.host.pool_bytes, meminfo, source)
    _check_policies(config, source)
    return config


def _check_pool(pool_bytes: int, meminfo: str, source: str) -> None:
    """Refuse a pool that is not there, warn of one that is in use."""
    total_bytes = _memory(meminfo, "MemTotal")
    available_bytes = _memory(meminfo, "MemAvailable")
    pool = f"{source}: [host]: pool: {format_size(pool_bytes)}"
    if total_bytes is not None and pool_bytes > total_bytes:
        raise ConfigError(
            f"{pool} is more than this machine's memory of {format_size(total_bytes)}",
            what_to_do="give the pool less, or leave it out for 75 % of what is available",
        )
    if available_bytes is not None and pool_bytes > available_bytes:
        # Not refused: VMs that the last agent left hold a part of the pool already.
        LOG.warning("%s, but only %s are available now", pool, format_size(available_bytes))


def default_pool(meminfo: str) -> int | None:
    """75 % of MemAvailable in the text of /proc/meminfo, in whole MiB; None if it isn't said."""
    available_bytes = _memory(meminfo, "MemAvailable")
    if available_bytes is None:
        return None
    return int(available_bytes * POOL_SHARE_OF_AVAILABLE) // MIB * MIB


def _memory(meminfo: str, wanted: str) -> int | None:
    """One line of /proc/meminfo in bytes; None if it isn't there."""
    for line in meminfo.splitlines():
        key, _, rest = line.partition(":")
        if key == wanted:
            return int(rest.split()[0]) * KIB
    return None


def parse_config(text: str, source: str, *, default_pool_bytes: int | None = None) -> Config:
    """The configuration that `text` says; `source` is named in errors. No I/O.

    `default_pool_bytes` is the pool where the text names none; without it a pool is required.

    Raises:
        ConfigError: one line with the source, the place and the reason.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not TOML: {error}") from error
    host = tables.setdefault("host", {})
    if isinstance(host, dict) and default_pool_bytes is not None:
        host.setdefault("pool", default_pool_bytes)
    try:
        return Config.model_validate(tables, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_line(error, tables)}") from error


def _check_policies(config: Config, source: str) -> None:
    """Refuse an unknown policy, and options that a policy doesn't have."""
    try:
        choose(config.host.policy, {})
    except PolicyError as error:
        raise ConfigError(f"{source}: [host]: policy: {error}") from error
    try:
        check_tables(config.policies)
    except PolicyError as error:
        raise ConfigError(f"{source}: {error}") from error


def _first_line(error: ValidationError, tables: Mapping[str, Any]) -> str:
    fault = first_fault(error.errors())
    *places, key = fault["loc"] or ("",)
    if not key or isinstance(key, int) or fault["loc"] == ("host",):
        places, key = list(fault["loc"]), ""  # a rule over a whole table
    reason = reason_of(fault, known_keys=_known_keys(places))
    if not key or fault["type"] in ("extra_forbidden", "missing"):
        return f"{_place(places, tables)}{reason}"
    return f"{_place(places, tables)}{key}: {reason}"


def _place(location: list[int | str], tables: Mapping[str, Any]) -> str:
    match location:
        case []:
            return ""
        case ["host"]:
            return "[host]: "
        case ["vm", int(index), *rest]:
            try:
                name = tables["vm"][index]["name"]
            except (LookupError, TypeError):
                name = None
            called = repr(name) if isinstance(name, str) else f"number {index + 1}"
            return f"vm {called}: " + (f"{'.'.join(map(str, rest))}: " if rest else "")
        case _:
            return f"{'.'.join(map(str, location))}: "


def _known_keys(places: list[int | str]) -> list[str]:
    table: type[BaseModel] = Config
    if places:
        table = HostConfig if places[0] == "host" else VmTable
    return [str(field.validation_alias or name) for name, field in table.model_fields.items()]
