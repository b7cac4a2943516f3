"""Scenarios by name or by file: those that come with memballoon, and anybody's."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from host_agent.errors import ConfigError
from host_agent.simulator.scenario import Recorded, Scenario, parse_scenario
from host_agent.simulator.traces import Recordings, recordings_of

MAX_FILE_BYTES = 16 << 20
"""A scenario is written by people; steps of a recording belong into a CSV file."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scenario with everything that it needs. `name` is its file's name without the ending."""

    name: str
    scenario: Scenario
    recordings: Mapping[Recorded, Recordings]


def shipped() -> dict[str, Path]:
    """The scenarios that come with memballoon: their files by name."""
    folder = Path(str(files("host_agent.simulator"))) / "scenarios"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_scenario(named: str) -> Loaded:
    """The scenario of this name, or in the file at this path.

    Raises:
        ConfigError: there is neither, or it can't be used; one line.
    """
    path = shipped().get(named, Path(named))
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: a scenario of more than 16MiB is not read")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no scenario and no file {named!r}",
            what_to_do=f"give a TOML file, or one of {', '.join(shipped())}",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    scenario = parse_scenario(text, str(path))
    return Loaded(path.stem, scenario, recordings_of(scenario, path.parent))
