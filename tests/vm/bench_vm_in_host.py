"""Inside the VM that memballoon is in: one turn of its inflation for each line on `control`.

python bench_vm_in_host.py SIZE_BYTES 4KiB|2MiB
"""

import io
import json
import sys
from dataclasses import asdict

import trio

from host_agent.bench.inflation import inflation
from host_agent.bench.steps import FRAME_BYTES, FrameSize
from host_agent.errors import AgentError


async def serve(control: io.FileIO, size_bytes: int, frames: FrameSize) -> None:
    def say(what: dict[str, object]) -> None:
        control.write(json.dumps(what).encode() + b"\n")

    try:
        async with inflation(size_bytes, frames) as one:
            say({"ready": True})
            while await trio.to_thread.run_sync(control.readline):
                say(asdict(await one.turn()))
    except* AgentError as errors:
        say({"error": "; ".join(map(str, errors.exceptions))})


if __name__ == "__main__":
    assert sys.argv[2] in FRAME_BYTES
    with open("/bed/control", "r+b", buffering=0) as port:
        trio.run(serve, port, int(sys.argv[1]), sys.argv[2])
