"""Reservations, pinned quotas and launches know of each other."""

import pytest

from host_agent.errors import BadRequest, NotEnoughMemory
from host_agent.facade.port import VmChange, VmSpec
from host_agent.guest import Guest
from host_agent.ledger.ledger import Ledger
from host_agent.promises import check_promise, pinned_pages
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
