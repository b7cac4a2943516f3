"""Options that several commands share, and the way to the agent."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from pydantic import BaseModel, ValidationError

from host_agent.client import AgentClient
from host_agent.config import DEFAULT_RUN_DIR, control_socket_in
from host_agent.errors import BadRequest
from host_agent.validation import one_line

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Model = TypeVar("Model", bound=BaseModel)

OPTION_OF_FIELD: Final = {
    "name": "NAME",
    "client": "NAME",
    "size_bytes": "SIZE",
    "vm": "VM",
    "command": "COMMAND",
    "assigned_bytes": "--memory",
    "reservation_bytes": "--reservation",
    "startup_bytes": "--startup",
    "maximum_bytes": "--maximum",
    "buffer_percent": "--buffer",
    "swap_bytes": "--swap",
    "balloon_may_swap": "--balloon-may-swap",
    "target_bytes": "--target",
    "quota_bytes": "--quota",
    "automatic": "--auto",
    "shares": "--shares",
    "frames": "--frames",
    "image": "--image",
    "network": "--network",
}


class SecondsRange(click.FloatRange):
    """A number of seconds in a range. `nan` and `inf` are numbers to click, and no times."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Fails as click's own types do."""
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


def run_dir_option(command: Decorated) -> Decorated:
    """`--run-dir`, given to the command as `run_dir`."""
    return click.option(
        "--run-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=DEFAULT_RUN_DIR,
        show_default=True,
        envvar="MEMBALLOON_RUN_DIR",
        show_envvar=True,
        help="Where the agent has its sockets.",
    )(command)


def json_option(command: Decorated) -> Decorated:
    """`--json`, given to the command as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def agent_at(run_dir: Path) -> AgentClient:
    """A client of the agent whose run directory this is."""
    return AgentClient(control_socket_in(run_dir))


def build(model: type[Model], **fields: Any) -> Model:
    """A request out of options; those not given (None) are left to their defaults.

    Raises:
        BadRequest: one line that names the option.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        line = one_line(error.errors(), names=OPTION_OF_FIELD)
        raise BadRequest(line) from error
