"""The course of a simulation as a picture. Needs matplotlib, which is imported here and late."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from host_agent.errors import BadRequest
from host_agent.simulator.fleet import MissingExtra
from host_agent.simulator.guests import SECOND_US
from host_agent.simulator.metrics import Sample
from protocol.units import GIB, bytes_of

FORMATS: Final = (".png", ".svg")

_LINES: Final = (
    ("need", "needed", "tab:orange"),
    ("quota", "in quotas", "tab:blue"),
    ("unmet", "lacking", "tab:red"),
    ("swapped", "would be swapped", "tab:purple"),
    ("reserve_left", "host reserve left", "tab:green"),
)


def check_plot(path: Path) -> None:
    """Refuse what can't be drawn before anything is simulated. BadRequest, MissingExtra."""
    if path.suffix not in FORMATS:
        raise BadRequest(f"{path}: a plot is a {' or '.join(FORMATS)} file")
    _matplotlib()


def draw(path: Path, title: str, samples: Mapping[str, list[Sample]]) -> None:
    """One panel for each policy, with time in seconds and memory in GiB.

    Drawn without a display. Raises BadRequest if the file can't be written.
    """
    matplotlib = _matplotlib()
    # Without these an SVG has the date and random names in it: the same run, the same picture.
    settings = {"svg.hashsalt": "memballoon", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        height = 1.0 + 3.0 * len(samples)
        figure = matplotlib.figure.Figure(figsize=(10.0, height), layout="constrained")
        panels = figure.subplots(len(samples), 1, sharex=True, squeeze=False)[:, 0]
        figure.suptitle(title)
        for panel, (policy, taken) in zip(panels, samples.items(), strict=True):
            _draw_one(panel, policy, taken)
        panels[0].legend(loc="upper right", fontsize="small", ncols=len(_LINES))
        panels[-1].set_xlabel("s")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        try:
            figure.savefig(path, metadata=metadata)
        except OSError as error:
            raise BadRequest(f"{path}: {error.strerror}") from error


def _draw_one(panel: Any, policy: str, taken: list[Sample]) -> None:
    times_s = [sample.now_us / SECOND_US for sample in taken]
    for name, label, colour in _LINES:
        sizes = [bytes_of(getattr(sample, name)) / GIB for sample in taken]
        panel.plot(times_s, sizes, label=label, color=colour, linewidth=1.2)
    panel.set_title(policy, loc="left", fontsize="medium")
    panel.set_ylabel("GiB")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def _matplotlib() -> Any:
    try:
        import matplotlib.figure  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot") from error
    return matplotlib
