"""`balloon bench`: the project's figures on this machine."""

import json
import logging
import sys
from functools import partial

import click
import trio
from rich.console import Console
from rich.table import Table

from host_agent.bench.run import SCALES, run_bench
from host_agent.commands.interrupt import INTERRUPTED, unless_interrupted


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write the figures as JSON alone.")
@click.option(
    "--scale",
    type=click.Choice(sorted(SCALES)),
    default="full",
    show_default=True,
    help="small: whether it runs at all; the ratios say little then.",
)
def bench(as_json: bool, scale: str) -> None:
    """Measure speed and memory against a plain loop in the same run.

    Exits with 0 only if every figure is within reach.
    """
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    console = Console(stderr=as_json)
    progress = partial(console.print, highlight=False)
    found = trio.run(unless_interrupted, partial(run_bench, SCALES[scale](), progress), progress)
    if found is None:
        sys.exit(INTERRUPTED)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        table = Table("figure", "value", "unit", "reach", "holds")
        for figure in found["figures"]:
            holds = "yes" if figure["holds"] else "NO"
            value = f"{figure['value']:.3g}"
            table.add_row(figure["name"], value, figure["unit"], figure["reach"], holds)
        console.print(table)
    sys.exit(0 if all(figure["holds"] for figure in found["figures"]) else 1)
