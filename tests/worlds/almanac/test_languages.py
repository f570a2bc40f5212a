"""A gate reads other languages as well as English, and a follow-up as well as the whole question."""

from pathlib import Path

import numpy as np
import pytest
from langchain_core.messages import AIMessage, HumanMessage

from metis_agent.evaluation.gates import area_under_curve, score_table
from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable, question_key
from metis_agent.types import GateRequest, ToolSpec
from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN, questions
from tests.worlds.almanac.translations import LANGUAGES, answered_by_heart, outcomes, translated

HELD_OUT = 300


def held_out_auc(language: str, seed: int, *, turns: int = 1, rows: int = 400, training: GateTraining) -> float:
    """Of the chance that the direct answer is right, on questions that the gate never saw."""
    parts = [
        outcomes(split, count, seed=seed, turns=turns, write=lambda it: translated(it, language))
        for split, count in (("train", rows), ("test", HELD_OUT))
    ]
    table = OutcomeTable(
        questions=parts[0].questions + parts[1].questions,
        histories=parts[0].histories + parts[1].histories,
        actions=parts[0].actions,
        **{name: np.vstack([getattr(part, name) for part in parts]) for name in ("correct", "cost", "seconds")},
    )
    gate = train_gate(table, training, rows=np.arange(rows))
    accuracy, _ = gate.score(np.arange(rows, len(table)))
    asked = questions("test", HELD_OUT, seed=seed, kinds=(*KINDS, PARTIALLY_KNOWN))
    return area_under_curve(accuracy[:, 0], np.array([answered_by_heart(it) for it in asked], dtype=float))


def test_a_deployed_gate_reads_the_conversation_as_training_did(tmp_path: Path) -> None:
    table = outcomes("train", 240, seed=0, turns=2)
    trained = train_gate(table, QUICK)
    write_artefact(trained, tmp_path / "gate", table=table, metrics={})
    gate, (_, expected) = PolicyGate(tmp_path / "gate", unfamiliar="gate"), trained.score(np.arange(len(table)))
    followed = [row for row, history in enumerate(table.histories) if history][:20]
    for row in followed:
        question = table.questions[row]
        before = [
            {"user": HumanMessage, "assistant": AIMessage}[who](text)
            for who, text in (line.split(": ", 1) for line in table.histories[row].split("\n"))
        ]
        tools = (ToolSpec(name="text_search"),)
        decided = gate.decide(GateRequest(messages=[*before, HumanMessage(question)], tools=tools))
        assert decided.probabilities == {"text_search": pytest.approx(float(expected[row, 0]), abs=1e-5)}
    assert score_table(gate, table).probabilities == pytest.approx(expected, abs=1e-5)
    assert len(set(table.keys)) > len({question_key(text) for text in table.questions})


QUICK = GateTraining(folds=2, strengths=(1.0,))


def test_every_language_is_read_as_well_as_english() -> None:
    english = held_out_auc("English", 0, training=QUICK)
    assert english > 0.93
    for language in LANGUAGES:
        assert held_out_auc(language, 0, training=QUICK) > english - 0.03, language


def test_a_follow_up_is_read_as_well_as_the_whole_question() -> None:
    whole, follow_up = (held_out_auc("English", 0, turns=turns, training=QUICK) for turns in (1, 2))
    assert follow_up > whole - 0.02


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_so_it_is_with_more_data_and_other_seeds(seed: int) -> None:
    training = GateTraining(folds=3, seed=seed)
    english = held_out_auc("English", seed, rows=1500, training=training)
    assert held_out_auc("English", seed, turns=2, rows=1500, training=training) > english - 0.02
    for language in LANGUAGES:
        assert held_out_auc(language, seed, rows=1500, training=training) > english - 0.03, language
