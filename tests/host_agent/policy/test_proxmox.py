"""Proxmox VE by hand, and the cases of pve-manager's own test (test/balloontest.pl) in MiB."""

import pytest
from mib_hosts import carried_out, decide, host, mib, pages, rule, term, vm

from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.policy.interface import Memory
from host_agent.policy.proxmox import Proxmox, ProxmoxSettings
from protocol.units import MIB
from protocol.vocabulary import Urgency

PROXMOX = Proxmox()

HALF = Proxmox(ProxmoxSettings(target_percent=50.0))
"""The goal can be exact to the page, and the host has room for it."""

TO_THE_FULL = Proxmox(ProxmoxSettings(target_percent=100.0))


def pressed(
    name: str, most: float, quota: float, shares: int = 1000, free: float = 0
) -> GuestSnapshot:
    """A guest with a minimum of 1000 MiB that uses all but `free` of its quota."""
    return vm(name, most, quota, least=min(most, 1000), shares=shares, used=quota - free)


TWO = (pressed("a", 2000, 1000, 2000), pressed("b", 2000, 1000))
FULL = vm("a", 2000, 2000, least=2000, shares=2000, used=2000)
THREE = (FULL, pressed("b", 2000, 1007), pressed("c", 2000, 1000, free=512))


def with_goal(goal_mib: float, guests: tuple[GuestSnapshot, ...]) -> HostSnapshot:
    """A host that has `goal_mib` to give, or is to take it back."""
    quotas = sum(guest.quota_pages for guest in guests)
    snapshot = host(0, *guests)
    target = quotas + pages(goal_mib)
    return HostSnapshot(snapshot.reserve_pages + 2 * target, snapshot.reserve_pages, guests)


def run(goal_mib: float, guests: tuple[GuestSnapshot, ...]) -> dict[str, float]:
    """One run; only those that are to change."""
    wanted = mib(decide(HALF, with_goal(goal_mib, guests)).plan)
    return {
        guest.name: wanted[guest.name]
        for guest in guests
        if pages(wanted[guest.name]) != guest.quota_pages
    }


class TestTheGoal:
    def test_the_host_is_kept_at_80_percent(self) -> None:
        # goal = int(1000 * 80 / 100 - 700) = 100. One guest under pressure takes it all:
        # desired = 400 + (700 - 400 + 100) = 800.
        decision = decide(PROXMOX, host(1000, vm("a", 1000, 700, least=400, used=650)))
        assert term(decision, "a", "goal") == pages(100)
        assert mib(decision.plan) == {"a": 800}
        assert rule(decision, "a") == "the host has memory to give: it grows by its shares"

    def test_what_is_more_than_80_percent_is_taken_back_urgently(self) -> None:
        # goal = 800 - 850 = -50
        decision = decide(PROXMOX, host(1000, vm("a", 1000, 850, least=400, used=850)))
        assert mib(decision.plan) == {"a": 800}
        assert decision.plan.urgency is Urgency.SHORT

    @pytest.mark.parametrize(("quota", "wanted"), [(790, 790), (789, 800), (810, 810), (811, 800)])
    def test_ten_mib_are_left_alone(self, quota: float, wanted: float) -> None:
        decision = decide(PROXMOX, host(1000, vm("a", 1000, quota, least=400, used=quota)))
        assert mib(decision.plan) == {"a": wanted}

    def test_growth_by_at_most_100_mib(self) -> None:
        assert mib(decide(PROXMOX, host(4000, vm("a", 2000, 500, least=400))).plan) == {"a": 600}


class TestRuns:
    """compute_alg1; the numbers are those that pve-manager's own test expects."""

    @pytest.mark.parametrize(
        ("goal", "wanted"),
        [
            (0, {}),
            # desired_a = 1000 + int((0 + 90) * 2000 / 3000) = 1060, desired_b = 1030
            (90, {"a": 1060, "b": 1030}),
            (150, {"a": 1100, "b": 1050}),
            # a's 1180 is more than a step: 1100. Of the rest, 270 - 190 = 80, b's part is
            # 1000 + int((190 + 80) / 3) = 1090; a can't go on, and b has what its shares give it.
            (270, {"a": 1100, "b": 1090}),
        ],
    )
    def test_two_guests_by_their_shares(self, goal: float, wanted: dict[str, float]) -> None:
        assert run(goal, TWO) == wanted

    @pytest.mark.parametrize(("goal", "wanted"), [(0, {}), (18, {"b": 1018}), (500, {"b": 1100})])
    def test_one_that_is_full(self, goal: float, wanted: dict[str, float]) -> None:
        assert run(goal, (FULL, pressed("b", 2000, 1000))) == wanted

    @pytest.mark.parametrize(
        ("goal", "wanted"),
        # c has free memory (512 > 0.25 * 1000): b alone is under pressure.
        [(0, {}), (11, {"b": 1018}), (80, {"b": 1087}), (200, {"b": 1107})],
    )
    def test_growth_goes_to_those_under_pressure(
        self, goal: float, wanted: dict[str, float]
    ) -> None:
        assert run(goal, THREE) == wanted

    def test_shrinking_takes_from_those_with_free_memory(self) -> None:
        # b has 300 MiB free (> 250), c none: b gives up to its step, c nothing.
        guests = (pressed("b", 2000, 1300, free=300), pressed("c", 2000, 1300))
        assert run(-80, guests) == {"b": 1220}

    def test_and_from_all_if_that_makes_no_progress(self) -> None:
        # Nobody has free memory. Each has 300 above its minimum: 600 - 80 = 520 are 260 each.
        guests = (pressed("b", 2000, 1300), pressed("c", 2000, 1300))
        assert run(-80, guests) == {"b": 1260, "c": 1260}

    def test_missing_statistics_count_as_pressure(self) -> None:
        silent = vm("c", 2000, 1000, least=1000)
        assert run(80, (FULL, pressed("b", 2000, 1000, free=512), silent)) == {"c": 1080}

    @pytest.mark.parametrize(
        ("goal", "wanted"),
        [
            (180, {"a": 1120, "b": 1060}),
            (270, {"a": 1180, "b": 1090}),
            # After three steps both have 300 MiB free and are no longer under pressure.
            (600, {"a": 1300, "b": 1300}),
            (900, {"a": 1600, "b": 1300}),
        ],
    )
    def test_run_after_run(self, goal: float, wanted: dict[str, float]) -> None:
        assert self.at_rest(with_goal(goal, TWO)) == wanted

    def test_run_after_run_up_and_down(self) -> None:
        up = self.at_rest(with_goal(593, THREE))
        assert up == {"a": 2000, "b": 1300, "c": 1300}
        guests = (FULL, pressed("b", 2000, 1300, free=293), pressed("c", 2000, 1300, free=812))
        for goal, wanted in (
            (-200, {"b": 1200, "c": 1200}),
            (-400, {"b": 1200, "c": 1000}),
            (-593, {"b": 1007, "c": 1000}),
        ):
            assert self.at_rest(with_goal(goal, guests)) == {"a": 2000, **wanted}

    def at_rest(self, snapshot: HostSnapshot) -> dict[str, float]:
        memory: Memory = None
        for number in range(30):
            decision = decide(HALF, snapshot, memory, 1000.0 + 10 * number)
            snapshot, memory = carried_out(snapshot, decision.plan), decision.memory
        return mib(decision.plan)


class TestWhoIsLeftOut:
    def test_without_a_minimum_without_shares_and_who_cannot_be_moved(self) -> None:
        guests = (
            vm("no-minimum", 1000, 300, used=300),
            vm("no-shares", 1000, 300, least=100, used=300, shares=0),
            vm("stuck", 1000, 300, least=100, used=300, movable=False),
            vm("takes", 1000, 300, least=100, used=300),
        )
        assert run(80, guests) == {"takes": 380}
        decision = decide(HALF, with_goal(80, guests))
        assert rule(decision, "no-minimum") == "left out: it has no minimum"
        assert rule(decision, "no-shares") == "left out: its shares are 0"
        assert rule(decision, "stuck").startswith("it can't be moved")


class TestBetweenRuns:
    def test_a_run_is_repeated_and_no_step_is_added(self) -> None:
        first = decide(PROXMOX, host(4000, vm("a", 2000, 500, least=400)), None, 0.0)
        assert mib(first.plan) == {"a": 600}
        halfway = host(4000, vm("a", 2000, 560, least=400))
        again = decide(PROXMOX, halfway, first.memory, 9.9)
        assert mib(again.plan) == {"a": 600}
        assert rule(again, "a") == "between two runs: what the last one wanted"
        assert mib(decide(PROXMOX, halfway, again.memory, 10.0).plan) == {"a": 660}

    def test_what_was_lent_since_is_not_asked_back(self) -> None:
        still = host(1000, vm("a", 1000, 795, least=400))
        first = decide(PROXMOX, still, None, 0.0)
        assert mib(first.plan) == {"a": 795}
        lent = host(1000, vm("a", 1000, 803, least=400))
        assert mib(decide(PROXMOX, lent, first.memory, 1.0).plan) == {"a": 803}


def test_growth_ends_where_the_pool_ends() -> None:
    # 100 % of 1000: goal 250, of which the pinned guest takes 150 in the same plan.
    guests = (
        vm("a", 800, 400, least=100),
        vm("b", 800, 350, least=100, pinned_pages=pages(500)),
    )
    decision = decide(TO_THE_FULL, host(1000, *guests))
    assert mib(decision.plan) == {"a": 500, "b": 500}
    decision = decide(
        Proxmox(ProxmoxSettings(target_percent=100.0, step_bytes=400 * MIB)), host(1000, *guests)
    )
    assert mib(decision.plan) == {"a": 500, "b": 500}
    assert rule(decision, "a").startswith("cut: it may grow only as far as pool minus reserve")


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_percent": 0.0},
        {"target_percent": 101.0},
        {"dead_zone_bytes": -1},
        {"step_bytes": 4095},
        {"interval_s": -1.0},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|can't"):
        ProxmoxSettings(**wrong)  # type: ignore[arg-type]
