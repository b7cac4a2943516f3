"""The properties that every policy has, and one example by hand."""

from memballoon_even import Even, EvenSettings

from host_agent.ledger.snapshot import GuestSnapshot, HostSnapshot
from host_agent.testing.policy_properties import PolicyProperties
from protocol.units import MIB, pages_of


class TestEven(PolicyProperties):
    # So much in a second that the largest guests, of 16 TiB, come to rest within the test's steps.
    policy = Even(EvenSettings(rate_bytes=2**40))


def test_by_hand() -> None:
    """300 MiB less 20 MiB of reserve for two: 140 MiB each, 64 MiB a second."""

    def host(a_mib: int, b_mib: int) -> HostSnapshot:
        size = pages_of(400 * MIB)
        rows = (
            GuestSnapshot("a", size, 0, 1000, pages_of(a_mib * MIB)),
            GuestSnapshot("b", size, 0, 1000, pages_of(b_mib * MIB)),
        )
        return HostSnapshot(pages_of(300 * MIB), pages_of(20 * MIB), rows)

    even = Even()
    first = even.decide(host(280, 0).columns, None, 10.0)
    assert first.plan.quota_pages.tolist() == [pages_of(280 * MIB), 0]
    second = even.decide(host(280, 0).columns, first.memory, 11.0)
    assert second.plan.quota_pages.tolist() == [pages_of(216 * MIB), pages_of(64 * MIB)]
    third = even.decide(host(200, 80).columns, second.memory, 12.0)
    assert third.plan.quota_pages.tolist() == [pages_of(140 * MIB), pages_of(140 * MIB)]
    assert second.why.of("a").rule == "it is on its way down, at the rate that is allowed"
