"""What VMs have and clients had reserved, as the next agent finds it; its pool may be smaller."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from host_rig import Rig, Run

from host_agent.errors import ConfigError
from host_agent.guest import Guest, overhead_of
from host_agent.hosting import Places
from host_agent.inheritance import Inheritance
from host_agent.machines.base import Machine
from host_agent.state import AgentState, GuestState, ReservationState, save_state
from protocol.units import MIB, pages_of


class Running:
    """A machine backend all of whose machines still run."""

    async def launch(self, spec: Any) -> Machine:
        raise NotImplementedError

    async def adopt(self, state: Mapping[str, Any]) -> Machine | None:
        await trio.lowlevel.checkpoint()
        return SimpleNamespace(place=None)  # type: ignore[return-value]


def running(rig: Rig, name: str, mib: int, reservation_mib: int) -> GuestState:
    """A VM with its whole size as quota."""
    overhead_bytes = overhead_of(mib * MIB)
    rig.remove(rig.add(name, mib * MIB))
    rig.quotas.create(name, mib * MIB, overhead_bytes).close()
    return GuestState(
        name=name,
        assigned_bytes=mib * MIB,
        reservation_bytes=reservation_mib * MIB,
        shares=1000,
        overhead_bytes=overhead_bytes,
        frame_order=0,
        command=("sleep",),
        backend="process",
        machine={},
    )


async def take_over(
    rig: Rig,
    state_dir: Path,
    *reserved: tuple[str, int, str | None],
    guests: tuple[GuestState, ...] | None = None,
) -> list[str]:
    """VMs and clients' reservations (id, MiB, VM); returns who is hosted.

    The VM is `one` of 100 MiB, half of them reserved, if `guests` are not given.
    """
    state = AgentState(
        guests=(running(rig, "one", 100, 50),) if guests is None else guests,
        reservations=tuple(
            ReservationState(client="xapi", id=name, size_bytes=mib * MIB, vm=vm)
            for name, mib, vm in reserved
        ),
    )
    save_state(state_dir, state)

    hosted = []

    async def host(guest: Guest, _machine: Machine) -> None:
        await trio.lowlevel.checkpoint()
        hosted.append(guest.name)

    places = Places(state_dir / "run", state_dir)
    balancer = rig.balancer
    await Inheritance(balancer, rig.quotas, {"process": Running()}, rig.threads, places).take_over(
        host
    )
    return hosted


def test_what_a_vm_has_begun_with_is_kept_no_longer(run: Run, tmp_path: Path) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        handed_over = [("a", 120, "one"), ("b", 30, "late"), ("c", 20, None)]
        await take_over(rig, tmp_path, *handed_over)
        left = rig.balancer.clients.reservations.all
        assert [(one.reservation_id, one.vm_name) for one in left] == [("b", "late"), ("c", None)]
        assert rig.ledger.held_pages == pages_of(50 * MIB)

    run(body)


def test_more_than_a_smaller_pool_can_keep_is_not_taken_over(run: Run, tmp_path: Path) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        # 256 MiB less 16 of the reserve and the VM's 50: 190.
        with pytest.raises(ConfigError, match="does not fit this pool") as refused:
            await take_over(rig, tmp_path, ("a", 120, None), ("b", 80, "late"))
        said = refused.value.one_line()
        assert "this pool of 256MiB: with what VMs were promised it is exceeded by 10MiB" in said
        assert "start with a pool of 266MiB or more" in said
        assert rig.balancer.clients.reservations.all == ()

    run(body)


def test_what_just_fits_is_taken_over(run: Run, tmp_path: Path) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        await take_over(rig, tmp_path, ("a", 110, None), ("b", 80, "late"))
        assert rig.balancer.clients.waits  # 140 are free: the rest is asked for

    run(body)


def test_vms_that_have_more_than_a_smaller_pool_are_taken_over(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool is 256 MiB, 16 of them the reserve; they have 300, promised are 240."""

    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        guests = tuple(running(rig, name, 100, 80) for name in ("one", "two", "three"))
        assert await take_over(rig, tmp_path, guests=guests) == ["one", "two", "three"]
        ledger = rig.ledger
        assert ledger.overdrawn_pages == pages_of(44 * MIB)
        assert (ledger.free_pages, ledger.reserve_left_pages) == (0, 0)
        ledger.check()
        rig.balancer.plan_once()
        assert rig.balancer.policy_fault is None
        said = [one.getMessage() for one in caplog.records if one.name == "memballoon.agent"]
        assert said == [
            *(f"{name} was running and is taken over" for name in ("one", "two", "three")),
            "the VMs that run have 44MiB more than the pool of 256MiB: they are asked for it, "
            "and nobody is killed",
        ]

    caplog.set_level("INFO", "memballoon.agent")
    run(body)


def test_more_than_a_smaller_pool_was_promised_is_refused_as_a_whole(
    run: Run, tmp_path: Path
) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        guests = tuple(
            running(rig, name, 50, promised)
            for name, promised in zip("abcdefg", (30, 40, 50, 35, 35, 35, 35), strict=True)
        )
        with pytest.raises(ConfigError) as refused:
            await take_over(rig, tmp_path, ("x", 10, None), guests=guests)
        assert refused.value.one_line() == (
            "the 7 VMs that run were promised 260MiB (c 50MiB, b 40MiB, d 35MiB, e 35MiB, "
            "f 35MiB, ...), and the pool has 240MiB beside its reserve: they run on, without an "
            "agent: start with a pool of 276MiB or more, and lower what they were promised with "
            "`balloon set VM --reservation` before you make it smaller"
        )
        assert list(rig.ledger) == []
        assert rig.balancer.guests == {}

    run(body)
