"""`balloon demo`: overcommitted memory, played through on real pages in a minute."""

import json
import logging
import sys
from functools import partial

import click
import trio
from rich.console import Console
from rich.live import Live

from host_agent.agent import Agent
from host_agent.commands.interrupt import INTERRUPTED, unless_interrupted
from host_agent.demo.outcome import Outcome
from host_agent.demo.scenario import SCENARIOS, Scenario
from host_agent.demo.screen import live_table, print_summary
from host_agent.demo.story import play

REFRESH_S = 0.25


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write the outcome as JSON, and no table.")
@click.option(
    "--scale",
    type=click.Choice(sorted(SCENARIOS)),
    default="full",
    show_default=True,
    help="small: four VMs, for a quick look.",
)
def demo(as_json: bool, scale: str) -> None:
    """Play the well-known case: more memory promised than there is.

    Exits with 0 only if all of it held: every move made, nobody killed, the limits never above the
    pool.
    """
    scenario = SCENARIOS[scale]()
    console = Console(stderr=as_json)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    live = console.is_terminal and not as_json
    progress = partial(console.print, highlight=False)
    work = partial(_play_live, scenario, console) if live else partial(play, scenario, progress)
    outcome = trio.run(unless_interrupted, work, progress)
    if outcome is None:
        sys.exit(INTERRUPTED)
    if as_json:
        click.echo(json.dumps(outcome.to_json(), indent=1))
    else:
        print_summary(console, outcome)
    sys.exit(0 if outcome.holds else 1)


async def _play_live(scenario: Scenario, console: Console) -> Outcome:
    act = ""

    def progress(line: str) -> None:
        nonlocal act
        act = line

    with Live(console=console, auto_refresh=False, transient=False) as live:

        async def show(agent: Agent) -> None:
            while True:
                live.update(live_table(act, agent.host(), agent.vms()), refresh=True)
                await trio.sleep(REFRESH_S)

        return await play(scenario, progress, show)
