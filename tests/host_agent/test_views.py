"""What the control API shows: taken from books and runtime records, absent where unknown."""

import pytest

from host_agent.facade.port import VmSpec
from host_agent.facade.views import VmState
from host_agent.guest import BASE_OVERHEAD_BYTES, Guest, Phase
from host_agent.ledger.ledger import Ledger
from host_agent.observing import DRY_MEMORY_S, UNCOOPERATIVE_AFTER
from host_agent.views import vitals_view, vm_view
from protocol.messages import Vitals
from protocol.units import MIB, pages_of

NOW_S = 1000.0


@pytest.fixture
def guest() -> Guest:
    spec = VmSpec.model_validate(
        {"name": "one", "assigned_bytes": 64 * MIB, "reservation_bytes": 8 * MIB, "shares": 500}
    )
    return Guest(spec, phase=Phase.RUNNING)


@pytest.fixture
def ledger(guest: Guest) -> Ledger:
    ledger = Ledger(pages_of(48 * MIB), pages_of(16 * MIB))
    ledger.admit("one", guest.assigned_pages, pages_of(8 * MIB), 500)
    ledger.lend("one", pages_of(40 * MIB))
    return ledger


def test_sizes_come_from_the_books(guest: Guest, ledger: Ledger) -> None:
    guest.target_pages = pages_of(24 * MIB)
    guest.pinned_pages = pages_of(24 * MIB)
    guest.last_reason = "floor: some stay"
    guest.oom_kills = 3
    view = vm_view(guest, ledger.view("one"), NOW_S)
    assert (view.name, view.backend, view.state) == ("one", "process", "running")
    assert (view.assigned_bytes, view.reservation_bytes, view.shares) == (64 * MIB, 8 * MIB, 500)
    assert (view.quota_bytes, view.lent_bytes) == (40 * MIB, 8 * MIB)
    assert (view.balloon_actual_bytes, view.balloon_target_bytes) == (24 * MIB, 40 * MIB)
    assert view.overhead_bytes == BASE_OVERHEAD_BYTES + 64 * MIB // 256
    assert (view.pinned, view.connected, view.oom_kills) == (True, False, 3)
    assert view.last_reason == "floor: some stay"


def test_what_is_unknown_is_absent(guest: Guest, ledger: Ledger) -> None:
    view = vm_view(guest, ledger.view("one"), NOW_S)
    assert (view.usage_bytes, view.working_set_bytes, view.demand_bytes) == (None, None, None)
    assert view.last_reason is None
    assert not view.pinned
    # Without a plan the balloon is as large as it is meant to be.
    assert view.balloon_target_bytes == view.balloon_actual_bytes == 24 * MIB
    assert vitals_view(guest, NOW_S) is None


def test_vitals_are_shown_with_their_age(guest: Guest, ledger: Ledger) -> None:
    guest.vitals = Vitals(
        clock_s=5.0, usage_bytes=7, working_set_bytes=6, demand_bytes=0, pressure_some_avg10=1.5
    )
    guest.vitals_s = NOW_S - 0.25
    shown = vitals_view(guest, NOW_S)
    assert shown is not None
    assert shown.age_s == 0.25
    assert (shown.usage_bytes, shown.pressure_some_avg10, shown.swap_used_bytes) == (7, 1.5, None)
    view = vm_view(guest, ledger.view("one"), NOW_S)
    assert (view.usage_bytes, view.working_set_bytes, view.demand_bytes) == (7, 6, 0)


def test_every_vital_has_a_place(guest: Guest) -> None:
    guest.vitals = Vitals(clock_s=0.0)
    shown = vitals_view(guest, NOW_S)
    assert shown is not None
    assert set(type(shown).model_fields) - {"age_s"} == set(Vitals.__slots__) - {"clock_s"}


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"phase": Phase.PENDING}, "waiting"),
        ({"phase": Phase.STARTING, "dry": True}, "starting"),
        ({"phase": Phase.STOPPING, "stuck_times": 9}, "stopping"),
        ({}, "running"),
        ({"dry": True}, "dry"),
        ({"dry_s": NOW_S - 0.9 * DRY_MEMORY_S}, "dry"),
        ({"dry_s": NOW_S - 1.1 * DRY_MEMORY_S}, "running"),
        ({"stuck_times": 1}, "stuck"),
        ({"stuck_times": UNCOOPERATIVE_AFTER - 1}, "stuck"),
        ({"stuck_times": UNCOOPERATIVE_AFTER}, "uncooperative"),
        ({"stuck_times": UNCOOPERATIVE_AFTER, "dry": True}, "dry"),
    ],
)
def test_the_state_is_one_word(
    guest: Guest, ledger: Ledger, changes: dict[str, object], state: str
) -> None:
    for name, value in changes.items():
        setattr(guest, name, value)
    assert vm_view(guest, ledger.view("one"), NOW_S).state == state


def test_every_state_occurs() -> None:
    """A word that no VM ever has is no word for a program to wait for."""
    (shown,) = (
        mark.args[1] for mark in getattr(test_the_state_is_one_word, "pytestmark", ()) if mark.args
    )
    assert {state for _, state in shown} == {str(state) for state in VmState}
