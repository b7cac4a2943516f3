"""Plain KVM: nothing moves but by command."""

from mib_hosts import decide, host, mib, pages, rule, vm

from host_agent.policy.manual import Manual

MANUAL = Manual()


def test_who_has_no_command_keeps_what_it_has() -> None:
    # a needs 400 more than it has, b 300 less, and 300 are free: it is said that memory is short,
    # by 800 + 100 - 800 = 100 MiB, and nothing moves.
    decision = decide(
        MANUAL,
        host(
            800,
            vm("a", 1000, 400, demand=800),
            vm("b", 1000, 400, demand=100),
        ),
    )
    assert mib(decision.plan) == {"a": 400, "b": 400}
    assert decision.plan.shortage_pages == pages(100)
    assert rule(decision, "a") == "no command: it keeps what it has"


def test_a_command_is_followed_to_the_page() -> None:
    decision = decide(
        MANUAL,
        host(
            1000,
            vm("a", 1000, 400, pinned_pages=pages(600)),
            vm("b", 1000, 400, pinned_pages=pages(50), least=100),
            vm("starts", 300, 0, has_driver=False, startup_pages=pages(200)),
        ),
    )
    # 600 for a, 100 (its reservation) for b, 200 to start with
    assert mib(decision.plan) == {"a": 600, "b": 100, "starts": 200}


def test_one_that_starts_gets_what_is_free() -> None:
    decision = decide(
        MANUAL,
        host(
            500,
            vm("a", 1000, 400),
            vm("starts", 300, 0, has_driver=False, startup_pages=pages(200)),
        ),
    )
    assert mib(decision.plan) == {"a": 400, "starts": 100}


def test_a_loan_is_paid_back_by_shares() -> None:
    # 1030 of 1000 are given out. One level for all: 970 / 2 would be more than what b and c have...
    # a, with the most for its shares, gives back: 600 - 30.
    decision = decide(
        MANUAL,
        host(
            1000, vm("a", 1000, 600), vm("b", 1000, 300), vm("c", 1000, 130, lent_pages=pages(30))
        ),
    )
    assert mib(decision.plan) == {"a": 570, "b": 300, "c": 130}
    assert rule(decision, "a").startswith("cut: more is given out than pool minus reserve")
