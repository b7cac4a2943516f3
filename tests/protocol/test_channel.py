"""Messages over trio streams: real in-memory streams and real sockets, no mocks."""

import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from conversations import HELLO, WELCOME, frames, target

from protocol.channel import RECEIVE_BYTES, Channel
from protocol.connection import Connection
from protocol.errors import ChannelBroken, LocalProtocolError, RemoteProtocolError
from protocol.messages import Goodbye, Message, Offer, Report, Reserve, Reserved, Vitals
from protocol.transitions import SessionState
from protocol.vocabulary import Role

VITALS = Vitals(clock_s=1.0)
DEADLINE_S = 20.0

Ends = tuple[Channel, Channel, trio.abc.Stream]
"""The guest's channel, the host's, and the stream below the guest's."""


def on_memory_stream() -> Ends:
    mine, theirs = trio.testing.memory_stream_pair()
    return Channel(mine, Connection(Role.GUEST)), Channel(theirs, Connection(Role.HOST)), mine


def on_socket() -> Ends:
    mine, theirs = (
        trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()
    )
    return Channel(mine, Connection(Role.GUEST)), Channel(theirs, Connection(Role.HOST)), mine


def run(scenario: Callable[[Channel, Channel, trio.abc.Stream], Awaitable[None]]) -> None:
    """On both kinds of stream, with a deadline that only a hang meets."""

    async def on(make_ends: Callable[[], Ends]) -> None:
        guest, host, stream = make_ends()
        with trio.fail_after(DEADLINE_S):
            async with guest, host:
                await scenario(guest, host, stream)

    trio.run(on, on_memory_stream)
    trio.run(on, on_socket)


async def greet(guest: Channel, host: Channel) -> None:
    await guest.send(HELLO)
    assert await host.receive() == HELLO
    await host.send(WELCOME)
    assert await guest.receive() == WELCOME


def test_a_sender_that_is_cancelled_as_the_session_ends_says_nothing() -> None:
    """Also one that was woken in that very instant: it would break the protocol."""

    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.send, VITALS)
            await trio.lowlevel.cancel_shielded_checkpoint()
            said = guest.connection.send(Goodbye("now"))
            nursery.cancel_scope.cancel()
        await stream.send_all(said)
        while not isinstance(await host.receive(), Goodbye):
            pass

    for _ in range(20):
        run(scenario)


def test_messages_arrive_in_order_and_one_by_one() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        await host.send(target(1), target(2))
        assert await guest.receive() == target(1)
        await guest.send(Offer(1, 5))  # legal: target 2 is not taken yet
        assert await guest.receive() == target(2)
        await guest.send(Offer(2, 30), VITALS)
        assert [await host.receive(), await host.receive()] == [Offer(2, 30), VITALS]
        await host.send(Reserve(2, 30, 0))
        assert await guest.receive() == Reserve(2, 30, 0)
        said = [Report(2, 1, frames(0)), Reserved(2, 10)]
        await guest.send(*said)
        assert [await host.receive(), await host.receive()] == said

    run(scenario)


def test_many_senders_do_not_mix_their_bytes() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        heard = 0
        async with trio.open_nursery() as nursery:
            for sender in range(8):
                batch = [Vitals(clock_s=float(sender), usage_bytes=n) for n in range(40)]
                nursery.start_soon(guest.send, *batch)
            counts = dict.fromkeys(range(8), 0)
            while heard < 320:
                vitals = await host.receive()
                assert isinstance(vitals, Vitals)
                assert vitals.usage_bytes == counts[int(vitals.clock_s)]
                counts[int(vitals.clock_s)] += 1
                heard += 1

    run(scenario)


def test_a_goodbye_ends_the_conversation() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        await guest.send(VITALS, Goodbye("done"))
        await guest.aclose()
        assert await host.receive() == VITALS
        assert await host.receive() == Goodbye("done")
        for _ in range(2):
            with pytest.raises(ChannelBroken, match="ended with a Goodbye"):
                await host.receive()
        with pytest.raises(LocalProtocolError):
            await host.send(target(1))

    run(scenario)


def test_a_peer_that_vanishes_breaks_the_channel() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        await guest.send(VITALS)
        await guest.aclose()
        assert await host.receive() == VITALS
        with pytest.raises(ChannelBroken, match="without a Goodbye"):
            await host.receive()
        with pytest.raises(ChannelBroken):
            await host.send(target(1))
        assert host.connection.session is SessionState.BROKEN

    run(scenario)


def test_sending_to_a_peer_that_vanished_breaks_the_channel() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        await guest.aclose()
        with pytest.raises(ChannelBroken, match="the stream broke") as caught:
            await host.send(target(1))
        assert isinstance(caught.value.__cause__, trio.BrokenResourceError)

    run(scenario)


def test_closing_wakes_the_receiver_and_may_be_repeated() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)

        async def closes() -> None:
            await trio.testing.wait_all_tasks_blocked()
            await guest.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(closes)
            with pytest.raises(ChannelBroken, match="closed at this end"):
                await guest.receive()
        await guest.aclose()
        with pytest.raises(ChannelBroken):
            await guest.send(VITALS)

    run(scenario)


def test_a_bad_peer_is_blamed_after_its_good_messages() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        await guest.send(VITALS)
        await stream.send_all(b"\xff\xff\xff\xff")
        assert await host.receive() == VITALS
        for _ in range(2):
            with pytest.raises(RemoteProtocolError, match="4294967295"):
                await host.receive()
        await host.send(Goodbye("a message too long"))
        assert await guest.receive() == Goodbye("a message too long")

    run(scenario)


def test_what_is_said_before_an_illegal_message_is_sent() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        with pytest.raises(LocalProtocolError, match="Offer"):
            await guest.send(VITALS, Offer(1, 1), VITALS)
        await guest.send(Goodbye("bug"))
        assert [await host.receive(), await host.receive()] == [VITALS, Goodbye("bug")]

    run(scenario)


def test_a_cancelled_receive_loses_nothing() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        await guest.send(VITALS)
        with trio.CancelScope() as scope:
            scope.cancel()
            await host.receive()
        assert scope.cancelled_caught
        assert await host.receive() == VITALS

    run(scenario)


def test_a_sender_that_is_cancelled_half_way_breaks_the_channel() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)

        with trio.CancelScope() as scope:

            async def until_the_buffer_is_full() -> None:
                while True:
                    await guest.send(*[VITALS] * 100)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_the_buffer_is_full)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(ChannelBroken, match="sending was cancelled"):
            await guest.send(VITALS)

    async def on_a_full_socket() -> None:
        guest, host, stream = on_socket()
        with trio.fail_after(DEADLINE_S):
            async with guest, host:
                await scenario(guest, host, stream)

    trio.run(on_a_full_socket)  # a memory stream never is full


def test_a_waiting_sender_that_is_cancelled_has_said_nothing() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        async with guest._sending:
            with trio.CancelScope() as scope:
                scope.cancel()
                await guest.send(Goodbye("never said"))
        assert guest.connection.session is SessionState.RUNNING
        await guest.send(VITALS)
        assert await host.receive() == VITALS

    run(scenario)


def test_a_flood_leaves_room_for_other_tasks() -> None:
    async def scenario(guest: Channel, host: Channel, stream: trio.abc.Stream) -> None:
        await greet(guest, host)
        batch: list[Message] = [VITALS] * 500
        await guest.send(*batch)
        turns = 0

        async def other_task() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other_task)
            for _ in batch:
                await host.receive()
            nursery.cancel_scope.cancel()
        assert turns > len(batch) // 4

    run(scenario)


def test_reads_are_bounded() -> None:
    assert RECEIVE_BYTES <= 1 << 20
