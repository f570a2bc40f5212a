"""What a shadow report says in a line."""

from metis_agent.gates.wrappers import ShadowTally
from metis_agent.types import GateDecision, ToolOutcome


def outcome(id_: str, tool: str) -> ToolOutcome:
    return ToolOutcome(call_id=id_, tool=tool, arguments={}, status="ok")


def test_it_says_what_was_saved_and_why_nothing_was() -> None:
    tally = ShadowTally()
    answer = GateDecision(allowed=("look",), shadow={"gate": "g", "allowed": []})
    tally.add([answer], [{"1"}], [outcome("1", "look")])
    assert str(tally.report()) == "1 turns, 1 tool calls, of which the gate would have saved 1 (look 1 of 1)"
    failed = [GateDecision(allowed=("look",), shadow={"gate": "g", "error": f"GateError: {why}"}) for why in "ab"]
    tally.add(failed, [{"2"}, set()], [outcome("2", "look")])
    tally.add([answer], [set()], [])
    report = tally.report()
    assert (report.failures, report.last_failure, report.calls, report.calls_saved) == (2, "GateError: b", 2, 1)
    assert str(report).endswith("(look 1 of 2); at 2 decisions it failed and would have saved nothing, the last time "
                                "with GateError: b")  # fmt: skip
