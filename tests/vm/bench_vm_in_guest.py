"""Inside the VM that QEMU's balloon is inflated in: touches its memory, says how much there is.

For each line on the port `control`, {"touch": bool}, it says how much memory there is, in bytes;
before that, if asked to, it writes to all that is available, once, and frees it again. It needs the
standard library only.
"""

import json
import mmap
import os
import platform

LEFT_BYTES = 32 << 20
"""For the kernel and this program; else somebody would be killed."""


def meminfo() -> dict[str, int]:
    """Bytes by name."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = [line.split() for line in file]
    return {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if line[-1] == "kB"}


def touch() -> None:
    size = meminfo()["MemAvailable"] - LEFT_BYTES
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def main() -> None:
    with open("/bed/control", "r+b", buffering=0) as control:

        def say(**what: object) -> None:
            control.write(json.dumps(what).encode() + b"\n")

        say(kernel=platform.release(), processors=os.cpu_count())
        while True:
            if json.loads(control.readline())["touch"]:
                touch()
            found = meminfo()
            say(total_bytes=found["MemTotal"], free_bytes=found["MemFree"])


if __name__ == "__main__":
    main()
