"""How commands print: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from host_agent.sizes import format_size

WIDTH_OF_A_PIPE: Final = 240
"""Columns where nobody looks: a table piped into grep must not be folded."""

NO_VALUE: Final = "-"


def counted(count: int, what: str) -> str:
    """1 move, 2 moves."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 2) -> None:
    """A table; the first `left` columns are text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        # Folded where the terminal is narrow: a cut-off number would be a wrong one.
        table.add_column(heading, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
    Console(width=width, highlight=False).print(table)


def print_json(value: Any) -> None:
    """`value`, models included, as indented JSON."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def size_or_none(size_bytes: int | None) -> str:
    """A size, or a dash where it isn't known."""
    return NO_VALUE if size_bytes is None else format_size(size_bytes)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"no JSON for {type(value).__name__}")
