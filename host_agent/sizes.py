"""Sizes as people write them, to bytes and back.

Built on pydantic's ByteSize, which alone is too generous: it takes `-5`, reads `1.2.3GiB` as one
byte, ignores what follows a unit, and knows bits. So the form is checked here first.

A bare letter is binary (`160M` is 160 MiB), as for QEMU, Docker and the kernel's cgroup files;
`160MB` is decimal, as the SI says.
"""

import re
from typing import Annotated, Any, Final

import click
from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter

from protocol.units import GIB, KIB, MIB, PAGE_BYTES

MAX_SIZE_BYTES: Final = (1 << 32) * PAGE_BYTES
"""16 TiB: a message counts at most 2**32 pages."""

_FORM: Final = re.compile(
    r"\s*(?P<sign>[-\N{MINUS SIGN}])?(?P<number>[0-9]+(\.[0-9]+)?|\.[0-9]+)\s*"
    r"(?P<unit>b|[kmgt]|[kmgt]i?b)?\s*",
    re.IGNORECASE,
)
_BYTE_SIZE: Final = TypeAdapter(ByteSize)
_UNITS: Final = (("TiB", KIB * GIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB))


def parse_size(value: str | int) -> int:
    """Bytes meant by `value`: `512MiB`, `1.2GiB`, `160M`, `160MB`, `4096`; fractions round down.

    Raises:
        ValueError: with one line that names the text; negative, malformed, above 16 TiB, or more
            than nothing but less than a page: that is a size with its unit forgotten.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        # One type for whatever a file may hold: pydantic reports no TypeError.
        raise ValueError(f"{value!r} is not a size (write it like 512MiB or 1.2GiB)")  # noqa: TRY004
    text = str(value)
    # An int of TOML or JSON may be longer than what Python agrees to print; so may a text be
    # longer than what anybody wants to read.
    shown = repr(text) if len(text) <= 40 else repr(text[:40] + "...")
    form = _FORM.fullmatch(text)
    if form is None:
        raise ValueError(f"{shown} is not a size (write it like 512MiB or 1.2GiB)")
    if form["sign"]:
        raise ValueError(f"{shown} is negative: a size is 0 or more")
    unit = form["unit"] or ""
    if len(unit) == 1 and unit.lower() != "b":
        unit += "iB"
    if len(form["number"]) > 40:
        raise ValueError(f"{shown} is more than 16TiB")
    number_bytes = int(_BYTE_SIZE.validate_python(f"{form['number']}{unit or 'B'}"))
    if not unit and "." not in form["number"]:
        number_bytes = int(form["number"])  # exact: ByteSize goes through a float
    if number_bytes > MAX_SIZE_BYTES:
        raise ValueError(f"{shown} is more than 16TiB")
    if number_bytes < PAGE_BYTES and float(form["number"]):
        meant = "" if form["unit"] else f": did you mean {form['number']}MiB?"
        raise ValueError(f"{shown} is less than a page of 4KiB{meant}")
    return number_bytes


def format_size(size_bytes: int) -> str:
    """`size_bytes` for a person: `160MiB`, `1.2GiB`, `0B`; one decimal, read back by parse_size.

    A negative number (a difference) keeps its sign.
    """
    if size_bytes < 0:
        return f"-{format_size(-size_bytes)}"
    return ByteSize(size_bytes).human_readable().replace(".0", "")


def format_size_exactly(size_bytes: int) -> str:
    """`size_bytes` in the largest unit that leaves no remainder: `1228MiB`, `4097B`.

    For messages that compare two sizes, which must not look alike when they are not.
    """
    for unit, unit_bytes in _UNITS:
        if size_bytes and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return f"{size_bytes}B"


def _whole_pages(value: Any) -> int:
    # Rounding never makes a page.
    return parse_size(value) // PAGE_BYTES * PAGE_BYTES


SizeBytes = Annotated[
    int,
    BeforeValidator(_whole_pages, json_schema_input_type=int | str),
    Field(
        description="Bytes as a number, or a text with a unit like 512MiB or 1.2GiB; rounded down "
        "to whole pages of 4 KiB. More than nothing but less than a page is refused.",
        examples=["512MiB", 536870912],
    ),
]
"""A pydantic field that reads a size and holds bytes, rounded down to whole 4 KiB pages."""


class SizeParam(click.ParamType[int]):
    """A command line's size, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, or click's BadParameter with the one line of parse_size."""
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE: Final = SizeParam()
