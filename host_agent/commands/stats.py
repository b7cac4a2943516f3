"""`balloon stats`: the pool in a line, then each mock VM; or everything about one."""

from pathlib import Path

import click

from host_agent.client import AgentClient
from host_agent.commands.options import agent_at, json_option, run_dir_option
from host_agent.commands.tables import NO_VALUE, counted, print_json, print_table, size_or_none
from host_agent.errors import NoSuchVm
from host_agent.facade.views import HostView, VitalsView, VmView
from host_agent.sizes import format_size


@click.command()
@click.argument("name", required=False)
@run_dir_option
@json_option
def stats(name: str | None, run_dir: Path, as_json: bool) -> None:
    """Show the pool, and what each mock VM does with its memory; or all about NAME."""
    with agent_at(run_dir) as agent:
        if name is not None:
            _show_one(agent.vm(name), agent.vitals(name), as_json=as_json)
            return
        host, vms = agent.host(), agent.vms()
        if as_json:
            print_json({"host": host, "vms": [_with_vitals(agent, vm) for vm in vms]})
            return
    click.echo(host_line(host))
    if vms:
        click.echo()
        _show_all(vms)


def host_line(host: HostView) -> str:
    """The pool in one line."""
    shortage = f"short of {format_size(host.shortage_bytes)}" if host.shortage else "no shortage"
    overdrawn = f" ({format_size(host.overdrawn_bytes)} too much)" if host.overdrawn_bytes else ""
    return (
        f"pool {format_size(host.pool_bytes)}: quotas {format_size(host.quotas_bytes)}{overdrawn}, "
        f"free {format_size(host.free_bytes)}, "
        f"{f'held for clients {format_size(host.held_bytes)}, ' if host.held_bytes else ''}"
        f"reserve {format_size(host.reserve_left_bytes)} of "
        f"{format_size(host.reserve_bytes)}; assigned {format_size(host.assigned_bytes)} "
        f"({host.overcommit_ratio:.2f} x), {shortage}, {counted(host.oom_kills, 'OOM kill')}, "
        f"{counted(host.moves_total, 'move')}, policy {host.policy}, cgroup v{host.cgroup_version}"
    )


def _show_all(vms: list[VmView]) -> None:
    print_table(
        (
            "NAME",
            "STATE",
            "ASSIGNED",
            "RESERVED",
            "QUOTA",
            "BALLOON",
            "TARGET",
            "LENT",
            "USAGE",
            "WORKING SET",
            "DEMAND",
            "SWAP USED",
            "SWAP FREE",
            "OVERHEAD",
            "OOM KILLS",
        ),
        [
            (
                vm.name,
                vm.state,
                format_size(vm.assigned_bytes),
                format_size(vm.reservation_bytes),
                format_size(vm.quota_bytes),
                format_size(vm.balloon_actual_bytes),
                format_size(vm.balloon_target_bytes),
                format_size(vm.lent_bytes),
                size_or_none(vm.usage_bytes),
                size_or_none(vm.working_set_bytes),
                size_or_none(vm.demand_bytes),
                size_or_none(vm.swap_used_bytes),
                size_or_none(vm.swap_free_bytes),
                format_size(vm.overhead_bytes),
                str(vm.oom_kills),
            )
            for vm in vms
        ],
    )


def _show_one(vm: VmView, vitals: VitalsView | None, *, as_json: bool) -> None:
    if as_json:
        print_json({**vm.model_dump(mode="json"), "vitals": vitals})
        return
    rows = [_row(key, value) for key, value in vm]
    if vitals is not None:
        rows += [_row(f"vitals: {key}", value) for key, value in vitals]
    print_table(("", vm.name), [row for row in rows if row[0] != "name"])


def _row(key: str, value: object) -> tuple[str, str]:
    heading = key.replace("_bytes", "").removesuffix("_total").replace("_", " ")
    match value:
        case None:
            shown = NO_VALUE
        case bool():
            shown = "yes" if value else "no"
        case int() if "_bytes" in key:
            shown = format_size(value)
        case float():
            shown = f"{value:.2f}"
        case _:
            shown = str(value)
    return heading, shown


def _with_vitals(agent: AgentClient, vm: VmView) -> dict[str, object]:
    try:
        vitals = agent.vitals(vm.name)
    except NoSuchVm:  # stopped since it was listed
        vitals = None
    return {**vm.model_dump(mode="json"), "vitals": vitals}
