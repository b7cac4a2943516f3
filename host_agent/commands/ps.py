"""`balloon ps`: the mock VMs, one a line."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, json_option, run_dir_option
from host_agent.commands.tables import print_json, print_table, size_or_none
from host_agent.sizes import format_size


@click.command()
@run_dir_option
@json_option
def ps(run_dir: Path, as_json: bool) -> None:
    """List the mock VMs."""
    with agent_at(run_dir) as agent:
        vms = agent.vms()
    if as_json:
        print_json(vms)
        return
    print_table(
        ("NAME", "STATE", "ASSIGNED", "QUOTA", "BALLOON", "TARGET", "USAGE", "SHARES"),
        [
            (
                vm.name,
                vm.state if vm.connected else f"{vm.state}, no driver",
                format_size(vm.assigned_bytes),
                format_size(vm.quota_bytes),
                format_size(vm.balloon_actual_bytes),
                format_size(vm.balloon_target_bytes) + (" pinned" if vm.pinned else ""),
                size_or_none(vm.usage_bytes),
                str(vm.shares),
            )
            for vm in vms
        ],
    )
