from pathlib import Path

import numpy as np
import pytest

from metis_agent.evaluation.gates import area_under_curve, score_table
from metis_agent.gates.features import agreement
from metis_agent.gates.policy import PolicyGate
from metis_agent.gates.reading import ends_of, hashed_words
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
from metis_agent.rollouts.outcomes import OutcomeTable


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
