"""A server of few words at a Unix socket, in place of a container engine, and a client of it."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from host_agent.machines.engine import Engine

DEADLINE_S = 60.0


@contextmanager
def serving(path: Path, answer_to: Callable[[str], bytes]) -> Iterator[list[str]]:
    """A server that answers each connection's first line and closes it; many at once.

    Yields the first lines of what it was asked, as they come.
    """
    heard: list[str] = []

    def serve(peer: socket.socket) -> None:
        with peer, suppress(ConnectionError):  # a client may have heard enough
            heard.append(peer.recv(65536).partition(b"\r\n")[0].decode())
            peer.sendall(answer_to(heard[-1]))

    def accept() -> None:
        with suppress(OSError):  # it is shut down
            while True:
                peer, _ = listening.accept()
                threads.append(threading.Thread(target=serve, args=(peer,), daemon=True))
                threads[-1].start()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        threads = [threading.Thread(target=accept, daemon=True)]
        threads[0].start()
        try:
            yield heard
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(DEADLINE_S)
                assert not thread.is_alive()
            path.unlink()


@contextmanager
def answering(path: Path, *answers: bytes) -> Iterator[list[str]]:
    """A server that gives these answers, each to one connection; it has to be asked for all."""
    left = iter(answers)
    with serving(path, lambda _: next(left, b"")) as heard:
        yield heard
        assert len(heard) == len(answers)


def http(status: str, body: Any = "", kind: str = "application/json") -> bytes:
    """An answer; a body that is JSON is given as the value."""
    text = json.dumps(body) if kind == "application/json" else str(body)
    return raw_http(status, text.encode(), kind)


def raw_http(status: str, body: bytes, kind: str = "application/json", more: str = "") -> bytes:
    """An answer with a body of any bytes, and `more` header lines."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def asked(path: Path, method: str, *arguments: Any) -> Any:
    """What a client's method returns; whatever it raises is raised."""

    async def main() -> Any:
        engine = Engine(path)
        try:
            with trio.fail_after(DEADLINE_S):
                return await getattr(engine, method)(*arguments)
        finally:
            await engine.aclose()

    return trio.run(main)
