"""`balloon doctor`: what this machine has, what it lacks, and what to do."""

from pathlib import Path

import click

from host_agent.commands.options import json_option, run_dir_option
from host_agent.commands.tables import print_json, print_table
from host_agent.doctor import Verdict, run_checks

UNFIT_STATUS = 2


@click.command()
@run_dir_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, run_dir: Path, as_json: bool) -> None:
    """Say whether this machine can run mock VMs.

    The exit status is 2 where something is missing that every mock VM needs.
    """
    checks = run_checks(run_dir)
    fit = all(check.verdict is not Verdict.FAIL for check in checks)
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
