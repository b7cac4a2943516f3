"""Connections to a guest's private socket, each from its first byte to its end.

Who connects is looked at, the greeting answered, and the session run. Whatever the peer does wrong
ends its own connection and nothing else: its quota stays what the books say, the log names it, and
the other guests don't notice.
"""

import contextlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from host_agent.audit.errors import AuditError, ProcessGone
from host_agent.balance import Balancer
from host_agent.blocking import DeadlinePassed, Threads, run_blocking
from host_agent.guest import Guest, Phase
from host_agent.intake.faults import GuestAtFault, GuestStuck
from host_agent.intake.listener import (
    HelloRefused,
    is_driver_of,
    new_channel,
    open_auditor,
    peer_pid,
    peer_process,
    receive_hello,
    say_goodbye,
)
from host_agent.intake.newcomer import make_driver, may_become_driver, who_is
from host_agent.intake.pace import Pace
from host_agent.intake.session import GuestSession
from host_agent.ledger.ledger import LedgerError
from host_agent.quota.errors import QuotaError
from protocol.channel import Channel
from protocol.errors import ChannelBroken, LocalProtocolError, RemoteProtocolError
from protocol.messages import Welcome
from protocol.negotiation import negotiate
from protocol.vocabulary import SWAP_FEATURE

LOG = logging.getLogger("memballoon.intake")

VITALS_INTERVAL_MS: Final = 200
"""Demand is known at most this late; reading the statistics costs a guest 0.1 ms."""

OPEN_DEADLINE_S: Final = 20.0
"""For opening the files of a pseudo-process."""

MOST_CONNECTIONS: Final = 4
"""A driver needs one, and another one before the old one is known to be dead."""

MOST_GREETINGS: Final = 10
"""In a second, on one connection: each costs the host a look at the guest's processes."""

FAULT_PAUSE_S: Final = 1.0
"""A guest that was at fault is greeted again only after this: no storm of faults fills the log."""

STRANGER_PAUSE_S: Final = 1.0
"""Between lines about strangers at one socket: no storm of connections fills the log."""

CONNECTION_PAUSE_S: Final = 0.05
"""A connection counts for at least so long: whoever connects in a loop is slowed down."""

ROOM_WATCH_S: Final = 0.05
ROOM_WATCHES: Final = 200
"""For so long a broken-off guest's reserved pages are waited for before its room is given back."""


@dataclass(slots=True)
class _Visit:
    """One connection of a guest's driver."""

    guest: Guest
    channel: Channel
    greetings: Pace = field(default_factory=lambda: Pace(MOST_GREETINGS, 1.0))
    session: GuestSession | None = None
    """The last one that was held on it."""


class Reception:
    """Receives the drivers of all guests."""

    def __init__(self, balancer: Balancer, threads: Threads) -> None:
        self._balancer = balancer
        self._threads = threads

    async def serve(self, guest: Guest, stream: trio.SocketStream) -> None:
        """One connection to the guest's socket, to its end. Faults of the peer end here."""
        async with new_channel(stream) as channel:
            pid = peer_pid(stream)
            if not is_driver_of(guest, pid):
                await self._meet(guest, stream, pid)
                return
            if guest.connections >= MOST_CONNECTIONS:
                LOG.warning("%s: its driver has %d connections", guest.name, guest.connections)
                return
            guest.connections += 1
            visit = _Visit(guest, channel)
            try:
                await self._speak(visit)
            finally:
                await channel.aclose()
                with trio.CancelScope(shield=True):
                    await trio.sleep(CONNECTION_PAUSE_S)
                guest.connections -= 1
        # Only now: a driver lets go of its frames when it hears that the connection has ended.
        if visit.session is not None:
            await self._return_room_later(guest, visit.session)

    async def _meet(self, guest: Guest, stream: trio.SocketStream, pid: int) -> None:
        """Somebody who is not the driver: a process of a container that knocks, or a stranger."""
        if not may_become_driver(guest, pid):
            now_s = trio.current_time()
            if now_s >= guest.stranger_s + STRANGER_PAUSE_S:
                guest.stranger_s = now_s
                LOG.warning("%s: %s", guest.name, who_is(guest, pid))
            return
        try:
            await run_blocking(
                partial(_admit, guest, stream, pid),
                timeout_s=OPEN_DEADLINE_S,
                limiter=self._threads.limit_writes,
            )
        except (OSError, DeadlinePassed) as error:
            LOG.warning("%s: its driver can't be put into its cgroup: %s", guest.name, error)
        else:
            LOG.info("%s: pid %d of its container becomes its driver", guest.name, pid)

    async def _speak(self, visit: _Visit) -> None:
        """Greet and converse again and again; the end of it is put into the log."""
        guest, channel = visit.guest, visit.channel
        await trio.sleep_until(guest.fault_s + FAULT_PAUSE_S)
        try:
            while True:
                await self._converse(visit)
        except* (ChannelBroken, ProcessGone) as errors:
            LOG.info("%s: the driver's connection ended: %s", guest.name, _first(errors))
        except* (RemoteProtocolError, HelloRefused, GuestAtFault) as errors:
            fault = _first(errors)
            guest.fault_s = trio.current_time()
            if isinstance(fault, GuestStuck):
                guest.stuck_times += 1
                guest.stuck_s = guest.fault_s
            guest.last_reason = str(fault)
            LOG.warning("%s: its driver is at fault: %s", guest.name, fault)
            await say_goodbye(channel, str(fault))
        except* (LocalProtocolError, LedgerError, AuditError, DeadlinePassed) as errors:
            guest.fault_s = trio.current_time()
            LOG.error("%s: a fault of this agent: %s", guest.name, _first(errors))
            await say_goodbye(channel, "the host agent made an error")

    async def _converse(self, visit: _Visit) -> None:
        """One Hello and what follows, until the guest resets."""
        guest, channel = visit.guest, visit.channel
        hello = await receive_hello(channel)
        if visit.greetings.is_too_fast(trio.current_time()):
            raise HelloRefused(f"it greets more than {MOST_GREETINGS} times a second")
        agreement = negotiate(hello)
        auditor = await run_blocking(
            partial(open_auditor, guest, hello),
            timeout_s=OPEN_DEADLINE_S,
            limiter=self._threads.audits,
        )
        ledger = self._balancer.ledger
        with auditor, trio.CancelScope() as scope:
            if guest.session is not None:
                # A driver speaks on one connection: this one is newer.
                guest.session.supersede()
            session = visit.session = GuestSession(
                guest,
                hello,
                auditor,
                ledger,
                self._threads,
                self._balancer,
                scope,
                may_swap=SWAP_FEATURE in agreement.features,
            )
            claimed = ledger.settle(guest.name, hello.claimed)
            # A driver that greets has released what was not claimed.
            session.return_room()
            guest.session = session
            try:
                await channel.send(
                    Welcome(
                        version=agreement.version,
                        features=agreement.features,
                        assigned_pages=guest.assigned_pages,
                        claimed=claimed,
                        vitals_interval_ms=VITALS_INTERVAL_MS,
                    )
                )
                guest.connected.set()
                self._balancer.replan()
                await session.run(channel)
            finally:
                if guest.session is session:
                    guest.session = None
                    guest.vitals = None
                    ledger.drop_report(guest.name, ledger.view(guest.name).pending)
                    self._balancer.replan()
        if scope.cancelled_caught:
            raise ChannelBroken("a newer connection of the same driver took its place")

    async def _return_room_later(self, guest: Guest, session: GuestSession) -> None:
        """Give back the room of a broken attempt, once the driver has let go of its frames."""
        if not self._balancer.ledger.view(guest.name).room_pages:
            return
        for _ in range(ROOM_WATCHES):
            if guest.session is not None or guest.phase is Phase.STOPPING:
                return  # the new session has done it, or nobody needs it any more
            try:
                held_bytes = guest.live_quota.read().driver_usage_bytes
            except QuotaError:
                return
            if held_bytes <= guest.overhead_bytes:
                session.return_room()
                return
            await trio.sleep(ROOM_WATCH_S)
        LOG.error("%s: its driver still holds frames: the workload's room stays away", guest.name)


def _admit(guest: Guest, stream: trio.SocketStream, pid: int) -> None:
    """Make the process that connected the guest's driver. Raises OSError.

    It is held in here, since the thread of this may outlast whoever waits for it. The kernel is
    asked in here as well: a thread that never starts has nothing to let go of, and of a connection
    that is closed by then nobody is got.
    """
    with contextlib.closing(peer_process(stream, pid)) as process:
        make_driver(guest, process)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside a group of groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
