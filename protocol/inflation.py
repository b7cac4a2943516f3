"""The state of one running session: the newest target, its reservation, the open reports.

Both ends keep one of these and walk it with every message, said or heard. It knows the tables of
transitions.py and no blame: a fault is a sentence, and who is told off is the connection's
business. It knows nothing of who owns which frame: that is the ledger's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from protocol.messages import (
    Claim,
    Decline,
    Dropped,
    Message,
    Offer,
    Refusal,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Target,
)
from protocol.page_frames import PageFrames
from protocol.transitions import (
    CROSSED,
    INFLATION,
    REPORT,
    Crossed,
    InflationState,
    ReportState,
    ReportStep,
)
from protocol.vocabulary import MAX_OPEN_REPORTS, RefusalReason


@dataclass(slots=True)
class Reservation:
    """What a Reserve opened and no Reserved has closed yet."""

    target_id: int
    room_pages: int
    reported_pages: int = 0


@dataclass(slots=True)
class OpenReport:
    """A report that is neither rejected as a whole nor dropped."""

    state: ReportState
    frames: PageFrames
    """Those not rejected: to be claimed as a whole, then to be dropped as a whole."""


class Inflation:
    """One session's walk through `INFLATION` and `REPORT`."""

    def __init__(self) -> None:
        self.state = InflationState.IDLE
        self.target_id: int | None = None
        """Of the newest target; None before the first."""
        self.offered_pages = 0
        """Of the offer to the newest target; 0 before there is one."""
        self.swap_pages = 0
        """That the newest target allows to be swapped out."""
        self.reservation: Reservation | None = None
        self.open_reports: dict[int, OpenReport] = {}
        self._last_report_id: int | None = None

    def is_dropped(self, message: Message) -> bool:
        """Whether the host drops this message: it is only words, about an older target."""
        if CROSSED.get(type(message)) is not Crossed.DROPPED or self.target_id is None:
            return False
        target_id: int = message.target_id  # type: ignore[attr-defined]  # all of CROSSED have one
        return target_id < self.target_id

    def accept(self, message: Message) -> str | None:
        """Walk one step. Gives the fault, in which case nothing has changed, or None."""
        step = self._STEPS.get(type(message))
        return None if step is None else step(self, message)

    def _target(self, message: Target) -> str | None:
        if self.target_id is not None and message.target_id <= self.target_id:
            return f"target {message.target_id} does not come after target {self.target_id}"
        self.target_id = message.target_id
        self.swap_pages = message.swap_pages
        self.offered_pages = 0  # an offer for the older target may be known to the guest alone
        self.state = INFLATION[self.state][Target]
        return None

    def _offer(self, message: Offer) -> str | None:
        if fault := self._answer_fault(message, message.target_id):
            return fault
        if self.reservation is not None:
            return f"the reservation of target {self.reservation.target_id} is still open"
        if message.swap_pages > self.swap_pages:
            return f"{message.swap_pages} pages are more than the {self.swap_pages} to be swapped"
        self.offered_pages = message.pages
        self.state = INFLATION[self.state][Offer]
        return None

    def _reserve(self, message: Reserve) -> str | None:
        if fault := self._answer_fault(message, message.target_id):
            return fault
        if message.pages > self.offered_pages:
            return f"{message.pages} pages are more than the {self.offered_pages} offered"
        self.reservation = Reservation(message.target_id, message.pages)
        self.state = INFLATION[self.state][Reserve]
        return None

    def _refusal_or_decline(self, message: Refusal | Decline) -> str | None:
        if fault := self._answer_fault(message, message.target_id):
            return fault
        self.state = INFLATION[self.state][type(message)]
        return None

    def _report(self, message: Report) -> str | None:
        reservation = self.reservation
        if reservation is None or reservation.target_id != message.target_id:
            return f"no reservation is open for target {message.target_id}"
        if self._last_report_id is not None and message.report_id <= self._last_report_id:
            return f"report {message.report_id} does not come after report {self._last_report_id}"
        if len(self.open_reports) >= MAX_OPEN_REPORTS:
            return f"{MAX_OPEN_REPORTS} reports are open already"
        reported_pages = reservation.reported_pages + message.frames.page_count
        if reported_pages > reservation.room_pages:
            return f"{reported_pages} pages are more than the {reservation.room_pages} granted"
        reservation.reported_pages = reported_pages
        self._last_report_id = message.report_id
        self.open_reports[message.report_id] = OpenReport(ReportState.REPORTED, message.frames)
        return None

    def _reserved(self, message: Reserved) -> str | None:
        reservation = self.reservation
        if reservation is None or reservation.target_id != message.target_id:
            return f"no reservation is open for target {message.target_id}"
        if message.pages != reservation.reported_pages:
            return f"{message.pages} pages are not the {reservation.reported_pages} reported"
        self.reservation = None
        if message.target_id == self.target_id:
            self.state = INFLATION[self.state][Reserved]
        return None

    def _rejection(self, message: Rejection) -> str | None:
        report = self.open_reports.get(message.report_id)
        if report is None:
            return f"report {message.report_id} is not open"
        rejected = message.frames
        if not report.frames.issuperset(rejected):
            return f"report {message.report_id} has not all of these frames"
        rest = report.frames - rejected
        step = ReportStep.REJECTION_OF_SOME if rest else ReportStep.REJECTION_OF_ALL
        return self._walk_report(message.report_id, report, step, rest)

    def _claim(self, message: Claim) -> str | None:
        return self._whole_report(message.report_id, message.frames, ReportStep.CLAIM)

    def _dropped(self, message: Dropped) -> str | None:
        return self._whole_report(message.report_id, message.frames, ReportStep.DROPPED)

    def _whole_report(self, report_id: int, frames: PageFrames, step: ReportStep) -> str | None:
        report = self.open_reports.get(report_id)
        if report is None:
            return f"report {report_id} is not open"
        if frames != report.frames:
            return f"not exactly the frames left in report {report_id}"
        return self._walk_report(report_id, report, step, frames)

    def _walk_report(
        self, report_id: int, report: OpenReport, step: ReportStep, frames: PageFrames
    ) -> str | None:
        after = REPORT[report.state].get(step)
        if after is None:
            return f"report {report_id} is {report.state}"
        if after is ReportState.OVER:
            del self.open_reports[report_id]
        else:
            self.open_reports[report_id] = OpenReport(after, frames)
        return None

    def _answer_fault(self, message: Message, target_id: int) -> str | None:
        """Offer, Refusal, Reserve, Decline: about the newest target, and in the table."""
        if target_id != self.target_id:
            return f"target {target_id} is not the newest, {self.target_id}"
        if (
            isinstance(message, Offer | Refusal)
            and message.reason is RefusalReason.NO_SWAP
            and not self.swap_pages
        ):
            return "it was not asked to swap"
        if type(message) not in INFLATION[self.state]:
            return f"the inflation is {self.state}"
        return None

    _STEPS: ClassVar[dict[type[Message], Callable[[Any, Any], str | None]]] = {
        Target: _target,
        Offer: _offer,
        Refusal: _refusal_or_decline,
        Reserve: _reserve,
        Decline: _refusal_or_decline,
        Report: _report,
        Reserved: _reserved,
        Rejection: _rejection,
        Claim: _claim,
        Dropped: _dropped,
    }
