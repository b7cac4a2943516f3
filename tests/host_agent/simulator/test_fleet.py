"""Fleets: neither the engine nor the number of workers changes a figure."""

import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scenarios_for_tests import scenario

from host_agent.simulator.fleet import Job, MissingExtra, NoCluster, run_job, run_jobs
from host_agent.simulator.metrics import Totals
from protocol.units import MIB

HOSTS = 5
JOBS = [
    Job(
        scenario(
            {"trace": {"kind": "burst", "low": 0, "high": 250 * MIB, "every_s": 9, "length_s": 3}},
            {"trace": {"kind": "steady", "level": 150 * MIB, "noise": 0.2}},
            pool_mib=320,
            reserve_mib=8,
            duration_s=30.0,
            count=HOSTS,
        ),
        {},
        "shares",
        host,
    )
    for host in range(HOSTS)
]


@pytest.fixture(scope="module")
def alone() -> list[Totals]:
    return [run_job(job).totals for job in JOBS]


def test_joblib(alone: list[Totals]) -> None:
    pytest.importorskip("joblib")
    for workers in (1, 2):
        assert [run.totals for run in run_jobs(JOBS, "joblib", workers=workers)] == alone


def test_the_order_of_the_work_does_not_matter(alone: list[Totals]) -> None:
    assert [run_job(job).totals for job in reversed(JOBS)] == alone[::-1]


@pytest.fixture
def cluster() -> Iterator[str]:
    """A scheduler and two workers, processes of this machine, on loopback."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as made:
        yield made.scheduler_address


def test_dask_on_a_cluster(alone: list[Totals], cluster: str) -> None:
    assert cluster.startswith("tcp://127.0.0.1:")
    assert [run.totals for run in run_jobs(JOBS, "dask", cluster=cluster)] == alone


def test_a_cluster_that_is_not_there() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(NoCluster, match="no Dask cluster at nonsense://"):
        run_jobs(JOBS, "dask", cluster="nonsense://127.0.0.1:1")


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "joblib", None)
    with pytest.raises(MissingExtra) as missing:
        run_jobs(JOBS)
    assert missing.value.one_line() == "joblib is not installed: pip install 'memballoon[fleet]'"
    assert run_jobs(JOBS[:1])[0].totals == run_job(JOBS[0]).totals, "one host needs none"


def test_a_job_crosses_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(JOBS[0])) == JOBS[0]
    other = replace(JOBS[0], host=1)
    assert run_job(other).totals != run_job(JOBS[0]).totals
