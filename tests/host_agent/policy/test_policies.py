"""The properties that all built-in policies share."""

import json

import pytest
from mib_hosts import decide, host, vm

from host_agent.policy.esx import Esx
from host_agent.policy.hyperv import Hyperv, HypervSettings
from host_agent.policy.interface import Policy
from host_agent.policy.manual import Manual
from host_agent.policy.mom import Mom, MomSettings
from host_agent.policy.proxmox import Proxmox, ProxmoxSettings
from host_agent.policy.registry import BUILT_IN
from host_agent.policy.senpai import Senpai, SenpaiSettings
from host_agent.policy.shares import Shares, SharesSettings
from host_agent.policy.squeezed import Squeezed
from host_agent.testing.policy_properties import PolicyProperties
from protocol.units import GIB


class TestShares(PolicyProperties):
    policy = Shares()
    steps_to_rest = 4


class TestSharesWithoutStep(PolicyProperties):
    policy = Shares(SharesSettings(step_bytes=0))
    steps_to_rest = 4


class TestEsx(PolicyProperties):
    policy = Esx()
    steps_to_rest = 20


class TestHyperv(PolicyProperties):
    policy = Hyperv()
    steps_to_rest = 4


class TestHypervWithoutStep(PolicyProperties):
    policy = Hyperv(HypervSettings(step_bytes=0))
    steps_to_rest = 4


class TestProxmox(PolicyProperties):
    # The largest guests of all would be on their way for days by steps of 100 MiB.
    policy = Proxmox(ProxmoxSettings(step_bytes=1024 * GIB))
    interval_s = 10.0
    steps_to_rest = 20


class TestSqueezed(PolicyProperties):
    policy = Squeezed()
    steps_to_rest = 40


class TestMom(PolicyProperties):
    # The largest guests of all would need some hundred steps of 5 %.
    policy = Mom(MomSettings(max_change=0.5))
    interval_s = 10.0
    # A host that is critically short takes the last pages one by one.
    steps_to_rest = 160


class TestSenpai(PolicyProperties):
    # The largest guests of all would be on their way for hours by 1 % at once.
    policy = Senpai(SenpaiSettings(max_probe=0.5))
    interval_s = 6.0
    steps_to_rest = 80


class TestManual(PolicyProperties):
    policy = Manual()
    steps_to_rest = 4


def test_every_built_in_policy_is_among_these() -> None:
    tested = {type(tests.policy) for tests in PolicyProperties.__subclasses__()}
    assert set(BUILT_IN) <= tested


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.name)
def test_what_is_explained_can_be_written_as_json(kind: type[Policy]) -> None:
    """Nothing that is no number, also of a guest with nothing of whom nothing is known."""
    decision = decide(kind(), host(100, vm("a", 100, 0), vm("b", 100, 50)))
    for name in ("a", "b"):
        values = [term.value for term in decision.why.of(name).terms]
        json.dumps(values, allow_nan=False)
