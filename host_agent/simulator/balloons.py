"""The balloons of one simulated host: what the agent's sessions do, in columns.

Guests are asked, offer or refuse, give at their balloon's speed, and are found stuck or gone. The
pauses after refusals and the deadlines are the agent's own. Pure: time is an argument, in whole
microseconds.
"""

from typing import Final

import numpy as np

from host_agent.balance import FIRST_REFUSAL_PAUSE_S, LONGEST_REFUSAL_PAUSE_S, MOST_REFUSALS
from host_agent.intake.session import PROGRESS_DEADLINE_S
from host_agent.simulator.books import Flags, Rows
from host_agent.simulator.guests import NEVER_US, SECOND_US
from host_agent.simulator.host_state import HostState
from protocol.units import bytes_of

RECONNECT_US: Final = SECOND_US
"""A driver whose connection was ended for a fault is greeted again after so long."""


class Balloons:
    """Moves memory out of the guests of one host."""

    def __init__(self, state: HostState) -> None:
        self._state = state

    def ask(self, short: Flags, may_swap: Flags, now_us: int) -> None:
        """Ask guests that have more than their targets for the difference.

        `short` and `may_swap` say for each how urgently, and whether out of its swap.
        """
        state = self._state
        quota, target = state.books.quota, state.target
        asked = (
            state.connected(now_us) & ~state.inflating & ~state.is_dry(now_us)
            & (target >= 0) & (quota > target)
            & ((now_us >= state.refused_until_us) | (short & ~state.asked_short))
        )  # fmt: skip
        rows = np.flatnonzero(asked)
        if not rows.size:
            return
        state.counts.asked += rows.size
        state.asked_short[rows] = short[rows]
        offers = state.guests.offers(quota, target, short, may_swap & short, now_us)[rows]
        refusing = rows[offers == 0]
        state.counts.refused += refusing.size
        self._pause(refusing, now_us)
        giving, pages = rows[offers > 0], offers[offers > 0]
        state.books.make_room(giving, pages)
        state.inflating[giving] = True
        state.began_us[giving] = now_us
        state.offered[giving], state.given[giving] = pages, 0
        if state.log is not None:
            for row in refusing.tolist():
                state.tell(
                    now_us, "refuses", row, wanted_bytes=bytes_of(int((quota - target)[row]))
                )
            for row, count in zip(giving.tolist(), pages.tolist(), strict=True):
                state.tell(now_us, "offers", row, bytes=bytes_of(count))
        if giving.size:
            state.settle(now_us)

    def credit(self, now_us: int) -> bool:
        """Claim what the balloons have given by now; whether that is anything."""
        state = self._state
        self._end_of_the_absent(now_us)
        gives = state.inflating & (now_us < state.traits.stuck_from_us)
        elapsed_s = (now_us - state.began_us) / SECOND_US
        speed = state.traits.inflate_pages_per_s
        done = np.minimum(state.offered, (elapsed_s * speed).astype(np.int64))
        rows = np.flatnonzero(gives & (done > state.given))
        if rows.size:
            pages = (done - state.given)[rows]
            state.books.claim(rows, pages)
            state.given[rows] += pages
            state.stuck_times[rows] = 0
            state.stalled_since_us[rows] = NEVER_US
            state.counts.claimed_pages += int(pages.sum())
            if state.log is not None:
                for row, count in zip(rows.tolist(), pages.tolist(), strict=True):
                    state.tell(now_us, "gives", row, bytes=bytes_of(count))
        ended = np.flatnonzero(gives & (state.given == state.offered))
        if ended.size:
            state.inflating[ended] = False
            state.refusals[ended] = 0
            state.replan = True
        late = state.inflating & ~gives
        late &= now_us - state.began_us >= PROGRESS_DEADLINE_S * SECOND_US
        self._find_stuck(np.flatnonzero(late), now_us)
        return bool(rows.size)

    def next_credit_us(self, now_us: int, credit_us: int) -> int | None:
        """When a balloon will have something to credit again, or its guest be stuck."""
        state = self._state
        if not state.inflating.any():
            return None
        rows = np.flatnonzero(state.inflating)
        stuck = now_us >= state.traits.stuck_from_us[rows]
        deadline = state.began_us[rows] + round(PROGRESS_DEADLINE_S * SECOND_US)
        when = int(np.where(stuck, deadline, now_us + credit_us).min())
        return max(when, now_us + 1)

    def stop_making_room(self, rows: Rows, now_us: int) -> None:
        """Who is given memory is not asked for any: an attempt under way ends."""
        both = rows[self._state.inflating[rows]]
        if both.size:
            self._end(both, now_us)

    def _pause(self, rows: Rows, now_us: int) -> None:
        state = self._state
        doubled = FIRST_REFUSAL_PAUSE_S * 2.0 ** state.refusals[rows]
        pause_s = np.minimum(doubled, LONGEST_REFUSAL_PAUSE_S)
        state.refused_until_us[rows] = now_us + (pause_s * SECOND_US).astype(np.int64)
        state.refusals[rows] = np.minimum(state.refusals[rows] + 1, MOST_REFUSALS)

    def _end_of_the_absent(self, now_us: int) -> None:
        """Attempts of drivers that have gone away end; the room goes back to the workload."""
        gone = np.flatnonzero(self._state.inflating & ~self._state.connected(now_us))
        if gone.size:
            self._end(gone, now_us)
            self._pause(gone, now_us)

    def _find_stuck(self, rows: Rows, now_us: int) -> None:
        if not rows.size:
            return
        state = self._state
        self._end(rows, now_us)
        state.stuck_times[rows] += 1
        state.stuck_us[rows] = now_us
        state.away_until_us[rows] = now_us + RECONNECT_US
        state.counts.stuck += rows.size
        for row in rows.tolist():
            state.tell(now_us, "stuck", row)
        state.replan = True

    def _end(self, rows: Rows, now_us: int) -> None:
        self._state.inflating[rows] = False
        self._state.books.close_room(rows)
        self._state.settle(now_us)
