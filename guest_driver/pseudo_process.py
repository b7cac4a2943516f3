"""The balloon's pseudo-process: the process that holds what the guest has given up.

As ESXi's driver reserves memory under a pseudo-process of the guest, one process of its own holds
the arena here, and nothing but it: so the kernel and the host see the balloon's frames apart from
the driver's memory, the kernel may kill it first when the guest runs dry (oom_score_adj 1000), and
its end, for whatever reason, gives all of the frames back. It dies with its driver.

Commands come over a SOCK_SEQPACKET socket pair. WORKERS threads all block in reading it, and the
kernel hands each message to one of them: sharing of work without a queue of ours. A command is all
or nothing.

    command  request id u64, operation u8, new state u8, then ranges (start u32, count u32)...
    reply    request id u64, errno i32 (0: done), pages u32, seconds f64; a release never fails
    ready    arena address u64, error text (empty: ready), once, before any reply

The frames' states stand in memory shared with the driver, one byte a frame: the pseudo-process
writes RESERVED after a page was populated, and the command's new state after it was dropped.

At the limit of its memory cgroup the kernel kills it (it is the first choice), or, with the OOM
killer off (v1), lets it wait until there is room: it may hold what it just populated then, so that
somebody else has to make the room. Then it goes on as if nothing had been.

This module is imported, and `start` called, before the driver imports trio or numpy. It must know
nothing of them, of channels or of policy.
"""

# The C modules under os, signal, socket and threading: with those, every pseudo-process would be
# 1 MiB larger, since what is imported before the fork becomes its own memory.
import _signal as signal  # type: ignore[import-not-found]  # typeshed has none of it
import _socket as socket
import _thread
import ctypes
import errno
import gc
import mmap
import posix as os
import struct
import time

from guest_driver.memory import Arena, ArenaError, map_arena, map_shared

FREE = 0
RESERVED = 1
REPORTED = 2
CLAIMED = 3
PENDING = 4
"""Frame states as bytes; `frame_states.FrameState` explains them."""

RESERVE = 1
RELEASE = 2
"""Operations of a command."""

COMMAND = struct.Struct("<QBB")
REPLY = struct.Struct("<QiId")

MAX_COMMAND_RANGES = 4096
"""Ranges a command may have: 32 KiB, so that several fit the usual send buffer of 208 KiB."""

WORKERS = 2
"""Two threads populate at 1.5 to 2 times the speed of one; more only wait for the same lock."""

NO_BUFFER_WAIT_S = 0.001
"""Between attempts to send when the cgroup has no room for the message's buffer."""

_RANGE = struct.Struct("<II")
_READY = struct.Struct("<Q")
_MAX_COMMAND_BYTES = COMMAND.size + MAX_COMMAND_RANGES * _RANGE.size
_MAX_ERROR_BYTES = 1024
_STACK_BYTES = 128 * 1024
_SOCKET_FD = 3
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_M_ARENA_MAX = -8


class PseudoProcess:
    """The driver's end of a running pseudo-process. Made by `start`; `stop` ends it.

    `connection` is a blocking socket for whole messages; `states` the shared bytes of the frames.
    """

    __slots__ = (
        "arena_address",
        "arena_pages",
        "connection",
        "exit_code",
        "frame_order",
        "pid",
        "pidfd",
        "states",
    )

    def __init__(
        self,
        *,
        pid: int,
        connection: socket.socket,
        states: mmap.mmap,
        arena_address: int,
        arena_pages: int,
        frame_order: int,
    ) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.connection = connection
        self.states = states
        self.arena_address = arena_address
        self.arena_pages = arena_pages
        self.frame_order = frame_order
        self.exit_code: int | None = None
        """None until it was reaped; then its exit code, or minus the signal that ended it."""

    def kill(self) -> None:
        """End it now, whatever it does. All of its frames are the guest's again."""
        # Until it is reaped its pid can't be another process's.
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Wait until it has ended, and return `exit_code`. Blocks: wait for `pidfd` first."""
        if self.exit_code is None:
            _, status = os.waitpid(self.pid, 0)
            self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def stop(self) -> None:
        """Kill and reap it, close what was opened for it. The shared states stay. Idempotent."""
        self.kill()
        self.reap()
        self.connection.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def start(arena_pages: int, frame_order: int) -> PseudoProcess:
    """Fork the pseudo-process with an arena of `arena_pages` base pages; return when it is ready.

    Call it in the main thread, before others were started: the pseudo-process dies with the thread
    that forked it (RuntimeError in another). Raises ValueError or ArenaError for a size or order
    that no arena has, ArenaError when it can't be set up (no right to lock memory, kernel too
    old); no process is left behind then.
    """
    if arena_pages < 1:
        raise ValueError(f"an arena of {arena_pages} pages")
    if _thread.get_native_id() != os.getpid():
        raise RuntimeError("the pseudo-process would die with this thread: fork it in the main one")
    states = map_shared(arena_pages)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    driver_pid = os.getpid()
    # What the collector would touch in the driver later on is copied for it, and the originals
    # become the pseudo-process's own memory: 0.2 MiB less of them.
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        _run(theirs, states, arena_pages, frame_order, driver_pid)
    theirs.close()
    try:
        address = _await_ready(ours)
        return PseudoProcess(
            pid=pid,
            connection=ours,
            states=states,
            arena_address=address,
            arena_pages=arena_pages,
            frame_order=frame_order,
        )
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
        states.close()
        raise


def _await_ready(connection: socket.socket) -> int:
    """The arena's address, or ArenaError."""
    try:
        message = connection.recv(_READY.size + _MAX_ERROR_BYTES)
    except ConnectionResetError:
        message = b""
    if not message:
        raise ArenaError("the pseudo-process ended before it was ready (out of memory?)")
    text = message[_READY.size :].decode(errors="replace")
    if text:
        raise ArenaError(text)
    address: int
    (address,) = _READY.unpack_from(message)
    return address


def _run(
    connection: socket.socket,
    states: mmap.mmap,
    arena_pages: int,
    frame_order: int,
    driver_pid: int,
) -> None:
    """The forked process's life. Never returns, and runs none of the driver's exit handlers."""
    try:
        gc.disable()  # it makes no cycles, and collecting would touch every page of the heap
        fd = _keep_only(connection)
        try:
            _settle(driver_pid)
            arena = map_arena(arena_pages, frame_order)
        except (ArenaError, OSError, ValueError) as error:
            os.write(fd, _READY.pack(0) + str(error).encode()[:_MAX_ERROR_BYTES])
            os._exit(1)
        os.write(fd, _READY.pack(arena.address))
        _thread.stack_size(_STACK_BYTES)
        for _ in range(WORKERS - 1):
            _thread.start_new_thread(_work, (fd, arena, states))
        _work(fd, arena, states)
    except BaseException as error:
        _give_up(error)


def _settle(driver_pid: int) -> None:
    """Tie this process to its driver, and make it the one that the OOM killer takes first."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != driver_pid:
        os._exit(0)  # the driver died before the kernel was asked to tell
    libc.prctl(_PR_SET_NAME, b"balloon", 0, 0, 0)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)  # the workers allocate next to nothing: no arena for each
    # Ctrl-C reaches the whole process group; ending in good order is the driver's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"1000")  # raising it needs no right


def _keep_only(connection: socket.socket) -> int:
    """Close every descriptor but the connection's, now `_SOCKET_FD`, and standard error."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    fd = connection.detach()
    if fd != _SOCKET_FD:
        os.dup2(fd, _SOCKET_FD)
    os.closerange(_SOCKET_FD + 1, os.sysconf("SC_OPEN_MAX"))
    return _SOCKET_FD


def _work(fd: int, arena: Arena, states: mmap.mmap) -> None:
    """Carry out commands until the driver closes its end, then end the process."""
    try:
        # One buffer for all: at a cgroup's limit the kernel could not write to a new one, and the
        # command would be lost.
        buffer = bytearray(_MAX_COMMAND_BYTES)
        while size := os.readv(fd, (buffer,)):
            began_s = time.monotonic()
            request_id, operation, new_state = COMMAND.unpack_from(buffer)
            ranges = list(_RANGE.iter_unpack(buffer[COMMAND.size : size]))
            code = 0
            if operation == RESERVE:
                code = _reserve(arena, states, ranges)
            else:
                _release(arena, states, ranges, new_state)
            pages = 0 if code else sum(count for _, count in ranges)
            _answer(fd, REPLY.pack(request_id, code, pages, time.monotonic() - began_s))
        os._exit(0)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException as error:
        _give_up(error)


def _answer(fd: int, reply: bytes) -> None:
    """Send `reply`; at the limit of a cgroup, as soon as there is room for the message."""
    while True:
        try:
            os.write(fd, reply)
        except OSError as error:
            # The buffer of a Unix socket is charged to the sender's cgroup, and is refused where a
            # page would be waited for (v1, OOM killer off).
            if error.errno != errno.ENOBUFS:
                raise
            time.sleep(NO_BUFFER_WAIT_S)
        else:
            return


def _reserve(arena: Arena, states: mmap.mmap, ranges: list[tuple[int, int]]) -> int:
    """Populate all of the ranges, or none: then errno, and their frames are FREE."""
    for start, count in ranges:
        code = arena.populate(start, count)
        if code:
            _release(arena, states, ranges, FREE)
            return code
    _mark(states, ranges, RESERVED)
    return 0


def _release(
    arena: Arena, states: mmap.mmap, ranges: list[tuple[int, int]], new_state: int
) -> None:
    # Room first: the state bytes may need a page themselves.
    for start, count in ranges:
        arena.drop(start, count)
    _mark(states, ranges, new_state)


def _mark(states: mmap.mmap, ranges: list[tuple[int, int]], state: int) -> None:
    value = bytes((state,))
    for start, count in ranges:
        states[start : start + count] = value * count


def _give_up(error: BaseException) -> None:
    """End the whole process, whichever thread it is: half a pseudo-process would lose commands."""
    try:
        os.write(2, f"balloon pseudo-process: {error!r}\n".encode())
    finally:
        os._exit(1)
