"""The live table of the demonstration, and its summary as text."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from host_agent.demo.outcome import Outcome, describe_moves, mib
from host_agent.facade.views import HostView, VmView

BAR_CHARS: Final = 40

STATE_STYLES: Final = {"running": "green", "dry": "bold red"}


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
    return "?" if size_bytes is None else mib(size_bytes)


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
    show = partial(console.print, highlight=False, soft_wrap=True)
    show()
    show("What happened", style="bold")
    for act in outcome.acts:
        show(f"  {act.title}", style="bold")
        show(f"    asked    {act.asked}")
        show(f"    given    {act.given} ({act.seconds:.1f} s)")
        show(f"    moved    {describe_moves(act.moves)}")
        if act.stall is not None:
            stall_ms = act.stall.seconds * 1000
            show(f"    stalls   longest touch {stall_ms:.1f} ms ({act.stall.vm}, {act.stall.kind})")
        for failure in act.failures:
            show(f"    FAILED   {failure}", style="bold red")
    show(
        f"  The kernel's own sum of limits: {mib(outcome.highest_sum_of_limits_bytes)} at its "
        f"highest, of a pool of {mib(outcome.pool_bytes)} ({outcome.samples} readings)"
    )
    if outcome.peak_memory_bytes is not None:
        peak = mib(outcome.peak_memory_bytes)
        show(f"  Memory of all VMs, drivers included: {peak} at its highest")
    show(f"  OOM kills: {outcome.oom_kills}")
    for failure in outcome.failures:
        show(f"  did not hold: {failure}", style="bold red")
    verdict = "All of it held." if outcome.holds else "NOT all of it held."
    show(f"{verdict} ({outcome.seconds:.0f} s)", style="bold")
