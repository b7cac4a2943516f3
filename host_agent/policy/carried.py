"""Memory by guest, carried from one decision to the next: columns follow their guests' names.

Guests come and go between decisions, so that the place of one in the columns changes. Where they
are the same guests, as nearly always, nothing is copied.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from host_agent.ledger.columns import HostColumns, Ints

Kind = TypeVar("Kind", np.int64, np.float64, np.bool_)


class Carried:
    """Moves columns of the guests `old` to the places of the guests `new`; both in order."""

    __slots__ = ("_found", "_places", "_same")

    def __init__(self, old: tuple[str, ...], new: tuple[str, ...]) -> None:
        self._same = old == new
        if self._same:
            return
        if not old or not new:
            self._places = np.zeros(len(new), np.int64)
            self._found = np.zeros(len(new), np.bool_)
            return
        known, wanted = np.array(old), np.array(new)
        self._places = np.minimum(np.searchsorted(known, wanted), len(old) - 1)
        self._found = known[self._places] == wanted

    def column(self, values: NDArray[Kind], otherwise: NDArray[Kind]) -> NDArray[Kind]:
        """The values of the same guests, and `otherwise` for those that are new."""
        if self._same:
            return values
        if not len(values):
            return otherwise
        return np.where(self._found, values[self._places], otherwise)


@dataclass(frozen=True, slots=True, eq=False)
class LastRun:
    """What was wanted when a policy last ran, for one that runs at an interval.

    The agent decides whenever something has changed; a policy whose steps are meant for each run
    must not take one for each of these. Between runs it repeats itself.
    """

    run_s: float
    names: tuple[str, ...]
    quota_pages: Ints
    """As they were then."""
    wanted_pages: Ints

    def again(self, host: HostColumns) -> Ints:
        """The same direction and end for each guest, from where it is now.

        Whoever was not to move keeps what it has now: it may have been lent some since.
        """
        carried = Carried(self.names, host.names)
        now = host.quota_pages
        then = carried.column(self.quota_pages, now)
        wanted = carried.column(self.wanted_pages, now)
        up, down = np.maximum(wanted, now), np.minimum(wanted, now)
        again: Ints = np.where(wanted > then, up, np.where(wanted < then, down, now))
        return again
