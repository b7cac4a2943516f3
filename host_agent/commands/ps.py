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
    """List the mock VMs, and why one gave less than was wanted of it."""
    with agent_at(run_dir) as agent:
        vms = agent.vms()
        fault = None if as_json else agent.host().policy_fault
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
    reasons = [f"{vm.name}: {vm.last_reason}" for vm in vms if vm.last_reason is not None]
    if reasons:
        click.echo("\n" + "\n".join(reasons))
    if fault is not None:
        click.echo(f"policy: {fault.text}; the last plan stays", err=True)
