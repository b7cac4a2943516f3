"""Policies out of the configuration: built-in or installed, with their options or a refusal."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from made_up_policies import Ratio, RatioSettings

from host_agent.choosing import check_tables
from host_agent.config import load_config
from host_agent.errors import ConfigError
from host_agent.policy import registry
from host_agent.policy.registry import PolicyError, policy_class, policy_names
from host_agent.policy.shares import Shares, SharesSettings
from host_agent.policy_settings import make_policy, settings_as_table
from protocol.units import MIB

MEMINFO = "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What packages offer: entry points by name."""
    points = {"ratio": "made_up_policies:Ratio"}

    def entry_points(*, group: str) -> EntryPoints:
        assert group == "memballoon.policies"
        return EntryPoints(EntryPoint(name, value, group) for name, value in points.items())

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return points


def test_the_default_policy_has_its_defaults() -> None:
    assert make_policy("shares", {}) == Shares()
    assert settings_as_table(Shares()) == {"step": "2MiB"}
    assert make_policy("shares", {"shares": {"step": "4MiB"}}) == Shares(SharesSettings(4 * MIB))


def test_installed_policies_are_known_and_loaded_when_wanted(installed: dict[str, str]) -> None:
    installed["later"] = "a_module_that_is_not_there:Policy"
    assert {"later", "ratio", "shares"} <= set(policy_names())
    assert policy_class("ratio") is Ratio
    table: dict[str, Any] = {"ratio": 0.25, "floor": "1MiB", "greedy": True}
    assert make_policy("ratio", {"ratio": table}) == Ratio(RatioSettings(0.25, MIB, True))
    with pytest.raises(PolicyError, match="'later' can't be loaded from a_module_that_is_not"):
        policy_class("later")


def test_a_built_in_policy_cannot_be_replaced(installed: dict[str, str]) -> None:
    installed["shares"] = "made_up_policies:Ratio"
    assert policy_class("shares") is Shares
    assert policy_names().count("shares") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("made_up_policies:keep", "is no class with a method `decide`"),
        ("made_up_policies:RatioSettings", "is no class with a method `decide`"),
        ("made_up_policies:Nothing", "can't be loaded"),
        ("made_up_policies:MadeUp", "calls itself 'made-up'"),
    ],
)
def test_what_is_no_policy_is_refused(installed: dict[str, str], value: str, message: str) -> None:
    installed["wrong"] = value
    with pytest.raises(PolicyError, match=message):
        policy_class("wrong")


def test_one_that_cannot_be_made_is_refused(installed: dict[str, str]) -> None:
    installed["made-up"] = "made_up_policies:MadeUp"  # it wants an argument
    with pytest.raises(PolicyError, match=r"policy 'made-up' can't be made: .*argument"):
        make_policy("made-up", {})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rato": 1}, r"\[policy.ratio\]: unknown key 'rato' \(did you mean 'ratio'\?\)"),
        ({"floor_bytes": 1}, r"\[policy.ratio\]: unknown key 'floor_bytes'"),
        ({"ratio": "much"}, r"\[policy.ratio\]: ratio: "),
        ({"ratio": 2.0}, r"\[policy.ratio\]: ratio must lie between 0 and 1"),
        ({"ratio": float("nan")}, r"\[policy.ratio\]: ratio: "),
        ({"floor": -1}, r"\[policy.ratio\]: floor: .*negative"),
        ({"greedy": 1}, r"\[policy.ratio\]: greedy: "),
    ],
)
def test_options_that_it_does_not_have_are_refused_by_name(
    installed: dict[str, str], table: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        check_tables({"ratio": table})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[host]\npolicy = "share"',
            r"host.toml: \[host\]: policy: unknown policy 'share' \(known",
        ),
        ("[policy.share]", r"host.toml: unknown policy 'share' \(known"),
        ('[policy.shares]\nsteps = "1MiB"', r"host.toml: \[policy.shares\]: unknown key 'steps'"),
        ("[policy.shares]\nstep = 1.5", r"host.toml: \[policy.shares\]: step: 1.5 is not a size"),
        ("policy = 3", "host.toml: policy: this must be a table"),
        ("[policy]\nshares = 3", "host.toml: policy: shares: this must be a table"),
    ],
)
def test_the_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "host.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, MEMINFO)
    assert "\n" not in error.value.one_line()


def test_the_file_gives_the_options(tmp_path: Path) -> None:
    path = tmp_path / "host.toml"
    path.write_text('[policy.shares]\nstep = "8MiB"\n')
    config = load_config(path, MEMINFO)
    assert make_policy(config.host.policy, config.policies) == Shares(SharesSettings(8 * MIB))


PYPROJECT_POINTS = "[memballoon.policies]\nfrom-a-wheel = from_a_wheel:Policy\n"


def test_an_installed_distribution_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip leaves it on the path: a module and its dist-info."""
    info = tmp_path / "from_a_wheel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: from-a-wheel\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(PYPROJECT_POINTS)
    (tmp_path / "from_a_wheel.py").write_text(
        "from made_up_policies import Ratio\n\n\nclass Policy(Ratio):\n    name = 'from-a-wheel'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert "from-a-wheel" in policy_names()
        assert make_policy("from-a-wheel", {}).name == "from-a-wheel"
    finally:
        sys.modules.pop("from_a_wheel", None)
