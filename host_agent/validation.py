"""One line for a person out of a pydantic ValidationError.

pydantic reports every fault with its location; a person wants the one to set right first, by the
name under which it was written. Used for the configuration file, the command line and the API.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from host_agent.sizes import format_size_exactly
from protocol.units import MIB

Fault = Mapping[str, Any]
"""One item of ValidationError.errors(): `type`, `loc`, `msg`, `input`, `ctx`."""

_PLAIN: Final = {
    "tuple_type": "this must be a list",
    "list_type": "this must be a list",
    "dict_type": "this must be a table",
    "model_type": "this must be a table",
    "model_attributes_type": "this must be a JSON object",
    "string_type": "this must be a string",
    "int_type": "this must be a whole number",
    "int_from_float": "this must be a whole number",
    "float_type": "this must be a number",
    "path_type": "this must be a string",
}
_NAME_RULE: Final = (
    "lower-case letters, digits and dashes, 32 at most, beginning with a letter or a digit"
)


def first_fault(faults: Sequence[Fault]) -> Fault:
    """The fault to tell of.

    A misspelt key shows up twice, as unknown and as the missing one: the unknown one is the fault.
    A default that could not be computed is only the echo of another fault.
    """
    real = [fault for fault in faults if fault["type"] != "default_factory_not_called"]
    return min(real or faults, key=lambda fault: fault["type"] != "extra_forbidden")


def reason_of(fault: Fault, *, known_keys: Iterable[str] = ()) -> str:
    """What is wrong, without saying where.

    `known_keys` are those that could have been meant where an unknown one was found.
    """
    key = str(fault["loc"][-1]) if fault["loc"] else ""
    bounds: Mapping[str, Any] = fault.get("ctx", {})
    match fault["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, known_keys, n=1)
            reason = f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
        case "missing":
            reason = f"{key!r} is missing"
        case "value_error":
            # pydantic puts "Value error, " before what was said.
            reason = str(bounds.get("error", fault["msg"]))
        case "json_invalid":
            reason = f"not JSON: {bounds.get('error', fault['msg'])}"
        case "string_pattern_mismatch":
            rule = _NAME_RULE if key == "name" else "it is not one that a container engine has"
            reason = f"{fault['input']!r} is not a name: {rule}"
        case "greater_than_equal" if bounds["ge"] >= MIB:
            reason = f"this must be {format_size_exactly(int(bounds['ge']))} or more"
        case kind:
            said = str(fault["msg"])
            reason = _PLAIN.get(kind, said[:1].lower() + said[1:])
    return reason


def one_line(faults: Sequence[Fault], *, names: Mapping[str, str] | None = None) -> str:
    """The first fault as `key: reason`; `names` translates keys to what the person wrote."""
    fault = first_fault(faults)
    location = [str(part) for part in fault["loc"] if part != "body"]
    reason = reason_of(fault)
    if not location or fault["type"] in ("extra_forbidden", "missing", "json_invalid"):
        return reason
    if names is not None:
        location = [names.get(part, part) for part in location]
    return f"{'.'.join(location)}: {reason}"
