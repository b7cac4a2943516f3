"""What a log says last, for a line that tells a person why something could not be started."""

import os
from pathlib import Path
from typing import Final

from protocol.vocabulary import one_line

LOG_TAIL_BYTES: Final = 4096


def last_line(log_path: Path) -> str:
    """The last line of the log that begins a message (mount indents its advice on the next)."""
    with log_path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").split("\n")
    found = (line for line in reversed(lines) if line and not line[0].isspace())
    return one_line(next(found, "its log says nothing"))
