"""A running agent with everything around it: rights, places, watchdog, control API, and its end.

`running` is for whoever needs an agent in this process (the demonstration, the bench, tests),
`run_agent` is `balloon agent`.
"""

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio

from host_agent.agent import Agent
from host_agent.config import Config, HostConfig
from host_agent.errors import (
    AgentError,
    BadRequest,
    MissingRight,
    NoMemoryController,
    SocketInUse,
)
from host_agent.facade.control import build_app
from host_agent.facade.port import VmSpec
from host_agent.facade.server import is_answered, serve
from host_agent.guest_command import template_command
from host_agent.machines.attached import LINKS_DIR, AttachedBackend
from host_agent.machines.base import MachineBackend
from host_agent.machines.cgroup_layout import hierarchy_of
from host_agent.machines.docker import DockerBackend
from host_agent.machines.driver_template import DriverTemplate
from host_agent.machines.other_hierarchies import remove_elsewhere
from host_agent.machines.process import ProcessBackend
from host_agent.quota.base import QuotaBackend
from host_agent.quota.detect import MOUNTINFO, detect
from host_agent.quota.errors import QuotaError, QuotaUnavailable
from host_agent.quota.namespace import is_outside, join_namespace_of_init
from host_agent.sole_owner import sole_owner
from host_agent.watchdog_client import GRACE_S, Watchdog

LOG = logging.getLogger("memballoon.agent")


@contextlib.asynccontextmanager
async def running(
    config: Config, *, die_with_agent: bool = False, scratch_dir: Path | None = None
) -> AsyncIterator[Agent]:
    """A working agent with its control API, inside a nursery; everything ends with the block.

    `die_with_agent`: if this process is killed, the watchdog removes the VMs as well (a
    demonstration), instead of leaving them to the next agent, and with them all files, or
    `scratch_dir` as a whole.

    Raises UserErrors before anything is made: MissingRight, NoMemoryController, SocketInUse.
    """
    host = config.host
    if os.geteuid() != 0:
        raise MissingRight("the agent needs root", what_to_do="run it with sudo")
    try:
        quotas = detect(host.cgroup_root)
        # After that: what is delegated to a container as a whole is not this agent's.
        if is_outside(hierarchy_of(quotas.root), MOUNTINFO.read_text(encoding="utf-8")):
            join_namespace_of_init()
    except QuotaUnavailable as error:
        raise NoMemoryController(str(error)) from error
    with contextlib.suppress(OSError):  # of a path that can't be, more is said when it is made
        if is_answered(host.control_socket):
            raise SocketInUse(host.control_socket)
    with contextlib.ExitStack() as owned:
        try:
            _make_private(host.run_dir)
            owned.enter_context(sole_owner(host.state_dir, partial(_make_private, host.state_dir)))
            owned.enter_context(sole_owner(quotas.root, quotas.prepare))
        except QuotaUnavailable as error:
            raise NoMemoryController(str(error)) from error
        except OSError as error:
            raise BadRequest(f"{error.filename}: {error.strerror}") from error
        owned.callback(_remove_root, quotas)
        template = DriverTemplate(template_command(host.run_dir))
        if not config.vms or any(vm.container is None for vm in config.vms):
            template.want()
        hidden = (host.state_dir,)
        docker = DockerBackend(
            host.cgroup_root,
            hidden_dirs=hidden,
            template=template,
            hierarchy=hierarchy_of(quotas.root) if quotas.cgroup_version == 2 else None,
        )
        machines: dict[str, MachineBackend] = {
            "process": ProcessBackend(hidden_dirs=hidden, template=template),
            "docker": docker,
            "attached": AttachedBackend(),
        }
        agent = Agent(config, quotas, machines)
        docker.enter_scope = agent.enter_scope
        async with contextlib.aclosing(docker), trio.open_nursery() as nursery:
            watchdog = Watchdog(
                quotas.root,
                host.run_dir / LINKS_DIR,
                on_death="remove" if die_with_agent else "release",
                remove_paths=_paths_of(host, scratch_dir) if die_with_agent else (),
                # As long as a dry guest waits in vain, and never shorter than a loop may stall.
                grace_s=max(GRACE_S, host.dry_patience_s),
                on_released=agent.rearm_all,
            )
            nursery.start_soon(template.run)
            async with watchdog, trio.open_nursery() as workers:
                await workers.start(agent.run)
                if host.on_exit == "keep" and not die_with_agent:
                    # Now, not at the end: the agent may fail as well.
                    agent.keep_vms()
                workers.start_soon(docker.run)
                try:
                    # Only now: who asks is answered by an agent that knows all of its VMs.
                    await nursery.start(partial(serve, build_app(agent), host.control_socket))
                except BaseException:
                    agent.keep_vms()
                    raise
                yield agent
                workers.cancel_scope.cancel()
            nursery.cancel_scope.cancel()


def _paths_of(host: HostConfig, scratch_dir: Path | None) -> tuple[Path, ...]:
    return (host.run_dir, host.state_dir) if scratch_dir is None else (scratch_dir,)


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove_root(quotas: QuotaBackend) -> None:
    # It stays where VMs were kept.
    with contextlib.suppress(QuotaError):
        quotas.remove_root()
        remove_elsewhere(quotas.root)


async def run_agent(config: Config) -> None:
    """`balloon agent`: run until SIGINT or SIGTERM."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with running(config) as agent, trio.open_nursery() as nursery:
            for spec in config.vms:
                if spec.name not in agent.balancer.guests:
                    nursery.start_soon(_launch_configured, agent, spec)
            async for number in signals:
                LOG.info("%s: ending", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


async def _launch_configured(agent: Agent, spec: VmSpec) -> None:
    try:
        await agent.launch(spec)
    except AgentError as error:
        LOG.error("%s: %s", spec.name, error.one_line())
