"""A real run as CSV: what each VM used and needed, row by row. `balloon record` writes it.

The columns `time_s` and `vm` say when and who; the others are the control API's own figures, empty
where they are not known. A scenario's trace of the kind `recorded` plays them (traces.py).
"""

import csv
from collections.abc import Sequence
from typing import Final, TextIO

from host_agent.facade.views import VmView

FIGURES: Final = (
    "working_set_bytes",
    "usage_bytes",
    "demand_bytes",
    "quota_bytes",
    "assigned_bytes",
    "reservation_bytes",
    "shares",
    "lent_bytes",
    "oom_kills",
)

COLUMNS: Final = ("time_s", "vm", *FIGURES)


class Recorder:
    """Writes a recording into an open text file; each look is in the file when it returns."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(COLUMNS)
        self.rows = 0

    def look(self, time_s: float, vms: Sequence[VmView]) -> None:
        """One row for each VM that has told of itself, at `time_s` since the recording began."""
        for vm in vms:
            if vm.usage_bytes is None:
                continue
            self._writer.writerow(
                (f"{time_s:.3f}", vm.name, *(getattr(vm, key) for key in FIGURES))
            )
            self.rows += 1
        self._file.flush()
