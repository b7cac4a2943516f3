"""Many hosts: each is simulated by itself, wherever there is a processor for it.

The work is handed to an engine that exists: joblib on this machine, or Dask, through joblib's own
interface to it, where a cluster is given. A host's run depends on the scenario, its own number and
the policy alone, so that neither the engine nor the number of workers changes the result.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from host_agent.choosing import choose
from host_agent.errors import UserError
from host_agent.simulator.engine import BooksKind, Engine, HostRun
from host_agent.simulator.host_state import Log
from host_agent.simulator.scenario import Recorded, Scenario
from host_agent.simulator.traces import Recordings, needs_of

FleetEngine = Literal["joblib", "dask"]


class MissingExtra(UserError):
    """A library that only some need is not installed."""

    kind = "missing-extra"

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} is not installed", what_to_do=f"pip install 'memballoon[{extra}]'"
        )


class NoCluster(UserError):
    """The cluster that was given can't be reached."""

    kind = "no-cluster"


@dataclass(frozen=True, slots=True)
class Job:
    """One host under one policy: all that a worker needs."""

    scenario: Scenario
    recordings: Mapping[Recorded, Recordings]
    policy: str
    host: int = 0
    books: BooksKind = "auto"
    samples: bool = False


def run_job(job: Job, log: Log | None = None) -> HostRun:
    """Simulate one host. Pure but for the clock that tells how long decisions took."""
    needs = needs_of(job.scenario, job.host, job.recordings)
    policy = choose(job.policy, job.scenario.policies).policy
    engine = Engine(job.scenario, needs, policy, books=job.books, log=log, samples=job.samples)
    return engine.run()


def run_jobs(
    jobs: Sequence[Job],
    engine: FleetEngine = "joblib",
    *,
    workers: int | None = None,
    cluster: str | None = None,
) -> list[HostRun]:
    """Simulate many hosts, in the order of `jobs`. `workers`: None for one a processor.

    Raises MissingExtra, and NoCluster if nobody answers at the address.
    """
    if len(jobs) == 1 and cluster is None:
        return [run_job(jobs[0])]
    joblib = _import(lambda: __import__("joblib"), "joblib", "fleet")
    with _backend(joblib, engine, workers, cluster):
        runs: list[HostRun] = joblib.Parallel()(joblib.delayed(run_job)(job) for job in jobs)
    return runs


@contextlib.contextmanager
def _backend(
    joblib: Any, engine: FleetEngine, workers: int | None, cluster: str | None
) -> Iterator[None]:
    n_jobs = -1 if workers is None else workers
    if engine == "joblib":
        with joblib.parallel_config(backend="loky", n_jobs=n_jobs, inner_max_num_threads=1):
            yield
        return
    distributed = _import(lambda: __import__("distributed"), "dask.distributed", "fleet")
    local = {} if cluster is not None else {"n_workers": workers, "dashboard_address": None}
    try:
        client = distributed.Client(cluster, timeout="10s", **local)
    except (OSError, ValueError) as error:
        raise NoCluster(f"no Dask cluster at {cluster}: {error}") from error
    with client, joblib.parallel_config(backend="dask", n_jobs=n_jobs):
        yield


def _import(importing: Callable[[], Any], what: str, extra: str) -> Any:
    try:
        return importing()
    except ImportError as error:
        raise MissingExtra(what, extra) from error
