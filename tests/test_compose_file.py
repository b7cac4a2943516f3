"""docker-compose.yml and compose/host.toml say the same of each VM; this needs no engine."""

import re
import tomllib
from pathlib import Path

import pytest

from guest_driver.container import pages_of
from host_agent.config import VmTable, parse_config
from protocol.units import bytes_of

ROOT = Path(__file__).parent.parent
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
HOST = (ROOT / "compose" / "host.toml").read_text(encoding="utf-8")
CONFIG = parse_config(HOST, "host.toml")
RUN_DIR = "${MEMBALLOON_RUN_DIR:-/run/memballoon}"


def service(name: str) -> str:
    """The lines of one service."""
    found = re.search(rf"^  {name}:\n((?:    .*\n|\n)+)", COMPOSE, re.MULTILINE)
    assert found is not None, f"no service {name}"
    return found[1]


@pytest.mark.parametrize("vm", CONFIG.vms, ids=lambda vm: vm.name)
def test_a_vm_and_its_service_agree(vm: VmTable) -> None:
    text = service(vm.name)
    assert vm.container == f"memballoon-{vm.name}"
    assert f"container_name: ${{MEMBALLOON_NAME:-memballoon}}-{vm.name}\n" in text
    assert f"cgroup_parent: /${{MEMBALLOON_NAME:-memballoon}}/{vm.name}/workload\n" in text
    assert f"- {RUN_DIR}/guests/{vm.name}:/run/memballoon:ro\n" in text
    assert f"- {RUN_DIR}/cgroup/{vm.name}:/run/memballoon-cgroup:ro\n" in text
    [size] = re.findall(r"--memory=(\w+)", text)
    assert bytes_of(pages_of(size)) == vm.assigned_bytes
    assert text.startswith("    <<: *guest\n")


def test_a_guest_has_no_other_guests_places() -> None:
    for vm in CONFIG.vms:
        named = set(re.findall(r"/(?:guests|cgroup)/(\w+):", service(vm.name)))
        assert named == {vm.name}


def test_the_agent_is_healthy_when_all_places_are_there() -> None:
    [names] = re.findall(r"for vm in (.*); do", service("agent"))
    assert sorted(names.split()) == sorted(vm.name for vm in CONFIG.vms)


def test_they_are_promised_more_than_there_is() -> None:
    assert len(CONFIG.vms) >= 4
    assert sum(vm.assigned_bytes for vm in CONFIG.vms) > 1.8 * CONFIG.host.pool_bytes
    assert tomllib.loads(HOST)["host"]["cgroup_root"] == "memballoon"
