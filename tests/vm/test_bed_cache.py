"""When an image is built, when it isn't, and what a build that failed leaves."""

import threading
from collections.abc import Callable
from pathlib import Path

import bed_image
import bed_recipe
import pytest
from bed_errors import BedError
from bed_recipe import Image

DEADLINE_S = 60.0


class Builds:
    """In place of the recipe's real steps: what was made, in their order."""

    def __init__(self) -> None:
        self.made: list[Path] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def make(self, image: Image, work: Path, kind: str) -> None:
        assert kind in bed_recipe.MORE_PACKAGES
        image.directory.mkdir()
        (work / "half-made").write_text("")
        self.made.append(work)
        self.meanwhile()
        image.kernel.write_text("")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bed_image.os, "geteuid", lambda: 0)
    return tmp_path / "cache" / "memballoon-vm"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Builds:
    builds = Builds()
    monkeypatch.setattr(bed_recipe, "make", builds.make)
    return builds


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"lock"}


PYPROJECT = bed_recipe.ROOT / "pyproject.toml"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"msgpack>=1.0.5"', '"msgpack>=1.1"'),
        ('"trio>=0.25",', '"trio>=0.25",\n"outcome",'),
        ('"fastapi>=0.110"', '"fastapi>=0.111"'),
        ('"pytest>=8.2"', '"pytest>=8.3"'),
    ],
)
def test_other_wheels_are_another_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    old = bed_image.inputs_hash()
    source = PYPROJECT.read_text()
    assert source.count(before) == 1
    (tmp_path / "pyproject.toml").write_text(source.replace(before, after))
    monkeypatch.setattr(bed_recipe, "ROOT", tmp_path)
    assert bed_image.inputs_hash() != old


@pytest.mark.parametrize("line", ['description = "', '"mypy>=', '"ruff>=', 'addopts = "'])
def test_what_is_not_in_it_makes_no_other_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    old = bed_image.inputs_hash()
    source = PYPROJECT.read_text()
    assert source.count(line) == 1
    (tmp_path / "pyproject.toml").write_text(source.replace(line, f"{line}9"))
    monkeypatch.setattr(bed_recipe, "ROOT", tmp_path)
    assert bed_image.inputs_hash() == old


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('SUITE = "bookworm"', 'SUITE = "trixie"'),
        ('PYTHON = "3.11"', 'PYTHON = "3.13"'),
        ('"busybox-static")', '"busybox-static", "gdb")'),
        ('"docker.io", ', '"podman", '),
        ('"linux-image-cloud-amd64"', '"linux-image-amd64"'),
        ("3 << 30", "4 << 30"),
        ('"man", "locale"', '"locale"'),
        ("^has_journal", "^has_journal,^extent"),
    ],
)
def test_another_recipe_is_another_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    """Packages, kernel, layout: whatever stands in it, to the letter."""
    old = bed_image.inputs_hash()
    source = Path(bed_recipe.__file__).read_text()
    assert source.count(before) == 1
    changed = tmp_path / "bed_recipe.py"
    changed.write_text(source.replace(before, after))
    monkeypatch.setattr(bed_recipe, "__file__", str(changed))
    assert bed_image.inputs_hash() != old


def test_each_kind_is_an_image_of_its_own(builds: Builds, cache: Path) -> None:
    images = {bed_image.image(kind).directory for kind in bed_recipe.MORE_PACKAGES}
    assert len(images) == len(builds.made) == 2
    assert kept(cache) == {directory.name for directory in images}


def test_it_is_built_once(builds: Builds, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = bed_image.image()
    assert first.kernel.exists()
    assert "bed: image built in 0 s" in capsys.readouterr().err
    assert bed_image.image() == first
    assert capsys.readouterr().err == ""
    assert len(builds.made) == 1
    assert kept(cache) == {first.directory.name}


def test_other_inputs_are_built_beside_it_and_the_oldest_go(
    builds: Builds, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bed_image, "KEPT", 3)
    for wanted in ("a", "b", "c", "a", "d"):
        monkeypatch.setattr(bed_image, "inputs_hash", lambda _kind, wanted=wanted: wanted)
        assert bed_image.image().directory.name == wanted
    assert len(builds.made) == 4
    assert kept(cache) == {"a", "c", "d"}, "b was not used for the longest time"


def test_a_failed_build_leaves_nothing(builds: Builds, cache: Path) -> None:
    def fail() -> None:
        raise BedError("no wheels")

    builds.meanwhile = fail
    with pytest.raises(BedError, match="no wheels"):
        bed_image.image()
    assert kept(cache) == set()


def test_what_a_killed_build_left_is_removed_by_the_next(builds: Builds, cache: Path) -> None:
    (cache / "building-dead" / "tree").mkdir(parents=True)
    built = bed_image.image()
    assert kept(cache) == {built.directory.name}


def test_of_two_at_once_one_builds_and_the_other_waits(
    builds: Builds, capsys: pytest.CaptureFixture[str]
) -> None:
    building, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        building.set()
        assert go_on.wait(DEADLINE_S)

    builds.meanwhile = wait
    images: list[Image] = []
    threads = [threading.Thread(target=lambda: images.append(bed_image.image())) for _ in range(2)]
    said = ""
    try:
        threads[0].start()
        assert building.wait(DEADLINE_S)
        threads[1].start()
        for _ in range(600):
            said += capsys.readouterr().err
            if "waiting for another build" in said:
                break
            threads[1].join(0.1)
    finally:
        go_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert "waiting for another build" in said
    assert len(builds.made) == 1
    assert images[0] == images[1]


def test_no_place_for_it_is_said_in_one_line(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BedError, match=r"can't be kept in .*Not a directory.*XDG_CACHE_HOME"):
        bed_image.image()


def test_without_root_nothing_is_begun(
    builds: Builds, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bed_image.os, "geteuid", lambda: 1000)
    with pytest.raises(BedError, match="needs root"):
        bed_image.image()
    assert not cache.exists()


def test_the_cache_is_where_the_user_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bed_image.cache_directory() == tmp_path / "memballoon-vm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bed_image.cache_directory() == tmp_path / ".cache" / "memballoon-vm"
