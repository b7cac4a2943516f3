"""The host's client of the workload, against the real program and against impostors."""

import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from host_agent.workload_client import (
    MAX_ANSWER_BYTES,
    WorkloadClient,
    WorkloadError,
    WorkloadRefused,
)
from protocol.units import MIB

DEADLINE_S = 30.0


@pytest.fixture
def workload(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "control.sock"
    command = [sys.executable, "-m", "guest_driver.workload"]
    process = subprocess.Popen([*command, f"--files={tmp_path / 'f'}", f"--control={path}"])
    yield path
    process.kill()
    process.wait()


async def _until(predicate: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not await predicate():
            await trio.sleep(0.01)


def test_every_command_reaches_the_program(workload: Path) -> None:
    client = WorkloadClient(workload)

    async def is_up() -> bool:
        try:
            await client.stats()
        except WorkloadError:
            return False
        return True

    async def is_grown() -> bool:
        stats = await client.stats(reset=True)
        return bool(
            stats["anon"]["touched_bytes"] == 2 * MIB
            and stats["cache"]["ready_bytes"] == MIB
            and stats["rate"] == 1e6
        )

    async def main() -> None:
        await _until(is_up)
        await client.set(anon_bytes=2 * MIB, cache_bytes=MIB, rate_bytes_per_s=1e6)
        await _until(is_grown)
        assert (await client.burst(4 * MIB))["bytes"] == 4 * MIB
        with pytest.raises(WorkloadRefused, match="a burst is held already"):
            await client.burst(MIB)
        await client.unburst()
        await client.stop()
        await _until(lambda: _is_gone(workload))

    trio.run(main)


async def _is_gone(path: Path) -> bool:
    return not await trio.Path(path).exists()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no workload at"):
        trio.run(WorkloadClient(tmp_path / "none.sock").stats)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"hello\n", "does not answer in JSON"),
        (b"[]\n", "does not answer with objects"),
        (b'{"ok": 1}\n', "refused: without a reason"),
        (b'{"ok": false, "error": "no"}\n', "refused: no"),
        (b'{"ok": true}', "hung up"),
        (b"x" * (MAX_ANSWER_BYTES + 1), "too long"),
        (None, "no answer from"),
    ],
)
def test_impostors(tmp_path: Path, answer: bytes | None, complaint: str) -> None:
    path = tmp_path / "impostor.sock"

    async def impostor(listener: trio.SocketListener) -> None:
        stream = await listener.accept()
        async with stream:
            await stream.receive_some()
            if answer is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(answer)

    async def main() -> None:
        server = trio.socket.socket(trio.socket.AF_UNIX)
        await server.bind(str(path))
        server.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impostor, trio.SocketListener(server))
            timeout_s = 0.2 if answer is None else DEADLINE_S
            with pytest.raises(WorkloadError, match=complaint):
                await WorkloadClient(path).stats(timeout_s=timeout_s)
            nursery.cancel_scope.cancel()
        server.close()

    trio.run(main)
