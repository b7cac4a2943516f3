"""How far the simulator goes on this machine: `make bench-sim`.

Measured in one process on one processor, but for the fleet. Each figure has its bound beside it;
the exit status is 0 only if all hold.
"""

import argparse
import json
import sys
import time
from typing import Any, Final

from host_agent.bench.figures import Figure, Reach
from host_agent.policy.registry import BUILT_IN
from host_agent.simulator.fleet import Job, run_job, run_jobs
from host_agent.simulator.library import load_scenario
from host_agent.simulator.metrics import figures_of
from host_agent.simulator.scenario import Scenario
from protocol.units import GIB

DECISIONS_S: Final = 20.0
"""Virtual time for which decisions on 10,000 guests are watched."""


def many_guests(guests: int, duration_s: float) -> Scenario:
    """One host, planned at 1 Hz: half of its guests in slow waves, half in bursts that coincide.

    Half of what was promised is there, so that it is short now and then.
    """
    day = {"kind": "diurnal", "low": "128MiB", "high": "768MiB", "period_s": 3600.0}
    burst = {
        "kind": "correlated",
        "low": "128MiB",
        "high": "896MiB",
        "every_s": 300,
        "length_s": 60,
    }
    alike = {"count": guests // 2, "memory": "1GiB", "reservation": "64MiB"}
    return Scenario.model_validate(
        {
            "duration_s": duration_s,
            "seed": 1,
            "host": {"pool": guests * GIB // 2, "plan_gap_s": 1.0, "credit_s": 0.25},
            "guest": [
                {"name": "day", "swap": "256MiB", "trace": day | {"spread_s": 3600, "noise": 0.01}}
                | alike,
                {"name": "burst", "trace": burst | {"joins": 0.5, "stagger_s": 20.0}} | alike,
            ],
        }
    )


def decision(policy: str, guests: int = 10_000) -> Figure:
    """The longest of a policy's decisions about so many guests."""
    run = run_job(Job(many_guests(guests, DECISIONS_S), {}, policy))
    plans = run.totals.counts.plans
    return Figure(
        name=f"decision_{policy}_{guests}_guests",
        value=1000 * run.decide_s / plans,
        unit="ms, mean",
        reach=Reach("at most", 50.0),
        detail={"plans": plans, "longest_ms": 1000 * run.longest_decide_s},
    )


def hour(policy: str, guests: int = 1_000) -> Figure:
    """Real time for a simulated hour at 1 Hz."""
    began_s = time.perf_counter()
    run = run_job(Job(many_guests(guests, 3600.0), {}, policy))
    return Figure(
        name=f"hour_{policy}_{guests}_guests",
        value=time.perf_counter() - began_s,
        unit="s",
        reach=Reach("at most", 60.0),
        detail={
            "events": run.events,
            "decide_s": run.decide_s,
            "figures": figures_of([run.totals]),
        },
    )


def fleet(policy: str, hosts: int) -> Figure:
    """Real time for the first hosts of the datacenter, on all processors of this machine."""
    loaded = load_scenario("datacenter")
    began_s = time.perf_counter()
    runs = run_jobs([Job(loaded.scenario, {}, policy, host) for host in range(hosts)])
    return Figure(
        name=f"datacenter_{policy}_{hosts}_hosts",
        value=time.perf_counter() - began_s,
        unit="s",
        reach=Reach("at most", 3600.0),
        detail={"figures": figures_of([run.totals for run in runs])},
    )


def main() -> None:
    """Measure and print, one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="append", help="default: all that come along")
    parser.add_argument("--hosts", type=int, default=1000, help="of the datacenter")
    given = parser.parse_args()
    policies: list[str] = given.policy or [kind.name for kind in BUILT_IN]
    held = True

    def tell(figure: Figure) -> None:
        nonlocal held
        held &= figure.holds
        line: dict[str, Any] = figure.to_json()
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    for policy in policies:
        tell(decision(policy))
        tell(hour(policy))
    tell(fleet(policies[0], given.hosts))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
