"""`balloon client`: memory that named clients reserve for VMs that are still to come."""

from pathlib import Path

import click

from host_agent.commands.options import agent_at, build, json_option, run_dir_option
from host_agent.commands.tables import NO_VALUE, counted, print_json, print_table
from host_agent.facade.port import ClientRequest, ClientTransfer
from host_agent.sizes import SIZE, format_size


@click.group()
def client() -> None:
    """Memory that named clients reserve for VMs that are still to come."""


@client.command()
@click.argument("name")
@run_dir_option
@json_option
def login(name: str, run_dir: Path, as_json: bool) -> None:
    """NAME begins anew: what it had reserved is free again."""
    with agent_at(run_dir) as agent:
        purged = agent.login(name)
    if as_json:
        print_json(purged)
        return
    size = format_size(sum(one.size_bytes for one in purged))
    click.echo(
        f"{name}: {counted(len(purged), 'reservation')} purged" + (f", {size}" if purged else "")
    )


@client.command()
@click.argument("name")
@click.argument("size", type=SIZE)
@run_dir_option
@json_option
def reserve(name: str, size: int, run_dir: Path, as_json: bool) -> None:
    """Keep SIZE free for the client NAME; prints the reservation's id when it is."""
    wanted = build(ClientRequest, client=name, size_bytes=size)
    with agent_at(run_dir) as agent:
        reserved = agent.reserve(wanted.client, wanted.size_bytes)
    if as_json:
        print_json(reserved)
    else:
        click.echo(reserved.id)


@client.command()
@click.argument("reservation_id", metavar="ID")
@click.argument("vm")
@run_dir_option
def transfer(reservation_id: str, vm: str, run_dir: Path) -> None:
    """Hand a reservation over to VM: kept until that is launched, given to one that runs."""
    to = build(ClientTransfer, vm=vm).vm
    with agent_at(run_dir) as agent:
        done = agent.transfer(reservation_id, to)
    given = f"{format_size(done.given_bytes)} given to {to}"
    click.echo(f"{reservation_id}: {given if done.kept is None else f'kept for {to}'}")


@client.command()
@click.argument("reservation_id", metavar="ID")
@run_dir_option
def release(reservation_id: str, run_dir: Path) -> None:
    """Free a reservation again."""
    with agent_at(run_dir) as agent:
        agent.release(reservation_id)
    click.echo(f"{reservation_id}: released")


@client.command("list")
@run_dir_option
@json_option
def list_command(run_dir: Path, as_json: bool) -> None:
    """List what is reserved."""
    with agent_at(run_dir) as agent:
        reserved = agent.reservations()
    if as_json:
        print_json(reserved)
        return
    rows = [
        (
            one.id,
            one.client,
            one.vm or NO_VALUE,
            format_size(one.size_bytes),
            format_size(one.missing_bytes),
        )
        for one in reserved
    ]
    print_table(("ID", "CLIENT", "VM", "SIZE", "MISSING"), rows, left=3)
