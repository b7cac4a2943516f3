"""`balloon record`: a real run as a file that scenarios play."""

import time
from pathlib import Path
from typing import Final

import click

from host_agent.client import AgentClient
from host_agent.commands.options import SecondsRange, agent_at, run_dir_option
from host_agent.errors import BadRequest, UserError
from host_agent.simulator.recording import Recorder

LEAST_INTERVAL_S: Final = 0.05
"""Drivers tell of themselves a few times a second; looking more often shows nothing new."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--interval-s",
    type=SecondsRange(LEAST_INTERVAL_S, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--duration-s",
    type=SecondsRange(0, min_open=True),
    help="Seconds to record for. [until Ctrl-C, or the agent ends]",
)
@run_dir_option
def record(file: Path, interval_s: float, duration_s: float | None, run_dir: Path) -> None:
    """Write what each mock VM uses and needs into FILE, a new CSV file."""
    with agent_at(run_dir) as agent:
        agent.host()  # whether there is one, before a file is made
        try:
            with file.open("x", encoding="utf-8", newline="") as opened:
                recorder = Recorder(opened)
                try:
                    _record(agent, recorder, interval_s, duration_s)
                finally:
                    if not recorder.rows:
                        file.unlink()
        except FileExistsError:
            raise BadRequest(f"{file} exists", what_to_do="choose another name") from None
        except OSError as error:
            raise BadRequest(f"{file}: {error.strerror}") from error
    if not recorder.rows:
        raise UserError("no VM has told of itself: nothing was recorded")
    click.echo(f"{file}: {recorder.rows} rows")


def _record(
    agent: AgentClient, recorder: Recorder, interval_s: float, duration_s: float | None
) -> None:
    began_s = time.monotonic()
    look = 0
    try:
        while True:
            now_s = time.monotonic() - began_s
            recorder.look(now_s, agent.vms())
            look += 1
            due_s = look * interval_s
            if duration_s is not None and due_s > duration_s:
                return
            time.sleep(max(0.0, due_s - (time.monotonic() - began_s)))
    except KeyboardInterrupt:
        click.echo("", err=True)  # below the ^C
    except UserError as error:
        if not recorder.rows:
            raise
        click.echo(f"balloon: the recording ends here: {error.one_line()}", err=True)
