"""What a simulation found out: a table for people, JSON for programs."""

import json
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from host_agent.simulator.library import Loaded
from host_agent.simulator.metrics import Figures
from host_agent.sizes import format_size

NO_VALUE: Final = "-"

_ROWS: Final = (
    ("demand_met_percent", "demand met (%)"),
    ("stall_s", "stalls (s, all guests)"),
    ("would_be_swaps_bytes", "would-be swaps"),
    ("oom_kills", "OOM kills"),
    ("unmet_s", "somebody lacks memory (s)"),
    ("shortage_s", "more is needed than there is (s)"),
    ("moved_bytes", "moved"),
    ("lent_bytes", "lent to dry guests"),
    ("fairness", "fairness by shares (1 is fair)"),
    ("turns_per_guest_hour", "turns (per guest and hour)"),
    ("back_and_forth_bytes", "moved back and forth"),
    ("requests", "requests"),
    ("requests_satisfied", "  satisfied"),
    ("requests_withdrawn", "  withdrawn unmet"),
    ("requests_open", "  open at the end"),
    ("request_p50_s", "time to satisfy, p50 (s)"),
    ("request_p99_s", "time to satisfy, p99 (s)"),
    ("launches_refused", "launches refused"),
    ("start_p99_s", "wait to start, p99 (s)"),
    ("refused", "refusals by guests"),
)


def report(loaded: Loaded, figures: dict[str, Figures], host: int | None = None) -> dict[str, Any]:
    """The figures by policy, and what they are of: for machines.

    `host` is the number, from 1 on, of the only one that was simulated.
    """
    scenario = loaded.scenario
    return {
        "scenario": loaded.name,
        "title": scenario.title,
        "seed": scenario.seed,
        "duration_s": scenario.duration_s,
        "hosts": scenario.host.count if host is None else 1,
        **({} if host is None else {"host": host}),
        "guests_per_host": sum(table.count for table in scenario.guests),
        "policies": figures,
    }


def to_json(made: dict[str, Any]) -> str:
    """The report as text: the same for the same scenario, seed and policies, to the last byte."""
    return json.dumps(made, indent=1)


def print_report(console: Console, made: dict[str, Any]) -> None:
    """The report as a table, a column for each policy."""
    hosts = f"{made['hosts']} hosts with " if made["hosts"] > 1 else ""
    if "host" in made:
        hosts = f"host {made['host']}: "
    console.print(
        f"{made['scenario']}: {made['title']}\n{hosts}{made['guests_per_host']} guests, "
        f"{made['duration_s']:g} s, seed {made['seed']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for policy in made["policies"]:
        table.add_column(Text(policy), justify="right", overflow="fold")
    for name, heading in _ROWS:
        table.add_row(heading, *(_shown(name, found[name]) for found in made["policies"].values()))
    console.print(table)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return NO_VALUE
    if name.endswith("_bytes"):
        return format_size(int(value))
    if name == "fairness":
        return f"{value:.3f}"
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
