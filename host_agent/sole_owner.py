"""One agent to a directory: a lock that the kernel drops with its holder, however that ends."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from host_agent.errors import BadRequest


@contextlib.contextmanager
def sole_owner(directory: Path, make: Callable[[], object]) -> Iterator[None]:
    """Hold `directory`, which `make` makes where it is missing.

    Raises BadRequest if another agent holds it, OSError if it can't be opened.

    Two agents in one state directory would overwrite each other's state; in one root of cgroups,
    each would remove the other's mock VMs as those of a dead agent.
    """
    while True:
        make()
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadRequest(
                    f"another agent works with {directory}",
                    what_to_do="stop it, or choose another run_dir, state_dir and cgroup_root",
                ) from None
            if not _is_there(directory, descriptor):
                continue  # an agent that ended has just removed it
            yield
            return
        finally:
            os.close(descriptor)


def _is_there(directory: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(directory.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
