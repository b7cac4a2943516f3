"""The project's images without a registry and without any package: of this machine's own files.

They are empty but for an entry point; what they run is mounted into their containers from here, by
a file that is merged into docker-compose.yml. For the VM bed, which has no network, and where it
takes minutes to unpack an image.
"""

import compileall
import json
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Final

from base_image import ROOT
from engine import Engine

ENTRY_POINTS: Final = {
    "agent": ("balloon",),
    "guest": ("balloon-guest", "run"),
    "guest-redis": ("balloon-guest", "run"),
}
SERVICES: Final = ("agent", "redis", "batch", "greedy", "idle")
DIRECTORIES: Final = ("usr", "sbin", "etc", "tmp", "var/tmp", "proc", "sys", "dev", "run")
LINKS: Final = ("bin", "lib", "lib64")

_INSIDE: Final = "/opt/memballoon"
"""Where all modules are in one directory, as they are in a virtual environment."""


def make_own_images(engine: Engine, prefix: str, work: Path) -> Path:
    """Make the three in `work`, which has to stay; the file that is to be merged.

    This machine needn't have Redis: that guest does nothing.
    """
    _link_modules(work / "modules")
    _compile()
    _make_scripts(work / "bin")
    for target, entry_point in ENTRY_POINTS.items():
        archive = work / f"{target}.tar"
        _make_archive(archive)
        engine.docker(
            *("import", "--change", f"ENTRYPOINT {json.dumps(entry_point)}"),
            *("--change", f"ENV PATH={_INSIDE}/bin:/usr/local/bin:/usr/bin"),
            *("--change", f"ENV PYTHONPATH={_INSIDE}/modules", str(archive), f"{prefix}-{target}"),
        )
    merged = work / "own.yml"
    mounts = ["/usr:/usr:ro", f"{ROOT}:{ROOT}:ro", f"{work}:{_INSIDE}:ro"]
    services: dict[str, dict[str, object]] = {service: {"volumes": mounts} for service in SERVICES}
    services["redis"]["command"] = ["--memory=192MiB", "--", "sleep", "2147483647"]
    merged.write_text(json.dumps({"services": services}), encoding="utf-8")  # which is YAML as well
    return merged


def _link_modules(modules: Path) -> None:
    modules.mkdir()
    for directory in (Path(sysconfig.get_path("purelib")), ROOT):
        for path in directory.iterdir():
            if not path.name.startswith((".", "__")):
                (modules / path.name).symlink_to(path)


def _compile() -> None:
    """Drivers run with -OO; their containers can't keep what they compile."""
    for package in ("host_agent", "guest_driver", "protocol"):
        for level in (0, 2):
            compileall.compile_dir(ROOT / package, quiet=1, optimize=level)


def _make_scripts(scripts: Path) -> None:
    scripts.mkdir()
    for name, module in (("balloon", "host_agent.cli"), ("balloon-guest", "guest_driver.cli")):
        script = scripts / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n",
            encoding="utf-8",
        )
        script.chmod(0o755)


def _make_archive(archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        for name in DIRECTORIES:
            directory = tarfile.TarInfo(name)
            directory.type = tarfile.DIRTYPE
            directory.mode = 0o1777 if name.endswith("tmp") else 0o755
            tar.addfile(directory)
        for name in LINKS:
            link = tarfile.TarInfo(name)
            link.type = tarfile.SYMTYPE
            link.linkname = f"usr/{name}"
            tar.addfile(link)
