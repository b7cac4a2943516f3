"""Properties that every policy has to have, as tests to inherit from. Needs pytest and hypothesis.

    from host_agent.testing.policy_properties import PolicyProperties

    class TestMyPolicy(PolicyProperties):
        policy = MyPolicy()

Each property is a test of its own. The hosts are as the ledger makes them: reservations fit pool
minus reserve, and quotas the pool, unless an agent with a smaller pool has found them; everything
else may be anything, unknown included.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, ClassVar, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.interface import Decision, Memory, Policy
from host_agent.policy.plan import Plan
from host_agent.policy.soundness import checked
from protocol.units import MIB, pages_of

STEP_PAGES: Final = pages_of(2 * MIB)
"""About what policies leave alone: sizes are a few of them, so that both sides are tried."""

LARGE_PAGES: Final = 2**32
"""The largest guest: sums of a few leave 32 bits, and products of floats are inexact."""

EXAMPLES_DIVISOR: Final = 4
"""A host is drawn from about a hundred choices, ten times as dear as most examples are; and each
policy has all of the properties. A profile with more examples looks closer."""


@st.composite
def guests(draw: st.DrawFn, name: str, most_pages: int = 64 * STEP_PAGES) -> GuestSnapshot:
    """One guest with up to `most_pages`, of whom nothing may be known, or anything."""
    size = st.integers(0, most_pages) | st.integers(0, 4 * STEP_PAGES)
    assigned = draw(st.integers(1, most_pages))
    quota = min(draw(size), assigned)
    reservation = min(draw(st.just(0) | size), assigned)
    maybe = st.none() | size
    seconds = st.none() | st.floats(0, 1e6)
    return GuestSnapshot(
        name=name,
        assigned_pages=assigned,
        reservation_pages=reservation,
        shares=draw(st.sampled_from([0, 1, 500, 1000, 2000, 1_000_000])),
        quota_pages=quota,
        demand_pages=draw(maybe),
        working_set_pages=draw(maybe),
        spare_pages=draw(maybe),
        movable=draw(st.sampled_from([True, True, True, False])),
        pinned_pages=draw(st.none() | st.none() | maybe),
        usage_pages=draw(st.none() | st.integers(0, quota)),
        active_fraction=draw(st.none() | st.floats(0, 1)),
        pressure_some_total_s=draw(seconds),
        refault_pages_total=draw(maybe),
        swap_used_pages=draw(maybe),
        oom_kills_total=draw(st.none() | st.integers(0, 3)),
        has_driver=draw(st.sampled_from([True, True, True, False])),
        dry=draw(st.sampled_from([False, False, False, True])),
        stalled_since_s=draw(st.none() | st.floats(0, 1000)),
        maximum_pages=draw(st.none() | st.none() | st.integers(reservation, assigned)),
        startup_pages=draw(st.none() | st.integers(reservation, assigned)),
        buffer_percent=draw(st.none() | st.floats(0, 200)),
        inaccuracy_pages=draw(st.none() | st.sampled_from([1, 512])),
    )


@st.composite
def hosts(draw: st.DrawFn, fewest: int = 0) -> HostSnapshot:
    """A host with up to six guests, small ones or the largest that there can be."""
    most_pages = draw(st.sampled_from([64 * STEP_PAGES, 64 * STEP_PAGES, LARGE_PAGES]))
    names = draw(st.lists(st.sampled_from("abcdef"), unique=True, min_size=fewest, max_size=6))
    some = tuple(draw(guests(name, most_pages)) for name in names)
    reserve = draw(st.integers(0, 8 * STEP_PAGES))
    quotas = sum(g.quota_pages for g in some)
    overdrawn = draw(st.just(0) | st.just(0) | st.integers(0, quotas))
    pool = max(quotas - overdrawn, sum(g.reservation_pages for g in some) + reserve)
    pool += draw(st.just(0) | st.integers(0, 20 * STEP_PAGES) | st.integers(0, most_pages))
    return _with_loans(HostSnapshot(pool, reserve, some))


def _with_loans(host: HostSnapshot) -> HostSnapshot:
    """Quotas beyond pool minus reserve are lent up to the reserve, as the ledger has it."""
    beyond = max(0, sum(g.quota_pages for g in host.guests) - host.shareable_pages)
    left = min(beyond, host.reserve_pages)
    some = []
    for guest in host.guests:
        lent = min(left, guest.quota_pages)
        left -= lent
        some.append(replace(guest, lent_pages=lent))
    return replace(host, guests=tuple(some))


def _holds(**strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    # Each policy's class inherits the same function; and how long a policy takes is not the
    # subject: a busy machine is no failure.
    relaxed = settings(
        deadline=None,
        max_examples=max(settings().max_examples // EXAMPLES_DIVISOR, 1),
        suppress_health_check=[HealthCheck.differing_executors],
    )
    return lambda test: relaxed(given(**strategies)(test))


class PolicyProperties:
    """Inherit, and set `policy`; override the bounds where your policy's nature asks for it."""

    policy: ClassVar[Policy]

    interval_s: ClassVar[float] = 1.0
    """How far apart the decisions are."""

    steps_to_rest: ClassVar[int] = 50
    """After so many decisions on a steady input the policy has come to rest."""

    longest_cycle: ClassVar[int] = 1
    """At rest it may go round in a cycle of so many decisions: 1 is a standstill."""

    cycle_pages: ClassVar[int] = 0
    """And move a guest by at most so much then."""

    def decide(self, host: HostSnapshot, memory: Memory = None, now_s: float = 1000.0) -> Decision:
        """One decision that can be carried out: UnsoundPlan is what is wrong with it."""
        columns = host.columns
        return checked(columns, self.policy.decide(columns, memory, now_s))

    @_holds(host=hosts())
    def test_a_plan_keeps_to_what_there_is(self, host: HostSnapshot) -> None:
        """Bounds, promises, conservation: no page made, by rounding or otherwise."""
        self.decide(host)

    @_holds(host=hosts())
    def test_so_do_the_plans_that_follow(self, host: HostSnapshot) -> None:
        """The same with a memory, while the plans are carried out."""
        memory: Memory = None
        for number in range(8):
            decision = self.decide(host, memory, 1000.0 + number * self.interval_s)
            host, memory = carried_out(host, decision.plan), decision.memory

    @_holds(host=hosts(), random=st.randoms(use_true_random=False))
    def test_the_order_of_the_guests_does_not_matter(
        self, host: HostSnapshot, random: Random
    ) -> None:
        """The same guests in another order, with a memory from the first."""
        mixed = list(host.guests)
        random.shuffle(mixed)
        memory = self.decide(host).memory
        ordered = self.decide(host, memory).plan
        shuffled = self.decide(replace(host, guests=tuple(mixed)), memory).plan
        assert ordered.targets == shuffled.targets

    @_holds(host=hosts())
    def test_the_same_question_has_the_same_answer(self, host: HostSnapshot) -> None:
        """Nothing is kept but the memory, and the memory is not changed."""
        memory = self.decide(host).memory
        first, second = self.decide(host, memory), self.decide(host, memory)
        assert first.plan.targets == second.plan.targets
        assert first.plan.shortage_pages == second.plan.shortage_pages

    @_holds(host=hosts(fewest=1))
    def test_every_decision_can_be_explained(self, host: HostSnapshot) -> None:
        """A rule in words and at least one term, for each guest."""
        decision = self.decide(host)
        for guest in host.guests:
            why = decision.why.of(guest.name)
            assert why.rule
            assert why.terms

    @_holds(host=hosts())
    def test_steady_input_comes_to_rest(self, host: HostSnapshot) -> None:
        """Plans that are carried out, again and again, end in a standstill or a small cycle."""
        memory: Memory = None
        seen: list[dict[str, int]] = []
        for number in range(self.steps_to_rest + 2 * self.longest_cycle):
            decision = self.decide(host, memory, 1000.0 + number * self.interval_s)
            host, memory = carried_out(host, decision.plan), decision.memory
            seen.append({guest.name: guest.quota_pages for guest in host.guests})
        rest = seen[-2 * self.longest_cycle :]
        assert rest[: self.longest_cycle] == rest[self.longest_cycle :]
        for name in rest[0]:
            pages = [quotas[name] for quotas in rest]
            assert max(pages) - min(pages) <= self.cycle_pages

    def test_an_empty_host(self) -> None:
        """Nobody there: nothing to decide, nothing short."""
        for host in (HostSnapshot(1000, 100, ()), HostSnapshot(0, 0, ())):
            plan = self.decide(host).plan
            assert plan.targets == ()
            assert plan.shortage_pages == 0

    @_holds(host=hosts(fewest=1))
    def test_guests_that_come_and_go(self, host: HostSnapshot) -> None:
        """A memory of guests that are gone, and none of those that have come."""
        memory = self.decide(host).memory
        emptied = _with_loans(replace(host, guests=()))
        self.decide(emptied, memory, 1001.0)
        fewer = _with_loans(replace(host, guests=host.guests[1:]))
        memory = self.decide(fewer, memory, 1002.0).memory
        self.decide(host, memory, 1003.0)

    @_holds(host=hosts(fewest=1))
    def test_when_nobody_can_be_moved_nobody_is(self, host: HostSnapshot) -> None:
        """All stuck: everybody keeps what it has."""
        stuck = replace(host, guests=tuple(replace(g, movable=False) for g in host.guests))
        plan = self.decide(stuck).plan
        assert {t.name: t.quota_pages for t in plan.targets} == {
            g.name: g.quota_pages for g in host.guests
        }

    @_holds(host=hosts(fewest=1))
    def test_nobody_has_shares(self, host: HostSnapshot) -> None:
        """No division by zero, and the bounds hold."""
        poor = replace(host, guests=tuple(replace(g, shares=0) for g in host.guests))
        self.decide(poor)

    @_holds(host=hosts(fewest=1))
    def test_nothing_is_known(self, host: HostSnapshot) -> None:
        """No guest has said anything yet."""
        silent = replace(
            host,
            guests=tuple(
                GuestSnapshot(
                    name=g.name,
                    assigned_pages=g.assigned_pages,
                    reservation_pages=g.reservation_pages,
                    shares=g.shares,
                    quota_pages=g.quota_pages,
                    lent_pages=g.lent_pages,
                )
                for g in host.guests
            ),
        )
        self.decide(silent)


def carried_out(host: HostSnapshot, plan: Plan) -> HostSnapshot:
    """What obedient guests and the agent make of a plan: free first, then grant what is free."""
    wanted = {target.name: target.quota_pages for target in plan.targets}
    now = {g.name: g.quota_pages for g in host.guests}
    for guest in host.guests:
        if guest.movable:
            now[guest.name] = min(now[guest.name], wanted[guest.name])
    for guest in sorted(host.guests, key=lambda g: g.name):
        free = max(0, host.shareable_pages - sum(now.values()))
        if guest.movable and wanted[guest.name] > now[guest.name]:
            now[guest.name] += min(free, wanted[guest.name] - now[guest.name])
    return _with_loans(
        replace(host, guests=tuple(_with_quota(g, now[g.name]) for g in host.guests))
    )


def _with_quota(guest: GuestSnapshot, quota_pages: int) -> GuestSnapshot:
    """The same guest with another quota. What it can't spare, and what it uses, stay."""
    spare, usage = guest.spare_pages, guest.usage_pages
    if spare is not None:
        spare = max(0, quota_pages - guest.quota_pages + spare)
    if usage is not None:
        usage = min(usage, quota_pages)
    return replace(guest, quota_pages=quota_pages, spare_pages=spare, usage_pages=usage)
