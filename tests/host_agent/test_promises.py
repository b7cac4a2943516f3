"""Reservations, pinned quotas and launches know of each other."""

import pytest

from host_agent.errors import BadRequest, NotEnoughMemory
from host_agent.facade.port import VmChange, VmSpec
from host_agent.guest import Guest
from host_agent.ledger.client_reservations import ClientReservations
from host_agent.ledger.ledger import Ledger
from host_agent.promises import (
    changed_range,
    check_client,
    check_promise,
    excess_pages,
    pinned_pages,
)
from protocol.units import MIB, bytes_of, pages_of

POOL, RESERVE = 320 * MIB, 20 * MIB


class Host:
    """Guests of 300 MiB, each with its reservation and perhaps a pin, in MiB."""

    def __init__(self, **guests: tuple[int, int | None]) -> None:
        self.ledger = Ledger(pages_of(POOL), pages_of(RESERVE))
        self.guests: dict[str, Guest] = {}
        for name, (reservation, pin) in guests.items():
            spec = VmSpec(name=name, assigned_bytes=300 * MIB, reservation_bytes=reservation * MIB)
            self.guests[name] = Guest(spec)
            self.guests[name].pinned_pages = None if pin is None else pages_of(pin * MIB)
            self.ledger.admit(name, pages_of(300 * MIB), pages_of(reservation * MIB), 1000)

    def check(self, name: str, reservation: int, pin: int | None = None) -> None:
        pages = None if pin is None else pages_of(pin * MIB)
        check_promise(self.ledger, self.guests, name, reservation * MIB, pages)

    def pin(self, name: str, **wish: int) -> int | None:
        change = VmChange(**{key: size * MIB for key, size in wish.items()})  # type: ignore[arg-type]
        return pinned_pages(self.ledger, self.guests, self.guests[name], change)


def test_a_launch_is_refused_at_once_by_name_of_whose_quota_is_fixed() -> None:
    host = Host(p=(50, 240), free=(0, None))
    host.check("q", 60)
    with pytest.raises(NotEnoughMemory) as refused:
        host.check("q", 150)
    assert refused.value.missing_bytes == 90 * MIB
    assert refused.value.refused_by == ("p",)
    assert "exceed the pool by 90MiB (fixed: p at 240MiB)" in refused.value.message
    assert "`balloon set p --auto`" in refused.value.one_line()


def test_a_pin_below_a_reservation_takes_nothing_from_it() -> None:
    host = Host(p=(100, 100), q=(150, None))
    host.check("r", 50)
    with pytest.raises(NotEnoughMemory, match="r: the reservations together would exceed") as full:
        host.check("r", 51)
    assert full.value.refused_by == ()


def test_a_reservation_above_the_own_pin_is_refused() -> None:
    host = Host(p=(10, 20))
    host.check("p", 20, pin=20)
    with pytest.raises(BadRequest) as refused:
        host.check("p", 200, pin=20)
    assert "p: its quota is fixed at 20MiB, below the reservation of 200MiB" in str(refused.value)
    assert "--auto" in refused.value.one_line()


def test_a_pin_below_the_reservation_is_refused() -> None:
    host = Host(p=(100, None))
    with pytest.raises(BadRequest, match="below the reservation of 100MiB"):
        host.pin("p", quota_bytes=99)
    with pytest.raises(BadRequest, match="below the reservation of 100MiB"):
        host.pin("p", target_bytes=201)
    assert host.pin("p", quota_bytes=99, reservation_bytes=99) == pages_of(99 * MIB)
    assert host.pin("p", quota_bytes=100) == pages_of(100 * MIB)


def test_a_pin_leaves_what_the_others_were_promised() -> None:
    host = Host(p=(0, None), q=(60, None), r=(20, 100))
    pinned = host.pin("p", quota_bytes=140)
    assert pinned is not None
    assert bytes_of(pinned) == 140 * MIB
    with pytest.raises(NotEnoughMemory) as refused:
        host.pin("p", quota_bytes=141)
    assert refused.value.missing_bytes == MIB
    assert "r at 100MiB" in refused.value.message


def test_what_asks_for_no_quota_leaves_the_pin() -> None:
    host = Host(p=(0, 40))
    assert host.pin("p", reservation_bytes=10) == pages_of(40 * MIB)
    change = VmChange(automatic=True)
    assert pinned_pages(host.ledger, host.guests, host.guests["p"], change) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reservation_bytes": 301}, "g: the reservation exceeds the assigned size"),
        ({"maximum_bytes": 301}, "g: the maximum exceeds the assigned size"),
        ({"maximum_bytes": 90}, "g: the reservation exceeds the maximum"),
        ({"maximum_bytes": 100, "reservation_bytes": 120}, "g: the reservation exceeds"),
    ],
)
def test_a_range_that_cannot_be_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        ranged(**change)


def test_a_range_in_order_is_taken() -> None:
    ranged(reservation_bytes=150, maximum_bytes=150)
    ranged(reservation_bytes=10)


def test_what_a_change_makes_of_a_range() -> None:
    assert ranged(maximum_bytes=250) == ((100 * MIB, 100 * MIB), (200 * MIB, 250 * MIB))
    assert ranged(reservation_bytes=90) == ((100 * MIB, 90 * MIB), (200 * MIB, 200 * MIB))
    none = changed_range(guest_of_300_mib(), 100 * MIB, VmChange(shares=5))
    assert none.is_none


def test_what_was_handed_over_to_a_launch_is_not_promised_twice() -> None:
    host = Host(late=(50, None), p=(100, None))
    clients = ClientReservations().reserve("xapi", "1", pages_of(80 * MIB)).transfer("1", "late")
    # Of 300: 100 of p, and 80 of the launch, whose reservation is a part of them.
    assert excess_pages(host.ledger, host.guests, clients) == pages_of(-120 * MIB)
    check_client(host.ledger, host.guests, pages_of(120 * MIB), clients)
    with pytest.raises(NotEnoughMemory, match="exceeded by 1MiB"):
        check_client(host.ledger, host.guests, pages_of(121 * MIB), clients)
    check_promise(host.ledger, host.guests, "q", 120 * MIB, clients=clients)
    with pytest.raises(NotEnoughMemory, match="30MiB reserved by clients"):
        check_promise(host.ledger, host.guests, "q", 121 * MIB, clients=clients)
    # What is its own is in its own way neither before nor after its launch.
    for name in ("late", "r"):
        own = clients.transfer("1", name)
        room_mib = 200 if name == "late" else 150
        check_promise(host.ledger, host.guests, name, room_mib * MIB, clients=own)
    host.ledger.set_reservation("late", pages_of(90 * MIB))
    assert excess_pages(host.ledger, host.guests, clients) == pages_of(-110 * MIB)


def ranged(**change: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """A change to a guest of 300 MiB that has a range of 100 to 200 MiB. Sizes in MiB."""
    wanted = VmChange(**{key: size * MIB for key, size in change.items()})  # type: ignore[arg-type]
    changed = changed_range(guest_of_300_mib(), 100 * MIB, wanted)
    return changed.reservation_bytes, changed.maximum_bytes


def guest_of_300_mib() -> Guest:
    spec = VmSpec(
        name="g",
        assigned_bytes=300 * MIB,
        reservation_bytes=100 * MIB,
        maximum_bytes=200 * MIB,
    )
    return Guest(spec)
