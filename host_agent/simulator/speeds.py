"""The inflate speed of a real machine, out of what `balloon bench --json` wrote."""

import json
import statistics
from pathlib import Path
from typing import Final

from host_agent.errors import BadRequest
from protocol.units import MIB

_FIGURE: Final = "inflate_4KiB_ratio"


def read_speed(path: Path) -> int:
    """Bytes per second, the median of the turns with 4 KiB frames. Raises BadRequest."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{path}: not JSON: {error}") from error
    try:
        figure = next(one for one in found["figures"] if one["name"] == _FIGURE)
        seconds = [float(turn) for turn in figure["detail"]["balloon_s"]]
        speed = int(figure["detail"]["bytes"] / statistics.median(seconds))
    except (LookupError, TypeError, ValueError, ArithmeticError, StopIteration) as error:
        raise BadRequest(
            f"{path}: no figure {_FIGURE} in it", what_to_do="write it with `balloon bench --json`"
        ) from error
    if speed < MIB:
        raise BadRequest(f"{path}: {speed} bytes a second is no speed of a balloon")
    return speed
