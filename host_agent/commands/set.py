"""`balloon set`: an operator's wish for one mock VM."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, build, json_option, run_dir_option
from host_agent.commands.tables import print_json
from host_agent.errors import BadRequest
from host_agent.facade.port import VmChange
from host_agent.sizes import SIZE, format_size


@click.command("set")
@click.argument("name")
@click.option("--target", type=SIZE, help="Pin the balloon to this size.")
@click.option("--quota", type=SIZE, help="Pin the balloon so that this much stays.")
@click.option("--auto", is_flag=True, help="Let the policy choose the balloon's size again.")
@click.option("--shares", type=int, help="Weight when memory is short.")
@click.option("--reservation", type=SIZE, help="What can never be taken.")
@click.option("--maximum", type=SIZE, help="The most that a policy gives.")
@run_dir_option
@json_option
def set_command(
    *,
    name: str,
    target: int | None,
    quota: int | None,
    auto: bool,
    shares: int | None,
    reservation: int | None,
    maximum: int | None,
    run_dir: Path,
    as_json: bool,
) -> None:
    """Change a mock VM's balloon, shares, reservation or maximum."""
    if (target is not None) + (quota is not None) + auto > 1:
        raise BadRequest("only one of --target, --quota and --auto can be given")
    if not auto and {target, quota, shares, reservation, maximum} == {None}:
        raise BadRequest(
            f"nothing to change in {name}",
            what_to_do="give --target, --quota, --auto, --shares, --reservation or --maximum",
        )
    change = build(
        VmChange,
        target_bytes=target,
        quota_bytes=quota,
        automatic=True if auto else None,
        shares=shares,
        reservation_bytes=reservation,
        maximum_bytes=maximum,
    )
    with agent_at(run_dir) as agent:
        vm = agent.change(name, change)
    if as_json:
        print_json(vm)
    else:
        click.echo(
            f"{vm.name}: balloon {format_size(vm.balloon_actual_bytes)}, target "
            f"{format_size(vm.balloon_target_bytes)} ({'pinned' if vm.pinned else 'automatic'}), "
            f"shares {vm.shares}, reservation {format_size(vm.reservation_bytes)}"
        )
