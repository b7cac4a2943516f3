"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_agent.sizes import MAX_SIZE_BYTES, format_size, format_size_exactly, parse_size
from protocol.units import GIB, KIB, MIB, PAGE_BYTES

TIB = 1024 * GIB


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("512MiB", 512 * MIB),
        ("512 mib", 512 * MIB),
        ("  512MiB ", 512 * MIB),
        ("160M", 160 * MIB),
        ("160m", 160 * MIB),
        ("2G", 2 * GIB),
        ("1T", TIB),
        ("64k", 64 * KIB),
        ("160MB", 160_000_000),
        ("5kb", 5000),
        ("8192B", 8192),
        ("0MiB", 0),
        ("0.0", 0),
        (0, 0),
        ("1.2GiB", int(1.2 * GIB)),
        (".5GiB", 512 * MIB),
        ("4KiB", 4096),
        ("16TiB", MAX_SIZE_BYTES),
        ("17592186044416", MAX_SIZE_BYTES),
        ("00512MiB", 512 * MIB),
    ],
)
def test_read(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "MiB", "nan", "inf", "1e3", "1_000", "0x10", "+5", "5 5", "5MiB garbage",
        "1.2.3GiB", "1,5GiB", "1.GiB", "5Mbit", "5XB", "5iB", "5PiB", "٣MiB", "512MiB\0", "5mi",
        True, None, 1.5, float("nan"), [], b"5",
    ],
)  # fmt: skip
def test_refused_by_name(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size") as refusal:
        parse_size(text)  # type: ignore[arg-type]
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["-5", "-1MiB", "-0", -5, "\N{MINUS SIGN}5MiB"])
def test_negative(text: str | int) -> None:
    with pytest.raises(ValueError, match="is negative"):
        parse_size(text)


@pytest.mark.parametrize("text", ["17TiB", "17592186044417", "1" * 5000, "9" * 30 + "GiB", 2**80])
def test_more_than_the_channel_can_count(text: str | int) -> None:
    with pytest.raises(ValueError, match="is more than 16TiB") as refusal:
        parse_size(text)
    assert len(str(refusal.value)) < 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("128", "'128' is less than a page of 4KiB: did you mean 128MiB?"),
        (128, "'128' is less than a page of 4KiB: did you mean 128MiB?"),
        ("0.5", "'0.5' is less than a page of 4KiB: did you mean 0.5MiB?"),
        ("4095", "'4095' is less than a page of 4KiB: did you mean 4095MiB?"),
        (1, "'1' is less than a page of 4KiB: did you mean 1MiB?"),
        ("12B", "'12B' is less than a page of 4KiB"),
        ("0.0001KiB", "'0.0001KiB' is less than a page of 4KiB"),
        ("3KiB", "'3KiB' is less than a page of 4KiB"),
    ],
)
def test_a_forgotten_unit_is_not_nothing(text: str | int, said: str) -> None:
    with pytest.raises(ValueError, match="less than a page") as refusal:
        parse_size(text)
    assert str(refusal.value) == said


WRITTEN = st.just(0) | st.integers(PAGE_BYTES, MAX_SIZE_BYTES)


@given(WRITTEN)
def test_exact_form_is_read_back_exactly(size_bytes: int) -> None:
    assert parse_size(format_size_exactly(size_bytes)) == size_bytes
    assert parse_size(str(size_bytes)) == parse_size(size_bytes) == size_bytes


@given(WRITTEN.filter(lambda size_bytes: size_bytes <= MAX_SIZE_BYTES - GIB))
def test_short_form_is_read_back_within_its_decimal(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert len(text) <= 9
    assert " " not in text
    assert abs(parse_size(text) - size_bytes) <= size_bytes / 20


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_one_line_refusal(text: str) -> None:
    try:
        assert 0 <= parse_size(text) <= MAX_SIZE_BYTES
    except ValueError as refusal:
        assert len(str(refusal).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize(
    ("size_bytes", "short", "exact"),
    [
        (0, "0B", "0B"),
        (4096, "4KiB", "4KiB"),
        (160 * MIB, "160MiB", "160MiB"),
        (1228 * MIB, "1.2GiB", "1228MiB"),
        (10 * GIB, "10GiB", "10GiB"),
        (4097, "4KiB", "4097B"),
    ],
)
def test_written(size_bytes: int, short: str, exact: str) -> None:
    assert format_size(size_bytes) == short
    assert format_size_exactly(size_bytes) == exact


def test_a_difference_keeps_its_sign() -> None:
    assert format_size(-160 * MIB) == "-160MiB"
