"""`balloon stop`: end mock VMs, and wait until their memory is back in the pool."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, run_dir_option
from host_agent.errors import AgentError, AgentNotRunning, BadRequest, UserError


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "everyone", is_flag=True, help="Stop all of them.")
@run_dir_option
def stop(names: tuple[str, ...], everyone: bool, run_dir: Path) -> None:
    """Stop mock VMs.

    What could not be done is told line by line; the exit status is 2 if you can set all of it
    right, else 1.
    """
    if everyone == bool(names):
        raise BadRequest("give the names of VMs to stop, or --all")
    errors: list[AgentError] = []
    with agent_at(run_dir) as agent:
        for name in [vm.name for vm in agent.vms()] if everyone else names:
            # One wrong name, or one VM that won't go, doesn't save the others.
            try:
                agent.stop(name)
            except AgentError as error:
                errors.append(error)
                if isinstance(error, AgentNotRunning):
                    break
            else:
                click.echo(f"{name}: stopped")
    for told in errors:
        click.echo(f"balloon: {told.one_line()}", err=True)
    if errors:
        by_user = all(isinstance(told, UserError) for told in errors)
        click.get_current_context().exit(UserError.exit_code if by_user else AgentError.exit_code)
