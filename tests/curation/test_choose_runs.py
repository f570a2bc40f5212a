"""What a cold start learns from a model's own runs: right ones, with a call only where it is needed."""

from __future__ import annotations

from dataclasses import replace

from metis_agent.curation.strategy import choose_runs
from metis_agent.judging.verifiers import verify
from metis_agent.types import Branch, ModelCall, Question, ToolOutcome, Trajectory
from metis_agent.worlds.almanac.cold_start import build_tokenizer

PROMPT, BARE = (1, 2, 3), (1, 3)
"""A prompt with the tools in it, and one without."""


def run(number: int, branch: Branch, answer: str, *, ids: tuple[int, ...] = (7,), called: bool = False) -> Trajectory:
    question = Question(id="q", text="What is 6 * 7?", answer="42", verifier="exact")
    call = ModelCall(node="m", step=0, prompt_ids=BARE if branch == "direct" else PROMPT, completion_ids=ids)
    outcome = ToolOutcome(call_id="c", tool="python", arguments={}, status="ok")
    return Trajectory(
        id=str(number), question=question, branch=branch, answer=answer, calls=(call,),
        outcomes=(outcome,) if called else (),
    )  # fmt: skip


def chosen(*runs: Trajectory) -> list[str]:
    return [kept.id for kept in choose_runs(runs, verify, longest=4).runs]


def test_where_the_direct_answer_does_a_call_is_redundant_and_not_learnt() -> None:
    runs = (run(1, "direct", "42"), run(2, "direct", "41"), run(3, "tool", "42", called=True))
    kept = choose_runs((*runs, run(4, "free", "42", ids=(8,), called=True)), verify, longest=4)
    assert [it.id for it in kept.runs] == ["1"]  # right half the time
    assert kept.runs[0].calls[0].prompt_ids == PROMPT  # as the policy will be asked, and not as the run was
    assert kept.runs[0].calls[0].completion_ids == (7,)
    assert kept.figures == {
        "runs": {"direct": 2, "tool": 2}, "right": {"direct": 1, "tool": 2}, "cut off": {"direct": 0, "tool": 0},
        "kept": {"direct": 1, "tool": 0},
        "questions": {"direct": 1, "tool": 0},
    }  # fmt: skip
    assert kept.questions == 1


def test_where_only_the_tool_does_the_call_is_learnt() -> None:
    seldom = [run(number, "direct", "41") for number in range(2)] + [run(2, "direct", "42")]
    assert chosen(*seldom, run(3, "tool", "42", called=True), run(4, "tool", "0", called=True)) == ["3"]
    assert chosen(*seldom, run(3, "tool", "0", called=True)) == ["2"]  # the tool is of no use: better than it


def test_a_forced_run_without_a_call_is_one_of_the_direct_branch() -> None:
    assert chosen(run(1, "tool", "42"), run(2, "direct", "42", ids=(8,))) == ["1", "2"]


def test_the_wrong_the_cut_off_and_the_same_again_are_left_out() -> None:
    assert chosen(run(1, "direct", "41"), run(2, "tool", "0", called=True)) == []
    both = (run(1, "direct", "42", ids=(7, 7, 7, 7)), run(2, "direct", "42"))
    assert chosen(*both) == ["2"]
    assert choose_runs(both, verify, longest=4).figures["cut off"] == {"direct": 1, "tool": 0}
    unsuited = (*both, run(3, "tool", "42", called=True, ids=(7, 7, 7, 7)), run(4, "direct", "42", ids=()))
    assert choose_runs(unsuited, verify, longest=4).figures["cut off"] == {"direct": 1, "tool": 1}
    same = [run(number, "direct", "42", ids=ids) for number, ids in enumerate([(7,), (7,), (8,), (9,)])]
    assert chosen(*same) == ["0", "2"]  # two of a question at most


def test_a_reply_that_rambled_on_after_its_call_is_learnt_up_to_the_call() -> None:
    tokenizer = build_tokenizer()
    called = tuple(tokenizer.encode('<tool_call>{"name": "python", "arguments": {"code": "6*7"}}</tool_call>'))
    rambled = (*called, *tokenizer.encode(" and the river is"))
    asked = ModelCall(
        node="m", step=0, prompt_ids=PROMPT, completion_ids=rambled, log_probs=(-0.1,) * len(rambled),
        tool_calls=({"name": "python", "args": {"code": "6*7"}, "id": "c"},),
    )  # fmt: skip
    answer = ModelCall(node="m", step=1, prompt_ids=(*PROMPT, *rambled, 5), completion_ids=(6,))
    it = replace(run(1, "tool", "42", called=True), calls=(asked, answer))
    assert choose_runs([it], verify, longest=len(rambled)).runs == ()
    (kept,) = choose_runs([it], verify, longest=len(rambled), tokenizer=tokenizer).runs
    assert [call.completion_ids for call in kept.calls] == [(*called, tokenizer.eos_token_id), (6,)]
    assert kept.calls[0].log_probs is None
