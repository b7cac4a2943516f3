"""Errors that the host agent and its commands tell to a person.

    AgentError                    one line, and where it helps what to do about it
    └── UserError                 something the user can set right; exit status 2
        ├── ConfigError           the configuration file
        ├── BadRequest            a request that makes no sense, whoever is asked
        ├── NoSuchRoute           a request to a path that the control API has not
        ├── MethodNotAllowed      a request to a path that takes other methods
        ├── NoSuchVm              no mock VM of this name
        ├── VmExists              a mock VM of this name is already there
        ├── NotEnoughMemory       the pool or a guest has no room; how much is missing, who refused
        ├── AgentNotRunning       nobody answers at the control socket
        ├── SocketInUse           another agent lives at the control socket
        ├── MissingRight          root, a capability, or a file that may not be read
        └── NoMemoryController    no memory cgroup controller to work with

An error crosses the control API as a problem document and is raised again, as the same type, by
the client: `to_problem` and `error_from_problem` are the two ends. HTTP statuses are the facade's
matter, not this module's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from host_agent.sizes import format_size


class AgentError(Exception):
    """An error with one line for a person.

    `message` is one line without a full stop at its end; `what_to_do` is None or one more line.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "agent-error"

    def __init__(self, message: str, *, what_to_do: str | None = None) -> None:
        self.message = " ".join(message.split())
        self.what_to_do = None if what_to_do is None else " ".join(what_to_do.split())
        super().__init__(self.message)

    def one_line(self) -> str:
        """Message and advice together, on one line."""
        return self.message if self.what_to_do is None else f"{self.message}: {self.what_to_do}"

    def to_problem(self) -> dict[str, Any]:
        """The problem document: `kind`, `error`, and `what_to_do` where there is advice."""
        problem: dict[str, Any] = {"kind": self.kind, "error": self.message}
        if self.what_to_do is not None:
            problem["what_to_do"] = self.what_to_do
        return problem


class UserError(AgentError):
    """Something that the user can set right. Commands exit with status 2."""

    exit_code = 2
    kind = "user-error"


class ConfigError(UserError):
    """The configuration can't be used; the message names the place and the key."""

    kind = "config"


class BadRequest(UserError):
    """The request makes no sense as it stands, or is out of bounds for this VM."""

    kind = "bad-request"


class NoSuchRoute(UserError):
    """The control API has no such path."""

    kind = "not-found"


class MethodNotAllowed(UserError):
    """The control API has the path, but not for this method."""

    kind = "method-not-allowed"


class NoSuchVm(UserError):
    """No mock VM has this name."""

    kind = "no-such-vm"

    def __init__(self, name: str) -> None:
        super().__init__(f"no VM named {name!r}", what_to_do="see `balloon ps`")
        self.name = name

    def to_problem(self) -> dict[str, Any]:
        """As the base, with the name."""
        return {**super().to_problem(), "name": self.name}


class NoSuchReservation(UserError):
    """No client has a reservation of this id."""

    kind = "no-such-reservation"


class VmExists(UserError):
    """A mock VM of this name is there already."""

    kind = "vm-exists"

    def __init__(self, name: str) -> None:
        super().__init__(f"a VM named {name!r} exists already")
        self.name = name

    def to_problem(self) -> dict[str, Any]:
        """As the base, with the name."""
        return {**super().to_problem(), "name": self.name}


class NotEnoughMemory(UserError):
    """There is no room, and nobody could be made to give it.

    `missing_bytes` is how much more was needed; `refused_by` names the VMs that were asked and
    gave less than wanted (empty when there was nobody to ask).
    """

    kind = "not-enough-memory"

    def __init__(
        self,
        missing_bytes: int,
        refused_by: Sequence[str] = (),
        *,
        message: str | None = None,
        what_to_do: str | None = None,
    ) -> None:
        if message is None:
            asked = f"; asked in vain: {', '.join(refused_by)}" if refused_by else ""
            message = f"not enough memory: {format_size(missing_bytes)} missing{asked}"
        super().__init__(message, what_to_do=what_to_do)
        self.missing_bytes = missing_bytes
        self.refused_by = tuple(refused_by)

    def to_problem(self) -> dict[str, Any]:
        """As the base, with `missing_bytes` and `refused_by`."""
        return {
            **super().to_problem(),
            "missing_bytes": self.missing_bytes,
            "refused_by": list(self.refused_by),
        }


class AgentNotRunning(UserError):
    """Nobody answers at the control socket."""

    kind = "agent-not-running"

    def __init__(self, socket_path: object) -> None:
        super().__init__(
            f"no agent answers at {socket_path}", what_to_do="start one with `balloon agent`"
        )


class SocketInUse(UserError):
    """Another agent lives at the control socket."""

    kind = "socket-in-use"

    def __init__(self, socket_path: object) -> None:
        super().__init__(
            f"another agent answers at {socket_path}",
            what_to_do="stop it, or choose another --run-dir",
        )


class MissingRight(UserError):
    """Root, a capability, or the right to open a file is missing."""

    kind = "missing-right"


class NoMemoryController(UserError):
    """There is no memory cgroup controller that the agent can use."""

    kind = "no-memory-controller"


_SAID_IN_WORDS: Final[tuple[type[AgentError], ...]] = (
    UserError,
    ConfigError,
    BadRequest,
    NoSuchReservation,
    NoSuchRoute,
    MethodNotAllowed,
    MissingRight,
)
"""Errors that have nothing but their lines."""


def error_from_problem(problem: Mapping[str, Any]) -> AgentError:
    """The error that a problem document stands for, as its own type where the kind is known.

    A document of an unknown kind (a newer agent) becomes an AgentError with its line.
    """
    message = str(problem.get("error", "the agent refused without a reason"))
    advice = problem.get("what_to_do")
    what_to_do = None if advice is None else str(advice)
    match problem.get("kind"):
        case NoSuchVm.kind:
            return NoSuchVm(str(problem.get("name", "?")))
        case VmExists.kind:
            return VmExists(str(problem.get("name", "?")))
        case NotEnoughMemory.kind:
            return NotEnoughMemory(
                int(problem.get("missing_bytes", 0)),
                tuple(str(name) for name in problem.get("refused_by", ())),
                message=message,
                what_to_do=what_to_do,
            )
        case kind:
            for error_type in _SAID_IN_WORDS:
                if error_type.kind == kind:
                    return error_type(message, what_to_do=what_to_do)
            return AgentError(message, what_to_do=what_to_do)
