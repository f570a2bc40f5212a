"""A question unlike its training is left to the model: calibrated when a gate is trained, stored, counted, shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from langchain_core.messages import AIMessage, HumanMessage

from metis_agent.errors import CheckpointError, ConfigurationError
from metis_agent.gates.artefact import GATE_FILE, TENSOR_FILE, description_hash, load_artefact
from metis_agent.gates.policy import UNFAMILIAR, PolicyGate
from metis_agent.gates.reading import SEEN, Familiarity, load_familiarity
from metis_agent.gates.wrappers import ShadowGate
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import calibrate, other_questions, train_gate
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import GateRequest, ToolSpec
from metis_agent.worlds.almanac.questions import questions

TOOLS = (ToolSpec(name="look"),)
STRANGE = "Write a cover letter for a nurse who moves to Hamburg, in a warm tone and without clichés."


def table_of(count: int) -> OutcomeTable:
    asked = questions("train", count)
    right = np.array([[float(it.kind in ("sum", "popular", "greeting")), 1.0] for it in asked])
    return OutcomeTable(
        questions=tuple(it.text for it in asked), actions=("direct", "look"), correct=right,
        cost=np.tile([0.0, 1.0], (count, 1)), seconds=np.full((count, 2), np.nan),
    )  # fmt: skip


def written(folder: Path, count: int) -> Path:
    table = table_of(count)
    write_artefact(train_gate(table, GateTraining(folds=3, strengths=(1.0,))), folder, table=table, metrics={})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gate") / "gate", 300)


def request(text: str) -> GateRequest:
    return GateRequest(messages=[HumanMessage(text)], tools=TOOLS)


def test_held_out_questions_are_decided_on_and_other_peoples_are_left_to_the_model(folder: Path) -> None:
    gate = PolicyGate(folder)
    held_out = [gate.decide(request(it.text)) for it in questions("test", 200)]
    assert np.mean([decision.reason.startswith(UNFAMILIAR) for decision in held_out]) <= 0.05
    others = [gate.decide(request(text)) for text in other_questions()]
    left = [decision for decision in others if decision.reason.startswith(UNFAMILIAR)]
    assert len(left) >= 0.9 * len(others)
    assert {decision.allowed for decision in left} == {("look",)}
    assert not any(decision.required for decision in left)
    told = load_artefact(folder).description["familiarity"]
    assert told["held_out_left"] <= told["share"] == 0.02
    assert told["others_left"] >= 0.9


def test_the_gate_decides_all_the_same_where_it_is_told_to(folder: Path) -> None:
    decision = PolicyGate(folder, unfamiliar="gate").decide(request(STRANGE))
    assert not decision.reason.startswith(UNFAMILIAR)
    assert decision.probabilities
    with pytest.raises(ConfigurationError, match="'model' or the 'gate'"):
        PolicyGate(folder, unfamiliar="me")  # type: ignore[arg-type]


def test_turns_are_counted_and_a_shadow_report_shows_them(folder: Path) -> None:
    gate = PolicyGate(folder)
    shadow = ShadowGate(gate)
    for text in ("What is 12 + 34?", STRANGE):
        decision = shadow.decide(request(text))
        shadow.after_turn([HumanMessage(text), AIMessage("So.")], [decision], [])
    assert "1 turns are unlike its training" in str(shadow.report())
    for text in ("What is 12 + 34?", STRANGE, STRANGE):
        gate.after_turn([HumanMessage(text), AIMessage("So.")], [gate.decide(request(text))], [])
    assert gate.unfamiliar_turns == 2


def test_a_gate_of_an_earlier_version_or_of_few_questions_has_no_threshold(folder: Path, tmp_path: Path) -> None:
    assert load_familiarity(load_artefact(written(tmp_path / "few", 48))) is None
    path = folder / GATE_FILE
    before = path.read_text()
    description = json.loads(before)
    del description["familiarity"]
    try:
        path.write_text(json.dumps({**description, "hash": description_hash(description)}))
        assert not PolicyGate(folder).decide(request(STRANGE)).reason
        description["familiarity"] = {"weights": [1.0], "length": {"mean": 1.0, "deviation": 0.0}, "threshold": 1.0}
        path.write_text(json.dumps({**description, "hash": description_hash(description)}))
        with pytest.raises(CheckpointError, match="familiarity that fits no gate"):
            PolicyGate(folder)
    finally:
        path.write_text(before)


def test_service_scores_as_training_did() -> None:
    asked = [it.text for it in questions("train", 200)]
    fold = np.arange(200) % 4
    found = calibrate(asked, fold)
    assert found is not None
    told = found.description
    served = Familiarity(
        seen=[int(word) for word in found.seen], weights=tuple(told["weights"]),
        length=(told["length"]["mean"], told["length"]["deviation"]), threshold=told["threshold"],
    )  # fmt: skip
    others = [served.score(text) > served.threshold for text in other_questions()]
    assert np.mean(others) == told["others_left"]
    # Nothing in a training question is new.
    assert served.score(asked[0]) < served.threshold
    assert calibrate(asked[:48], fold[:48]) is None
    assert min(told["weights"][1:]) >= 0
    assert (SEEN, TENSOR_FILE) == ("seen_ngrams", "gate.safetensors")
