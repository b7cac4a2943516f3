"""A container engine's API, as much of it as mock VMs need: plain HTTP over its Unix socket.

It owns the addresses, the errors and nothing else: what the answers mean is engine_answers.py's,
and what a container is for is decided by docker.py.
Every call is a fresh decision of the engine; no state of a container is kept here.

Source: the Docker Engine API, version 1.41 (Docker 20.10), which newer engines and Podman's
compatible service still speak.
"""

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import trio

from host_agent.machines.base import MachineError
from host_agent.machines.engine_answers import (
    MAX_ANSWER_BYTES,
    MAX_EVENT_BYTES,
    ContainerView,
    EngineEvent,
    EngineView,
    OddAnswer,
    parse_container,
    parse_engine,
    parse_event,
    parse_id,
    parse_ids,
    parse_refusal,
    unframed,
)
from protocol.vocabulary import one_line

DEFAULT_SOCKET: Final = Path("/var/run/docker.sock")
API: Final = "http://engine/v1.41"

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 60.0
"""Creating and starting take 0.3 s; an engine that starts many at once, or a slow disk, longer."""

MAX_LOG_BYTES: Final = 65_536

HTTP_ERRORS: Final = (httpx.HTTPError, httpx.InvalidURL)
"""What httpx makes of a peer that speaks no HTTP, and of a name that can't stand in an address."""


class EngineError(MachineError):
    """The engine refused; `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoEngine(MachineError):
    """Nobody answers at the engine's socket, or it went away in the middle."""


def engine_socket(docker_host: str | None = None) -> Path:
    """The engine's socket: of `docker_host`, else of $DOCKER_HOST, else the usual one.

    Raises MachineError for an address that is no Unix socket: a mock VM runs on this machine.
    """
    address = os.environ.get("DOCKER_HOST", "") if docker_host is None else docker_host
    if not address:
        return DEFAULT_SOCKET
    scheme, separator, path = address.partition("://")
    if scheme != "unix" or not separator or not path.startswith("/"):
        raise MachineError(
            f"DOCKER_HOST is {address!r}: mock VMs need an engine on this machine, at unix:///PATH"
        )
    return Path(path)


class Engine:
    """A client of the engine at `socket_path`. `aclose` it at the end.

    Every method raises NoEngine if nobody answers, EngineError if the engine refuses and OddAnswer
    if it answers what makes no sense, each with one line for a person.
    """

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        # trust_env: a proxy for the web is no way to a socket of this machine.
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=str(socket_path), limits=httpx.Limits(max_connections=None)
            ),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            headers={"Accept-Encoding": "identity"},
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def view(self) -> EngineView:
        """The engine itself."""
        return parse_engine(await self._ask("GET", "/info"))

    async def has_network(self, name: str) -> bool:
        """Whether there is a network that is called so."""
        try:
            await self._ask("GET", f"/networks/{name}")
        except EngineError as error:
            if error.status == httpx.codes.NOT_FOUND:
                return False
            raise
        return True

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        """Make a container; its id. Status 404: no such image; 409: the name is in use."""
        params = {"name": name}
        return parse_id(await self._ask("POST", "/containers/create", params=params, body=config))

    async def start(self, container_id: str) -> None:
        """Start it; when this returns, its process 1 runs or has run."""
        await self._ask("POST", f"/containers/{container_id}/start")

    async def inspect(self, container: str) -> ContainerView:
        """A container by id or name. Status 404: there is none."""
        return parse_container(await self._ask("GET", f"/containers/{container}/json"))

    async def wait_ended(self, container_id: str) -> ContainerView:
        """Wait until the engine knows that it does not run."""
        params = {"condition": "not-running"}
        await self._ask("POST", f"/containers/{container_id}/wait", params=params)
        return await self.inspect(container_id)

    async def stop(self, container_id: str, timeout_s: float) -> None:
        """Ask it to end with its own stop signal; after `timeout_s` (whole seconds) kill it."""
        params = {"t": str(int(timeout_s))}
        await self._ask(
            "POST",
            f"/containers/{container_id}/stop",
            params=params,
            timeout_s=ANSWER_TIMEOUT_S + timeout_s,
        )

    async def remove(self, container_id: str) -> None:
        """Remove it with its anonymous volumes, running or not; no error if it is gone."""
        params = {"force": "1", "v": "1"}
        try:
            await self._ask("DELETE", f"/containers/{container_id}", params=params)
        except EngineError as error:
            # 409: somebody else's removal of it is under way.
            if error.status not in (404, 409):
                raise

    async def last_words(self, container_id: str, lines: int = 1) -> str:
        """The end of what it printed, on both streams, as one line."""
        params = {"stdout": "1", "stderr": "1", "tail": str(lines)}
        raw = await self._ask("GET", f"/containers/{container_id}/logs", params=params)
        return one_line(unframed(raw[:MAX_LOG_BYTES]).decode(errors="replace").strip())

    async def containers(self, label: str) -> list[str]:
        """Ids of all containers with this label (`key=value`), running or not."""
        filters = json.dumps({"label": [label]})
        params = {"all": "1", "filters": filters}
        return parse_ids(await self._ask("GET", "/containers/json", params=params))

    @asynccontextmanager
    async def events(self, label: str | None = None) -> AsyncIterator[AsyncIterator[EngineEvent]]:
        """What happens to containers (those with `label`), from now on, as long as the block."""
        filters: dict[str, list[str]] = {"type": ["container"]}
        if label is not None:
            filters["label"] = [label]
        request = self._http.build_request(
            "GET",
            f"{API}/events",
            params={"filters": json.dumps(filters)},
        )
        try:
            answer = await self._http.send(request, stream=True)
        except HTTP_ERRORS as error:
            raise self._gone(error) from error
        try:
            if not answer.is_success:
                with trio.move_on_after(ANSWER_TIMEOUT_S):
                    raise _refusal(answer, await self._body(answer))
                raise _refusal(answer, b"")
            yield self._events_of(answer)
        finally:
            await answer.aclose()

    async def _events_of(self, answer: httpx.Response) -> AsyncIterator[EngineEvent]:
        """One event a line; ends with NoEngine, since the stream has no other end."""
        text = b""
        try:
            async for part in answer.aiter_raw():
                text += part
                *whole, text = text.split(b"\n")
                for line in whole:
                    if line.strip():
                        yield parse_event(line)
                if len(text) > MAX_EVENT_BYTES:
                    raise OddAnswer("the container engine sends an event without an end")
        except HTTP_ERRORS as error:
            raise self._gone(error) from error
        raise NoEngine(f"the container engine at {self.socket_path} has ended")

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> bytes:
        """The body of the answer, cut where it is longer than any that makes sense."""
        try:
            # From the first byte to the last: one that dribbles has not answered either.
            with trio.fail_after(timeout_s):
                request = self._http.build_request(method, f"{API}{path}", params=params, json=body)
                answer = await self._http.send(request, stream=True)
                try:
                    raw = await self._body(answer)
                finally:
                    await answer.aclose()
        except (httpx.TimeoutException, trio.TooSlowError) as error:
            raise NoEngine(
                f"the container engine at {self.socket_path} has not answered in {timeout_s:g} s"
            ) from error
        except HTTP_ERRORS as error:
            raise self._gone(error) from error
        if answer.is_success or answer.status_code == httpx.codes.NOT_MODIFIED:
            return raw
        raise _refusal(answer, raw)

    async def _body(self, answer: httpx.Response) -> bytes:
        """As it is: nothing was asked for in a packed form, which might unpack to anything."""
        raw = bytearray()
        async for part in answer.aiter_raw():
            raw += part
            if len(raw) > MAX_ANSWER_BYTES:
                break
        return bytes(raw)

    def _gone(self, error: Exception) -> NoEngine:
        if isinstance(error, httpx.ConnectError):
            return NoEngine(
                f"no container engine answers at {self.socket_path}: "
                "start one, or set DOCKER_HOST for the agent"
            )
        why = one_line(str(error)) or type(error).__name__
        return NoEngine(f"the container engine at {self.socket_path} went away: {why}")


def _refusal(answer: httpx.Response, raw: bytes) -> EngineError:
    said = parse_refusal(raw) or f"HTTP status {answer.status_code}"
    return EngineError(f"the container engine says: {said}", answer.status_code)
