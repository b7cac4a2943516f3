"""`balloon agent`: run the host agent until it is interrupted."""

import logging
from pathlib import Path

import click
import trio

from host_agent.config import load_config
from host_agent.service import run_agent


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with the host and its VMs; without it the defaults, and no VM.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    envvar="MEMBALLOON_RUN_DIR",
    show_envvar=True,
    help="Where the agent makes its sockets, instead of the file's run_dir.",
)
def agent(config_path: Path | None, run_dir: Path | None) -> None:
    """Run the host agent."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # It tells of every request, and the engine is asked often.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = load_config(config_path)
    if run_dir is not None:
        host = config.host.model_copy(update={"run_dir": run_dir})
        config = config.model_copy(update={"host": host})
    trio.run(run_agent, config)
