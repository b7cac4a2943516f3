"""The live table of the demonstration, and its summary as text."""

from collections.abc import Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from host_agent.demo.outcome import Outcome, describe_moves
from host_agent.facade.port import HostView, VmView
from host_agent.sizes import format_size
from protocol.units import MIB

BAR_CHARS: Final = 40

STATE_STYLES: Final = {"running": "green", "dry": "bold red", "starting": "yellow"}


def live_table(act: str, host: HostView, vms: Sequence[VmView]) -> RenderableType:
    """Everything at one instant: a bar for each VM, and the pool's line."""
    table = Table(title=act, title_justify="left", title_style="bold", expand=False, pad_edge=False)
    table.add_column("VM")
    table.add_column("working set █  quota ▒  balloon ·", width=BAR_CHARS)
    for heading in ("quota", "balloon", "working set"):
        table.add_column(heading, justify="right")
    table.add_column("shares", justify="right")
    table.add_column("state")
    for vm in vms:
        table.add_row(
            vm.name,
            _bar(vm),
            _mib(vm.quota_bytes),
            _mib(vm.balloon_actual_bytes),
            _mib(vm.working_set_bytes),
            str(vm.shares),
            Text(vm.state, style=STATE_STYLES.get(vm.state, "yellow")),
        )
    return Group(table, _pool_line(host))


def _bar(vm: VmView) -> Text:
    quota = round(BAR_CHARS * vm.quota_bytes / vm.assigned_bytes)
    used = min(quota, round(BAR_CHARS * (vm.working_set_bytes or 0) / vm.assigned_bytes))
    return Text.assemble(
        ("█" * used, "cyan"), ("▒" * (quota - used), "blue"), ("·" * (BAR_CHARS - quota), "dim")
    )


def _mib(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes / MIB:.0f} MiB"


def _pool_line(host: HostView) -> Text:
    line = (
        f"pool {_mib(host.pool_bytes)} = quotas {_mib(host.quotas_bytes)} + reserve "
        f"{_mib(host.reserve_left_bytes)} + free {_mib(host.free_bytes)}; "
        f"assigned {_mib(host.assigned_bytes)} (overcommit {host.overcommit_ratio:.2f}); "
        f"OOM kills {host.oom_kills}"
    )
    if not host.shortage:
        return Text(line)
    short = f"; SHORT of {_mib(host.shortage_bytes)}: shares and reservations decide"
    return Text.assemble(line, (short, "bold red"))


def print_summary(console: Console, outcome: Outcome) -> None:
    """What a person wants to know at the end."""
    console.print()
    console.print("What happened", style="bold", highlight=False)
    for act in outcome.acts:
        console.print(f"  {act.title}", style="bold", highlight=False)
        console.print(f"    asked    {act.asked}", highlight=False)
        console.print(f"    given    {act.given} ({act.seconds:.1f} s)", highlight=False)
        console.print(f"    moved    {describe_moves(act.moves)}", highlight=False)
        if act.stall is not None:
            console.print(
                f"    stalls   longest touch {act.stall.seconds * 1000:.1f} ms "
                f"({act.stall.vm}, {act.stall.kind})",
                highlight=False,
            )
        for failure in act.failures:
            console.print(f"    FAILED   {failure}", style="bold red", highlight=False)
    highest = outcome.highest_sum_of_limits_bytes
    console.print(
        f"  The kernel's own sum of limits: {format_size(highest)} at its highest, "
        f"of a pool of {format_size(outcome.pool_bytes)} ({outcome.samples} readings)",
        highlight=False,
    )
    if outcome.peak_memory_bytes is not None:
        console.print(
            f"  Memory of all VMs, drivers included: {format_size(outcome.peak_memory_bytes)} "
            f"at its highest",
            highlight=False,
        )
    console.print(f"  OOM kills: {outcome.oom_kills}", highlight=False)
    for failure in outcome.failures:
        console.print(f"  did not hold: {failure}", style="bold red", highlight=False)
    verdict = "All of it held." if outcome.holds else "NOT all of it held."
    console.print(f"{verdict} ({outcome.seconds:.0f} s)", style="bold", highlight=False)
