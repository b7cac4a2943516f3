"""The cache of images: one directory for each set of inputs, named by their hash.

An image is either whole or not there, and a change of the inputs makes another. The checkout is no
part of it.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bed_recipe
from bed_errors import BedError
from bed_recipe import Image

KEPT = 5
"""Images kept beside each other, for branches with different inputs: two kinds of each."""


def cache_directory() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # As the XDG specification has it, a relative path is as good as none.
    return (base if base.is_absolute() else Path.home() / ".cache") / "memballoon-vm"


def inputs_hash(kind: str = "plain") -> str:
    """Of the recipe, to the letter, of the wheels that it installs, and of the image's kind."""
    inputs = hashlib.sha256(Path(bed_recipe.__file__).read_bytes())
    inputs.update("\n".join([kind, *bed_recipe.requirements()]).encode())
    return inputs.hexdigest()[:16]


def image(kind: str = "plain") -> Image:
    """The image for the inputs as they are now, built if need be. Raises BedError."""
    cache = cache_directory()
    wanted = Image(cache / inputs_hash(kind))
    try:
        if _is_there(wanted):
            return wanted
        if os.geteuid() != 0:
            raise BedError("building the image needs root: it is a tree of files that root owns")
        cache.mkdir(parents=True, exist_ok=True)
        with _only_builder(cache):
            if not _is_there(wanted):
                _build(wanted, cache, kind)
            _prune(cache)
    except OSError as error:
        raise BedError(
            f"the image can't be kept in {cache}: {error} (XDG_CACHE_HOME names another place)"
        ) from error
    return wanted


def _is_there(wanted: Image) -> bool:
    if not wanted.directory.exists():
        return False
    os.utime(wanted.directory)
    return True


@contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another build to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Only the holder of the lock builds: these are of builds that were killed.
        for dead in cache.glob("building-*"):
            shutil.rmtree(dead)
        yield


def _build(wanted: Image, cache: Path, kind: str) -> None:
    _say(f"building the VM's image ({kind}) in {wanted.directory} (once)")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as scratch:
        work = Path(scratch)
        made = Image(work / "image")
        bed_recipe.make(made, work, kind)
        made.directory.rename(wanted.directory)
    _say(f"image built in {time.monotonic() - began_s:.0f} s")


def _prune(cache: Path) -> None:
    images = [path for path in cache.iterdir() if path.is_dir()]
    images.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in images[KEPT:]:
        shutil.rmtree(old)


def _say(what: str) -> None:
    print(f"bed: {what}", file=sys.stderr)
