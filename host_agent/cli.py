"""`balloon`: the host's commands.

Owns the list of commands and how an error ends one: a line on stderr and exit status 2 for what the
user can set right. A command's module is imported when it is used and not before, so that
`balloon --help` answers at once.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NamedTuple, NoReturn

import click

INTERRUPTED_STATUS: Final = 130
"""128 + SIGINT, as a shell would say it."""


class CommandEntry(NamedTuple):
    """Where a command lives and the line that `balloon --help` has for it."""

    module: str
    function: str
    line: str


COMMANDS: Final[dict[str, CommandEntry]] = {
    name: CommandEntry(f"host_agent.commands.{name}", function, line)
    for name, function, line in (
        ("doctor", "doctor", "Say whether this machine can run mock VMs."),
        ("demo", "demo", "See memory move between mock VMs, in a minute."),
        ("agent", "agent", "Run the host agent."),
        ("launch", "launch", "Launch a mock VM."),
        ("ps", "ps", "List the mock VMs."),
        ("stats", "stats", "Show the pool, and what each mock VM does with its memory."),
        ("set", "set_command", "Change a mock VM's balloon, shares, reservation or maximum."),
        ("policy", "policy", "Show the policy, or let another one decide."),
        ("explain", "explain", "Say what was decided about a mock VM lately, and why."),
        ("client", "client", "Reserve memory for VMs that are still to come."),
        ("stop", "stop", "Stop mock VMs."),
        ("bench", "bench", "Measure how fast memory moves on this machine."),
        ("simulate", "simulate", "Try policies on a virtual clock, on hosts of any size."),
        ("record", "record", "Write down what a real run needs, for simulations."),
    )
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; None for a name that is no command."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(import_module(entry.module), entry.function)
        assert isinstance(command, click.Command), entry
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands with their lines, without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.line) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="memballoon", message="memballoon %(version)s")
def cli() -> None:
    """Memory ballooning on one Linux box, with containers as mock VMs."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 1 for a failure, 2 for what the user can set right."""
    try:
        status = cli.main(arguments, prog_name="balloon", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        _end(context.command_path if context else "balloon", error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED_STATUS)
    except BaseException as error:  # told in one line if it is one for the user, else raised
        _end_with_told(error)
        raise
    sys.exit(status if isinstance(status, int) else 0)


def _end_with_told(error: BaseException) -> None:
    # Imported here: it takes longer than all of `balloon --help`.
    from host_agent.errors import AgentError  # noqa: PLC0415

    if isinstance(error, BaseExceptionGroup):
        # What a nursery raises. Anything in it that is no AgentError is a defect, and stays loud.
        told, defects = error.split(AgentError)
        if told is None or defects is not None:
            return
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
    if isinstance(error, AgentError):
        _end("balloon", error.one_line(), error.exit_code)


def _end(speaker: str, message: str, status: int) -> NoReturn:
    click.echo(f"{speaker}: {' '.join(message.split())}", err=True)
    sys.exit(status)
