"""Policies of somebody else, beside their decisions: imported, shown, and asked for reasons."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from host_rig import Rig, Run
from made_up_policies import MadeUp, keep

import host_agent.choosing
from host_agent.choosing import ChosenPolicy, choose, choose_in_thread
from host_agent.deciding import Decider
from host_agent.explaining import AT_ONCE, Explainer
from host_agent.facade.views import DecisionView
from host_agent.foreign import ForeignFault, ask_and_wait, guarded
from host_agent.ledger.columns import HostColumns
from host_agent.policy import registry
from host_agent.policy.explain import MOST_TERMS, Details, Explanation, Term, Why, plain
from host_agent.policy.interface import Decision, RangeChange
from host_agent.policy.registry import PolicyError
from protocol.units import MIB
from protocol.vocabulary import MAX_TEXT_CHARS

CHANGE: Final = RangeChange((1, 2), (3, 3))
HUGE: Final = "x" * (10 * MIB)


@pytest.fixture
def go() -> Iterator[threading.Event]:
    """What hangs until the test is over: its threads end with it."""
    event = threading.Event()
    yield event
    event.set()


def explained_by(make: Callable[[], Details]) -> MadeUp:
    def answer(host: HostColumns, *_: Any) -> Decision:
        return Decision(keep(host), None, Explanation(host.names, make))

    return MadeUp(answer)


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


async def views_of(rig: Rig, policy: MadeUp) -> list[DecisionView]:
    rig.add("one", 64 * MIB)
    rig.balancer.use(policy)
    rig.balancer.plan_once()
    return await Explainer().views(rig.balancer.log.of("one"), trio.current_time())


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (raises(ValueError("no\nidea")), "not explained by the policy: it raised ValueError: no i"),
        (raises(SystemExit(3)), "not explained by the policy: it raised SystemExit: 3"),
        (raises(KeyboardInterrupt()), "not explained by the policy: it raised KeyboardInterrupt"),
        (lambda: None, "not explained by the policy: it raised AttributeError"),
        (lambda: Details(host=[("a", None, "pages")] * 3, otherwise=HUGE), "x" * 500),
        (lambda: Details(host=[("a", "many", "pages")]), "not explained by the policy: it raised"),
    ],
)
def test_a_policy_that_cannot_explain_itself_spoils_nothing(
    run: Run, caplog: pytest.LogCaptureFixture, make: Callable[[], Any], rule: str
) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        (view,) = await views_of(rig, explained_by(make))
        assert view.rule.startswith(rule)
        assert len(view.rule) <= MAX_TEXT_CHARS
        assert (view.quota_bytes, view.target_quota_bytes) == (64 * MIB, 64 * MIB)
        view.model_dump_json()
        lines = [line for line in caplog.messages if "can't explain itself" in line]
        assert len(lines) == view.rule.startswith("not explained")
        assert all("\n" not in line and len(line) < 2 * MAX_TEXT_CHARS for line in lines)

    run(body)


def test_an_explanation_that_hangs_ends_at_its_deadline(run: Run, go: threading.Event) -> None:
    def make() -> Details:
        go.wait()
        return Details()

    async def body(rig: Rig, nursery: trio.Nursery) -> None:
        explainer = Explainer()
        rig.add("one", 64 * MIB)
        rig.balancer.use(explained_by(make))
        rig.balancer.plan_once()
        records = rig.balancer.log.of("one")
        threads = threading.active_count()
        views: list[list[DecisionView]] = []

        async def explain() -> None:
            views.append(await explainer.views(records, trio.current_time()))

        for _ in range(AT_ONCE + 2):  # and does not take ever more threads
            nursery.start_soon(explain)
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        while len(views) < AT_ONCE + 2:
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(0.5)
        assert {view.rule for (view,) in views} == {
            "not explained by the policy: it has not answered within 1 s"
        }
        assert threading.active_count() <= threads + AT_ONCE

    run(body)


def test_one_that_is_wrong_does_not_spoil_the_others(run: Run) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        rig.add("one", 64 * MIB)
        records = []
        for make in (raises(ValueError("no")), lambda: Details(otherwise="because")):
            rig.balancer.use(explained_by(make))
            rig.balancer.plan_once()
            records.extend(rig.balancer.log.of("one"))
            rig.balancer.log.forget("one")
        rules = [view.rule for view in await Explainer().views(records, 0.0)]
        assert rules == ["not explained by the policy: it raised ValueError: no", "because"]

    run(body)


def test_what_is_shown_is_plain_and_bounded() -> None:
    values = [10**400, float("nan"), float("inf"), HUGE, object(), True, None, 2**70, 0.5]
    shown = plain(Why(HUGE, tuple(Term(f"t{n}", value) for n, value in enumerate(values))))  # type: ignore[arg-type]
    found = [term.value for term in shown.terms]
    assert found[:3] == ["an int of 1329 bits", "nan", "inf"]
    assert len(str(found[3])) == len(shown.rule) == MAX_TEXT_CHARS
    assert str(found[4]).startswith("<object")
    assert found[5:] == [True, None, "2**70", 0.5]
    assert len(plain(Why("", (Term("t", 1),) * 1000)).terms) == MOST_TERMS


class Judges(MadeUp):
    def __init__(self, judge: Callable[..., Any]) -> None:
        super().__init__(lambda *_: None)
        self.judge = judge

    def range_fault(self, reservation_bytes: Any, maximum_bytes: Any) -> Any:
        return self.judge(reservation_bytes, maximum_bytes)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (raises(ValueError("no\nidea")), "it raised ValueError: no idea"),
        (raises(SystemExit(0)), "it raised SystemExit: 0"),
        (lambda *_: 7, "it raised TypeError: a range is faulted by int"),
    ],
)
def test_a_policy_that_cannot_judge_a_range_is_told(
    run: Run, judge: Callable[..., Any], message: str
) -> None:
    async def body(_rig: Rig, _nursery: trio.Nursery) -> None:
        with pytest.raises(ForeignFault, match=message):
            await Decider(Judges(judge), in_thread=True).range_fault(CHANGE)

    run(body)


def test_a_judgement_is_waited_for_in_vain_so_long(
    run: Run, clock: trio.testing.MockClock, go: threading.Event
) -> None:
    async def body(_rig: Rig, _nursery: trio.Nursery) -> None:
        fine = Decider(Judges(lambda *_: None), in_thread=True)
        assert await fine.range_fault(CHANGE) is None
        said = await Decider(Judges(lambda *_: HUGE), in_thread=True).range_fault(CHANGE)
        assert said is not None
        assert len(said) == MAX_TEXT_CHARS
        clock.autojump_threshold = 0.05
        with pytest.raises(ForeignFault, match="it has not answered within 1 s"):
            await Decider(Judges(lambda *_: go.wait()), in_thread=True).range_fault(CHANGE)

    run(body)


@dataclass(frozen=True)
class OddSettings:
    text: str = HUGE
    thing: Any = object
    number: float = float("inf")


class Odd(MadeUp):
    """Installed, and odd in a way that the test chooses."""

    name = "odd"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(lambda *_: None)

    @property
    def settings(self) -> Any:  # type: ignore[override]
        return SETTINGS["odd"]()


SETTINGS: dict[str, Callable[[], Any]] = {"odd": OddSettings}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The policies `odd` and `late`; the second one's module is yet to be written."""
    late = f"late_{secrets.token_hex(4)}"  # an import that goes on is in no other test's way
    points = [("odd", f"{__name__}:Odd"), ("late", f"{late}:Late")]
    found = EntryPoints(EntryPoint(*point, "memballoon.policies") for point in points)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: found)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / f"{late}.py"


def ways_of_choosing() -> list[Callable[[str], ChosenPolicy]]:
    async def in_thread(name: str) -> ChosenPolicy:
        return await choose_in_thread(name, {}, trio.CapacityLimiter(1))

    return [lambda name: choose(name, {}), lambda name: trio.run(in_thread, name)]


@pytest.mark.parametrize("way", ways_of_choosing())
def test_settings_are_read_once_and_made_plain(
    way: Callable[[str], ChosenPolicy], installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = way("odd")
    monkeypatch.setitem(SETTINGS, "odd", raises(RuntimeError("again")))
    assert chosen.in_thread
    assert len(chosen.settings["text"]) == MAX_TEXT_CHARS
    assert chosen.settings["number"] == "inf"
    with pytest.raises(PolicyError, match=r"policy 'odd': it raised RuntimeError: again") as error:
        way("odd")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ways_of_choosing())
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import time\nwhile True: time.sleep(0.05)", "it has not answered within 0.3 s"),
        ("raise GeneratorExit('bye')", "it raised GeneratorExit: bye"),
        ("raise ValueError('x' * 10**7)", ":Late: xxx"),
    ],
)
def test_an_import_has_a_deadline_and_one_line(
    way: Callable[[str], ChosenPolicy],
    source: str,
    message: str,
    installed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "within 0.3 s" in message:
        monkeypatch.setattr(host_agent.choosing, "IMPORT_DEADLINE_S", 0.3)
    stop = installed.with_suffix(".stop")
    # It ends with the test: a thread in an import lock would be in the next test's way.
    installed.write_text(
        source.replace("while True", f"import os\nwhile not os.path.exists({str(stop)!r})")
    )
    try:
        with pytest.raises(PolicyError) as error:
            way("late")
    finally:
        stop.touch()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2 * MAX_TEXT_CHARS


@pytest.mark.usefixtures("installed")
def test_one_that_never_ran_is_not_blamed_for_another_that_hangs(
    monkeypatch: pytest.MonkeyPatch, go: threading.Event
) -> None:
    monkeypatch.setattr(host_agent.choosing, "IMPORT_DEADLINE_S", 0.3)

    def hang() -> OddSettings:
        go.wait()
        return OddSettings()

    monkeypatch.setitem(SETTINGS, "odd", hang)

    async def body() -> None:
        limiter = trio.CapacityLimiter(1)
        with pytest.raises(PolicyError, match="policy 'odd': "):
            await choose_in_thread("odd", {}, limiter)
        with pytest.raises(PolicyError, match="'late': not imported: another policy's"):
            await choose_in_thread("late", {}, limiter)

    trio.run(body)


def test_built_in_policies_need_no_thread() -> None:
    threads: list[threading.Thread] = []
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        threads.append(thread)
        original(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert choose("shares", {}).settings == {"step": "2MiB"}
    assert threads == []


def test_the_main_threads_interrupt_is_its_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        guarded(raises(KeyboardInterrupt()))
    with pytest.raises(ForeignFault, match="it raised KeyboardInterrupt"):
        ask_and_wait(raises(KeyboardInterrupt()), timeout_s=30)


def test_whoever_waits_waits_no_longer(go: threading.Event) -> None:
    began_s = time.monotonic()
    with pytest.raises(ForeignFault, match=r"it has not answered within 0.2 s"):
        ask_and_wait(go.wait, timeout_s=0.2)
    assert time.monotonic() - began_s >= 0.2
    assert ask_and_wait(lambda: 7, timeout_s=30) == 7


def test_the_same_is_told_once_a_minute(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def body(rig: Rig, _nursery: trio.Nursery) -> None:
        caplog.set_level(logging.ERROR)
        rig.add("one", 64 * MIB)
        rig.balancer.use(explained_by(raises(ValueError("no"))))
        rig.balancer.plan_once()
        explainer = Explainer()
        for now_s in (0.0, 1.0, 59.0, 61.0):
            await explainer.views(rig.balancer.log.of("one"), now_s)
        assert len(caplog.messages) == 2

    run(body)
