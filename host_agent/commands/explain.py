"""`balloon explain`: what was decided about a mock VM, from which terms, and what came of it."""

from collections.abc import Iterator
from pathlib import Path

import click

from host_agent.commands.options import agent_at, json_option, run_dir_option
from host_agent.commands.tables import NO_VALUE, print_json
from host_agent.facade.views import DecisionView, DeedView, TermView
from host_agent.sizes import format_size


@click.command()
@click.argument("name")
@click.option(
    "--last",
    "count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many decisions to show, the newest first.",
)
@run_dir_option
@json_option
def explain(name: str, count: int, run_dir: Path, as_json: bool) -> None:
    """Say what was decided about a mock VM lately, why, and what was done."""
    with agent_at(run_dir) as agent:
        decisions = agent.decisions(name)[:count]
        fault = None if as_json else agent.policy().fault
    if as_json:
        print_json(decisions)
        return
    if not decisions:
        click.echo(f"nothing was decided about {name} yet")
    for number, decision in enumerate(decisions):
        if number:
            click.echo()
        for line in _lines(name, decision):
            click.echo(line)
    if fault is not None:
        click.echo(f"policy: {fault.text}; the last plan stays", err=True)


def _lines(name: str, decision: DecisionView) -> Iterator[str]:
    again = f", and {decision.times - 1} times since" if decision.times > 1 else ""
    yield (
        f"{name}: {format_size(decision.quota_bytes)} -> "
        f"{format_size(decision.target_quota_bytes)} by {decision.policy}, "
        f"{decision.first_age_s:.1f} s ago{again}"
    )
    yield f"  rule   {decision.rule}"
    if decision.last_rule != decision.rule:
        yield f"  since  {decision.last_rule}"
    last = {term.name: _value(term) for term in decision.last_terms}
    width = max((len(term.name) for term in decision.terms), default=0)
    for term in decision.terms:
        first, now = _value(term), last.get(term.name, NO_VALUE)
        yield f"  term   {term.name:<{width}}  {first}" + (f", since {now}" if now != first else "")
    for deed in decision.done:
        yield f"  done   {_deed(deed)}"


def _value(term: TermView) -> str:
    if term.value is None:
        return NO_VALUE
    if term.unit == "bytes":
        size_bytes = int(term.value)
        return format_size(size_bytes) if size_bytes >= 0 else f"-{format_size(-size_bytes)}"
    if isinstance(term.value, bool):
        return "yes" if term.value else "no"
    shown = f"{term.value:.4g}" if isinstance(term.value, float) else str(term.value)
    return f"{shown} {term.unit}".rstrip()


def _deed(deed: DeedView) -> str:
    size = f" {format_size(deed.size_bytes)}" if deed.size_bytes else ""
    times = f", {deed.times} times" if deed.times > 1 else ""
    detail = f" ({deed.detail})" if deed.detail else ""
    return f"{deed.what}{size}{times}{detail}, {deed.last_age_s:.1f} s ago"
