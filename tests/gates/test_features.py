from pathlib import Path

import numpy as np
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from metis_agent.evaluation.gates import area_under_curve, score_table
from metis_agent.gates.features import agreement
from metis_agent.gates.policy import UNFAMILIAR, PolicyGate
from metis_agent.gates.reading import ends_of, hashed_words
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import GateRequest, ToolSpec


@pytest.mark.parametrize(
    ("one", "other", "shared", "contained"),
    [
        ("435.", "435", 1.0, 1.0),
        ("15 August 1945", "August 15, 1945", 1.0, 1.0),
        ("the Yamato dynasty", "Yamato dynasty", 1.0, 1.0),
        ("1,100", "1100", 1.0, 1.0),
        ("3.5", "35", 0.0, 0.0),
        ("Peter Pan", "Captain Hook", 0.0, 0.0),
        ("algonquin park", "Algonquin", 0.5, 1.0),
        # Only words that say nothing: then they are all there is.
        ("who", "who", 1.0, 1.0),
        # Not every answer is English.
        ("Αθήνα", "Αθήνα", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
    ],
)
def test_agreement_is_of_what_two_answers_say(one: str, other: str, shared: float, contained: float) -> None:
    assert agreement(one, other) == {"draft_agreement": shared, "draft_containment": contained}
    assert agreement(other, one) == agreement(one, other)


def test_words_of_context_and_draft_are_read_and_served_as_they_were_trained(tmp_path: Path) -> None:
    # One question, asked of many texts: only a word of the context tells whether the tool is right, and only one of
    # the draft whether the direct answer is.
    rng = np.random.default_rng(0)
    direct, tool = rng.random((2, 120)) < 0.5
    table = OutcomeTable(
        questions=("Which of these is it?",) * 120,
        actions=("direct", "search"),
        correct=np.stack([direct, tool], axis=1).astype(float),
        cost=np.tile([0.0, 1.0], (120, 1)),
        seconds=np.full((120, 2), np.nan),
        contexts=tuple(f"{'beta' if right else 'alpha'} decay {row}" for row, right in enumerate(tool)),
        drafts=tuple(f"It is {'surely' if right else 'perhaps'} {row} of them" for row, right in enumerate(direct)),
    )
    trained = train_gate(table, GateTraining(strengths=[1.0]))
    assert area_under_curve(trained.accuracy[:, 0], table.correct[:, 0]) > 0.95
    assert area_under_curve(trained.accuracy[:, 1], table.correct[:, 1]) > 0.95
    write_artefact(trained, tmp_path / "gate", table=table, metrics={})
    served = score_table(PolicyGate(tmp_path / "gate"), table)
    accuracy, probabilities = trained.score(np.arange(120))
    np.testing.assert_allclose(served.direct_right, accuracy[:, 0], atol=1e-5)
    np.testing.assert_allclose(served.probabilities, probabilities, atol=1e-5)


def test_a_long_text_is_read_where_it_begins_and_where_it_ends() -> None:
    text = " ".join(f"word{place}" for place in range(3000))
    assert hashed_words("d", text) == hashed_words("d", ends_of(text))
    assert ends_of(ends_of(text)) == ends_of(text)
    assert len(hashed_words("d", text)) < 400
    assert hashed_words("c", "alpha") != hashed_words("d", "alpha")


def test_another_model_than_the_gate_learnt_from_is_noticed_from_its_first_reply_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    correct = (rng.random((60, 2)) < 0.5).astype(float)
    table = OutcomeTable(
        questions=tuple(f"How much is {row}?" for row in range(60)),
        actions=("direct", "search"),
        correct=correct,
        cost=np.tile([0.0, 1.0], (60, 1)),
        seconds=np.full((60, 2), np.nan),
        models=("gpt-4-0613",),
    )
    write_artefact(train_gate(table, GateTraining(strengths=[1.0])), tmp_path / "gate", table=table, metrics={})
    gate = PolicyGate(tmp_path / "gate")
    search = ToolSpec(name="search", description="")
    asked = [HumanMessage("How much is 7?")]

    def decided(messages: list[BaseMessage]) -> str:
        return gate.decide(GateRequest(messages=messages, tools=(search,))).reason

    def answered(model: str) -> list[BaseMessage]:
        return [*asked, AIMessage("7", response_metadata={"model_name": model})]

    assert not decided(asked).startswith(UNFAMILIAR)
    # What the conversation shows counts at once; then the gate remembers who answers.
    assert "'gpt-3.5-turbo'" in decided([*answered("gpt-3.5-turbo"), *asked])
    assert not decided([*answered("gpt-4-0613"), *asked]).startswith(UNFAMILIAR)
    gate.after_turn(answered("gpt-3.5-turbo"), [], [])
    assert decided(asked).startswith(UNFAMILIAR)
    gate.after_turn(answered("gpt-4-0613"), [], [])
    assert not decided(asked).startswith(UNFAMILIAR)
    # A local path names no model that could be known again.
    gate.after_turn(answered("/models/mine"), [], [])
    assert not decided(asked).startswith(UNFAMILIAR)
