"""`balloon` as a person runs it: its two streams and its exit status."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from facade_fixtures import NumbersAgent, served, spec

from host_agent.cli import COMMANDS, main
from host_agent.client import AgentClient
from host_agent.commands.stats import host_line
from host_agent.errors import AgentError
from host_agent.facade.views import DecisionView, DeedView, PolicyFaultView, TermView, VmState
from protocol.units import MIB

RUN = "from host_agent.cli import main; main()"


def balloon(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process would do, without the 0.5 s that it takes to start one."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main(arguments)
    return subprocess.CompletedProcess(
        ["balloon", *arguments], int(end.value.code or 0), out.getvalue(), err.getvalue()
    )


@pytest.fixture
def agent() -> NumbersAgent:
    return NumbersAgent()


@pytest.fixture
def run_dir(agent: NumbersAgent, tmp_path: Path) -> Iterator[str]:
    with served(agent, tmp_path / "control.sock"):
        yield str(tmp_path)


def test_help_lists_every_command_and_imports_none() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", RUN, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for name, entry in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert entry.line in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not {"pydantic", "trio", "rich", "httpx", "fastapi", "numpy"} & imported


@pytest.mark.parametrize(
    "name", ["doctor", "launch", "ps", "stats", "set", "policy", "explain", "stop", "agent"]
)
def test_a_commands_own_help_agrees_with_the_list(name: str) -> None:
    done = balloon(name, "--help")
    assert done.returncode == 0
    assert f"balloon {name}" in done.stdout
    assert COMMANDS[name].line.rstrip(".").split(",")[0] in " ".join(done.stdout.split())


def test_no_command_shows_help_and_fails() -> None:
    done = balloon()
    assert done.returncode == 2
    assert "Commands:" in done.stderr


BAD_INPUT = [
    (["nope"], "balloon: No such command 'nope'"),
    (["ps", "--jsno"], "balloon ps: No such option"),
    (["launch", "web1"], "balloon launch: Missing option '--memory'"),
    (["launch", "web1", "--memory", "3XB"], "'3XB' is not a size"),
    (["launch", "web1", "--memory", "-3"], "'-3' is negative"),
    (["launch", "web1", "--memory", "nan"], "'nan' is not a size"),
    (["launch", "web1", "--memory", "160"], "less than a page of 4KiB: did you mean 160MiB?"),
    (["launch", "web1", "--memory", "8192"], "--memory: this must be 8MiB or more"),
    (["set", "web1", "--target", "0.5"], "less than a page of 4KiB: did you mean 0.5MiB?"),
    (["set", "web1", "--quota", "128"], "less than a page of 4KiB: did you mean 128MiB?"),
    (["set", "web1", "--reservation", "128"], "less than a page of 4KiB: did you mean 128MiB?"),
    (["launch", "Web1", "--memory", "1GiB"], "NAME: 'Web1' is not a name"),
    (["launch", "w", "--memory", "1GiB", "--shares", "0"], "--shares: "),
    (["launch", "w", "--memory", "1GiB", "--frames", "1GiB"], "--frames"),
    (
        ["launch", "w", "--memory", "1GiB", "--reservation", "2GiB"],
        "the reservation of 2GiB is above the assigned 1GiB",
    ),
    (["set", "w"], "nothing to change in w: give --target"),
    (["set", "w", "--auto", "--quota", "5MiB"], "only one of --target, --quota and --auto"),
    (["set", "w", "--quota", "0", "--target", "0"], "only one of --target, --quota and --auto"),
    (["stop"], "give the names of VMs to stop, or --all"),
    (["stop", "--all", "w"], "give the names of VMs to stop, or --all"),
    (["agent", "--config", "/nowhere/x.toml"], "/nowhere/x.toml: No such file"),
]


def test_a_transfer_says_what_was_given(run_dir: str, agent: NumbersAgent) -> None:
    with AgentClient(Path(run_dir) / "control.sock") as client:
        client.launch(spec("web1"))
        for to, said in (("web1", "64MiB given to web1"), ("web2", "kept for web2")):
            name = client.reserve("xapi", 64 * MIB).id
            done = balloon("client", "transfer", name, to, "--run-dir", run_dir)
            assert (done.returncode, done.stdout) == (0, f"{name}: {said}\n")
    assert [one.vm for one in agent.reservations()] == ["web2"]


@pytest.mark.parametrize(
    ("arguments", "said"), BAD_INPUT, ids=[" ".join(arguments) for arguments, _ in BAD_INPUT]
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    done = balloon(*arguments, MEMBALLOON_RUN_DIR="/nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("balloon")
    assert len(done.stderr.splitlines()) == 1


def test_the_same_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, "ps", "--run-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    again = balloon("ps", "--run-dir", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", again.stderr)


def test_a_bad_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "balloon.toml"
    path.write_text('[[vm]]\nname = "web1"\nmemroy = "1GiB"\n')
    done = balloon("agent", "--config", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"balloon: {path}: vm 'web1': unknown key 'memroy' (did you mean 'memory'?)\n"
    )


COMMANDS_THAT_ASK = [
    ["ps"],
    ["stats"],
    ["stats", "w"],
    ["stop", "w"],
    ["stop", "--all"],
    ["launch", "w", "--memory", "1GiB"],
    ["set", "w", "--auto"],
]


@pytest.mark.parametrize("arguments", COMMANDS_THAT_ASK, ids=" ".join)
def test_no_agent(arguments: list[str], tmp_path: Path) -> None:
    done = balloon(*arguments, "--run-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"balloon: no agent answers at {tmp_path}/control.sock: start one with `balloon agent`\n"
    )


def test_launch_takes_a_command_with_its_own_options(run_dir: str, agent: NumbersAgent) -> None:
    done = balloon(
        "launch", "web1", "--memory", "160M", "--shares", "5", "--startup", "80MiB",
        "--frames", "2MiB", "--swap", "1GiB", "--balloon-may-swap",
        "--run-dir", run_dir, "--", "sleep", "--json", "-5",
    )  # fmt: skip
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "web1: running, quota 80MiB of 160MiB\n"
    launched = agent.specs["web1"]
    assert launched.command == ("sleep", "--json", "-5")
    assert (launched.shares, launched.frames) == (5, "2MiB")
    assert launched.reservation_bytes == 40 * MIB
    assert (launched.swap_bytes, launched.balloon_may_swap) == (1024 * MIB, True)

    again = balloon("launch", "web1", "--memory", "160M", "--run-dir", run_dir)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "balloon: a VM named 'web1' exists already\n"
    full = balloon("launch", "big", "--memory", "2GiB", "--run-dir", run_dir)
    assert full.returncode == 2
    assert "not enough memory: 96MiB missing; asked in vain: web1" in full.stderr


def launch(run_dir: str, *names: str) -> None:
    for name in names:
        done = balloon("launch", name, "--memory", "100MiB", "--run-dir", run_dir)
        assert done.returncode == 0, done.stderr


def test_ps(run_dir: str) -> None:
    launch(run_dir, "web1", "web2")
    table = balloon("ps", "--run-dir", run_dir).stdout.splitlines()
    assert table[0].split() == [
        "NAME", "STATE", "ASSIGNED", "QUOTA", "BALLOON", "TARGET", "USAGE", "SHARES"
    ]  # fmt: skip
    assert table[1].split() == ["web1", "running", "100MiB", "100MiB", "0B", "0B", "-", "1000"]
    assert len(table) == 3
    vms = json.loads(balloon("ps", "--json", "--run-dir", run_dir).stdout)
    assert [vm["name"] for vm in vms] == ["web1", "web2"]
    assert vms[0]["assigned_bytes"] == 100 * MIB
    assert vms[0]["usage_bytes"] is None


def test_ps_says_why_a_vm_gave_less(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "web1", "web2")
    reason = "no_swap: 154 MiB of 200 MiB is in use, and no swap is left for it"
    agent.views["web2"] = agent.views["web2"].model_copy(update={"last_reason": reason})
    said = balloon("ps", "--run-dir", run_dir).stdout.splitlines()
    assert said[3:] == ["", f"web2: {reason}"]


def test_stats_show_swap(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "web1", "web2")
    agent.views["web2"] = agent.views["web2"].model_copy(
        update={"swap_bytes": 64 * MIB, "swap_used_bytes": 0, "swap_free_bytes": 48 * MIB}
    )
    lines = balloon("stats", "--run-dir", run_dir).stdout.splitlines()
    heading = next(line for line in lines if line.startswith("NAME"))
    at = heading.split("  ")
    assert [word.strip() for word in at if word.strip()][-4:-2] == ["SWAP USED", "SWAP FREE"]
    cells = next(line for line in lines if line.startswith("web2")).split()
    assert cells[-4:-2] == ["0B", "48MiB"]
    assert next(line for line in lines if line.startswith("web1")).split()[-4:-2] == ["-", "-"]
    one = balloon("stats", "web2", "--run-dir", run_dir).stdout
    for line in ("swap", "balloon may swap", "swap used", "swap free"):
        assert any(row.startswith(line) for row in one.splitlines()), one


def test_launch_refuses_swap_that_makes_no_sense(run_dir: str) -> None:
    for options, said in (
        (("--swap", "-1MiB"), "'-1MiB' is negative"),
        (("--swap", "9GiB"), "a swap of 9GiB is more than 8 times the assigned 100MiB"),
        (("--balloon-may-swap",), "its balloon may swap, but the VM has no swap: give it some"),
    ):
        done = balloon("launch", "web1", "--memory", "100MiB", *options, "--run-dir", run_dir)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_table_in_a_pipe_is_not_folded(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "a" * 32)
    agent.views["a" * 32] = agent.views["a" * 32].model_copy(
        update={"pinned": True, "connected": False, "state": VmState.UNCOOPERATIVE}
    )
    done = balloon("stats", "--run-dir", run_dir, COLUMNS="40")
    assert any("a" * 32 in line and "uncooperative" in line for line in done.stdout.splitlines())
    done = balloon("ps", "--run-dir", run_dir, COLUMNS="40")
    assert "uncooperative, no driver" in done.stdout
    assert "0B pinned" in done.stdout


def test_stats(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "web1")
    host, _, *table = balloon("stats", "--run-dir", run_dir).stdout.splitlines()
    assert host == (
        "pool 512MiB: quotas 100MiB, free 396MiB, reserve 16MiB of 16MiB; assigned 100MiB "
        "(0.20 x), no shortage, 0 OOM kills, 0 moves, policy shares, cgroup v1"
    )
    assert len(table) == 2
    overdrawn = agent.host().model_copy(update={"overdrawn_bytes": 30 * MIB})
    assert "quotas 100MiB (30MiB too much), free" in host_line(overdrawn)
    both = json.loads(balloon("stats", "--json", "--run-dir", run_dir).stdout)
    assert both["host"]["free_bytes"] == 396 * MIB
    assert both["vms"][0]["vitals"]["usage_bytes"] == 3 * MIB
    one = balloon("stats", "web1", "--run-dir", run_dir).stdout
    assert "balloon actual" in one
    assert "vitals: usage" in one
    assert "3MiB" in one
    one = json.loads(balloon("stats", "web1", "--json", "--run-dir", run_dir).stdout)
    assert one["vitals"]["swap_used_bytes"] is None
    assert balloon("stats", "nobody", "--run-dir", run_dir).returncode == 2


def test_set(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "web1")
    done = balloon("set", "web1", "--quota", "60MiB", "--shares", "9", "--run-dir", run_dir)
    assert done.stdout == ("web1: balloon 0B, target 40MiB (pinned), shares 9, reservation 25MiB\n")
    done = balloon("set", "web1", "--auto", "--json", "--run-dir", run_dir)
    assert json.loads(done.stdout)["pinned"] is False
    assert [change.model_dump(exclude_none=True) for _, change in agent.changes] == [
        {"quota_bytes": 60 * MIB, "shares": 9},
        {"automatic": True},
    ]
    done = balloon("set", "web1", "--target", "0", "--run-dir", run_dir)
    assert (done.returncode, agent.changes[-1][1].target_bytes) == (0, 0)


def test_stop_ends_the_others_too(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "a", "b", "c")
    done = balloon("stop", "a", "nobody", "b", "--run-dir", run_dir)
    assert done.stdout == "a: stopped\nb: stopped\n"
    assert done.stderr == "balloon: no VM named 'nobody': see `balloon ps`\n"
    assert done.returncode == 2
    assert balloon("stop", "--all", "--run-dir", run_dir).stdout == "c: stopped\n"
    assert agent.views == {}


def test_stop_tells_of_every_wrong_name(run_dir: str, agent: NumbersAgent) -> None:
    done = balloon("stop", "x", "y", "--run-dir", run_dir)
    assert done.stderr.splitlines() == [
        "balloon: no VM named 'x': see `balloon ps`",
        "balloon: no VM named 'y': see `balloon ps`",
    ]
    assert (done.returncode, done.stdout) == (2, "")


def test_stop_goes_on_after_a_failure(run_dir: str, agent: NumbersAgent) -> None:
    launch(run_dir, "a", "b", "c")
    agent.stuck["a"] = AgentError("a could not be taken down", what_to_do="stop it again")
    done = balloon("stop", "a", "nobody", "b", "--run-dir", run_dir)
    assert done.stdout == "b: stopped\n"
    assert done.stderr.splitlines() == [
        "balloon: a could not be taken down: stop it again",
        "balloon: no VM named 'nobody': see `balloon ps`",
    ]
    assert done.returncode == 1
    done = balloon("stop", "--all", "--run-dir", run_dir)
    assert (done.stdout, done.returncode) == ("c: stopped\n", 1)


def test_stop_tells_once_that_nobody_answers(tmp_path: Path) -> None:
    done = balloon("stop", "x", "y", "--run-dir", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("balloon: no agent answers at ")


def test_a_defect_of_the_agent_is_status_1(run_dir: str, agent: NumbersAgent) -> None:
    agent.defect = ZeroDivisionError("oops")
    done = balloon("launch", "w", "--memory", "1GiB", "--run-dir", run_dir)
    assert done.returncode == 1
    assert done.stderr == "balloon: internal error: ZeroDivisionError: oops\n"


GROUPED = """
import sys
import click
from host_agent import cli
from host_agent.errors import SocketInUse, UserError
@click.command()
def fails():
    raise BaseExceptionGroup("n", [BaseExceptionGroup("m", [{errors}])])
cli.LazyGroup.get_command = lambda *_: fails
cli.main(["fails"])
"""


def grouped(errors: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GROUPED.format(errors=errors)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_error_out_of_a_nursery_is_one_line_as_well() -> None:
    done = grouped("SocketInUse('/x')")
    assert done.returncode == 2
    assert done.stderr.startswith("balloon: another agent answers at /x: stop it")
    assert len(done.stderr.splitlines()) == 1


def test_a_defect_beside_it_stays_loud() -> None:
    done = grouped("UserError('x'), ZeroDivisionError()")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_policy_shows_and_changes(agent: NumbersAgent, run_dir: str) -> None:
    shown = balloon("policy", "--run-dir", run_dir)
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == [
        "policy     shares: a test",
        "settings   step = 2MiB",
        "known      other, shares",
    ]
    agent.fault = PolicyFaultView(text="it raised ValueError: no", age_s=2.0, times=4)
    changed = balloon("policy", "other", "--run-dir", run_dir)
    assert changed.returncode == 0
    assert agent.policy_name == "other"
    assert "fault      it raised ValueError: no; the last plan stays" in changed.stdout
    assert "until the agent ends: the configuration says shares" in changed.stdout
    listed = balloon("ps", "--run-dir", run_dir)
    assert listed.stderr == "policy: it raised ValueError: no; the last plan stays\n"
    assert json.loads(balloon("policy", "--json", "--run-dir", run_dir).stdout)["name"] == "other"
    refused = balloon("policy", "nope", "--run-dir", run_dir)
    assert (refused.returncode, refused.stderr) == (2, "balloon: unknown policy 'nope'\n")


def test_explain_fills_in_the_terms(agent: NumbersAgent, run_dir: str) -> None:
    assert balloon("launch", "web1", "--memory", "160MiB", "--run-dir", run_dir).returncode == 0
    said = balloon("explain", "web1", "--run-dir", run_dir)
    assert said.stdout == "nothing was decided about web1 yet\n"
    agent.explained = [
        DecisionView(
            policy="shares",
            first_age_s=3.0,
            last_age_s=0.5,
            times=times,
            quota_bytes=100 * MIB,
            target_quota_bytes=80 * MIB,
            rule="by shares",
            terms=(
                TermView(name="demand", value=64 * MIB, unit="bytes"),
                TermView(name="room", value=-4 * MIB, unit="bytes"),
                TermView(name="spare", value=None, unit="bytes"),
                TermView(name="active fraction", value=0.25, unit="fraction"),
                TermView(name="has a driver", value=True, unit=""),
            ),
            last_rule="nothing moves" if times > 1 else "by shares",
            last_terms=(
                TermView(name="demand", value=65 * MIB, unit="bytes"),
                TermView(name="room", value=-4 * MIB, unit="bytes"),
                TermView(name="active fraction", value=0.25, unit="fraction"),
                TermView(name="has a driver", value=True, unit=""),
            ),
            done=(
                DeedView(
                    what="asked",
                    size_bytes=20 * MIB,
                    times=1,
                    first_age_s=3.0,
                    last_age_s=3.0,
                    detail="calm",
                ),
                DeedView(
                    what="refused",
                    size_bytes=0,
                    times=2,
                    first_age_s=2.0,
                    last_age_s=1.0,
                    detail="swap: it would",
                ),
            ),
        )
        for times in (12, 1)
    ]
    said = balloon("explain", "web1", "--run-dir", run_dir)
    assert said.returncode == 0
    assert said.stdout.splitlines() == [
        "web1: 100MiB -> 80MiB by shares, 3.0 s ago, and 11 times since",
        "  rule   by shares",
        "  since  nothing moves",
        "  term   demand           64MiB, since 65MiB",
        "  term   room             -4MiB",
        "  term   spare            -",
        "  term   active fraction  0.25 fraction",
        "  term   has a driver     yes",
        "  done   asked 20MiB (calm), 3.0 s ago",
        "  done   refused, 2 times (swap: it would), 1.0 s ago",
    ]
    agent.fault = PolicyFaultView(text="it raised ValueError: no", age_s=2.0, times=4)
    both = balloon("explain", "web1", "--last", "2", "--run-dir", run_dir)
    assert both.stdout.count("web1: ") == 2
    assert both.stderr == "policy: it raised ValueError: no; the last plan stays\n"
    parsed = json.loads(balloon("explain", "web1", "--json", "--run-dir", run_dir).stdout)
    assert parsed[0]["terms"][2] == {"name": "spare", "value": None, "unit": "bytes"}
    assert len(parsed) == 1
    assert balloon("explain", "nobody", "--run-dir", run_dir).returncode == 2
