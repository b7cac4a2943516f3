"""`balloon launch`: ask the agent for a mock VM."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, build, json_option, run_dir_option
from host_agent.commands.tables import print_json
from host_agent.facade.port import VmSpec
from host_agent.sizes import SIZE, format_size


@click.command()
@click.argument("name")
@click.option("--memory", type=SIZE, required=True, help="The assigned size, like 160MiB.")
@click.option("--reservation", type=SIZE, help="What can never be taken [default: 25 %].")
@click.option("--shares", type=int, help="Weight when memory is short [default: 1000].")
@click.option("--startup", type=SIZE, help="Quota to begin with [default: all of the memory].")
@click.option("--maximum", type=SIZE, help="The most that a policy gives [default: --memory].")
@click.option("--buffer", type=float, help="Percent beyond its demand, where a policy gives it.")
@click.option("--swap", type=SIZE, help="Swap that it has [default: none].")
@click.option("--balloon-may-swap", is_flag=True, help="Let its balloon push it into its swap.")
@click.option("--frames", type=click.Choice(["4KiB", "2MiB"]), help="Frame size [default: 4KiB].")
@click.option("--image", help="Run a container of this image instead of processes of the host.")
@click.option("--network", help="The container engine's network for it [default: none].")
@click.option(
    "--backend",
    type=click.Choice(["process", "docker"]),
    help="What runs it [default: docker with --image, else process].",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@run_dir_option
@json_option
def launch(
    *,
    name: str,
    memory: int,
    reservation: int | None,
    shares: int | None,
    startup: int | None,
    maximum: int | None,
    buffer: float | None,
    swap: int | None,
    balloon_may_swap: bool,
    frames: str | None,
    image: str | None,
    network: str | None,
    backend: str | None,
    command: tuple[str, ...],
    run_dir: Path,
    as_json: bool,
) -> None:
    """Launch a mock VM.

    It runs COMMAND (write -- before it). Without one it runs the image's own, or where there is no
    image the built-in workload, idle.
    """
    spec = build(
        VmSpec,
        name=name,
        assigned_bytes=memory,
        reservation_bytes=reservation,
        shares=shares,
        startup_bytes=startup,
        maximum_bytes=maximum,
        buffer_percent=buffer,
        swap_bytes=swap,
        balloon_may_swap=balloon_may_swap or None,
        frames=frames,
        image=image,
        network=network,
        backend=backend,
        command=command,
    )
    with agent_at(run_dir) as agent:
        vm = agent.launch(spec)
    if as_json:
        print_json(vm)
    else:
        click.echo(
            f"{vm.name}: {vm.state}, quota {format_size(vm.quota_bytes)} "
            f"of {format_size(vm.assigned_bytes)}"
        )
