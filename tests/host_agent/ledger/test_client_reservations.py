"""What clients reserve: by name and id, handed over to VMs, purged when a client begins anew."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.ledger.client_reservations import ClientReservations, UnknownReservation


def test_a_vm_that_has_it_takes_it_over() -> None:
    one = ClientReservations().reserve("xapi", "r1", 100).transfer("r1", "c")
    # Of 100, 40 are with the VM; then all of it.
    assert one.kept_parts({"c": 40}) == (60,)
    assert one.kept_parts({"c": 130}) == (0,)
    assert one.kept_parts({}) == (100,)
    # A second one for the same VM comes on top: 100 + 50 - 120
    two = one.reserve("xapi", "r2", 50).transfer("r2", "c")
    assert two.kept_parts({"c": 120}) == (0, 30)
    assert (two.handed_over_pages("c"), two.handed_over_pages("d")) == (150, 0)
    assert two.ended_for("c") == ClientReservations()
    assert two.ended_for("d") == two


def test_a_client_that_logs_in_again_has_nothing() -> None:
    both = ClientReservations().reserve("xapi", "1", 10).reserve("other", "2", 20)
    assert both.kept_parts({}) == (10, 20)
    assert both.login("xapi").kept_parts({}) == (20,)
    assert both.release("2").kept_parts({}) == (10,)


def test_mistakes_are_refused() -> None:
    one = ClientReservations().reserve("xapi", "1", 10)
    with pytest.raises(ValueError, match="already"):
        one.reserve("other", "1", 5)
    with pytest.raises(ValueError, match="at least a page"):
        one.reserve("xapi", "2", 0)
    for wrong in (lambda: one.release("2"), lambda: one.transfer("2", "vm"), lambda: one.get("2")):
        with pytest.raises(UnknownReservation):
            wrong()


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9), st.sampled_from(["", "v", "w"]))),
    st.dictionaries(st.sampled_from("vwx"), st.integers(0, 30)),
)
def test_the_parts_add_up(made: list[tuple[str, int, str]], quotas: dict[str, int]) -> None:
    reservations = ClientReservations()
    for number, (client, pages, vm) in enumerate(made):
        reservations = reservations.reserve(client, str(number), pages)
        if vm:
            reservations = reservations.transfer(str(number), vm)
    parts = reservations.kept_parts(quotas)
    for vm in ("", "v", "w"):
        handed_over = sum(pages for _, pages, to in made if to == vm)
        kept = sum(part for part, (_, _, to) in zip(parts, made, strict=True) if to == vm)
        assert kept == max(handed_over - quotas.get(vm, 0), 0)
    assert all(0 <= part <= pages for part, (_, pages, _) in zip(parts, made, strict=True))
