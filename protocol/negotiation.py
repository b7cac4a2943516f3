"""Version and features: what both ends speak.

The guest says a range of versions and its features; the host picks the newest version that both
know and the features that both have. A feature is used only if the Welcome names it.
"""

from dataclasses import dataclass

from protocol.errors import RemoteProtocolError
from protocol.messages import Hello, Welcome
from protocol.vocabulary import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, SUPPORTED_FEATURES


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the Welcome will say."""

    version: int
    features: tuple[str, ...]


def negotiate(
    hello: Hello,
    *,
    version_min: int = OLDEST_PROTOCOL_VERSION,
    version_max: int = PROTOCOL_VERSION,
    features: tuple[str, ...] = SUPPORTED_FEATURES,
) -> Agreement:
    """The newest common version and the common features, in the guest's order.

    The keywords are what this end speaks. Raises RemoteProtocolError if there is no common
    version; its text is fit for the Goodbye that the host answers then.
    """
    newest = min(hello.version_max, version_max)
    if newest < max(hello.version_min, version_min):
        raise RemoteProtocolError(
            f"no common protocol version: the guest speaks {hello.version_min} to "
            f"{hello.version_max}, this host {version_min} to {version_max}"
        )
    return Agreement(newest, tuple(name for name in hello.features if name in features))


def welcome_fault(hello: Hello, welcome: Welcome) -> str | None:
    """Why this Welcome is no answer to this Hello, or None."""
    if not hello.version_min <= welcome.version <= hello.version_max:
        return (
            f"version {welcome.version} is not one of the guest's "
            f"{hello.version_min} to {hello.version_max}"
        )
    unknown = set(welcome.features) - set(hello.features)
    if unknown:
        return f"the guest has no feature {min(unknown)!r}"
    return None
