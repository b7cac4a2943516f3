"""What a client is answered is what is kept, in the books and in the file: no more and no less."""

import pytest
import trio
import trio.testing
from host_rig import Rig, Run

import host_agent.client_desk
from host_agent.client_desk import ClientDesk
from host_agent.errors import AgentError, BadRequest, NotEnoughMemory
from host_agent.facade.port import ClientRequest
from host_agent.inheritance import state_of
from host_agent.ledger.client_reservations import ClientReservations
from host_agent.quota.errors import QuotaError
from protocol.units import MIB, pages_of

# The rig's host: 256 MiB, 16 MiB of which are its reserve.


class File:
    """What stands in the state file; `go` holds up whoever writes it, with all of it written."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.ids: list[str] = []
        self.go = trio.Event()
        self.go.set()

    async def save(self) -> None:
        self.ids = [one.id for one in state_of(self._rig.balancer).reservations]
        await self.go.wait()


def wanted(mib: int) -> ClientRequest:
    return ClientRequest(client="xapi", size_bytes=mib * MIB)


def test_what_still_waits_is_in_no_file(
    run: Run, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_agent.client_desk, "PATIENCE_S", 1.0)

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        file = File(rig)
        desk = ClientDesk(rig.balancer, file.save)
        rig.add("one", 240 * MIB)
        refused = trio.Event()

        async def reserve() -> None:
            with pytest.raises(NotEnoughMemory):
                await desk.reserve(wanted(64))
            refused.set()

        nursery.start_soon(reserve)
        await trio.testing.wait_all_tasks_blocked()
        (waits,) = desk.views()
        await file.save()  # of anybody: a VM that ends, for one
        assert file.ids == []
        with pytest.raises(BadRequest, match="still waited for"):
            await desk.transfer(waits.id, "two")
        clock.autojump_threshold = 0.05
        await refused.wait()
        assert (desk.views(), file.ids) == ([], [])

    run(body)


def test_who_goes_away_during_the_save_has_reserved_nothing(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        file = File(rig)
        desk = ClientDesk(rig.balancer, file.save)
        file.go = trio.Event()
        async with trio.open_nursery() as waiting:
            waiting.start_soon(desk.reserve, wanted(64))
            await trio.testing.wait_all_tasks_blocked()
            assert len(file.ids) == 1
            file.go.set()
            waiting.cancel_scope.cancel()
        assert (desk.views(), file.ids, rig.ledger.held_pages) == ([], [], 0)

    run(body)


def test_what_could_not_be_given_is_kept(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        file = File(rig)
        desk = ClientDesk(rig.balancer, file.save)
        one = rig.add("one", 120 * MIB, quota_bytes=100 * MIB)
        rig.add("full", 20 * MIB)
        reserved = await desk.reserve(wanted(64))
        rig.quota(one).failures["raise_quota"] = QuotaError("no")
        with pytest.raises(AgentError, match="could be given to one; it is kept"):
            await desk.transfer(reserved.id, "one")
        with pytest.raises(BadRequest, match="full has its full size"):
            await desk.transfer(reserved.id, "full")
        assert desk.views() == [reserved]
        assert (file.ids, rig.ledger.held_pages) == ([reserved.id], pages_of(64 * MIB))
        rig.check_agreement()

    run(body)


def test_nobody_is_given_what_is_kept_for_another(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        desk = ClientDesk(rig.balancer, File(rig).save)
        rig.add("one", 200 * MIB, quota_bytes=160 * MIB)
        two = rig.add("two", 40 * MIB, quota_bytes=0)
        # 80 are free: the first has all of its 60, the second 20 of its 40, as after a restart.
        both = ClientReservations().reserve("a", "x", pages_of(60 * MIB))
        rig.balancer.clients.change(both.reserve("b", "y", pages_of(40 * MIB)))
        with pytest.raises(NotEnoughMemory) as refused:
            await desk.transfer("y", "one")
        assert refused.value.missing_bytes == 20 * MIB
        assert rig.ledger.view("one").quota_pages == pages_of(160 * MIB)
        # Nor does a launch get the first one's, with the second handed over to it.
        rig.balancer.clients.change(rig.balancer.clients.reservations.transfer("y", "two"))
        two.target_pages = two.assigned_pages
        rig.balancer.grant_free()
        assert rig.ledger.view("two").quota_pages == pages_of(20 * MIB)
        assert (await desk.transfer("x", "one")).given_bytes == 40 * MIB

    run(body)


def test_what_a_vm_leaves_behind_is_not_lent_while_a_client_waits(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        going = rig.add("going", 100 * MIB)
        dry = rig.add("dry", 200 * MIB, quota_bytes=140 * MIB)
        rig.balancer.clients.change(ClientReservations().reserve("a", "x", pages_of(80 * MIB)))
        rig.remove(going)
        assert rig.balancer.lend(dry, pages_of(60 * MIB)) == pages_of(36 * MIB)
        assert rig.ledger.held_pages == pages_of(80 * MIB)

    run(body)


def test_taken_from_a_launch_it_counts_beside_it(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        desk = ClientDesk(rig.balancer, File(rig).save)
        late = rig.add("late", 200 * MIB, quota_bytes=0, reservation_bytes=130 * MIB)
        late.phase = late.phase.STARTING
        reserved = await desk.reserve(wanted(110))
        assert (await desk.transfer(reserved.id, "late")).kept is not None
        # 110 of the 130 are the same: there is room for as much again.
        other = await desk.reserve(wanted(110))
        with pytest.raises(NotEnoughMemory):
            await desk.transfer(reserved.id, "other")
        assert [one.vm for one in desk.views()] == ["late", None]
        await desk.release(other.id)
        assert (await desk.transfer(reserved.id, "other")).kept is not None

    run(body)
