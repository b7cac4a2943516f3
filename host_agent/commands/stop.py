"""`balloon stop`: end mock VMs, and wait until their memory is back in the pool."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, run_dir_option
from host_agent.errors import BadRequest, UserError


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "everyone", is_flag=True, help="Stop all of them.")
@run_dir_option
def stop(names: tuple[str, ...], everyone: bool, run_dir: Path) -> None:
    """Stop mock VMs."""
    if everyone == bool(names):
        raise BadRequest("give the names of VMs to stop, or --all")
    refused: list[UserError] = []
    with agent_at(run_dir) as agent:
        for name in [vm.name for vm in agent.vms()] if everyone else names:
            # One wrong name doesn't save the others.
            try:
                agent.stop(name)
            except UserError as error:
                refused.append(error)
            else:
                click.echo(f"{name}: stopped")
    if refused:
        raise refused[0]
