import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from metis_agent.agent import create_metis_agent
from metis_agent.errors import ConfigurationError
from metis_agent.gates import AlwaysGate, ExploringGate, Gate, ModelGate, NeverGate, ShadowGate, shadow_report
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import GateDecision, GateRequest, ToolSpec
from tests.fakes import call, calling, model

TOOLS = (ToolSpec(name="look"), ToolSpec(name="add"))
BOTH = ("look", "add")


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


look.metadata = {"cost": 0.5}
add.metadata = {"cost": 0.125}


class Counting(Gate):
    """Decides by script, and counts in which flavour it was asked."""

    def __init__(self, *decided, wants_draft=False):
        super().__init__(name="counting", version="7")
        self.decided, self.asked, self.wants_draft = list(decided), Counter(), wants_draft

    def _next(self, flavour):
        decided = self.decided[min(self.asked.total(), len(self.decided) - 1)]
        self.asked[flavour] += 1
        if isinstance(decided, Exception):
            raise decided
        return decided if isinstance(decided, GateDecision) else GateDecision(allowed=decided)

    def decide(self, request):
        return self._next("sync")

    async def adecide(self, request):
        return self._next("async")

    def check_tools(self, tools):
        raise ConfigurationError("checked")


def request(text="q", *later, id=None):
    return GateRequest(messages=[HumanMessage(text, id=id), *later], tools=TOOLS)


LATER = (AIMessage("", tool_calls=[call("look", query="x")]), ToolMessage("x", tool_call_id="call_1"))


@pytest.mark.parametrize(
    "wrap",
    [
        ShadowGate,
        ExploringGate,
        lambda gate: ShadowGate(ExploringGate(gate)),
        lambda gate: ExploringGate(ShadowGate(gate)),
    ],
)
async def test_wrappers_ask_once_in_the_flavour_asked_and_pass_everything_through(wrap):
    inner = Counting((), wants_draft=True)
    gate = wrap(inner)
    gate.decide(request())
    assert inner.asked == {"sync": 1}
    await gate.adecide(request())
    assert inner.asked == {"sync": 1, "async": 1}
    assert gate.wants_draft
    assert gate.version == "7"
    with pytest.raises(ConfigurationError, match="checked"):
        gate.check_tools(TOOLS)


# Shadow


async def test_a_shadow_changes_nothing_and_says_what_would_have_been():
    decided = GateDecision(allowed=("add",), required=True, probabilities={"look": 0.2, "add": 0.9}, threshold=0.5)
    gate = ShadowGate(Counting(decided))
    for decision in (gate.decide(request()), await gate.adecide(request())):
        assert (decision.allowed, decision.required, decision.probabilities) == (BOTH, False, None)
        assert decision.gate == "shadow:counting"
        shadow = decision.shadow
        assert (shadow["gate"], shadow["allowed"], shadow["required"]) == ("counting", ["add"], True)
        assert (shadow["probabilities"], shadow["threshold"]) == ({"look": 0.2, "add": 0.9}, 0.5)
        assert decision.reason == "shadow: counting would have allowed ['add']"


@pytest.mark.parametrize("wrong", [RuntimeError("no network"), "nonsense", GateDecision(allowed=None)])
async def test_a_failing_shadow_changes_nothing(wrong):
    class Wrong(Gate):
        def decide(self, request):
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

    gate = ShadowGate(Wrong())
    for decision in (gate.decide(request()), await gate.adecide(request())):
        assert decision.allowed == BOTH
        assert ("RuntimeError: no network" if isinstance(wrong, Exception) else "GateError") in decision.shadow["error"]


def script():
    return model(
        calling(call("look", id="1", query="x"), call("add", id="2", a=1, b=2)),
        calling(call("look", id="3", query="y")),
        "done",
    )


# (what the shadow says at each step) -> calls saved of look and add, direct turns, turns saved
CASES = [
    ([()], {"look": 2, "add": 1}, 1, 1),
    ([BOTH], {"look": 0, "add": 0}, 0, 0),
    # It would have blocked `add` at the first step, then answered: the second `look` would not have run either.
    ([("look",), ()], {"look": 1, "add": 1}, 0, 0),
    ([BOTH, ("add",)], {"look": 1, "add": 0}, 0, 0),
    ([("add",), BOTH, ()], {"look": 1, "add": 0}, 0, 0),
    ([RuntimeError("down"), ()], {"look": 1, "add": 0}, 0, 0),
]


@pytest.mark.parametrize("flavour", ["sync", "async"])
@pytest.mark.parametrize(("decided", "saved", "direct", "turns_saved"), CASES)
def test_what_it_would_have_saved_live_and_from_the_store(flavour, decided, saved, direct, turns_saved, tmp_path):
    class Watching(Counting):
        def check_tools(self, tools):
            pass

    gate = ShadowGate(Watching(*decided))
    with TrajectoryStore(tmp_path) as store:
        agent = create_metis_agent(script(), [look, add], gate=gate, recorder=Recorder(store))
        question = {"messages": [HumanMessage("q")]}
        state = agent.invoke(question) if flavour == "sync" else asyncio.run(agent.ainvoke(question))
    assert [outcome.status for outcome in state["outcomes"]] == ["ok", "ok", "ok"]  # nothing was changed

    live = gate.report()
    with TrajectoryStore(tmp_path, read_only=True) as again:  # as after a restart
        stored = shadow_report(again.read())
    assert live == stored
    assert (live.turns, live.direct_turns, live.turns_saved) == (1, direct, turns_saved)
    assert {name: one.calls for name, one in live.per_tool.items()} == {"look": 2, "add": 1}
    assert {name: one.calls_saved for name, one in live.per_tool.items()} == saved
    assert live.cost_saved == 0.5 * saved["look"] + 0.125 * saved["add"]
    assert live.failures == sum(isinstance(one, Exception) for one in decided)
    assert (live.seconds_saved > 0) == any(saved.values())
    assert (live.calls, live.calls_saved) == (3, sum(saved.values()))


def test_a_required_call_that_the_model_did_not_make_counts_as_added():
    gate = ShadowGate(AlwaysGate())
    agent = create_metis_agent(model("just so"), [look, add], gate=gate)
    agent.invoke({"messages": [HumanMessage("q")]})
    assert (gate.report().turns_added, gate.report().turns, gate.report().calls) == (1, 1, 0)


def test_turns_of_a_thread_and_other_gates_decisions_are_told_apart(tmp_path):
    gate = ShadowGate(NeverGate(version="2"))
    chat = model(calling(call("look", query="x")), "one", "two")
    with TrajectoryStore(tmp_path) as store:
        agent = create_metis_agent(chat, [look, add], gate=gate, recorder=Recorder(store), checkpointer=InMemorySaver())
        for _ in range(2):
            agent.invoke({"messages": [HumanMessage("q")]}, {"configurable": {"thread_id": "1"}})
        create_metis_agent(model("three"), [look], recorder=Recorder(store)).invoke({"messages": [HumanMessage("q")]})
        trajectories = list(store.read())
    assert len(trajectories) == 3
    report = shadow_report(trajectories)
    assert report == gate.report()
    assert (report.turns, report.direct_turns, report.turns_saved, report.calls_saved) == (2, 2, 1, 1)
    assert shadow_report(trajectories, gate="NeverGate", version="2") == report
    assert shadow_report(trajectories, version="1").turns == 0
    assert shadow_report(trajectories, gate="other").turns == 0


def test_a_report_that_fails_does_not_fail_the_turn(caplog):
    class Broken(ShadowGate):
        def after_turn(self, messages, decisions, outcomes):
            raise RuntimeError("cannot count")

    agent = create_metis_agent(model("fine"), [look], gate=Broken(NeverGate()))
    assert agent.invoke({"messages": [HumanMessage("q")]})["messages"][-1].content == "fine"
    assert "could not take note" in caplog.text


def test_many_turns_at_once_are_all_counted():
    gate = ShadowGate(NeverGate())
    decision = gate.decide(request())
    answered = [HumanMessage("q"), AIMessage("a")]
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(200):
            gate.after_turn(answered, [decision], [])

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            future.result()
    assert gate.report().turns == 1600


# Exploring


async def test_the_rate_and_the_propensities_are_as_said():
    rate, n = 0.2, 4000
    for inner, own in ((NeverGate(), "direct"), (ModelGate(), "tool")):
        gate = ExploringGate(inner, rate=rate, seed=1)
        seen = Counter()
        for index in range(n):
            decision = gate.decide(request(f"question {index}"))
            branch = "direct" if decision.direct else "tool"
            seen[branch] += 1
            assert decision.propensity == pytest.approx(1 - rate / 2 if branch == own else rate / 2)
            if branch != own:
                assert decision.required == (branch == "tool")
                assert decision.reason == f"exploring: forced {branch}"
        # Forced in rate/2 = 0.1 of 4,000 turns: 400, with a standard deviation of 19; six of them are allowed for.
        other = n - seen[own]
        assert abs(other - n * rate / 2) < 6 * (n * 0.1 * 0.9) ** 0.5


async def test_inverse_propensities_make_both_branches_count_alike():
    gate = ExploringGate(NeverGate(), rate=0.5, seed=3)
    weight = Counter()
    for index in range(4000):
        decision = gate.decide(request(str(index)))
        weight["direct" if decision.direct else "tool"] += 1 / decision.propensity
    assert weight["direct"] / 4000 == pytest.approx(1, abs=0.1)
    assert weight["tool"] / 4000 == pytest.approx(1, abs=0.2)


def test_rate_1_draws_every_turn():
    gate = ExploringGate(NeverGate(), rate=1, seed=0)
    seen = Counter(gate.decide(request(str(index))).direct for index in range(400))
    assert min(seen[True], seen[False]) > 140  # half each; 200 with a standard deviation of 10
    assert gate.decide(request()).propensity == 0.5


def branches(gate, config=None):
    """The branch of each of 60 questions, through the graph."""
    agent = create_metis_agent(model("done"), [look], gate=gate)
    found = []
    for index in range(60):
        state = agent.invoke({"messages": [HumanMessage(f"question {index}")]}, config)
        found.append(state["decisions"][0].direct)
    return found


def test_seeds():
    def gate(seed=None):
        return ExploringGate(NeverGate(), rate=1, seed=seed)

    assert branches(gate(1)) == branches(gate(1)) != branches(gate(2))
    run = [{"configurable": {"seed": seed}} for seed in (1, 2)]
    # A run's own seed goes first, and reaches the gate through the graph.
    assert branches(gate(1), run[0]) == branches(gate(2), run[0]) == branches(gate(), run[0])
    assert branches(gate(1), run[0]) != branches(gate(1), run[1])
    # Without any, each message has its own draw, even of the same text.
    draws = Counter(gate().decide(request("same", id=str(index))).direct for index in range(100))
    assert min(draws[True], draws[False]) > 20


async def test_a_turn_keeps_its_branch():
    gate = ExploringGate(NeverGate(), rate=1, seed=0)
    for index in range(50):
        first, later = gate.decide(request(str(index))), await gate.adecide(request(str(index), *LATER))
        if first.direct:
            assert later.direct
        else:
            # A forced tool turn goes on as AlwaysGate's: after the first call the model decides.
            assert (first.allowed, first.required) == (BOTH, True)
            assert (later.allowed, later.required) == (BOTH, False)
        assert later.propensity is None


def test_propensities_are_recorded_and_come_back(tmp_path):
    with TrajectoryStore(tmp_path) as store:
        gate = ExploringGate(ShadowGate(NeverGate()), rate=1, seed=0)
        agent = create_metis_agent(
            model("done"), [look], gate=gate, recorder=Recorder(store), checkpointer=InMemorySaver()
        )
        for index in range(8):
            config = {"configurable": {"thread_id": str(index)}}
            agent.invoke({"messages": [HumanMessage(str(index))]}, config)
            # Checkpoints bring the same back.
            assert agent.get_state(config).values["decisions"][0].propensity == 0.5
        decisions = [trajectory.decisions[0] for trajectory in store.read()]
    assert {decision.propensity for decision in decisions} == {0.5}
    assert {decision.direct for decision in decisions} == {True, False}
    assert all(decision.shadow["allowed"] == [] for decision in decisions)


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigurationError, match="rate of exploration"):
        ExploringGate(NeverGate(), rate=rate)
