"""`balloon doctor`: what this machine has, what it lacks, and what to do."""

from pathlib import Path

import click
from click.core import ParameterSource

from host_agent.commands.options import json_option, run_dir_option
from host_agent.commands.tables import print_json, print_table
from host_agent.config import load_config
from host_agent.doctor import is_fit, run_checks
from host_agent.quota.detect import ROOT_NAME

UNFIT_STATUS = 2


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The agent's TOML file: its run directory and cgroup root are looked at.",
)
@run_dir_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, config_path: Path | None, run_dir: Path, as_json: bool) -> None:
    """Say whether this machine can run mock VMs.

    The exit status is 2 where something is missing that every mock VM needs.
    """
    cgroup_root = ROOT_NAME
    if config_path is not None:
        host = load_config(config_path).host
        cgroup_root = host.cgroup_root
        if ctx.get_parameter_source("run_dir") is ParameterSource.DEFAULT:
            run_dir = host.run_dir
    checks = run_checks(run_dir, cgroup_root)
    fit = is_fit(checks)
    if as_json:
        print_json({"fit": fit, "checks": [check.as_dict() for check in checks]})
    else:
        print_table(
            ("CHECK", "", "FOUND", "WHAT TO DO"),
            [(check.name, check.verdict, check.found, check.what_to_do or "") for check in checks],
            left=4,
        )
        click.echo()
        click.echo("This machine can run mock VMs." if fit else "Mock VMs can't run here yet.")
    ctx.exit(0 if fit else UNFIT_STATUS)
