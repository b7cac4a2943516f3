"""The project's images, built from the Dockerfile without a network."""

from dataclasses import dataclass

from base_image import ROOT
from engine import Engine

TARGETS = ("guest", "guest-redis", "agent")


@dataclass(frozen=True, slots=True)
class Images:
    """Tags of the three."""

    guest: str
    guest_redis: str
    agent: str


def build_images(engine: Engine, base: str, prefix: str) -> Images:
    """Build all of them on the images that base_image.py made."""
    tags = [f"{prefix}-{target}" for target in TARGETS]
    for target, tag in zip(TARGETS, tags, strict=True):
        engine.docker(
            *("build", "--quiet", "--network", "none", "--target", target, "--tag", tag),
            *("--build-arg", f"BASE_IMAGE={base}", "--build-arg", f"BUILD_IMAGE={base}-build"),
            str(ROOT),
        )
    return Images(*tags)
