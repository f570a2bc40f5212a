"""Training, the artefact and the deployed gate, end to end on a small world."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.errors import (
    CheckpointError,
    ConfigurationError,
    GateError,
    InputError,
    SchemaVersionError,
    StorageError,
)
from metis_agent.evaluation.gates import evaluate_gate, score_table
from metis_agent.gates.artefact import FORMAT, load_artefact
from metis_agent.gates.features import agreement
from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo import export
from metis_agent.hdpo.export import set_threshold, trained_keys, write_artefact
from metis_agent.hdpo.gate_trainer import TrainedGate, train_gate
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import Draft, GateRequest, ToolSpec

# A price above what the estimates of a small table are off by.
TRAINING = GateTraining(beta=0.2)


def world(n: int = 300, seed: int = 0, context: bool = False, draft: bool = False) -> OutcomeTable:
    """Sums need the tool, greetings don't, riddles are lost either way."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, n)
    asked = ("What is {} plus {}?", "Say hello to guest {} of {}", "Riddle {}: what has {} eyes?")
    questions = tuple(asked[k].format(*rng.integers(10, 10_000, 2)) for k in kinds)
    p = np.array([[0.1, 0.95], [0.95, 0.95], [0.1, 0.1]])[kinds]
    return OutcomeTable(
        questions=questions,
        actions=("direct", "python"),
        correct=(rng.random((n, 2)) < p).astype(float),
        cost=np.tile([0.0, 1.0], (n, 1)),
        seconds=np.full((n, 2), np.nan),
        contexts=tuple(f"a | {i}\nsome text" for i in range(n)) if context else (),
        draft={"draft_entropy": np.where(rng.random(n) < 0.2, np.nan, np.exp(kinds + rng.normal(size=n)))}
        if draft
        else {},
    )


@pytest.fixture(scope="module")
def trained() -> tuple[OutcomeTable, TrainedGate]:
    table = world()
    return table, train_gate(table, TRAINING)


@pytest.fixture
def folder(tmp_path: Path, trained: tuple[OutcomeTable, TrainedGate]) -> Path:
    table, gate = trained
    write_artefact(gate, tmp_path / "gate", table=table, metrics={"auc": 0.9}, descriptions={"python": "runs code"})
    return tmp_path / "gate"


def ask(text: str, *later: object, tools: tuple[str, ...] = ("python",)) -> GateRequest:
    return GateRequest(
        messages=[HumanMessage(text), *later],  # type: ignore[list-item]
        tools=tuple(ToolSpec(name=name) for name in tools),
    )


def test_it_calls_the_tool_where_it_helps_and_only_there(folder: Path) -> None:
    gate = PolicyGate(folder)
    decision = gate.decide(ask("What is 5124 plus 7707?"))
    assert decision.allowed == ("python",)
    assert decision.required
    assert decision.version == gate.version != ""
    assert gate.decide(ask("Say hello to guest 1234 of 5678")).direct
    later = gate.decide(
        ask("What is 5124 plus 7707?", AIMessage("", tool_calls=[]), ToolMessage("589", tool_call_id="1"))
    )
    assert later.allowed == ("python",)
    assert not later.required


async def test_async_is_the_same(folder: Path) -> None:
    gate = PolicyGate(folder)
    assert (await gate.adecide(ask("What is 1 plus 2?"))).probabilities == gate.decide(
        ask("What is 1 plus 2?")
    ).probabilities


@pytest.mark.parametrize(("context", "draft"), [(False, False), (True, False), (True, True)])
def test_the_deployed_gate_says_what_was_trained(tmp_path: Path, context: bool, draft: bool) -> None:
    table = world(context=context, draft=draft)
    gate = train_gate(table, GateTraining(strengths=(1.0,)))
    write_artefact(gate, tmp_path / "gate", table=table, metrics={})
    scored = score_table(PolicyGate(tmp_path / "gate"), table)
    rows = np.arange(len(table))
    accuracy, probabilities = gate.score(rows)
    np.testing.assert_allclose(scored.direct_right, accuracy[:, 0], atol=1e-5)
    np.testing.assert_allclose(scored.probabilities, probabilities, atol=1e-5)


def test_held_out_questions_are_ranked_well(folder: Path) -> None:
    fresh = world(seed=9)
    gate = PolicyGate(folder)
    figures = evaluate_gate(score_table(gate, fresh), fresh, gate.threshold, resamples=20)
    assert figures["auc"] > 0.85
    assert figures["auc_benefit"] > 0.9
    # Sums are a third of the questions; calling on them alone gives nearly what always calling does.
    at = figures["at_threshold"]
    assert at["tool_rate"] < 0.5
    assert at["accuracy"] > figures["baselines"]["always"]["accuracy"] - 0.05
    assert figures["frontier"][0]["accuracy"] == pytest.approx(figures["baselines"]["never"]["accuracy"])
    assert figures["frontier"][-1]["accuracy"] == pytest.approx(figures["baselines"]["always"]["accuracy"])


def test_the_same_table_gives_the_same_gate(trained: tuple[OutcomeTable, TrainedGate]) -> None:
    table, gate = trained
    np.testing.assert_array_equal(train_gate(table, TRAINING).accuracy, gate.accuracy)


def test_a_tampered_newer_or_foreign_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    description = json.loads((folder / "gate.json").read_text())
    weights = (folder / "gate.safetensors").read_bytes()
    (folder / "gate.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        PolicyGate(folder)
    (folder / "gate.safetensors").write_bytes(weights)
    (folder / "gate.json").write_text(json.dumps({**description, "threshold": {"value": 0.0}}))
    with pytest.raises(CheckpointError, match="changed"):
        PolicyGate(folder)
    (folder / "gate.json").write_text(json.dumps({**description, "format": FORMAT + 1}))
    with pytest.raises(SchemaVersionError, match="Upgrade"):
        PolicyGate(folder)
    (folder / "gate.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        PolicyGate(folder)
    with pytest.raises(CheckpointError, match="no gate"):
        PolicyGate(tmp_path)


def test_another_set_of_tools_is_refused(folder: Path) -> None:
    gate = PolicyGate(folder)
    with pytest.raises(ConfigurationError, match="trained for"):
        gate.decide(ask("What is 1 plus 2?", tools=("python", "search")))
    with pytest.raises(ConfigurationError, match="sets must be the same"):
        gate.check_tools([ToolSpec(name="search")])
    gate.check_tools([ToolSpec(name="python")])


def test_a_new_threshold_is_kept_and_training_questions_are_known(
    folder: Path, trained: tuple[OutcomeTable, TrainedGate]
) -> None:
    set_threshold(folder, {"value": 1.0, "chosen": "by hand"})
    assert PolicyGate(folder).decide(ask("What is 5124 plus 7707?")).direct
    assert tuple(trained_keys(load_artefact(folder))) == trained[0].keys


def test_a_draft_that_training_always_had_must_be_there(tmp_path: Path) -> None:
    table = world(draft=True)
    table = OutcomeTable(**{**table.__dict__, "draft": {"draft_perplexity": np.linspace(1, 2, len(table))}})
    write_artefact(train_gate(table, GateTraining(strengths=(1.0,))), tmp_path / "g", table=table, metrics={})
    gate = PolicyGate(tmp_path / "g", unfamiliar="gate")
    assert gate.wants_draft
    with pytest.raises(GateError, match="draft_perplexity"):
        gate.decide(ask("What is 1 plus 2?"))
    request = GateRequest(
        messages=[HumanMessage("What is 1 plus 2?")],
        tools=(ToolSpec(name="python"),),
        draft=Draft(text="3", log_probs=(-0.1, -0.3)),
    )
    assert gate.decide(request).probabilities is not None


def test_a_gate_that_reads_two_attempts_says_so(tmp_path: Path) -> None:
    table = world()
    columns = {"draft_agreement": np.linspace(0, 1, len(table)), "draft_perplexity": np.linspace(1, 2, len(table))}
    table = OutcomeTable(**{**table.__dict__, "draft": columns})
    write_artefact(train_gate(table, GateTraining(strengths=(1.0,))), tmp_path / "g", table=table, metrics={})
    request = GateRequest(
        messages=[HumanMessage("What is 1 plus 2?")],
        tools=(ToolSpec(name="python"),),
        draft=Draft(text="3", log_probs=(-0.1, -0.3)),
    )
    with pytest.raises(GateError, match="two direct attempts"):
        PolicyGate(tmp_path / "g", unfamiliar="gate").decide(request)
    served = PolicyGate(tmp_path / "g", unfamiliar="gate", read_draft=lambda draft: agreement(draft.text, "3"))
    assert served.decide(request).probabilities is not None


def test_serving_needs_neither_numpy_nor_torch(folder: Path) -> None:
    code = (
        "import sys; from metis_agent.gates.policy import PolicyGate; "
        f"PolicyGate({str(folder)!r}).score('What is 1 plus 2?'); "
        "print(sorted({'numpy', 'torch', 'scipy', 'safetensors'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def half_drafted(n: int = 900) -> OutcomeTable:
    """Whether the model is right shows in its draft alone, whether the tool is in the question; a third has drafts."""
    rng = np.random.default_rng(3)
    known, easy = rng.random(n) < 0.5, rng.random(n) < 0.5
    found = [f"{'Find the town' if it else 'Name the ghost'} of {rng.integers(10_000)}" for it in easy]
    p = np.stack([np.where(known, 0.9, 0.1), np.where(easy, 0.9, 0.1)], axis=1)
    entropy = np.where(known, 0.2, 2.0) + 0.1 * rng.normal(size=n)
    return OutcomeTable(
        questions=tuple(found), actions=("direct", "search"), correct=(rng.random((n, 2)) < p).astype(float),
        cost=np.tile([0.0, 1.0], (n, 1)), seconds=np.full((n, 2), np.nan),
        draft={"draft_entropy": np.where(np.arange(n) % 3 == 0, entropy, np.nan)},
    )  # fmt: skip


def test_questions_without_a_draft_teach_only_about_the_tools() -> None:
    table = half_drafted()
    training = GateTraining(strengths=(1.0,), drafted=True)
    gate = train_gate(table, training)
    assert gate.judged.tolist() == list(range(0, 900, 3))
    # What the model gets right without a draft changes no head, what the tool gets right does.
    undrafted = np.isnan(table.draft["draft_entropy"])
    for column, same in ((0, True), (1, False)):
        correct = table.correct.copy()
        correct[undrafted, column] = 1 - correct[undrafted, column]
        other = train_gate(OutcomeTable(**{**table.__dict__, "correct": correct}), training)
        assert np.allclose(other.policy.logits(gate.judged), gate.policy.logits(gate.judged)) == same
        assert (other.contrast.mean_accuracy == gate.contrast.mean_accuracy).all()


def test_a_tools_differences_count_whole_beside_drafts_where_the_records_show_them() -> None:
    table = half_drafted().take(np.arange(0, 900, 3))
    chance = np.stack([table.correct[:, 0], np.random.default_rng(0).random(len(table)) < 0.5], axis=1)
    for correct, given, trust in ((table.correct, None, 1.0), (chance, None, 0.5), (table.correct, 0.2, 0.2)):
        told = OutcomeTable(**{**table.__dict__, "correct": correct.astype(float)})
        assert train_gate(told, GateTraining(strengths=(1.0,), trust=given)).contrast.trust == trust


def test_questions_without_a_draft_help_a_gate_that_reads_drafts() -> None:
    table = half_drafted()
    undrafted = np.flatnonzero(np.isnan(table.draft["draft_entropy"]))
    few, rest = np.split(np.arange(0, 900, 3), [60])
    alone = train_gate(table, rows=few)
    helped = train_gate(table, GateTraining(drafted=True), rows=np.append(few, undrafted))

    truth = np.array([0.9 if "town" in table.questions[row] else 0.1 for row in rest])

    def error(trained: TrainedGate) -> float:
        """Of the tool's estimated accuracy."""
        return float(np.mean((trained.score(rest)[0][:, 1] - truth) ** 2))

    assert error(helped) < error(alone) / 2


@pytest.mark.parametrize(
    ("table", "message"),
    [(world(), "Of the 0 questions with a whole draft"), (half_drafted(60), "Of the 20 questions with a whole draft")],
)
def test_a_gate_for_drafts_needs_questions_with_drafts(table: OutcomeTable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_gate(table, GateTraining(drafted=True))


def test_a_failed_overwrite_leaves_the_old_gate(
    folder: Path, trained: tuple[OutcomeTable, TrainedGate], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, gate = trained
    before = (folder / "gate.json").read_bytes()

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(export.shutil, "move", broken)
    with pytest.raises(StorageError, match="can't be written"):
        write_artefact(gate, folder, table=table, metrics={})
    assert (folder / "gate.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["gate"]
    PolicyGate(folder)


def test_folds_and_strengths_that_are_given_are_used_of_a_large_table_too() -> None:
    fits: list[list[float]] = []

    class Noted:
        """A policy that takes note of what it is asked to fit, and learns nothing."""

        kind = "noted"

        def prepare(self, table: OutcomeTable) -> Noted:
            return self

        def fit(self, rows: np.ndarray, targets: np.ndarray, strength: np.ndarray) -> Noted:
            fits.append(strength.tolist())
            assert targets.shape == (len(rows), len(strength))
            return self

        def logits(self, rows: np.ndarray) -> np.ndarray:
            return np.zeros((len(rows), len(fits[-1])))

    table = world(20_000)
    train_gate(table, GateTraining(folds=5, strengths=(0.1, 0.3)), policy=Noted())  # type: ignore[arg-type]
    assert fits == [*[[0.1, 0.1, 0.3, 0.3]] * 5, [0.1, 0.1]]  # both strengths in one fit of a fold, and the last one
    fits.clear()
    train_gate(table, policy=Noted())  # type: ignore[arg-type]
    assert fits == [[1.0, 1.0]] * 3


class Sure:
    """A policy that knows the kinds of `world`, much too surely, at strength 1 and nothing of them at others."""

    kind = "sure"

    def prepare(self, table: OutcomeTable) -> Sure:
        self.kinds = np.array(["WSR".index(question[0]) for question in table.questions])
        return self

    def fit(self, rows: np.ndarray, targets: np.ndarray, strength: np.ndarray) -> Sure:
        self.strength = strength
        return self

    def logits(self, rows: np.ndarray) -> np.ndarray:
        known = 40.0 * np.array([[-1, 1, -1], [1, 1, -1]])
        vague = np.array([[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]])
        heads = [(known if c == 1 else vague)[head % 2, self.kinds[rows]] for head, c in enumerate(self.strength)]
        return np.stack(heads, axis=1)


def test_how_closely_to_fit_is_judged_at_the_temperature_that_it_gets() -> None:
    table = world(600)
    gate = train_gate(table, GateTraining(strengths=(0.1, 1.0)), policy=Sure())  # type: ignore[arg-type]
    # Too sure to be believed, but what it tells apart is right.
    assert gate.strength.tolist() == [1.0, 1.0]
    assert gate.contrast.head_temperature == pytest.approx([20, 20], rel=0.3)


def test_all_branches_are_held_back_alike() -> None:
    # Only the direct answer can be told, so a strength and a temperature of its own would be the best for it.
    table = world(600)
    table = replace(table, correct=np.column_stack([table.correct[:, 0], np.arange(600) % 2]))
    for gate in (train_gate(table), train_gate(table, policy=Sure())):  # type: ignore[arg-type]
        assert len({*gate.strength}) == len({*gate.contrast.head_temperature}) == 1


def test_a_tool_that_is_always_right_can_be_learnt_for(tmp_path: Path) -> None:
    table = world(200)
    sums = np.array(["plus" in question for question in table.questions])
    correct = np.column_stack([~sums, np.ones(200)]).astype(float)
    perfect = OutcomeTable(
        questions=table.questions, actions=table.actions, correct=correct, cost=table.cost, seconds=table.seconds
    )
    write_artefact(train_gate(perfect), tmp_path / "gate", table=perfect, metrics={})
    gate = PolicyGate(tmp_path / "gate")
    assert gate.decide(ask("What is 4096 plus 512?")).allowed == ("python",)
    assert gate.decide(ask("Say hello to guest 77 of 88")).allowed == ()


@pytest.mark.parametrize("training", [GateTraining(strengths=(0.1, 0.3)), GateTraining(drafted=True)])
def test_what_a_policy_would_pass_over_is_refused(training: GateTraining) -> None:
    from metis_agent.hdpo.policies.encoder import EncoderPolicy

    with pytest.raises(ConfigurationError, match="with a policy that"):
        train_gate(world(60), training, policy=EncoderPolicy(model="nowhere"))
