"""`balloon policy`: which policy decides, which there are, and another one."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, json_option, run_dir_option
from host_agent.commands.tables import print_json
from host_agent.facade.views import PolicyView


@click.command()
@click.argument("name", required=False)
@run_dir_option
@json_option
def policy(name: str | None, run_dir: Path, as_json: bool) -> None:
    """Show the policy that decides, or let NAME decide until the agent ends."""
    with agent_at(run_dir) as agent:
        shown = agent.policy() if name is None else agent.use_policy(name)
    if as_json:
        print_json(shown)
        return
    for line in _lines(shown):
        click.echo(line)


def _lines(shown: PolicyView) -> list[str]:
    lines = [f"policy     {shown.name}: {shown.source}"]
    if shown.settings:
        settings = ", ".join(f"{key} = {value}" for key, value in shown.settings.items())
        lines.append(f"settings   {settings}")
    if shown.fault is not None:
        lines.append(f"fault      {shown.fault.text}; the last plan stays")
    if shown.name != shown.configured:
        lines.append(f"           until the agent ends: the configuration says {shown.configured}")
    return [*lines, f"known      {', '.join(shown.known)}"]
