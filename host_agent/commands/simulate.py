"""`balloon simulate`: policies on a virtual clock, side by side."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from host_agent.choosing import choose
from host_agent.commands.tables import WIDTH_OF_A_PIPE, print_table
from host_agent.errors import BadRequest
from host_agent.policy.registry import PolicyError
from host_agent.policy_settings import PolicyTables
from host_agent.simulator.fleet import FleetEngine, Job, run_job, run_jobs
from host_agent.simulator.guests import SECOND_US
from host_agent.simulator.host_state import Log
from host_agent.simulator.library import Loaded, load_scenario, shipped
from host_agent.simulator.metrics import figures_of
from host_agent.simulator.plot import check_plot, draw
from host_agent.simulator.report import print_report, report, to_json
from host_agent.simulator.speeds import read_speed


@click.command()
@click.argument("scenario", required=False)
@click.option(
    "--policy", "policies", multiple=True, help="A policy to try; can be given again. [shares]"
)
@click.option("--host", type=click.IntRange(1), help="Only this one of many hosts, from 1 on.")
@click.option("--seed", type=click.IntRange(0), help="Instead of the scenario's.")
@click.option("--list", "as_list", is_flag=True, help="Name the scenarios that come along.")
@click.option("--json", "as_json", is_flag=True, help="Write the report as JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: a .png or .svg file."
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all events and decisions, with their terms, as JSON lines.",
)
@click.option(
    "--speeds",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `balloon bench --json` has written: balloons inflate at that speed.",
)
@click.option(
    "--engine",
    type=click.Choice(["joblib", "dask"]),
    default="joblib",
    show_default=True,
    help="What distributes many hosts.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes. [one a processor]")
@click.option("--cluster", metavar="ADDRESS", help="A Dask scheduler, like tcp://10.0.0.1:8786.")
def simulate(
    *,
    scenario: str | None,
    policies: tuple[str, ...],
    host: int | None,
    seed: int | None,
    as_list: bool,
    as_json: bool,
    plot: Path | None,
    trace: Path | None,
    speeds: Path | None,
    engine: FleetEngine,
    workers: int | None,
    cluster: str | None,
) -> None:
    """Play SCENARIO, a TOML file or the name of one that comes along, under each policy."""
    if as_list:
        _list(as_json=as_json)
        return
    if scenario is None:
        raise BadRequest("no scenario given", what_to_do="see `balloon simulate --list`")
    loaded = _with_changes(load_scenario(scenario), seed, speeds)
    chosen = tuple(dict.fromkeys(policies or ("shares",)))
    for name in chosen:
        _check_policy(name, loaded.scenario.policies)
    if plot is not None:
        check_plot(plot)
    numbers = _hosts(loaded, host, one=plot is not None or trace is not None)
    jobs = [
        Job(loaded.scenario, loaded.recordings, name, number, samples=plot is not None)
        for name in chosen
        for number in numbers
    ]
    if cluster is not None and engine != "dask":
        raise BadRequest("--cluster goes with --engine dask")
    if trace is not None:
        with _trace_file(trace) as write:
            runs = [run_job(job, write(job.policy)) for job in jobs]
    else:
        runs = run_jobs(jobs, engine, workers=workers, cluster=cluster)
    totals = [run.totals for run in runs]
    count = len(numbers)
    by_policy = {name: totals[at * count : (at + 1) * count] for at, name in enumerate(chosen)}
    made = report(loaded, {name: figures_of(every) for name, every in by_policy.items()}, host)
    if plot is not None:
        title = f"{loaded.name}: {loaded.scenario.title}"
        draw(plot, title, {name: every[0].samples for name, every in by_policy.items()})
    if as_json:
        click.echo(to_json(made))
    else:
        width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
        print_report(Console(width=width), made)


def _hosts(loaded: Loaded, host: int | None, *, one: bool) -> range:
    """Which hosts are simulated, counted from 0; `host` is counted from 1."""
    count = loaded.scenario.host.count
    if host is not None and host > count:
        raise BadRequest(f"{loaded.name} has no host {host}: it has {count}")
    if one and host is None and count > 1:
        raise BadRequest(
            f"{loaded.name} has {count} hosts: --plot and --trace are for one host",
            what_to_do=f"choose it with --host 1 to {count}",
        )
    return range(count) if host is None else range(host - 1, host)


def _list(*, as_json: bool) -> None:
    found = {name: load_scenario(name).scenario.title for name in shipped()}
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_table(("NAME", "WHAT"), found.items())


def _with_changes(loaded: Loaded, seed: int | None, speeds: Path | None) -> Loaded:
    scenario = loaded.scenario
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    if speeds is not None:
        host = scenario.host.model_copy(update={"inflate_bytes_per_s": read_speed(speeds)})
        scenario = scenario.model_copy(update={"host": host})
    return Loaded(loaded.name, scenario, loaded.recordings)


def _check_policy(name: str, tables: PolicyTables) -> None:
    try:
        choose(name, tables)
    except PolicyError as error:
        raise BadRequest(str(error)) from None


@contextmanager
def _trace_file(path: Path) -> Iterator[Any]:
    """A maker of logs, one for each policy, that write to the file at `path`."""
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error

    def of(policy: str) -> Log:
        def write(now_us: int, event: str, fields: Mapping[str, Any]) -> None:
            line = {"s": now_us / SECOND_US, "policy": policy, "event": event, **fields}
            file.write(json.dumps(line) + "\n")

        return write

    with file:
        yield of
