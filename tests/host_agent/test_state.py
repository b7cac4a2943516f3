"""The state file: what was saved is there, whole, or the one before is."""

import json
import os
import stat
from pathlib import Path

import pytest

from host_agent.state import (
    STATE_FILE,
    AgentState,
    GuestState,
    StateError,
    load_state,
    save_state,
)

GUEST = GuestState(
    name="one",
    assigned_bytes=1 << 28,
    reservation_bytes=1 << 26,
    shares=1000,
    overhead_bytes=41 << 20,
    frame_order=9,
    command=("sleep", "ein grüner Baum\n"),
    backend="process",
    machine={"init_pid": 7, "started": 12.5, "parts": ["a", None]},
    pinned_bytes=None,
)
ONE = AgentState(guests=(GUEST,))
TWO = AgentState(guests=(GUEST, GUEST.model_copy(update={"name": "two", "pinned_bytes": 4096})))


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert load_state(tmp_path) == AgentState()
    assert load_state(tmp_path / "not there") == AgentState()


def test_a_file_from_before_there_was_swap_is_read(tmp_path: Path) -> None:
    old = json.loads(ONE.model_dump_json())
    for key in ("swap_bytes", "balloon_may_swap", "maximum_bytes", "buffer_percent"):
        del old["guests"][0][key]
    (tmp_path / STATE_FILE).write_text(json.dumps(old))
    (guest,) = load_state(tmp_path).guests
    assert (guest.spec.swap_bytes, guest.spec.balloon_may_swap) == (0, False)


def test_swap_lasts(tmp_path: Path) -> None:
    swapping = GUEST.model_copy(update={"swap_bytes": 1 << 26, "balloon_may_swap": True})
    save_state(tmp_path, AgentState(guests=(swapping,)))
    (guest,) = load_state(tmp_path).guests
    assert (guest.spec.swap_bytes, guest.spec.balloon_may_swap) == (1 << 26, True)


def test_what_a_policy_is_told_of_it_lasts(tmp_path: Path) -> None:
    told = GUEST.model_copy(update={"maximum_bytes": GUEST.assigned_bytes, "buffer_percent": 5.0})
    save_state(tmp_path, AgentState(guests=(told,)))
    (guest,) = load_state(tmp_path).guests
    assert (guest.spec.maximum_bytes, guest.spec.buffer_percent) == (GUEST.assigned_bytes, 5.0)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    save_state(directory, ONE)
    assert load_state(directory) == ONE
    save_state(directory, TWO)
    assert load_state(directory) == TWO
    assert os.listdir(directory) == [STATE_FILE]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_state(tmp_path, ONE)

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "fsync":
            patched.setattr(os, "fsync", full)
        else:
            patched.setattr(Path, "replace", full)
        with pytest.raises(StateError, match=r"can't be written: No space left on device"):
            save_state(tmp_path, TWO)
    assert load_state(tmp_path) == ONE
    save_state(tmp_path, TWO)
    assert load_state(tmp_path) == TWO


def test_the_new_file_is_on_disk_before_it_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_directory:
            assert os.fstat(descriptor).st_size > 100  # nothing is left in a buffer
        steps.append("directory" if is_directory else "file")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        steps.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    save_state(tmp_path, ONE)
    assert steps == ["file", "replace", "directory"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "guests": []}',
        b'{"version": 1, "guests": [], "more": 1}',
        b'{"version": 1, "guests": [{"name": "one"}]}',
        ONE.model_dump_json().encode()[:-10],
    ],
)
def test_a_damaged_file_is_said_so_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / STATE_FILE
    path.write_bytes(content)
    with pytest.raises(StateError) as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("shares", 0, "shares"),
        ("shares", "many", "shares"),
        ("name", "../x", "is not a name"),
        ("assigned_bytes", -4096, "assigned_bytes"),
        ("reservation_bytes", 1 << 30, "above the assigned"),
        ("overhead_bytes", 5, "overhead_bytes"),
        ("frame_order", 3, "frame_order"),
        ("pinned_bytes", 1 << 29, "pinned above its assigned size"),
        ("command", ["a\0b"], "NUL"),
    ],
)
def test_a_value_that_can_not_be_is_damage(
    tmp_path: Path, key: str, value: object, why: str
) -> None:
    save_state(tmp_path, ONE)
    path = tmp_path / STATE_FILE
    content = json.loads(path.read_text())
    content["guests"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(StateError) as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)
    assert why in str(caught.value)


def test_two_of_one_name_are_damage(tmp_path: Path) -> None:
    guest = json.loads(GUEST.model_dump_json())
    content = {"version": 1, "guests": [guest, guest]}
    (tmp_path / STATE_FILE).write_text(json.dumps(content))
    with pytest.raises(StateError, match="two VMs have one name"):
        load_state(tmp_path)


def test_a_file_that_is_none_is_said_so(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).mkdir()
    with pytest.raises(StateError, match="Is a directory"):
        load_state(tmp_path)


def test_a_directory_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="can't be written"):
        save_state(tmp_path / "file" / "state", ONE)


def test_a_half_written_successor_is_not_looked_at(tmp_path: Path) -> None:
    save_state(tmp_path, ONE)
    (tmp_path / STATE_FILE).with_suffix(".new").write_bytes(b"half")
    assert load_state(tmp_path) == ONE
    save_state(tmp_path, TWO)
    assert os.listdir(tmp_path) == [STATE_FILE]
