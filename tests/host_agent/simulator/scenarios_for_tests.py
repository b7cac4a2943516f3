"""Small scenarios for tests, and hypothesis' own."""

from typing import Any

from hypothesis import strategies as st

from host_agent.policy.registry import policy_class
from host_agent.simulator.engine import BooksKind, Engine
from host_agent.simulator.host_state import Log
from host_agent.simulator.scenario import Scenario
from host_agent.simulator.traces import needs_of
from protocol.units import MIB


def scenario(
    *guests: dict[str, Any],
    pool_mib: int = 1024,
    reserve_mib: int = 64,
    duration_s: float = 60.0,
    seed: int = 0,
    look_s: float = 1.0,
    **host: Any,
) -> Scenario:
    """Guests as in the file; `memory_mib` is short for their size."""
    tables = [
        {"memory": guest.pop("memory_mib", 256) * MIB, "name": f"g{at}"} | guest
        for at, guest in enumerate(map(dict, guests))
    ]
    return Scenario.model_validate(
        {
            "duration_s": duration_s,
            "seed": seed,
            "look_s": look_s,
            "host": {"pool": pool_mib * MIB, "reserve": reserve_mib * MIB, **host},
            "guest": tables,
        }
    )


def steps(*points: tuple[float, int], **more: Any) -> dict[str, Any]:
    """A trace of (seconds, MiB)."""
    return {"kind": "steps", "points": [(at_s, mib * MIB) for at_s, mib in points], **more}


def engine_of(
    made: Scenario,
    policy: str = "shares",
    *,
    books: BooksKind = "auto",
    log: Log | None = None,
    host: int = 0,
) -> Engine:
    return Engine(made, needs_of(made, host, {}), policy_class(policy)(), books=books, log=log)


_SIZES = st.integers(0, 300).map(lambda mib: mib * MIB)
_LOW_HIGH = st.tuples(_SIZES, _SIZES).map(sorted)
_TRACES = st.one_of(
    st.builds(lambda level, noise: {"kind": "steady", "level": level, "noise": noise},
              _SIZES, st.sampled_from((0.0, 0.05))),
    st.builds(lambda pair: {"kind": "diurnal", "low": pair[0], "high": pair[1], "period_s": 20.0,
                            "spread_s": 20.0}, _LOW_HIGH),
    st.builds(lambda pair: {"kind": "burst", "low": pair[0], "high": pair[1], "every_s": 6.0,
                            "length_s": 4.0}, _LOW_HIGH),
    st.builds(lambda pair: {"kind": "correlated", "low": pair[0], "high": pair[1], "every_s": 8.0,
                            "length_s": 3.0, "joins": 0.8, "stagger_s": 1.0}, _LOW_HIGH),
)  # fmt: skip
_BEHAVIOURS = st.sampled_from(
    (
        {"kind": "honest"},
        {"kind": "slow", "factor": 0.02},
        {"kind": "stuck", "from_s": 3.0},
        {"kind": "intermittent", "on_s": 2.5, "off_s": 1.5},
        {"kind": "lying", "factor": 3.0, "hoards": True},
        {"kind": "lying", "factor": 0.2},
    )
)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Hosts of up to six guests that are short of memory now and then, for half a minute."""
    guests = []
    for number in range(draw(st.integers(1, 6))):
        guest: dict[str, Any] = {
            "name": f"g{number}",
            "memory_mib": draw(st.sampled_from((64, 128, 300))),
            "reservation": draw(st.sampled_from((0, 16, 48))) * MIB,
            "shares": draw(st.sampled_from((1, 1000, 4000))),
            "swap": draw(st.sampled_from((0, 32, 300))) * MIB,
            "cache_share": draw(st.sampled_from((0.0, 0.4, 1.0))),
            "balloon_may_swap": draw(st.booleans()),
            "heap_managed": draw(st.booleans()),
            "arrives_s": draw(st.sampled_from((0.0, 0.0, 4.0))),
            "trace": draw(_TRACES),
            "behaviour": draw(_BEHAVIOURS),
        }
        if draw(st.booleans()):
            guest["leaves_s"] = draw(st.sampled_from((8.5, 21.0)))
        guests.append(guest)
    return scenario(
        *guests,
        pool_mib=draw(st.sampled_from((400, 700, 1500))),
        reserve_mib=draw(st.sampled_from((0, 8, 64))),
        duration_s=30.0,
        seed=draw(st.integers(0, 9)),
        look_s=draw(st.sampled_from((0.5, 1.0))),
        dry_patience_s=draw(st.sampled_from((0.5, 10.0))),
        inflate_per_s=draw(st.sampled_from((16, 1536))) * MIB,
    )
