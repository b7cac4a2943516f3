"""From the tables `[policy.NAME]` of the configuration to policies with their settings.

    [policy.shares]
    step = "4MiB"

A policy says with a frozen dataclass which options it has (policy/interface.py). Here they are
read: unknown keys are refused by name, values by type and then by the dataclass itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from host_agent.policy.explain import plain_value
from host_agent.policy.interface import Policy
from host_agent.policy.registry import PolicyError, policy_class
from host_agent.sizes import SizeBytes, format_size_exactly
from host_agent.validation import first_fault, reason_of

PolicyTables = Mapping[str, Mapping[str, Any]]
"""What `[policy]` holds: a table for each policy by name."""

SIZE_SUFFIX: Final = "_bytes"


def make_policy(name: str, tables: PolicyTables) -> Policy:
    """The policy `name` with the settings that its table gives, else its defaults.

    Raises PolicyError, with the table and the key where that is at fault.
    """
    kind: Any = policy_class(name)
    try:
        policy: Policy = kind()
        table = tables.get(name)
        if table is None:
            return policy
        settings = policy.settings
    except (Exception, SystemExit) as error:
        # A foreign class may raise anything.
        raise PolicyError(f"policy {name!r} can't be made: {error}") from error
    try:
        made: Policy = kind(_settings(type(settings), table))
    except ValidationError as error:
        fault = first_fault(error.errors())
        key = ".".join(map(str, fault["loc"]))
        reason = reason_of(fault, known_keys=_keys(type(settings)))
        said = reason if fault["type"] == "extra_forbidden" else f"{key}: {reason}"
        raise PolicyError(f"[policy.{name}]: {said}") from error
    except (Exception, SystemExit) as error:
        # ValueError of the settings' own rules; anything else of a foreign class.
        raise PolicyError(f"[policy.{name}]: {error}") from error
    return made


def settings_as_table(policy: Policy) -> dict[str, Any]:
    """A policy's settings as its table would have them: sizes as people write them.

    Values of kinds that no table has are shown as texts; texts are cut.
    """
    settings = policy.settings
    if not dataclasses.is_dataclass(settings):
        return {}
    table = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        table[_key(field)] = format_size_exactly(value) if _is_size(field) else plain_value(value)
    return table


def _settings(kind: type[Any], table: Mapping[str, Any]) -> Any:
    if not dataclasses.is_dataclass(kind):
        if table:
            raise PolicyError(f"it has no settings, and {next(iter(table))!r} is given")
        return None
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (
            SizeBytes if _is_size(field) else hints[field.name],
            Field(default=None, validation_alias=_key(field), validate_default=False),
        )
        for field in dataclasses.fields(kind)
    }
    model: type[BaseModel] = create_model(
        kind.__name__,
        __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
        **fields,
    )
    given = model.model_validate(dict(table))
    return kind(**{name: getattr(given, name) for name in given.model_fields_set})


def _is_size(field: "dataclasses.Field[Any]") -> bool:
    return field.name.endswith(SIZE_SUFFIX)


def _key(field: "dataclasses.Field[Any]") -> str:
    return field.name.removesuffix(SIZE_SUFFIX) if _is_size(field) else field.name


def _keys(kind: type[Any]) -> list[str]:
    return [_key(field) for field in dataclasses.fields(kind)]
