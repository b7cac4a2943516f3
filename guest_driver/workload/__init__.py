"""A program with a known appetite, to run inside a mock VM: `python -m guest_driver.workload`.

It holds an anonymous working set and a page cache of real files, touches both round and round at
a rate, and measures how long its own touches take: what a balloon costs its guest, seen from
inside. Only the standard library, and little of it, since ten of these run beside each other.

memory.py    what is touched: anonymous memory, bursts of it, files
latency.py   how long the touches took
control.py   the socket on which it is told what to do; sans-I/O commands
loop.py      the one loop

Importing the package imports all of it, so that it is compiled once where that can be kept:
without .pyc files the process holds 5 MiB more.
"""

from guest_driver.workload.command_line import main

__all__ = ["main"]
