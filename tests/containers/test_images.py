"""What is in the images, and what is not."""

import json

import pytest
from engine import Engine
from images import Images

pytestmark = pytest.mark.effects

HARDENED = ("--rm", "--init", "--network=none", "--read-only", "--cap-drop=ALL")
NEEDED_BY_GUEST = {"memballoon", "msgpack", "numpy", "trio"}
OF_HOST_ONLY = {"click", "fastapi", "httpx", "hypercorn", "pydantic", "rich"}

DISTRIBUTIONS = """
import importlib.metadata, json
print(json.dumps([found.name for found in importlib.metadata.distributions()]))
"""

MODULES = """
import importlib.util, json
print(json.dumps([name for name in ("protocol", "guest_driver", "host_agent")
                  if importlib.util.find_spec(name)]))
"""


def python(engine: Engine, image: str, code: str) -> set[str]:
    shown = engine.docker("run", *HARDENED, "--entrypoint=python3", image, "-c", code)
    return {name.lower() for name in json.loads(shown)}


def size_of(engine: Engine, image: str) -> int:
    return int(engine.inspect(image)["Size"])


def test_a_guest_has_nothing_of_the_host_agent(engine: Engine, images: Images) -> None:
    for image in (images.guest, images.guest_redis):
        assert python(engine, image, MODULES) == {"protocol", "guest_driver"}
        found = python(engine, image, DISTRIBUTIONS)
        assert found >= NEEDED_BY_GUEST
        assert not found & OF_HOST_ONLY


def test_the_agent_has_both_ends(engine: Engine, images: Images) -> None:
    assert python(engine, images.agent, MODULES) == {"protocol", "guest_driver", "host_agent"}
    assert python(engine, images.agent, DISTRIBUTIONS) >= NEEDED_BY_GUEST | OF_HOST_ONLY
    assert engine.docker("run", *HARDENED, images.agent, "--version").startswith("memballoon ")


def test_they_are_small(engine: Engine, images: Images, base_image: str) -> None:
    base_bytes = size_of(engine, base_image)
    assert size_of(engine, images.guest) - base_bytes < 90e6  # numpy: 60 MB
    assert size_of(engine, images.agent) - base_bytes < 130e6


def test_redis_of_the_base_is_taken_as_it_is(engine: Engine, images: Images) -> None:
    assert size_of(engine, images.guest_redis) == size_of(engine, images.guest)


COMPILED = """
import sys
from importlib.util import cache_from_source
from pathlib import Path
import guest_driver.driver
late = [module.__file__ for module in sys.modules.values()
        if (getattr(module, "__file__", None) or "").endswith(".py")
        and not Path(cache_from_source(module.__file__)).exists()]
print("late", late)
"""


def test_a_driver_compiles_nothing_when_it_starts(engine: Engine, images: Images) -> None:
    run = ("run", *HARDENED, "--entrypoint=python3", images.guest, "-OO", "-c")
    assert engine.docker(*run, COMPILED) == "late []"


def test_the_containers_status_is_the_workloads(engine: Engine, images: Images) -> None:
    workload = ("--memory=64MiB", "--", "sh", "-c", "id -u; exit 7")
    done = engine.run("run", *HARDENED, images.guest, *workload, check=False)
    assert (done.returncode, done.stdout) == (7, "0\n")


def test_a_mistake_is_one_line(engine: Engine, images: Images) -> None:
    done = engine.run("run", *HARDENED, images.guest, "--", "true", check=False)
    assert done.returncode == 2
    said = (
        "balloon-guest: --memory is missing: say --memory=512MiB, as the host agent's file has it"
    )
    assert said in done.stderr
