"""The tests' own engine and base image: what is left of them afterwards is nothing."""

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine import (
    DEFAULT_SOCKET,
    Engine,
    answers,
    cgroups_named,
    missing_for_engine,
    mounts_below,
    running_socket,
    until,
)

from tests.conftest import RUN_PREFIX

pytestmark = pytest.mark.effects

HOLDS_ONE = """
import sys, time
sys.path.insert(0, {here!r})
from engine import engine_for_tests
with engine_for_tests({name!r}) as engine:
    print(engine.socket_path, flush=True)
    {then}
"""


def start(name: str, then: str) -> tuple["subprocess.Popen[str]", Path]:
    """A process that has an engine; no other is to be found in its environment."""
    if answers(DEFAULT_SOCKET):
        pytest.skip("an engine runs here already, none is started")
    code = HOLDS_ONE.format(here=str(Path(__file__).parent), name=name, then=then)
    environment = {key: value for key, value in os.environ.items() if key != "DOCKER_HOST"}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def left_of(name: str, base: Path) -> list[object]:
    """What an engine of ours has left behind, its files apart."""
    found: list[object] = [*cgroups_named(name), *mounts_below(base)]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text(errors="replace")
        except OSError:
            continue
        if str(base) in command:
            found.append(command.replace("\0", " "))
    return found


@pytest.fixture
def name() -> str:
    return f"{RUN_PREFIX}-{secrets.token_hex(3)}"


@pytest.mark.parametrize("failing", [False, True])
def test_an_own_engine_leaves_nothing(name: str, failing: bool) -> None:
    child, socket_path = start(name, "raise SystemExit(3)" if failing else "pass")
    assert child.wait(60) == (3 if failing else 0)
    assert left_of(name, socket_path.parent) == []
    assert not socket_path.parent.exists()


def test_an_own_engine_ends_with_whoever_started_it(name: str) -> None:
    child, socket_path = start(name, "time.sleep(1000)")
    base = socket_path.parent
    try:
        assert answers(socket_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
        until(lambda: not left_of(name, base), lambda: left_of(name, base))
    finally:
        child.kill()
        subprocess.run(["rm", "-r", str(base)], check=True)


def test_a_running_engine_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine.url)
    assert running_socket() == engine.socket_path
    monkeypatch.setenv("DOCKER_HOST", f"{engine.url}.not")
    assert running_socket() is None


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("engine.SBIN", "/nowhere")
    assert missing_for_engine() == (
        "no Docker engine: docker is missing (apt-get install docker.io)"
    )


def test_containers_are_in_a_cgroup_of_this_run(engine: Engine, base_image: str) -> None:
    if not engine.cgroup_parent:
        pytest.skip("the engine that runs here has a cgroup parent of its own")
    shown = engine.docker("run", "--rm", "--network=none", base_image, "cat", "/proc/self/cgroup")
    assert all(f":{engine.cgroup_parent}/" in line for line in shown.splitlines()), shown


def test_the_base_image_can_do_what_the_dockerfile_needs(engine: Engine, base_image: str) -> None:
    look = "import sys, ssl, ensurepip, venv; print(sys.version_info[:2] >= (3, 11))"
    run = ("run", "--rm", "--network=none")
    assert engine.docker(*run, base_image, "python3", "-c", look) == "True"
    assert engine.docker(*run, base_image, "redis-server", "--version").startswith("Redis server")
    wheels = engine.docker(*run, f"{base_image}-build", "sh", "-c", "ls $PIP_FIND_LINKS")
    for requirement in ("numpy", "trio", "fastapi", "setuptools"):
        assert f"{requirement}-" in wheels
    assert json.loads(engine.docker("image", "inspect", base_image))[0]["Size"] < 100e6
