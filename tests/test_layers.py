"""Who may import whom, and who may touch the memory calls: read from the sources, by ast."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("protocol", "guest_driver", "host_agent")
MEMORY_CALLS = {"mmap", "mmap64", "munmap", "madvise", "mlock", "mlock2", "munlock"}
IMPURE = {
    "asyncio",
    "datetime",
    "os",
    "pathlib",
    "random",
    "select",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "trio",
}


def modules_below(where: str) -> list[Path]:
    """The sources of a package, a folder or one module; never none."""
    path = ROOT / where
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert found, where
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, package: str = "") -> Iterator[str]:
    """Full names of all that a source imports, also inside functions and TYPE_CHECKING blocks.

    `package` is what a relative import starts from. `from a import b` gives `a.b`: b may be a
    module.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*start, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module")):
                if node.args and isinstance(name := node.args[0], ast.Constant):
                    yield str(name.value)
            case _:
                pass


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(where: str, allowed: Callable[[str], bool]) -> list[str]:
    found = []
    for path in modules_below(where):
        package = module_name(path if path.stem == "__init__" else path.parent / "__init__.py")
        for name in imports_of(path.read_text(encoding="utf-8"), package):
            if not allowed(name):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def ours(name: str) -> bool:
    return is_in(name, *PACKAGES, "tests")


def stdlib(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in sys.stdlib_module_names


def memory_calls(source: str) -> list[str]:
    """Calls like libc.madvise(...), arena.mlock(...), mmap.mmap(...)."""
    return [
        node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in MEMORY_CALLS
    ]


def test_the_two_ends_never_import_each_other() -> None:
    assert offences("guest_driver", lambda name: not is_in(name, "host_agent", "tests")) == []
    assert offences("host_agent", lambda name: not is_in(name, "guest_driver", "tests")) == []


def test_protocol_imports_neither_end_and_little_else() -> None:
    def allowed(name: str) -> bool:
        return stdlib(name) or is_in(name, "protocol", "numpy", "msgpack", "trio")

    assert offences("protocol", allowed) == []


def test_in_protocol_only_the_channel_knows_trio() -> None:
    with_trio = offences("protocol", lambda name: not is_in(name, "trio"))
    assert {line.split(" ")[0] for line in with_trio} == {"protocol/channel.py"}


def test_a_guest_needs_only_its_own_dependencies() -> None:
    def allowed(name: str) -> bool:
        return stdlib(name) or is_in(name, "guest_driver", "protocol", "numpy", "msgpack", "trio")

    assert offences("guest_driver", allowed) == []


def test_a_policy_sees_the_snapshot_and_units_only() -> None:
    def allowed(name: str) -> bool:
        return not ours(name) or is_in(
            name,
            "host_agent.policy",
            "host_agent.ledger.columns",
            "host_agent.ledger.snapshot",
            "protocol",
        )

    assert offences("host_agent/policy", allowed) == []


def test_the_ledger_knows_the_protocol_and_nothing_of_the_agent() -> None:
    def allowed(name: str) -> bool:
        return not ours(name) or is_in(name, "host_agent.ledger", "protocol")

    assert offences("host_agent/ledger", allowed) == []


@pytest.mark.parametrize("where", ["host_agent/ledger", "host_agent/policy"])
def test_the_pure_core_has_no_clock_and_no_world(where: str) -> None:
    assert offences(where, lambda name: not is_in(name, *IMPURE, "protocol.channel")) == []


def test_only_memory_moves_the_balloons_pages() -> None:
    """workload.py holds memory as any program would, by the mmap module; it has no ctypes."""
    free = {"guest_driver/memory.py", "guest_driver/workload.py"}
    for package in ("guest_driver", "protocol"):
        for path in modules_below(package):
            if str(path.relative_to(ROOT)) not in free:
                assert memory_calls(path.read_text(encoding="utf-8")) == [], path
    if (ROOT / "guest_driver/workload.py").exists():
        assert offences("guest_driver/workload.py", lambda name: not is_in(name, "ctypes")) == []


def test_the_watchdog_stands_on_the_standard_library() -> None:
    """It must start in milliseconds and outlive everything."""
    assert offences("host_agent/watchdog.py", stdlib) == []


def test_the_reader_of_imports_sees_them_all() -> None:
    source = """
import os, a.b as c
from d import e
from . import f
from ..g import h
def later():
    from i.j import k
    import_module("l.m")
    importlib.import_module("n")
"""
    assert set(imports_of(source, "p.q")) == {
        "os", "a.b", "d.e", "p.q.f", "p.g.h", "i.j.k", "l.m", "n",
    }  # fmt: skip
    assert is_in("trio.testing", "trio")
    assert not is_in("triometer", "trio")


def test_the_reader_of_calls_sees_them() -> None:
    assert memory_calls("libc.madvise(1)\nmmap.mmap(-1, 4)\nx.mlock2\n") == ["madvise", "mmap"]
