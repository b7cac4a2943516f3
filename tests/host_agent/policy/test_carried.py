"""Memory follows its guest when others come and go."""

import numpy as np
import pytest
from mib_hosts import host, vm

from host_agent.policy.carried import Carried, LastRun


@pytest.mark.parametrize(
    ("old", "new", "carried"),
    [
        (("a", "c"), ("a", "c"), [1, 2]),
        (("a", "c"), ("a", "b", "c"), [1, -1, 2]),
        (("a", "c"), ("c",), [2]),
        (("a", "c"), ("0", "b", "d"), [-1, -1, -1]),
        ((), ("a", "b"), [-1, -1]),
        (("a", "c"), (), []),
        # As Python orders names, not as words.
        (("a-1", "a1"), ("a-1", "a0", "a1"), [1, -1, 2]),
    ],
)
def test_columns_follow_names(
    old: tuple[str, ...], new: tuple[str, ...], carried: list[int]
) -> None:
    values = np.arange(1, len(old) + 1)
    found = Carried(old, new).column(values, np.full(len(new), -1))
    assert found.tolist() == carried


def test_a_run_is_repeated_from_where_each_guest_is() -> None:
    then = host(1000, vm("down", 100, 50), vm("same", 100, 50), vm("up", 100, 50)).columns
    wanted = then.quota_pages + np.array([-2560, 0, 2560])  # 40, 50 and 60 MiB
    run = LastRun(0.0, then.names, then.quota_pages, wanted)

    def again(down: float, same: float, up: float) -> list[float]:
        now = host(
            1000, vm("down", 100, down), vm("new", 100, 7), vm("same", 100, same), vm("up", 100, up)
        )
        return [pages / 256 for pages in run.again(now.columns).tolist()]

    assert again(45, 50, 55) == [40, 7, 50, 60]
    # Whoever is beyond it, or was lent some, is not turned round.
    assert again(35, 58, 65) == [35, 7, 58, 65]
