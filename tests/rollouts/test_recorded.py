"""Which run counts for which branch, what is left out, and that a pool's size and order don't matter."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from metis_agent.errors import InfrastructureError, InputError
from metis_agent.judging.judge import Agreeing, Agreement, Pair, own_answers
from metis_agent.judging.verifiers import verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import branch_taken
from metis_agent.rollouts.recorded import OutcomePool, outcomes_from_trajectories
from metis_agent.types import GateDecision, ModelCall, Question, ToolOutcome, Trajectory

TOOLS = ("python", "search")


def used(*tools: str, cost: float = 0.0, status: str = "ok") -> tuple[ToolOutcome, ...]:
    return tuple(
        ToolOutcome(call_id=str(i), tool=tool, arguments={}, status=status, cost=cost)  # type: ignore[arg-type]
        for i, tool in enumerate(tools)
    )


def run(
    question: str = "a",
    right: bool = True,
    *,
    allowed: tuple[str, ...] | None = None,
    required: bool = True,
    tools: tuple[str, ...] = (),
    **fields: object,
) -> Trajectory:
    decisions = () if allowed is None else (GateDecision(allowed=allowed, required=required and bool(allowed)),)
    asked = fields.pop("asked", None) or Question(id=question, text=f"What is {question}?", answer="yes")
    return Trajectory(
        **{
            "id": f"{question}/{allowed}/{tools}",
            "question": asked,
            "answer": "yes" if right else "no",
            "decisions": decisions,
            "outcomes": used(*tools),
            **fields,
        }  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("trajectory", "branch", "reason"),
    [
        (run(allowed=()), "direct", ""),
        (run(allowed=("search",), tools=("search", "search")), "search", ""),
        # The gate required a call and the model made none, or another: that says nothing of the tool.
        (run(allowed=("search",)), "", "no call, though one was required"),
        (run(allowed=("search",), outcomes=used("python", status="blocked")), "", "no call, though one was required"),
        # The model chose, so what it did counts.
        (run(allowed=TOOLS, required=False), "direct", ""),
        (run(allowed=("search",), required=False), "direct", ""),
        (run(allowed=TOOLS, required=False, tools=("python",)), "python", ""),
        (run(allowed=TOOLS, required=False, tools=TOOLS), "", "several tools"),
        (run(allowed=TOOLS), "", "no call, though one was required"),
        (run(allowed=TOOLS, tools=("python",)), "python", ""),
        (run(), "direct", ""),
        (run(tools=("python",)), "python", ""),
    ],
)
def test_the_branch_is_what_the_gate_chose_or_else_what_the_model_did(
    trajectory: Trajectory, branch: str, reason: str
) -> None:
    assert branch_taken(trajectory) == (branch, reason)


def test_runs_are_pooled_by_question_and_branch() -> None:
    runs = [
        run("a", True, allowed=(), seconds=1.0),
        run("a", False, allowed=(), seconds=3.0),
        run("a", True, allowed=("search",), tools=("search", "search")),
        run("a", False, allowed=("python",), tools=("python",)),
        # The same words under another id, from an exploring gate in service: one question.
        run(
            "", True, allowed=("python",), tools=("python",), asked=Question(id="q-1", text="what  is A?", answer="yes")
        ),
        run("b", True, allowed=()),
        run("c", True, allowed=(), status="failed", answer=""),
        run("d", True, allowed=(), asked=Question(id="d", text="What is d?")),
        run("a", True, allowed=("wiki",), tools=("wiki",)),
    ]
    table = outcomes_from_trajectories(runs, tools=TOOLS)
    assert table.questions == ("What is a?",)
    assert table.actions == ("direct", "python", "search")
    assert table.correct.tolist() == [[0.5, 0.5, 1.0]]
    # Calls: none, one each, two.
    assert table.cost.tolist() == [[0.0, 1.0, 2.0]]
    assert table.seconds[0, 0] == 2.0
    assert dict(table.dropped) == {
        "failed run": 1, "no reference": 1, "another tool": 1, "question without all branches": 1,
    }  # fmt: skip


def test_costs_contexts_groups_and_tools_are_found_in_the_records() -> None:
    asked = Question(
        id="a", text="A table.\n\nWhat is a?", answer="yes", metadata={"context": "A table.", "document": "d1"}
    )
    runs = [
        run(asked=asked, allowed=()),
        run(asked=asked, allowed=("search",), outcomes=used("search", "search", cost=0.25)),
        run(asked=asked, allowed=("python",), outcomes=used("python")),
    ]
    table = outcomes_from_trajectories(runs, use_cost=True, group_by="document")
    assert (table.questions, table.contexts, table.groups) == (("What is a?",), ("A table.",), ("d1",))
    # Without names the tools are those that occur, in the order of the alphabet.
    assert table.actions == ("direct", "python", "search")
    assert table.cost.tolist() == [[0.0, 0.0, 0.5]]
    with pytest.raises(InputError, match="no 'page'"):
        outcomes_from_trajectories(runs, group_by="page")


def test_what_the_direct_run_shows_of_itself_becomes_the_draft() -> None:
    def direct(id_: str, *log_probs: float) -> Trajectory:
        return run(id=id_, allowed=(), calls=(ModelCall(node="answer", step=0, log_probs=log_probs),))

    runs = [direct("2", -3.0), direct("1", -0.5, -1.5), run(allowed=("search",), tools=("search",))]
    for order in (runs, runs[::-1]):
        table = outcomes_from_trajectories(order, draft=True)
        # Of the run with the smallest id, whatever the order: one draft is what a deployed gate gets.
        assert table.draft["draft_mean_log_prob"].tolist() == [-1.0]
        assert table.draft["draft_tokens"].tolist() == [2.0]
    assert not outcomes_from_trajectories(runs).draft


def test_the_draft_is_read_as_a_deployed_gate_reads_it() -> None:
    """Where a call was banned: without how much the model would rather have called."""
    call = ModelCall(node="answer", step=0, log_probs=(-9.0, -0.5), allowed_log_probs=(-0.1, -0.5))
    runs = [run(allowed=(), calls=(call,)), run(allowed=("search",), tools=("search",))]
    assert outcomes_from_trajectories(runs, draft=True).draft["draft_min_log_prob"].tolist() == [-0.5]


def test_two_models_are_not_mixed_unseen() -> None:
    runs = [run(allowed=(), metadata={"model": "small"}), run(allowed=("search",), metadata={"model": "large"})]
    with pytest.raises(InputError, match="--of-model"):
        outcomes_from_trajectories(runs)
    runs.append(run(allowed=("search",), tools=("search",), metadata={"model": "small"}))
    table = outcomes_from_trajectories(runs, model="small")
    assert dict(table.dropped) == {"another model": 1}


def test_a_question_without_all_branches_is_said_to_be_so() -> None:
    with pytest.raises(InputError, match="'direct': 1, 'search': 0"):
        outcomes_from_trajectories([run(allowed=())], tools=["search"])


def test_a_full_pool_keeps_the_same_sample_in_any_order() -> None:
    runs = [
        trajectory
        for i in range(300)
        for trajectory in (
            run(f"{i}", i % 2 == 0, allowed=()),
            run(f"{i}", i % 3 > 0, allowed=("search",), tools=("search",)),
        )
    ]
    whole = outcomes_from_trajectories(runs)
    expected = {
        question: tuple(row) for question, row in zip(whole.questions, whole.correct.tolist(), strict=True)
    }  # fmt: skip
    samples = []
    for seed in range(3):
        random.Random(seed).shuffle(runs)
        pool = OutcomePool(max_questions=50).extend(runs)
        assert len(pool) == 50
        table = pool.table()
        samples.append(table.questions)
        assert all(
            expected[question] == tuple(row)
            for question, row in zip(table.questions, table.correct.tolist(), strict=True)
        )  # fmt: skip
        assert len(table) == 50
        assert pool.dropped["no room for the question"] > 0
    assert samples[0] == samples[1] == samples[2] == whole.questions[:50]


def test_outcomes_read_without_messages_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TrajectoryStore(tmp_path) as store:
        for i in range(30):
            for allowed in ((), ("search",), ("python",)):
                call = ModelCall(node="answer", step=0, text="x", prompt_ids=(1, 2))
                message = {"type": "ai", "data": {"content": "half of an emoji \ud83d" if i == 3 else "x"}}
                runs = run(
                    f"{i}", bool(rng.random() < 0.5), allowed=allowed, tools=allowed, calls=(call,),
                    messages=(message,), metadata={"model": "m"}, seconds=0.5,
                    branch="tool" if allowed else "direct",
                )  # fmt: skip
                store.append(runs)
    whole, light = list(store.read()), list(store.read(whole=False))
    assert [vars(one) | {"messages": (), "calls": (), "history": (), "tools": ()} for one in whole] == [
        vars(one) for one in light
    ]
    assert store.report.read == 90
    tables = [outcomes_from_trajectories(runs) for runs in (whole, light)]
    assert tables[0].correct.tolist() == tables[1].correct.tolist()


@pytest.mark.parametrize(
    ("answer", "verifier", "said"),
    [
        ("The answer is, as far as I know, 42 apples.", "exact", "state the reference"),
        ("I have no idea.", "exact", "of every branch, are judged wrong"),
    ],
)
def test_verdicts_that_look_like_the_verifiers_fault_are_refused(answer: str, verifier: str, said: str) -> None:
    runs = [
        run(f"{i}", True, allowed=allowed, tools=allowed, answer=answer,
            asked=Question(id=f"{i}", text=f"How many are {i}?", answer="42", verifier=verifier))
        for i in range(20)
        for allowed in ((), ("search",))
    ]  # fmt: skip
    with pytest.raises(InputError, match=said):
        outcomes_from_trajectories(runs)
    assert not outcomes_from_trajectories(runs, trust_verdicts=True).correct.any()
    if "42" in answer:
        assert outcomes_from_trajectories(runs, verify=partial(verify, name="prose")).correct.all()


class Words:
    """A judge of pairs that calls the same what has the same words."""

    name = "words"

    def __init__(self) -> None:
        self.asked: list[list[Pair]] = []

    def rule(self, pairs: list[Pair]) -> list[Agreement]:
        self.asked.append(pairs)
        return [
            Agreement(agrees=None if "?" in it.probe else set(it.own.split()) == set(it.probe.split())) for it in pairs
        ]


def test_without_a_reference_the_free_runs_own_answer_is_the_measure() -> None:
    def of(name: str, branch: str, answer: str, **fields: object) -> Trajectory:
        allowed = {"direct": (), "tool": ("search",), "free": TOOLS}[branch]
        tools = ("search",) if branch != "direct" else ()
        asked = Question(id=name, text=f"What is {name}?")
        return run(name, allowed=allowed, required=branch == "tool", tools=tools, asked=asked, answer=answer,
                   branch=branch, id=f"{name}/{branch}/{answer}", **fields)  # fmt: skip

    runs = [
        of("a", "free", "it is red"), of("a", "direct", "red it is"), of("a", "tool", "it is blue"),
        of("b", "free", "12"), of("b", "direct", "12.0"), of("b", "tool", "12"),
        of("c", "free", "bad", metadata={"feedback": 0}), of("c", "direct", "bad"), of("c", "tool", "bad"),
        of("d", "free", "it is red"), of("d", "direct", "red ?"), of("d", "tool", "it is red"),
        of("e", "free", "later", metadata={"turn": 1}), of("e", "direct", "later"), of("e", "tool", "later"),
        run("f", True, allowed=()), run("f", False, allowed=("search",), tools=("search",)),
    ]  # fmt: skip
    judge = Words()
    own = own_answers(runs)
    assert own == {"a": "it is red", "b": "12", "d": "it is red"}
    pool = OutcomePool(tools=["search"], verify=Agreeing(own, pair_judge=judge))
    table = pool.extend(runs).table()
    found = dict(zip(table.questions, table.correct.tolist(), strict=True))
    # Of a two runs took the tool, the free one, which agrees with itself, and the forced one, which does not.
    assert found == {"What is a?": [1.0, 0.5], "What is b?": [1.0, 1.0], "What is f?": [1.0, 0.0]}
    assert pool.dropped == {"no reference": 6, "judge unavailable": 1}
    # Asked about all at once; what can be compared is not asked about.
    assert [pair.probe for pair in judge.asked[0]] == ["red it is", "it is blue", "red ?"]
    # Without a judge what no comparison decides has no verdict.
    alone = OutcomePool(tools=["search"], verify=Agreeing(own)).extend(runs)
    assert alone.coverage() == {"direct": 2, "search": 4}


def test_a_judge_that_is_away_is_not_a_missing_branch() -> None:
    def away(question: Question, answer: str) -> bool | None:
        raise InfrastructureError("no such model")

    pool = OutcomePool(verify=away).extend([run(allowed=()), run(allowed=("search",), tools=("search",))])
    with pytest.raises(
        InfrastructureError, match=r"^The judge gave no verdict on 2 of 2 runs.*Check its name, its key"
    ):
        pool.table()
