"""What a user can get wrong with an agent: status 2, one line, nothing left and nothing broken."""

import json

import pytest
from scenario_rig import PATIENCE_S, Rig, spec, until_blocking

from protocol.units import MIB

pytestmark = pytest.mark.effects


def run(rig: Rig, *arguments: str) -> tuple[int, str, str]:
    child = rig.balloon(*arguments)
    output, _ = child.communicate(timeout=PATIENCE_S * 3)
    return child.returncode, output, rig.stderr()


def refused(rig: Rig, *arguments: str) -> str:
    """The one line that a command was refused with."""
    status, output, error = run(rig, *arguments)
    assert (status, output) == (2, ""), error
    assert error.count("\n") == 1, error
    assert error.startswith("balloon")
    return error


def end(rig: Rig, number: int) -> None:
    rig.children[number].terminate()
    assert rig.children[number].wait(timeout=PATIENCE_S) == 0


def test_a_second_agent_is_refused_and_the_first_one_unharmed(rig: Rig) -> None:
    rig.agent_process()
    path = rig.base / "agent.toml"
    first = path.read_text()
    assert "another agent" in refused(rig, "agent", "--config", str(path))
    # Another run directory, but the same state or the same root of cgroups.
    other = first.replace(str(rig.run_dir), str(rig.base / "run2"))
    (rig.base / "b.toml").write_text(other)
    assert "another agent" in refused(rig, "agent", "--config", str(rig.base / "b.toml"))
    other = other.replace(str(rig.state_dir), str(rig.base / "state2"))
    (rig.base / "c.toml").write_text(other)
    assert "another agent" in refused(rig, "agent", "--config", str(rig.base / "c.toml"))
    with rig.client() as client:
        client.launch(spec("a", 64))
        assert "another agent" in refused(rig, "agent", "--config", str(path))
        assert client.vm("a").connected
    end(rig, 0)


def test_requests_that_can_not_be(rig: Rig) -> None:
    rig.agent_process(pool_mib=256)
    at = ("--run-dir", str(rig.run_dir))
    status, output, error = run(rig, "launch", *at, "a", "--memory", "64MiB")
    assert status == 0, output + error
    assert "exists already" in refused(rig, "launch", *at, "a", "--memory", "64MiB")
    memory = ("--memory", "512MiB", "--reservation", "300MiB")
    assert "exceed the pool" in refused(rig, "launch", *at, "b", *memory)
    words = ("launch", *at, "b", "--memory", "64MiB", "--", "no-such-program")
    assert "no program no-such-program" in refused(rig, *words)
    assert "whole number" in refused(
        rig, "launch", *at, "b", "--memory", "65MiB", "--frames", "2MiB"
    )
    assert "no VM named 'b'" in refused(rig, "stop", *at, "b")
    assert "exceeds the assigned size" in refused(rig, "set", *at, "a", "--target", "65MiB")
    status, output, _ = run(rig, "ps", *at, "--json")
    assert status == 0
    (vm,) = json.loads(output)
    assert vm["name"] == "a"
    assert vm["quota_bytes"] == 64 * MIB
    end(rig, 0)


def test_a_vm_of_the_file_that_can_not_start_does_not_end_the_agent(rig: Rig) -> None:
    rig.agent_process()
    rig.children[0].kill()
    rig.children[0].wait()
    path = rig.base / "agent.toml"
    vms = '\n[[vm]]\nname = "bad"\nmemory = "64MiB"\ncommand = ["no-such-program"]\n'
    vms += '\n[[vm]]\nname = "good"\nmemory = "64MiB"\n'
    path.write_text(path.read_text() + vms)
    rig.balloon("agent", "--config", str(path))
    with rig.client() as client:

        def only_good() -> bool:
            try:
                return [(vm.name, vm.connected) for vm in client.vms()] == [("good", True)]
            except Exception:
                return False

        until_blocking(only_good, "the good one alone")
    end(rig, 1)
    assert "bad can't be launched" in rig.stderr()
    assert "Traceback" not in rig.stderr()


def test_reservations_above_the_pool(rig: Rig) -> None:
    path = rig.base / "agent.toml"
    vm = '[[vm]]\nname = "{}"\nmemory = "512MiB"\nreservation = "300MiB"\n'
    path.write_text(
        f'[host]\npool = "512MiB"\nrun_dir = "{rig.run_dir}"\nstate_dir = "{rig.state_dir}"\n'
        f'cgroup_root = "{rig.cgroup.name}"\n' + vm.format("a") + vm.format("b")
    )
    assert "exceed the pool" in refused(rig, "agent", "--config", str(path))
    assert not rig.run_dir.exists()
    assert not rig.cgroup.exists()


@pytest.mark.parametrize("fault", ["too long", "no directory", "a file"])
def test_a_run_dir_that_can_not_be_used(rig: Rig, fault: str) -> None:
    run_dir = rig.base / ("r" * 120 if fault == "too long" else "run")
    if fault == "no directory":
        run_dir = rig.base / "file" / "run"
        run_dir.parent.touch()
    if fault == "a file":
        run_dir.mkdir()
        (run_dir / "control.sock").touch()
    path = rig.base / "agent.toml"
    path.write_text(
        f'[host]\npool = "512MiB"\nrun_dir = "{run_dir}"\nstate_dir = "{rig.state_dir}"\n'
        f'cgroup_root = "{rig.cgroup.name}"\n'
    )
    assert str(rig.base) in refused(rig, "agent", "--config", str(path))
    assert not rig.cgroup.exists()
    if fault == "a file":
        (run_dir / "control.sock").unlink()
