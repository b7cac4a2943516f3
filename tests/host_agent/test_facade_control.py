"""The control API over a real socket: what crosses it, and what each error becomes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from facade_fixtures import NumbersAgent, served, spec

from host_agent.client import AgentClient
from host_agent.errors import (
    AgentError,
    AgentNotRunning,
    BadRequest,
    MissingRight,
    NoSuchReservation,
    NoSuchVm,
    NotEnoughMemory,
    VmExists,
)
from host_agent.facade.port import VmChange
from host_agent.facade.views import DecisionView, DeedView, PolicyFaultView, TermView, VmState
from protocol.units import MIB


@pytest.fixture
def agent() -> NumbersAgent:
    return NumbersAgent()


@pytest.fixture
def socket_path(agent: NumbersAgent, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run" / "control.sock"
    with served(agent, path):
        yield path


@pytest.fixture
def client(socket_path: Path) -> Iterator[AgentClient]:
    with AgentClient(socket_path, answer_timeout_s=20) as client:
        yield client


@pytest.fixture
def raw(socket_path: Path) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(socket_path))
    with httpx.Client(transport=transport, base_url="http://agent", trust_env=False) as raw:
        yield raw


def test_a_vm_is_launched_seen_changed_and_stopped(
    client: AgentClient, agent: NumbersAgent
) -> None:
    assert client.vms() == []
    launched = client.launch(spec("web1", command=("sleep", "1"), frames="2MiB"))
    assert agent.specs["web1"].command == ("sleep", "1")
    assert agent.specs["web1"].frame_order == 9
    assert client.vm("web1") == launched == client.vms()[0] == agent.views["web1"]
    assert client.host() == agent.host()
    vitals = client.vitals("web1")
    assert vitals is not None
    assert vitals.usage_bytes == 3 * MIB
    assert vitals.swap_used_bytes is None

    pinned = client.change("web1", VmChange(target_bytes=40 * MIB, shares=5))
    assert (pinned.balloon_target_bytes, pinned.shares, pinned.pinned) == (40 * MIB, 5, True)
    assert not client.change("web1", VmChange(automatic=True)).pinned
    client.stop("web1")
    assert client.vms() == []


def test_no_vitals_are_none_not_zeros(client: AgentClient) -> None:
    client.launch(spec("mute"))
    assert client.vitals("mute") is None


def test_the_policy_is_seen_and_changed(client: AgentClient, agent: NumbersAgent) -> None:
    assert client.policy() == agent.policy()
    assert client.policy().settings == {"step": "2MiB"}
    agent.fault = PolicyFaultView(text="it raised ValueError: no", age_s=1.5, times=3)
    changed = client.use_policy("other")
    assert (changed.name, changed.configured, changed.fault) == ("other", "shares", agent.fault)
    assert client.host().policy_fault == agent.fault
    with pytest.raises(BadRequest, match="unknown policy 'x'"):
        client.use_policy("x")
    with pytest.raises(BadRequest, match="name"):
        client.use_policy("")


def test_clients_reserve_hand_over_and_release(client: AgentClient, agent: NumbersAgent) -> None:
    first = client.reserve("xapi", 64 * MIB)
    second = client.reserve("xapi", 32 * MIB)
    assert client.reservations() == agent.reservations() == [first, second]
    kept = client.transfer(first.id, "web1").kept
    assert kept is not None
    assert (kept.vm, kept.size_bytes) == ("web1", 64 * MIB)
    client.launch(spec("web1"))
    given = client.transfer(first.id, "web1")
    assert (given.given_bytes, given.kept) == (64 * MIB, None)
    client.release(second.id)
    with pytest.raises(NoSuchReservation, match=second.id):
        client.release(second.id)
    last = client.reserve("xapi", 4096)
    assert client.login("xapi") == [last]
    assert client.login("xapi") == []
    with pytest.raises(NotEnoughMemory) as refused:
        client.reserve("xapi", 4096 * MIB)
    assert refused.value.refused_by == ("web1",)
    for wrong in (lambda: client.reserve("No Name", 4096), lambda: client.reserve("xapi", 0)):
        with pytest.raises(BadRequest):
            wrong()
    for wrong_name in (client.login, client.release):
        with pytest.raises(BadRequest, match="is not a name"):
            wrong_name("../vms")


def test_decisions_cross_with_their_terms(client: AgentClient, agent: NumbersAgent) -> None:
    terms = [
        TermView(name=name, value=value, unit=unit)
        for name, value, unit in (
            ("demand", 5 * MIB, "bytes"),
            ("active fraction", 0.25, "fraction"),
            ("spare", None, "bytes"),
            ("has a driver", True, ""),
        )
    ]
    deed = DeedView(
        what="refused", size_bytes=0, times=2, first_age_s=2.0, last_age_s=1.0, detail="swap"
    )
    agent.explained = [
        DecisionView(
            policy="shares",
            first_age_s=3.0,
            last_age_s=0.5,
            times=12,
            quota_bytes=9 * MIB,
            target_quota_bytes=8 * MIB,
            rule="by shares",
            terms=tuple(terms),
            last_rule="nothing moves",
            last_terms=tuple(terms[:2]),
            done=(deed,),
        )
    ]
    client.launch(spec("web1"))
    assert client.decisions("web1") == agent.explained
    with pytest.raises(NoSuchVm):
        client.decisions("nobody")


def test_each_error_comes_back_as_itself(client: AgentClient, agent: NumbersAgent) -> None:
    for call in (client.vm, client.vitals, client.stop):
        with pytest.raises(NoSuchVm) as missing:
            call("nobody")
        assert missing.value.name == "nobody"
    client.launch(spec("web1", 400))
    with pytest.raises(VmExists, match="web1"):
        client.launch(spec("web1"))
    with pytest.raises(NotEnoughMemory) as full:
        client.launch(spec("web2", 400))
    assert full.value.missing_bytes == 4 * MIB
    assert full.value.refused_by == ("web1",)
    assert "4MiB" in full.value.message
    with pytest.raises(BadRequest, match="reservation is in the way"):
        client.change("web1", VmChange(target_bytes=399 * MIB))
    agent.defect = MissingRight("no CAP_SYS_ADMIN", what_to_do="run as root")
    with pytest.raises(MissingRight) as right:
        client.launch(spec("web3"))
    assert right.value.one_line() == "no CAP_SYS_ADMIN: run as root"


def test_a_defect_is_one_line_and_the_agent_goes_on(
    client: AgentClient, agent: NumbersAgent
) -> None:
    agent.defect = ZeroDivisionError("division\nby zero")
    with pytest.raises(AgentError, match="internal error: ZeroDivisionError: division by zero"):
        client.launch(spec())
    assert client.vms() == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "Web", "x" * 33, "a\n", "ä"])
def test_what_cannot_be_a_name_is_nobodys(client: AgentClient, name: str) -> None:
    with pytest.raises(NoSuchVm):
        client.stop(name)


STATUSES = [
    ("GET", "/v1/vms/nobody", None, 404, "no VM named 'nobody'"),
    ("GET", "/v2", None, 404, "GET /v2: Not Found"),
    ("PUT", "/v1/host", None, 405, "PUT /v1/host: Method Not Allowed"),
    ("POST", "/v1/vms", {"name": "web1", "assigned_bytes": 160 * MIB}, 409, "exists already"),
    ("POST", "/v1/vms", {"name": "w2", "assigned_bytes": "4GiB"}, 507, "not enough memory: 6"),
    ("POST", "/v1/vms", {"name": "w2", "assigned_bytes": "4XB"}, 422, "'4XB' is not a size"),
    ("POST", "/v1/vms", {"name": "w2", "assigned_bytes": 1.5}, 422, "1.5 is not a size"),
    ("POST", "/v1/vms", {"name": "w2", "memory": "4GiB"}, 422, "unknown key 'memory'"),
    ("POST", "/v1/vms", {"name": "w2"}, 422, "'assigned_bytes' is missing"),
    ("POST", "/v1/vms", {"name": "W", "assigned_bytes": "4GiB"}, 422, "name: 'W' is not a name"),
    (
        "POST",
        "/v1/vms",
        {"name": "w", "assigned_bytes": "1GiB", "reservation_bytes": "2GiB"},
        422,
        "the reservation of 2GiB is above the assigned 1GiB",
    ),
    ("PATCH", "/v1/vms/web1", {}, 422, "nothing to change"),
    ("PATCH", "/v1/vms/web1", {"target_bytes": 0, "quota_bytes": 0}, 422, "only one of"),
    ("PATCH", "/v1/vms/web1", {"target_bytes": 128}, 422, "did you mean 128MiB?"),
    ("PATCH", "/v1/vms/web1", {"shares": 0}, 422, "shares: "),
    ("PATCH", "/v1/vms/web1", {"shares": True}, 422, "shares: "),
    ("PATCH", "/v1/vms/web1", [], 422, "JSON object"),
]


@pytest.mark.parametrize("case", STATUSES, ids=lambda case: f"{case[0]}-{case[3]}-{case[4]}")
def test_problems(
    client: AgentClient, raw: httpx.Client, case: tuple[str, str, object, int, str]
) -> None:
    method, path, body, status, said = case
    client.launch(spec("web1"))
    answer = raw.request(method, path, json=body)
    assert answer.status_code == status
    problem = answer.json()
    assert said in problem["error"]
    assert "\n" not in problem["error"]
    assert problem["kind"]
    assert set(problem) <= {"kind", "error", "what_to_do", "name", "missing_bytes", "refused_by"}


def test_a_body_that_is_no_json(raw: httpx.Client) -> None:
    answer = raw.post("/v1/vms", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert "JSON" in answer.json()["error"]


def test_statuses_of_success(raw: httpx.Client) -> None:
    assert raw.post("/v1/vms", json={"name": "a", "assigned_bytes": "64MiB"}).status_code == 201
    stopped = raw.delete("/v1/vms/a")
    assert (stopped.status_code, stopped.content) == (204, b"")


def test_openapi_names_every_route_and_no_other_host(raw: httpx.Client) -> None:
    document = raw.get("/openapi.json").json()
    assert {path: set(routes) for path, routes in document["paths"].items()} == {
        "/v1/host": {"get"},
        "/v1/vms": {"get", "post"},
        "/v1/vms/{name}": {"get", "patch", "delete"},
        "/v1/vms/{name}/vitals": {"get"},
        "/v1/vms/{name}/decisions": {"get"},
        "/v1/policy": {"get", "put"},
        "/v1/reservations": {"get", "post"},
        "/v1/reservations/{reservation_id}/vm": {"put"},
        "/v1/reservations/{reservation_id}": {"delete"},
        "/v1/clients/{name}/login": {"post"},
    }
    assert "http" not in json.dumps(document).lower().replace("httpvalidationerror", "")
    assert raw.get("/docs").status_code == 404


def schema(raw: httpx.Client, name: str) -> dict[str, Any]:
    schemas: dict[str, Any] = raw.get("/openapi.json").json()["components"]["schemas"]
    found: dict[str, Any] = schemas[name]
    return found


def test_openapi_says_what_a_problem_holds(client: AgentClient, raw: httpx.Client) -> None:
    documented = schema(raw, "Problem")["properties"]
    assert all("description" in field for field in documented.values())
    client.launch(spec("web1", 400))
    for answer in (
        raw.get("/v1/vms/nobody"),
        raw.get("/v2"),
        raw.put("/v1/host"),
        raw.post("/v1/vms", json={"name": "web1", "assigned_bytes": "64MiB"}),
        raw.post("/v1/vms", json={"name": "web2", "assigned_bytes": "4GiB"}),
        raw.post("/v1/vms", json={}),
    ):
        problem = answer.json()
        assert set(problem) <= set(documented)
        assert problem["kind"] in documented["kind"]["examples"]


def test_openapi_says_how_sizes_are_written(raw: httpx.Client) -> None:
    for model, field in (
        ("VmSpec", "assigned_bytes"),
        ("VmSpec", "reservation_bytes"),
        ("VmSpec", "startup_bytes"),
    ):
        size = schema(raw, model)["properties"][field]
        assert {way["type"] for way in size["anyOf"]} == {"integer", "string"}
        assert "512MiB" in size["description"]
    for field in ("target_bytes", "quota_bytes", "reservation_bytes"):
        assert "512MiB" in json.dumps(schema(raw, "VmChange")["properties"][field])


def test_openapi_lists_the_states(raw: httpx.Client) -> None:
    assert set(schema(raw, "VmState")["enum"]) == set(VmState)


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v2", "not-found"),
        ("PUT", "/v1/host", "method-not-allowed"),
        ("GET", "/v1/vms/nobody", "no-such-vm"),
    ],
)
def test_a_missing_route_is_no_missing_vm(
    raw: httpx.Client, method: str, path: str, kind: str
) -> None:
    assert raw.request(method, path).json()["kind"] == kind


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    with AgentClient(tmp_path / "none.sock") as client, pytest.raises(AgentNotRunning) as error:
        client.host()
    assert error.value.one_line() == (
        f"no agent answers at {tmp_path}/none.sock: start one with `balloon agent`"
    )
