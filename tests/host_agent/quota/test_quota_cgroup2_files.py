"""Version 2 on plain files: which files are written, in which order, and what is read from them.

No kernel is behind these files, so nothing here says what the kernel does; the contract does that
on a machine with a version 2 memory controller.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from quota_rigs import DEADLINE_S, readable, wait_for

from host_agent.quota import cgroup2
from host_agent.quota.base import Part
from host_agent.quota.cgroup2 import Cgroup2Quota, soft_wall_bytes
from host_agent.quota.cgroup2_levels import hand_down_memory
from host_agent.quota.control_file import ControlFile
from host_agent.quota.errors import LimitRefused, NoRoom, QuotaUnavailable
from protocol.units import MIB, PAGE_BYTES

WORKLOAD_FILES = {
    "memory.max": 96 * MIB,
    "memory.min": 0,
    "memory.high": "max",
    "memory.current": 64 * MIB,
    "memory.reclaim": "",
    "memory.stat": f"anon {16 * MIB}\ninactive_file {40 * MIB}\nactive_file {8 * MIB}\n",
    "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
    "memory.events.local": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
    "memory.swap.max": 8 * MIB,
    "memory.swap.current": 3 * MIB,
    "cgroup.freeze": "0",
    "cgroup.events": "populated 1\nfrozen 0\n",
}
VM_FILES = {
    "memory.max": 120 * MIB,
    "memory.min": 0,
    "memory.current": 70 * MIB,
    "memory.events": "oom 3\noom_kill 2\n",
    "cgroup.kill": "",
    "cgroup.events": "populated 0\nfrozen 0\n",
}


class Kernel:
    """Plain files, a journal of writes, and what a pretended kernel does after some of them."""

    def __init__(self, root: Path) -> None:
        self.vm = root / "vm1"
        self.workload = self.vm / "workload"
        self.journal: list[tuple[str, str]] = []
        self.quotas: list[Cgroup2Quota] = []
        self.after: dict[str, Callable[[str], None]] = {
            "cgroup.freeze": lambda value: self.put(
                "cgroup.events", f"populated 1\nfrozen {value}"
            ),
            "memory.reclaim": self.reclaim,
        }
        for directory, files in (
            (self.vm, VM_FILES),
            (self.workload, WORKLOAD_FILES),
            (self.vm / "driver", {"memory.current": 4 * MIB}),
        ):
            directory.mkdir()
            for name, value in files.items():
                (directory / name).write_text(f"{value}\n")

    def put(self, name: str, value: int | str) -> None:
        """Into one of the workload's files, with no trace in the journal."""
        (self.workload / name).write_text(f"{value}\n")

    def current(self) -> int:
        return int((self.workload / "memory.current").read_text())

    def freeze(self, value: str) -> None:
        self.put("cgroup.events", f"populated 1\nfrozen {value}")

    def reclaim(self, value: str) -> None:
        self.put("memory.current", self.current() - int(value))

    def refuse(self, value: str) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def open_file(self, path: Path, *, writable: bool = False, waits: bool = True) -> ControlFile:
        kernel = self

        class Journalled(ControlFile):
            def write(self, value: int | str) -> None:
                where = str(self.path.relative_to(kernel.vm))
                kernel.journal.append((where, str(value)))
                super().write(value)
                if self.path.parent == kernel.workload and self.path.name in kernel.after:
                    kernel.after[self.path.name](str(value))

        return Journalled(path, writable=writable, waits=waits)

    def quota(self) -> Cgroup2Quota:
        quota = Cgroup2Quota(self.vm, 24 * MIB, self.open_file, swap_bytes=8 * MIB)
        quota._room._settle_s = 0.001
        self.quotas.append(quota)
        return quota

    def written(self, name: str) -> list[str]:
        return [value for where, value in self.journal if where == f"workload/{name}"]


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    # However slow the machine is that runs this.
    monkeypatch.setattr("host_agent.quota.cgroup2_room.FROZEN_SLICE_S", DEADLINE_S)
    monkeypatch.setattr("host_agent.quota.cgroup2_room.FREEZE_TIMEOUT_S", DEADLINE_S)
    made = Kernel(tmp_path)
    yield made
    for quota in made.quotas:
        quota.close()


def test_reading(kernel: Kernel) -> None:
    reading = kernel.quota().read()
    assert reading.vm_limit_bytes == 120 * MIB
    assert reading.workload_limit_bytes == 96 * MIB
    assert reading.workload_usage_bytes == 64 * MIB
    assert reading.driver_usage_bytes == 4 * MIB
    assert kernel.quota().oom_kills_total == 2


def test_a_raise_begins_with_the_vm(kernel: Kernel) -> None:
    kernel.quota().raise_quota(128 * MIB)
    assert kernel.journal == [
        ("memory.max", str(152 * MIB)),
        ("workload/memory.max", str(128 * MIB)),
        ("workload/memory.high", "max"),
    ]


def test_a_raise_moves_the_soft_wall_of_an_armed_guest(kernel: Kernel) -> None:
    quota = kernel.quota()
    quota.arm_dry_events()
    assert kernel.written("memory.high") == [str(92 * MIB)]
    quota.raise_quota(128 * MIB)
    assert kernel.written("memory.high")[1:] == [str(124 * MIB)]
    quota.let_kernel_decide()
    assert kernel.written("memory.high")[2:] == ["max"]
    quota.raise_quota(160 * MIB)
    assert kernel.written("memory.high")[3:] == ["max"]
    quota.close()


@pytest.mark.parametrize(
    ("limit_mib", "wall_mib"), [(0, 0), (8, 6), (64, 60), (128, 124), (1024, 992)]
)
def test_the_soft_wall(limit_mib: int, wall_mib: int) -> None:
    assert soft_wall_bytes(limit_mib * MIB) == wall_mib * MIB
    assert soft_wall_bytes(limit_mib * MIB + PAGE_BYTES) % PAGE_BYTES == 0


def test_the_safe_shrink_in_its_order(kernel: Kernel) -> None:
    kernel.quota().make_room(58 * MIB)
    workload = [(where.removeprefix("workload/"), value) for where, value in kernel.journal]
    assert workload == [
        ("memory.swap.max", str(3 * MIB)),
        ("memory.reclaim", str(4 * MIB)),
        ("memory.reclaim", str(2 * MIB)),
        ("memory.high", str(58 * MIB)),
        ("cgroup.freeze", "1"),
        ("memory.max", str(58 * MIB)),
        ("cgroup.freeze", "0"),
        ("memory.high", "max"),
        ("memory.swap.max", str(8 * MIB)),
    ]


def test_an_armed_guest_has_to_fit_below_its_soft_wall(kernel: Kernel) -> None:
    quota = kernel.quota()
    quota.arm_dry_events()
    quota.make_room(58 * MIB)
    assert kernel.current() == 54 * MIB
    assert kernel.written("memory.high")[-1] == str(54 * MIB)
    assert kernel.written("memory.max") == [str(58 * MIB)]
    quota.close()


def assert_put_back(kernel: Kernel) -> None:
    assert kernel.written("memory.high")[-1] == "max"
    assert int(kernel.written("memory.max")[-1]) == 96 * MIB
    assert set(kernel.written("memory.max")) == {str(96 * MIB)}
    assert kernel.written("memory.swap.max")[-1:] in ([], [str(8 * MIB)])
    # Not while the wall is lower than it can do with: it would swap all that it may.
    names = [where for where, _ in kernel.journal if where.endswith((".high", ".swap.max"))]
    assert names[-2:] == ["workload/memory.high", "workload/memory.swap.max"]
    assert kernel.written("cgroup.freeze")[-1:] in ([], ["0"])


def test_no_before_anything_is_evicted(kernel: Kernel) -> None:
    with pytest.raises(NoRoom, match="cannot be reclaimed"):
        kernel.quota().make_room(8 * MIB)
    assert kernel.written("memory.reclaim") == []
    assert_put_back(kernel)


def test_no_after_twenty_refusals(kernel: Kernel) -> None:
    kernel.after["memory.reclaim"] = kernel.refuse
    with pytest.raises(NoRoom, match="too many"):
        kernel.quota().make_room(32 * MIB)
    assert len(kernel.written("memory.reclaim")) == 1 + 20  # gently, then under the wall
    assert kernel.written("cgroup.freeze") == []
    assert_put_back(kernel)


def test_a_refusal_while_memory_is_on_its_way_to_swap_is_none(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow: reclaim gives up at once, and what was swapped out is free a bit later."""
    monkeypatch.setattr("host_agent.quota.cgroup2_swap.DISK_WAIT_S", 0.0)
    kernel.put("memory.stat", f"anon {64 * MIB}\ninactive_file 0\nactive_file 0\n")
    refusals = 0

    def reclaim(value: str) -> None:
        nonlocal refusals
        refusals += 1
        if refusals % 30 == 0:
            kernel.reclaim(str(MIB // 4))
        else:
            swapped_bytes = int((kernel.workload / "memory.swap.current").read_text())
            kernel.put("memory.swap.current", min(8 * MIB, swapped_bytes + MIB // 16))
            kernel.refuse(value)

    kernel.after["memory.reclaim"] = reclaim
    with pytest.raises(NoRoom, match="too many"):
        kernel.quota().make_room(60 * MIB, swap_bytes=5 * MIB)
    # Until its swap was full, and twenty more.
    assert 5 * 16 + 20 <= refusals < 5 * 16 + 60
    assert_put_back(kernel)
    refusals = 0
    kernel.put("memory.swap.current", 3 * MIB)
    with pytest.raises(NoRoom):
        kernel.quota().make_room(58 * MIB)
    assert refusals < 25


def test_no_for_a_workload_that_keeps_touching_the_wall(kernel: Kernel) -> None:
    quota = kernel.quota()
    events = iter(range(1, 100))

    def high_events() -> int:
        return next(events)

    quota._room._high_events = high_events  # type: ignore[method-assign]
    # In anonymous memory; what is a guest's cache may come and go.
    kernel.after["memory.high"] = lambda _: kernel.put("memory.stat", f"anon {32 * MIB}")
    with pytest.raises(NoRoom, match="growing"):
        quota.make_room(32 * MIB)
    assert kernel.written("cgroup.freeze") == []
    assert_put_back(kernel)


@pytest.mark.parametrize(("most_mib", "fits"), [(50, True), (200, False)])
def test_a_workload_on_its_way_up_has_not_settled(
    kernel: Kernel, most_mib: int, fits: bool
) -> None:
    """However slow the machine is: it is waited for what comes at the top."""
    quota = kernel.quota()
    kernel.after["memory.reclaim"] = kernel.refuse
    kernel.put("memory.current", 20 * MIB)
    kernel.put("memory.stat", "inactive_file 0")
    looks = iter(range(20, 400))

    def fixed_bytes() -> int:
        mib = next(looks)
        return (mib if mib < most_mib else 20) * MIB

    quota._room._fixed_bytes = fixed_bytes  # type: ignore[method-assign]
    events = iter(range(1, 400))
    quota._room._high_events = lambda: next(events)  # type: ignore[method-assign]
    if fits:
        quota.make_room(60 * MIB)
        assert 50 <= next(looks) < 80  # the window after the one with the top, at the latest
    else:
        with pytest.raises(NoRoom, match="growing back"):
            quota.make_room(60 * MIB)
        assert_put_back(kernel)


def test_a_workload_that_is_past_its_top_has_settled(kernel: Kernel) -> None:
    """Though it stands higher than at the first look: it has been seen where it goes to."""
    quota = kernel.quota()
    kernel.put("memory.stat", "inactive_file 0")
    seen_mib = [20, 24, 28, 32, 36, 40, 40, 40, 40, 40, 36]
    looks = iter(seen_mib + [60] * len(seen_mib))
    quota._room._fixed_bytes = lambda: next(looks) * MIB  # type: ignore[method-assign]
    quota.make_room(80 * MIB)
    assert list(looks) == [60] * len(seen_mib)  # one window, and none after it


def test_a_wall_of_a_container_below_is_no_sign_of_need(kernel: Kernel) -> None:
    """It counts in memory.events, which adds up, and not in what the workload itself met."""
    quota = kernel.quota()
    kernel.put("memory.events", "high 7\noom_kill 0")
    assert quota._room._high_events() == 0
    kernel.put("memory.events.local", "high 3\noom_kill 0")
    assert quota._room._high_events() == 3


def test_no_if_it_has_grown_when_it_is_frozen(kernel: Kernel) -> None:
    def freeze(value: str) -> None:
        kernel.freeze(value)
        kernel.put("memory.current", 33 * MIB)
        kernel.after["memory.reclaim"] = kernel.refuse

    kernel.after["cgroup.freeze"] = freeze
    with pytest.raises(NoRoom, match="grew"):
        kernel.quota().make_room(32 * MIB)
    assert_put_back(kernel)


def test_a_guest_that_streams_through_its_cache_gives_way(kernel: Kernel) -> None:
    """It touches the wall all the time, and stands above it when it is frozen."""
    quota = kernel.quota()
    events = iter(range(1, 100))

    def high_events() -> int:
        return next(events)

    quota._room._high_events = high_events  # type: ignore[method-assign]

    def freeze(value: str) -> None:
        kernel.freeze(value)
        if value == "1":
            kernel.put("memory.current", 33 * MIB)

    kernel.after["cgroup.freeze"] = freeze
    quota.make_room(32 * MIB)
    assert kernel.current() == 32 * MIB
    assert kernel.written("memory.max") == [str(32 * MIB)]
    assert kernel.written("cgroup.freeze") == ["1", "0"]


@pytest.mark.parametrize(
    ("armed", "anon_mib", "settles"), [(True, 16, False), (True, 53, True), (False, 16, True)]
)
def test_it_settles_only_where_a_mistake_would_be_dear(
    kernel: Kernel, armed: bool, anon_mib: int, settles: bool
) -> None:
    """A limit of 60, its wall at 56: 53 of what can't be reclaimed is near."""
    quota = kernel.quota()
    settled: list[object] = []
    quota._room._settle = lambda *_: settled.append(1)  # type: ignore[method-assign]
    kernel.put("memory.stat", f"anon {anon_mib * MIB}\ninactive_file {(64 - anon_mib) * MIB}")

    def reclaim(value: str) -> None:
        kernel.reclaim(value)
        cache_bytes = kernel.current() - anon_mib * MIB
        kernel.put("memory.stat", f"anon {anon_mib * MIB}\ninactive_file {cache_bytes}")

    kernel.after["memory.reclaim"] = reclaim
    if armed:
        quota.arm_dry_events()
    phases = quota.make_room(60 * MIB)
    assert bool(settled) == settles
    assert (phases.settle_s > 0) == settles
    assert 0 < phases.frozen_s < phases.total_s
    assert kernel.written("memory.max") == [str(60 * MIB)]


def test_a_workload_is_thawed_between_slices_of_reclaim(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came back meanwhile takes longer than it may stand still for."""
    monkeypatch.setattr("host_agent.quota.cgroup2_room.FROZEN_SLICE_S", -1.0)
    grown = iter([36, 34])

    def freeze(value: str) -> None:
        kernel.freeze(value)
        if value == "1" and (mib := next(grown, None)):
            kernel.put("memory.current", mib * MIB)

    kernel.after["cgroup.freeze"] = freeze
    quota = kernel.quota()
    quota.make_room(32 * MIB)
    assert kernel.written("cgroup.freeze") == ["1", "0"] * 3
    assert kernel.written("memory.max") == [str(32 * MIB)]


def test_no_for_a_workload_that_is_faster_than_reclaim(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_agent.quota.cgroup2_room.FROZEN_SLICE_S", -1.0)

    def freeze(value: str) -> None:
        kernel.freeze(value)
        kernel.put("memory.current", 36 * MIB)

    kernel.after["cgroup.freeze"] = freeze
    with pytest.raises(NoRoom, match="faster"):
        kernel.quota().make_room(32 * MIB)
    assert kernel.written("cgroup.freeze") == ["1", "0"] * 10
    assert_put_back(kernel)


def test_no_if_it_cannot_be_frozen(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host_agent.quota.cgroup2_room.FREEZE_TIMEOUT_S", 0.02)
    kernel.after["cgroup.freeze"] = lambda _: None
    with pytest.raises(NoRoom, match="frozen"):
        kernel.quota().make_room(32 * MIB)
    assert_put_back(kernel)


def test_a_raise_wins_over_a_shrink(kernel: Kernel) -> None:
    quota = kernel.quota()

    def freeze(value: str) -> None:
        kernel.freeze(value)
        if value == "1":
            thread = threading.Thread(target=lambda: quota.raise_quota(112 * MIB))
            thread.start()
            thread.join(timeout=10)

    kernel.after["cgroup.freeze"] = freeze
    with pytest.raises(NoRoom, match="given memory"):
        quota.make_room(32 * MIB)
    assert kernel.written("memory.max") == [str(112 * MIB)] * 2
    assert kernel.written("memory.high")[-1] == "max"
    assert kernel.written("cgroup.freeze") == ["1", "0"]


def test_the_vms_limit_is_lowered_only_if_nobody_can_be_killed_by_it(kernel: Kernel) -> None:
    quota = kernel.quota()
    with pytest.raises(LimitRefused, match="make room"):
        quota.lower_quota(64 * MIB)
    quota.make_room(60 * MIB)
    kernel.journal.clear()
    # 60 for the workload and 25 beside it do not fit under 60 + 24, whatever is used now.
    (kernel.vm / "memory.current").write_text(str(kernel.current() + 25 * MIB))
    with pytest.raises(LimitRefused, match="driver"):
        quota.lower_quota(60 * MIB, timeout_s=0.02)
    assert kernel.journal == []
    (kernel.vm / "memory.current").write_text(str(kernel.current() + 24 * MIB))
    quota.lower_quota(60 * MIB)
    assert kernel.journal == [("memory.max", str(84 * MIB))]


@pytest.mark.parametrize(
    ("current_mib", "file_mib", "dry"),
    [
        (92, 1, True),  # at the wall with nothing to reclaim
        (91, 0, False),  # below the wall
        (94, 40, False),  # streams through its cache
    ],
)
def test_what_is_dry(kernel: Kernel, current_mib: int, file_mib: int, dry: bool) -> None:
    quota = kernel.quota()
    event = quota.arm_dry_events()
    assert not readable(event)
    kernel.put("memory.current", current_mib * MIB)
    kernel.put("memory.stat", f"inactive_file {file_mib * MIB}\nactive_file 0")
    kernel.put("memory.events", "high 1\nmax 0")
    assert readable(event, DEADLINE_S)
    state = quota.dry_state()
    assert (state.under_oom, state.kills_total) == (dry, 2)
    assert not readable(event)
    quota.let_kernel_decide()
    assert not quota.dry_state().under_oom
    quota.close()


@pytest.mark.parametrize(
    ("swap_max_mib", "machine_mib", "dry"),
    [
        (20, 100, False),  # it swaps
        (20, 0, True),  # the machine's swap is full
        (3, 100, True),  # its own is, or room is being made: the same to the guest
    ],
)
def test_a_guest_is_dry_when_it_has_no_swap_left(
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    swap_max_mib: int,
    machine_mib: int,
    dry: bool,
) -> None:
    monkeypatch.setattr(cgroup2, "free_swap_bytes", lambda: machine_mib * MIB)
    quota = kernel.quota()
    quota.arm_dry_events()
    kernel.put("memory.swap.max", swap_max_mib * MIB)
    kernel.put("memory.current", 93 * MIB)
    kernel.put("memory.stat", f"inactive_anon {93 * MIB}\nactive_anon 0")
    assert quota.dry_state().under_oom is dry
    quota.close()


def test_a_guest_halfway_through_the_wall_is_frozen_until_it_is_answered(kernel: Kernel) -> None:
    quota = kernel.quota()
    quota.arm_dry_events()
    kernel.put("memory.stat", "inactive_file 0")
    kernel.put("memory.current", 93 * MIB)
    assert quota.dry_state().under_oom
    assert kernel.written("cgroup.freeze") == []
    kernel.put("memory.current", 94 * MIB)
    assert quota.dry_state().under_oom
    assert kernel.written("cgroup.freeze") == ["1"]
    with pytest.raises(NoRoom, match="dry"):
        quota.make_room(90 * MIB)
    quota.raise_workload(96 * MIB)  # what it has already
    assert kernel.written("cgroup.freeze") == ["1"]
    quota.raise_quota(128 * MIB)
    assert kernel.journal[-1] == ("workload/cgroup.freeze", "0")
    kernel.put("memory.current", 126 * MIB)
    assert quota.dry_state().under_oom
    quota.let_kernel_decide()
    assert kernel.written("cgroup.freeze") == ["1", "0", "1", "0"]
    assert not quota.dry_state().under_oom
    quota.rearm()
    assert quota.dry_state().under_oom
    kernel.put("memory.current", 20 * MIB)
    assert not quota.dry_state().under_oom
    assert kernel.written("cgroup.freeze")[4:] == ["1", "0"]
    quota.close()


def test_a_held_guest_that_was_let_go_is_held_again(kernel: Kernel) -> None:
    """By the watchdog, when the agent stood still."""
    quota = kernel.quota()
    quota.arm_dry_events()
    kernel.put("memory.stat", "inactive_file 0")
    kernel.put("memory.current", 94 * MIB)
    assert quota.dry_state().under_oom
    kernel.put("memory.high", "max")
    kernel.put("cgroup.freeze", "0")
    quota.rearm()
    assert kernel.written("cgroup.freeze") == ["1", "1"]
    quota.close()


def test_a_dry_guest_is_not_frozen_while_room_is_made_in_it(kernel: Kernel) -> None:
    """Thawing it would end the stillness in which the limit is lowered."""
    quota = kernel.quota()
    quota.arm_dry_events()

    def freeze(value: str) -> None:
        kernel.freeze(value)
        if value == "1":
            kernel.put("memory.current", 96 * MIB)
            kernel.put("memory.stat", "inactive_file 0")
            kernel.after["memory.reclaim"] = kernel.refuse
            assert quota.dry_state().under_oom
            quota.raise_workload(96 * MIB)
            assert kernel.written("cgroup.freeze") == ["1"]

    kernel.after["cgroup.freeze"] = freeze
    with pytest.raises(NoRoom):
        quota.make_room(64 * MIB)
    assert kernel.written("cgroup.freeze") == ["1", "0"]
    quota.close()


def test_kill_all_uses_the_kernels_own_way(kernel: Kernel) -> None:
    quota = kernel.quota()
    (kernel.vm / "cgroup.events").write_text("populated 1\n")
    thread = threading.Thread(target=quota.kill_all)
    thread.start()
    wait_for(lambda: ("cgroup.kill", "1") in kernel.journal, "cgroup.kill is written")
    (kernel.vm / "cgroup.events").write_text("populated 0\n")
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert quota.processes(Part.WORKLOAD) == ()


def test_handing_the_controller_down(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    hand_down_memory(tmp_path)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory\n"
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    hand_down_memory(tmp_path)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "cpu memory\n"
    (tmp_path / "cgroup.subtree_control").write_text("\n")
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(QuotaUnavailable, match="Delegate=memory"):
        hand_down_memory(tmp_path)


def test_a_held_guest_is_thawed_also_if_a_shrink_began_meanwhile(kernel: Kernel) -> None:
    kernel.put("memory.stat", "inactive_file 0")
    kernel.put("memory.current", 95 * MIB)
    quota = kernel.quota()
    quota.arm_dry_events()
    assert quota.dry_state().under_oom
    assert kernel.written("cgroup.freeze") == ["1"]
    with quota._guard._shrinking:  # until it looks, and refuses
        assert quota.dry_state().under_oom
    quota.raise_quota(128 * MIB)
    assert kernel.written("cgroup.freeze") == ["1", "0"]


@pytest.mark.parametrize(("anon_mib", "dry"), [(60, False), (0, True)])
def test_swap_is_no_help_for_what_can_not_be_swapped(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, anon_mib: int, dry: bool
) -> None:
    monkeypatch.setattr(cgroup2, "free_swap_bytes", lambda: 1024 * MIB)
    kernel.put("memory.swap.max", 40 * MIB)
    kernel.put("memory.swap.current", 0)
    kernel.put("memory.stat", f"inactive_anon {anon_mib * MIB}")
    kernel.put("memory.current", 95 * MIB)
    quota = kernel.quota()
    quota.arm_dry_events()
    assert quota.dry_state().under_oom is dry
