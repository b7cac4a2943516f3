"""The control API's client for commands and scripts: plain calls over the agent's Unix socket.

Errors that the agent answers with are raised here as what they were there.
"""

import errno
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
from pydantic import TypeAdapter

from host_agent.errors import (
    AgentError,
    AgentNotRunning,
    BadRequest,
    MissingRight,
    NoSuchVm,
    error_from_problem,
)
from host_agent.facade.port import VM_NAME_PATTERN, VmChange, VmSpec
from host_agent.facade.views import (
    DecisionView,
    HostView,
    PolicyView,
    ReservationView,
    TransferView,
    VitalsView,
    VmView,
)

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 120.0
"""A launch may wait for other guests to give memory, a stop for it to come back."""

_VMS: Final = TypeAdapter(list[VmView])
_DECISIONS: Final = TypeAdapter(list[DecisionView])
_RESERVATIONS: Final = TypeAdapter(list[ReservationView])
_VITALS: Final = TypeAdapter(VitalsView | None)


class AgentClient:
    """A client of the agent at `socket_path`; close it, or use it as a context manager.

    Every method raises AgentNotRunning when nobody answers, MissingRight when the socket may not
    be opened, and whatever the agent refused with.
    """

    def __init__(self, socket_path: Path, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._socket_path = socket_path
        self._answer_timeout_s = answer_timeout_s
        # trust_env: a proxy for the web is no way to a socket of this machine.
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path)),
            base_url="http://agent/v1/",
            timeout=httpx.Timeout(answer_timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def host(self) -> HostView:
        """The pool."""
        return HostView.model_validate_json(self._ask("GET", "host"))

    def vms(self) -> list[VmView]:
        """All mock VMs."""
        return _VMS.validate_json(self._ask("GET", "vms"))

    def vm(self, name: str) -> VmView:
        """One mock VM. NoSuchVm."""
        return VmView.model_validate_json(self._ask("GET", _vm_path(name)))

    def vitals(self, name: str) -> VitalsView | None:
        """A VM's last statistics, None before the first. NoSuchVm."""
        return _VITALS.validate_json(self._ask("GET", f"{_vm_path(name)}/vitals"))

    def decisions(self, name: str) -> list[DecisionView]:
        """What was decided about a VM lately, newest first. NoSuchVm."""
        return _DECISIONS.validate_json(self._ask("GET", f"{_vm_path(name)}/decisions"))

    def policy(self) -> PolicyView:
        """The policy in force, and which there are."""
        return PolicyView.model_validate_json(self._ask("GET", "policy"))

    def use_policy(self, name: str) -> PolicyView:
        """Let another policy decide. BadRequest."""
        return PolicyView.model_validate_json(self._ask("PUT", "policy", {"name": name}))

    def launch(self, spec: VmSpec) -> VmView:
        """Start a mock VM and wait until it runs. VmExists, NotEnoughMemory, BadRequest."""
        body = spec.model_dump(mode="json")
        return VmView.model_validate_json(self._ask("POST", "vms", body))

    def change(self, name: str, change: VmChange) -> VmView:
        """Change a mock VM. NoSuchVm, BadRequest, NotEnoughMemory."""
        body = change.model_dump(mode="json", exclude_none=True)
        return VmView.model_validate_json(self._ask("PATCH", _vm_path(name), body))

    def reservations(self) -> list[ReservationView]:
        """What clients have reserved."""
        return _RESERVATIONS.validate_json(self._ask("GET", "reservations"))

    def login(self, client: str) -> list[ReservationView]:
        """A client begins anew; what it had reserved is purged. BadRequest."""
        return _RESERVATIONS.validate_json(self._ask("POST", f"clients/{_name(client)}/login"))

    def reserve(self, client: str, size_bytes: int) -> ReservationView:
        """Keep memory free for a client, and wait until it is. NotEnoughMemory, BadRequest."""
        body = {"client": client, "size_bytes": size_bytes}
        return ReservationView.model_validate_json(self._ask("POST", "reservations", body))

    def transfer(self, reservation_id: str, vm: str) -> TransferView:
        """Hand a reservation over to a VM. NoSuchReservation, BadRequest, NotEnoughMemory."""
        path = f"reservations/{_name(reservation_id)}/vm"
        return TransferView.model_validate_json(self._ask("PUT", path, {"vm": vm}))

    def release(self, reservation_id: str) -> None:
        """Free a reservation again. NoSuchReservation."""
        self._ask("DELETE", f"reservations/{_name(reservation_id)}")

    def stop(self, name: str) -> None:
        """Stop a mock VM and wait until its memory is back. NoSuchVm."""
        self._ask("DELETE", _vm_path(name))

    def _ask(self, method: str, path: str, body: Any = None) -> bytes:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.ConnectError as error:
            if _errno_behind(error) in (errno.EACCES, errno.EPERM):
                raise MissingRight(
                    f"no right to talk to the agent at {self._socket_path}",
                    what_to_do="run as root",
                ) from error
            raise AgentNotRunning(self._socket_path) from error
        except httpx.TimeoutException as error:
            raise AgentError(
                f"the agent at {self._socket_path} has not answered within "
                f"{self._answer_timeout_s:g} s"
            ) from error
        except httpx.TransportError as error:
            raise AgentError(
                f"the agent at {self._socket_path} went away before it answered"
            ) from error
        if answer.is_success:
            return answer.content
        raise _refusal(answer)


def _refusal(answer: httpx.Response) -> AgentError:
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        return AgentError(f"the agent answered with HTTP status {answer.status_code}")
    return error_from_problem(problem)


def _vm_path(name: str) -> str:
    # What can't be a name is nobody's: nothing but a name ever gets into a path.
    if re.fullmatch(VM_NAME_PATTERN, name) is None:
        raise NoSuchVm(name)
    return f"vms/{name}"


def _name(text: str) -> str:
    if re.fullmatch(VM_NAME_PATTERN, text) is None:
        raise BadRequest(
            f"{text!r} is not a name: lower-case letters, digits and dashes, 32 at most"
        )
    return text


def _errno_behind(error: BaseException) -> int | None:
    # The OSError is the cause of the cause.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.errno
        cause = cause.__cause__ or cause.__context__
    return None
