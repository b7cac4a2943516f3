"""What was decided about each VM lately, why, and what came of it. Pure: for agent and simulator.

A record is opened when a decision wants something else for a VM than the one before, and says what
was done until the next one is opened. The decisions in between want the same: they are counted, and
the first and the last of them explain. Nothing is put in words before somebody asks.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from host_agent.ledger.columns import HostColumns, Ints
from host_agent.policy.explain import Explanation, Why
from host_agent.policy.interface import Decision
from protocol.units import MIB, pages_of

KEPT_RECORDS: Final = 16
"""For each VM."""

KEPT_DEEDS: Final = 32
"""For each record, the newest: a guest that refuses does so again and again."""

NOTEWORTHY_PAGES: Final = pages_of(1 * MIB)
"""A target that differs by less opens no record: estimates swing."""

DeedKind: TypeAlias = Literal["asked", "offered", "refused", "claimed", "granted", "lent"]


@dataclass(frozen=True, slots=True)
class Deed:
    """Something that was done about a VM; the same done again is one deed of several times."""

    what: DeedKind
    pages: int
    """In all."""
    first_s: float
    last_s: float
    times: int = 1
    detail: str = ""
    """The reason, where there is one: the driver's for a refusal."""


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One target of one VM: what led to it and what came of it. Times as the decider's clock."""

    vm: str
    policy: str
    first_s: float
    """When it was first decided."""
    last_s: float
    """When it was last decided."""
    times: int
    quota_pages: int
    """What the VM had when it was first decided."""
    target_pages: int
    """What it is to have."""
    first: Explanation
    """Of the first decision that wanted it."""
    last: Explanation
    """Of the last one: as things are now, or were when something else was wanted."""
    deeds: tuple[Deed, ...]

    @property
    def why(self) -> Why:
        """What the first decision came from. This asks the policy, which may be anybody's."""
        return self.first.of(self.vm)

    @property
    def last_why(self) -> Why:
        """What the last one came from, as `why`."""
        return self.last.of(self.vm)


@dataclass(frozen=True, slots=True, eq=False)
class _Decided:
    policy: str
    decision: Decision
    number: int
    now_s: float


@dataclass(slots=True, eq=False)
class _Entry:
    first: _Decided
    quota_pages: int
    deeds: deque[Deed] = field(default_factory=lambda: deque(maxlen=KEPT_DEEDS))
    last: _Decided | None = None
    """None while it is the newest: then it is the latest decision of all."""


class DecisionLog:
    """The latest decisions of one host, by VM."""

    def __init__(self) -> None:
        self._entries: dict[str, deque[_Entry]] = {}
        self._latest: _Decided | None = None
        self._noted: Ints = np.array([], np.int64)
        """The target with which each VM's newest record was opened, in the latest plan's order."""

    def decided(
        self, policy: str, host: HostColumns, decision: Decision, now_s: float
    ) -> tuple[str, ...]:
        """`policy` has made `decision` about `host`; returns the VMs that it opens records of."""
        before, plan = self._latest, decision.plan
        number = 0 if before is None else before.number + 1
        self._latest = latest = _Decided(policy, decision, number, now_s)
        if before is None or before.policy != policy:
            fresh = np.ones(len(host), np.bool_)
            noted = plan.quota_pages
        else:
            noted = self._noted_for(before, plan.names)
            fresh = np.abs(plan.quota_pages - noted) >= NOTEWORTHY_PAGES
        places = np.flatnonzero(fresh).tolist()
        for place in places:
            self._open(host.names[place], before, latest, int(host.quota_pages[place]))
        self._noted = np.where(fresh, plan.quota_pages, noted)
        return tuple(host.names[place] for place in places)

    def done(self, vm: str, what: DeedKind, pages: int, now_s: float, detail: str = "") -> None:
        """Something was done about `vm`. Unnoticed before the first decision about it."""
        entries = self._entries.get(vm)
        if not entries:
            return
        deeds = entries[-1].deeds
        last = deeds[-1] if deeds else None
        if last is not None and (last.what, last.detail) == (what, detail):
            pages, times = last.pages + pages, last.times + 1
            deeds[-1] = replace(last, pages=pages, last_s=now_s, times=times)
        else:
            deeds.append(Deed(what, pages, now_s, now_s, 1, detail))

    def forget(self, vm: str) -> None:
        """`vm` is gone: another one may come under its name."""
        if self._entries.pop(vm, None) is not None and self._latest is not None:
            # No target: whoever has the name next opens a record of its own.
            gone = np.array([name == vm for name in self._latest.decision.plan.names], np.bool_)
            self._noted = np.where(gone, _NO_TARGET, self._noted)

    def of(self, vm: str) -> tuple[DecisionRecord, ...]:
        """The records of `vm`, newest first; none for one that nothing was decided about."""
        return tuple(self._record(vm, entry) for entry in reversed(self._entries.get(vm, ())))

    def _noted_for(self, before: _Decided, names: tuple[str, ...]) -> Ints:
        if before.decision.plan.names == names:
            return self._noted
        known = dict(zip(before.decision.plan.names, self._noted.tolist(), strict=True))
        return np.array([known.get(name, _NO_TARGET) for name in names], np.int64)

    def _open(self, vm: str, before: _Decided | None, latest: _Decided, quota_pages: int) -> None:
        entries = self._entries.setdefault(vm, deque(maxlen=KEPT_RECORDS))
        if entries:
            entries[-1].last = before
        entries.append(_Entry(latest, quota_pages))

    def _record(self, vm: str, entry: _Entry) -> DecisionRecord:
        last = entry.last or self._latest or entry.first
        if vm not in last.decision.plan.names:
            last = entry.first  # the latest decision no longer knows it
        plan = last.decision.plan
        return DecisionRecord(
            vm=vm,
            policy=entry.first.policy,
            first_s=entry.first.now_s,
            last_s=last.now_s,
            times=last.number - entry.first.number + 1,
            quota_pages=entry.quota_pages,
            target_pages=int(plan.quota_pages[plan.names.index(vm)]),
            first=entry.first.decision.why,
            last=last.decision.why,
            deeds=tuple(entry.deeds),
        )


_NO_TARGET: Final = -NOTEWORTHY_PAGES
"""Differs from every target."""
