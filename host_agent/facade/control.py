"""The control API: routes, and which HTTP status stands for which error.

    GET    /v1/host                  the pool
    GET    /v1/vms                   all mock VMs
    POST   /v1/vms                   launch one (VmSpec), 201; undone if the client goes away before
    GET    /v1/vms/{name}            one
    PATCH  /v1/vms/{name}            change it (VmChange)
    DELETE /v1/vms/{name}            stop it, 204
    GET    /v1/vms/{name}/vitals     its driver's last statistics, null before the first
    GET    /v1/vms/{name}/decisions  what was decided about it lately, newest first
    GET    /v1/policy                the policy in force, and which there are
    PUT    /v1/policy                let another one decide (PolicyChange)
    GET    /v1/reservations          what clients have reserved
    POST   /v1/reservations          reserve memory (ClientRequest), 201; undone if the client goes
    PUT    /v1/reservations/{id}/vm  hand it over to a VM (ClientTransfer); null if that runs
    DELETE /v1/reservations/{id}     release it, 204
    POST   /v1/clients/{name}/login  a client begins anew: what it had reserved is purged
    GET    /openapi.json             this, for machines

An error is answered with a problem document (Problem); which keys it has depends on its kind.
No route decides anything: the agent behind AgentPort does.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Final, TypeVar

import trio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from host_agent.errors import (
    AgentError,
    BadRequest,
    MethodNotAllowed,
    MissingRight,
    NoSuchReservation,
    NoSuchRoute,
    NoSuchVm,
    NotEnoughMemory,
    UserError,
    VmExists,
)
from host_agent.facade.port import (
    AgentPort,
    ClientRequest,
    ClientTransfer,
    PolicyChange,
    VmChange,
    VmName,
    VmSpec,
)
from host_agent.facade.views import (
    DecisionView,
    HostView,
    PolicyView,
    ReservationView,
    TransferView,
    VitalsView,
    VmView,
)
from host_agent.validation import one_line

T = TypeVar("T")

STATUSES: Final[tuple[tuple[type[AgentError], HTTPStatus], ...]] = (
    (NoSuchVm, HTTPStatus.NOT_FOUND),
    (NoSuchReservation, HTTPStatus.NOT_FOUND),
    (VmExists, HTTPStatus.CONFLICT),
    (BadRequest, HTTPStatus.UNPROCESSABLE_ENTITY),
    (NotEnoughMemory, HTTPStatus.INSUFFICIENT_STORAGE),
    (MissingRight, HTTPStatus.FORBIDDEN),
    (UserError, HTTPStatus.BAD_REQUEST),
    (AgentError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
"""The first type that fits decides."""

_SENT: Final[tuple[type[AgentError], ...]] = (
    *(error for error, _ in STATUSES),
    NoSuchRoute,
    MethodNotAllowed,
)
_KINDS: Final = [error.kind for error in _SENT]

_UNROUTED: Final[Mapping[int, type[UserError]]] = {
    HTTPStatus.NOT_FOUND: NoSuchRoute,
    HTTPStatus.METHOD_NOT_ALLOWED: MethodNotAllowed,
}


class Problem(BaseModel):
    """The body of every answer that is not a success."""

    kind: str = Field(description="For programs; names the error.", examples=_KINDS)
    error: str = Field(description="For a person, one line.")
    what_to_do: str | None = Field(default=None, description="Advice, one line; absent if none.")
    name: str | None = Field(
        default=None, description=f"The VM; with {NoSuchVm.kind} and {VmExists.kind} alone."
    )
    missing_bytes: int | None = Field(
        default=None, description=f"How much more was needed; with {NotEnoughMemory.kind} alone."
    )
    refused_by: list[str] | None = Field(
        default=None,
        description=f"VMs that could not give it, perhaps none; with {NotEnoughMemory.kind} alone.",
    )


def build_app(agent: AgentPort) -> FastAPI:
    """The ASGI application over `agent`. It holds no state and starts nothing."""
    app = FastAPI(
        title="memballoon control API",
        version=version("memballoon"),
        # The interactive pages would load scripts from the net.
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}},
    )
    _add_routes(app, agent)
    _add_reservations(app, agent)
    _add_problems(app)
    return app


def _add_routes(app: FastAPI, agent: AgentPort) -> None:
    # Every route is async, also those that only read: a plain function would be run in a thread,
    # beside the loop that owns the agent's state.
    @app.get("/v1/host")
    async def host() -> HostView:
        return agent.host()

    @app.get("/v1/vms")
    async def vms() -> list[VmView]:
        return agent.vms()

    @app.post("/v1/vms", status_code=HTTPStatus.CREATED)
    async def launch(spec: VmSpec, request: Request) -> VmView:
        return await _unless_gone(request, partial(agent.launch, spec))

    @app.get("/v1/vms/{name}")
    async def vm(name: str) -> VmView:
        return agent.vm(name)

    @app.patch("/v1/vms/{name}")
    async def change(name: str, change: VmChange) -> VmView:
        return await agent.change(name, change)

    @app.delete("/v1/vms/{name}", status_code=HTTPStatus.NO_CONTENT)
    async def stop(name: str) -> None:
        await agent.stop(name)

    @app.get("/v1/vms/{name}/vitals")
    async def vitals(name: str) -> VitalsView | None:
        return agent.vitals(name)

    @app.get("/v1/vms/{name}/decisions")
    async def decisions(name: str) -> list[DecisionView]:
        return await agent.decisions(name)

    @app.get("/v1/policy")
    async def policy() -> PolicyView:
        return agent.policy()

    @app.put("/v1/policy")
    async def use_policy(change: PolicyChange) -> PolicyView:
        return await agent.use_policy(change.name)


def _add_reservations(app: FastAPI, agent: AgentPort) -> None:
    @app.get("/v1/reservations")
    async def reservations() -> list[ReservationView]:
        return agent.reservations()

    @app.post("/v1/reservations", status_code=HTTPStatus.CREATED)
    async def reserve(wanted: ClientRequest, request: Request) -> ReservationView:
        return await _unless_gone(request, partial(agent.reserve, wanted))

    @app.put("/v1/reservations/{reservation_id}/vm")
    async def transfer(reservation_id: str, to: ClientTransfer) -> TransferView:
        return await agent.transfer(reservation_id, to.vm)

    @app.delete("/v1/reservations/{reservation_id}", status_code=HTTPStatus.NO_CONTENT)
    async def release(reservation_id: str) -> None:
        await agent.release(reservation_id)

    @app.post("/v1/clients/{name}/login")
    async def login(name: VmName) -> list[ReservationView]:
        return await agent.login(name)


async def _unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, which is cancelled if the client goes away before there is one.

    A command that is interrupted closes its connection: what it waited for is not wanted any more.
    """
    results: list[T] = []
    failure: Exception | None = None

    async def watch(scope: trio.CancelScope) -> None:
        # The body was read already: what comes next is the end of the connection.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        try:
            results.append(await work())
        except Exception as error:
            failure = error  # raised below, outside of the nursery: alone, not in a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not results:
        raise AgentError("whoever asked for it has gone away")  # nobody reads it
    return results[0]


def _add_problems(app: FastAPI) -> None:
    handler: Callable[[type[Exception]], Callable[[_Handler], _Handler]] = app.exception_handler

    @handler(AgentError)
    async def refused(_request: Request, error: Any) -> JSONResponse:
        status = next(status for kind, status in STATUSES if isinstance(error, kind))
        return JSONResponse(error.to_problem(), status)

    @handler(RequestValidationError)
    async def malformed(_request: Request, error: Any) -> JSONResponse:
        problem = BadRequest(one_line(error.errors())).to_problem()
        return JSONResponse(problem, HTTPStatus.UNPROCESSABLE_ENTITY)

    @handler(HTTPException)
    async def unrouted(request: Request, error: Any) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {error.detail}"
        problem_type = _UNROUTED.get(error.status_code, UserError)
        problem = problem_type(said, what_to_do="see /openapi.json").to_problem()
        return JSONResponse(problem, error.status_code, headers=error.headers)

    @handler(Exception)
    async def defect(_request: Request, error: Any) -> JSONResponse:
        # The server logs the traceback; the one who asked gets its last line.
        problem = AgentError(f"internal error: {type(error).__name__}: {error}").to_problem()
        return JSONResponse(problem, HTTPStatus.INTERNAL_SERVER_ERROR)


_Handler = Callable[[Request, Any], Awaitable[JSONResponse]]
