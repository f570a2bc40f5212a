import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.errors import ConfigurationError
from metis_agent.gates import AlwaysGate, BranchGate, ModelGate, NeverGate
from metis_agent.types import GateRequest, ToolSpec

TOOLS = (ToolSpec(name="a"), ToolSpec(name="b"))
OLD_TURN = [HumanMessage("1"), AIMessage("one")]
FIRST = GateRequest(messages=[*OLD_TURN, HumanMessage("2")], tools=TOOLS)
LATER = GateRequest(messages=[*FIRST.messages, AIMessage(""), ToolMessage("x", tool_call_id="1")], tools=TOOLS)
BOTH = ("a", "b")


@pytest.mark.parametrize(
    ("gate", "first", "later"),
    [
        (ModelGate(), (BOTH, False), (BOTH, False)),
        (NeverGate(), ((), False), ((), False)),
        (AlwaysGate(), (BOTH, True), (BOTH, False)),
        (BranchGate("free"), (BOTH, False), (BOTH, False)),
        (BranchGate("direct"), ((), False), ((), False)),
        (BranchGate("tool"), (BOTH, True), (BOTH, False)),
        (BranchGate("tool", tool="b"), (("b",), True), (("b",), False)),
        (BranchGate("tool", tool="c"), ((), False), ((), False)),
        (BranchGate("direct", at=1), (BOTH, False), ((), False)),
        (BranchGate("tool", at=1), (BOTH, False), (BOTH, True)),
        (BranchGate("tool", tool="b", at=1), (BOTH, False), (("b",), True)),
        (BranchGate("direct", at=2), (BOTH, False), (BOTH, False)),
        (BranchGate("tool", at=2), (BOTH, False), (BOTH, False)),
    ],
)
async def test_baselines(gate, first, later):
    for request, expected in ((FIRST, first), (LATER, later)):
        for decision in (gate.decide(request), await gate.adecide(request)):
            assert (decision.allowed, decision.required) == expected
            assert decision.gate == gate.name


def test_nothing_is_required_where_there_is_no_tool():
    assert not AlwaysGate().decide(GateRequest(messages=[HumanMessage("1")], tools=())).required


def test_a_branch_gate_knows_its_branch():
    assert BranchGate("tool").branch == "tool"
    assert BranchGate("tool").decide(FIRST).gate == "branch:tool"
    with pytest.raises(ConfigurationError, match="'both'"):
        BranchGate("both")
    assert BranchGate("tool", tool="b").name == "branch:tool:b"
    assert BranchGate("tool", at=2).name == "branch:tool@2"
    with pytest.raises(ConfigurationError, match="only branch 'tool'"):
        BranchGate("direct", tool="b")
