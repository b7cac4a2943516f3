"""A guest's driver that lies: run as a process, which moves into the guest's driver cgroup.

    liar.py KIND SOCKET PROCS ASSIGNED_PAGES

It says on stdout "welcome" when the host has taken it, and what ended it: "goodbye REASON" or
"closed". For most kinds it goes on as an honest driver does but for the one lie.
"""

import ctypes
import itertools
import mmap
import os
import socket
import sys
import time
from pathlib import Path

from guest_driver.memory import Arena, map_arena
from protocol.codec import encode
from protocol.connection import Connection
from protocol.errors import ChannelError, LocalProtocolError
from protocol.framing import framed
from protocol.messages import (
    Claim,
    Dropped,
    Goodbye,
    Hello,
    Message,
    Offer,
    Rejection,
    Report,
    Reserve,
    Reserved,
    Reset,
    Target,
    Vitals,
    Welcome,
)
from protocol.page_frames import PageFrames
from protocol.units import PAGE_BYTES
from protocol.vocabulary import Role

kind, socket_path, procs, assigned = sys.argv[1:]
PAGES = int(assigned)


def shared_arena() -> int:
    """A mapping of a file in memory."""
    memory = os.memfd_create("arena")
    os.ftruncate(memory, PAGES * PAGE_BYTES)
    KEPT.append(mmap.mmap(memory, PAGES * PAGE_BYTES))
    view = (ctypes.c_char * (PAGES * PAGE_BYTES)).from_buffer(KEPT[0])
    return ctypes.addressof(view)


KEPT: list[mmap.mmap] = []
REPORT_IDS = itertools.count(1)
arena: Arena | None = None
if kind == "foreign pages":
    # Charged to the cgroup that we come from.
    arena = map_arena(PAGES, 0)
    assert arena.populate(PAGES // 2, 2048) == 0
Path(procs).write_text("0")
if kind == "file pages":
    address = shared_arena()
elif kind == "arena at 0":
    address = 0
elif kind == "arena elsewhere":
    address = 1 << 40
else:
    arena = arena or map_arena(PAGES, 0)
    address = arena.address

link = socket.socket(socket.AF_UNIX)
link.connect(socket_path)
connection = Connection(Role.GUEST)


def say(message: Message) -> None:
    """Whether or not it may be said."""
    try:
        link.sendall(connection.send(message))
    except LocalProtocolError:
        link.sendall(framed(encode(message)))


def hear() -> Message:
    while True:
        message = connection.next_event()
        if message is not None:
            return message
        data = link.recv(65536)
        if data:
            connection.receive_data(data)
        else:
            connection.receive_eof()


def hello() -> Hello:
    return Hello(
        version_min=1,
        version_max=1 if kind != "version" else 7,
        features=(),
        software="liar",
        pseudo_process_pid=4_000_000 if kind == "foreign process" else os.getpid(),
        arena_address=address,
        arena_pages=PAGES + (kind == "arena too large"),
        frame_order=9 if kind == "frame order" else 0,
        claimed=PageFrames.span(0, PAGES) if kind == "claims all" else PageFrames.empty(),
    )


def vitals() -> Vitals:
    return Vitals(clock_s=time.monotonic(), demand_bytes=0, spare_bytes=PAGES * PAGE_BYTES)


def reserve(order: Reserve) -> PageFrames:
    if kind == "foreign pages":
        return PageFrames.span(PAGES // 2, min(order.pages, 2048))
    frames = FREE.lowest(min(order.pages, 2048))
    if kind == "file pages":
        for start, count in frames.ranges():
            touched = slice(start * PAGE_BYTES, (start + count) * PAGE_BYTES, PAGE_BYTES)
            KEPT[0][touched] = bytes(count)
    if arena is not None and kind != "unreserved":
        for start, count in frames.ranges():
            assert arena.populate(start, count) == 0
    return frames


def open_with() -> None:
    """What some say first after the Welcome."""
    if kind == "flood":
        for _ in range(5000):
            say(vitals())
    if kind == "resets":
        for _ in range(50):
            say(Reset("once more"))
            say(hello())
            while not isinstance(hear(), Welcome):
                pass
    if kind == "unasked":
        say(Report(0, 1, PageFrames.span(0, 16)))
    if kind == "host's words":
        say(Claim(1, PageFrames.span(0, 1)))
    say(vitals())


def live() -> None:
    """After the Welcome, until the host says goodbye."""
    open_with()
    while not isinstance(message := hear(), Goodbye):
        if isinstance(message, Target):
            say(Offer(message.target_id, message.balloon_pages - HELD.page_count, None, ""))
        elif isinstance(message, Reserve):
            report(message)
        elif isinstance(message, Rejection):
            print("rejected", *sorted({str(reason) for _, reason in message.rejected}), flush=True)
        elif isinstance(message, Claim):
            drop(message)
    print("goodbye", message.reason, flush=True)


def report(order: Reserve) -> None:
    reported = reserve(order)
    if kind == "more than room":
        reported = PageFrames.span(0, order.pages + 1)
    if kind == "out of range":
        reported = PageFrames.span(PAGES, 16)
    if kind == "of the welcome":
        reported = HELD.lowest(16)
    say(Report(order.target_id, next(REPORT_IDS), reported))
    if kind == "twice":
        say(Report(order.target_id, next(REPORT_IDS), reported))
    elif kind != "more than room":
        say(Reserved(order.target_id, reported.page_count, None, ""))


def drop(claim: Claim) -> None:
    if arena is not None and kind not in ("keeps", "drops others"):
        for start, count in claim.frames.ranges():
            arena.drop(start, count)
    frames = claim.frames
    if kind == "drops others":
        frames = PageFrames.span(PAGES // 2, frames.page_count)
    say(Dropped(claim.report_id, frames))


try:
    if kind == "garbage":
        link.sendall(os.urandom(100_000))
    elif kind == "endless":
        link.sendall((1 << 30).to_bytes(4, "big") + bytes(100_000))
    elif kind == "no hello":
        say(vitals())
    elif kind != "silent":
        say(hello())
    if kind in ("garbage", "endless", "no hello", "silent"):
        while link.recv(65536):
            pass
        print("closed", flush=True)
        sys.exit()
    first = hear()
    if isinstance(first, Goodbye):
        print("goodbye", first.reason, flush=True)
        sys.exit()
    assert isinstance(first, Welcome)
    HELD = first.claimed
    FREE = PageFrames.span(0, PAGES) - HELD
    print("welcome", flush=True)
    live()
except (ChannelError, OSError) as error:
    print("closed", error, flush=True)
