import random
from typing import get_args

import pytest

from metis_agent.errors import ConfigurationError
from metis_agent.judging.verifiers import verify
from metis_agent.worlds.almanac.agent import ERROR, Noise
from metis_agent.worlds.almanac.cold_start import natural_call, observe, read
from metis_agent.worlds.almanac.facts import PLACES, place
from metis_agent.worlds.almanac.questions import KINDS, Kind, Split, draw, questions

EVERY_KIND = get_args(Kind)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_held_out_questions_never_stand_in_training(kind: Kind) -> None:
    drawn = {split: {draw(kind, split, random.Random(seed)).text for seed in range(400)} for split in get_args(Split)}
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["validation"] & drawn["test"]


def test_a_sum_is_held_out_in_both_orders() -> None:
    def pairs(split: Split) -> set[frozenset[str]]:
        made = (draw("sum", split, random.Random(seed)).text for seed in range(2_000))
        return {
            frozenset(word for word in text.replace(".", "").replace("?", "").split() if word.isdigit())
            for text in made
        }

    assert not pairs("train") & pairs("test")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_reference_answer_is_the_one_that_a_faultless_tool_gives(kind: Kind) -> None:
    rng = random.Random(0)
    for _ in range(50):
        question = draw(kind, "test", rng)
        content = observe(natural_call(question), Noise(wrong=0, error=0), rng)
        assert verify(question, read(question, content)) is True


def test_kinds_come_in_equal_shares_and_from_a_seed() -> None:
    made = questions("test", 52, seed=3)
    assert [sum(question.kind == kind for question in made) for kind in KINDS] == [11, 11, 10, 10, 10]
    assert made == questions("test", 52, seed=3)
    assert made != questions("test", 52, seed=4)
    assert len({question.id for question in made}) == 52


def test_bare_greetings_are_learnt_from() -> None:
    assert "hi" in {question.text for question in questions("train", 300, kinds=("greeting",))}


def test_places_have_distinct_names() -> None:
    assert len({place(index).name for index in range(PLACES)}) == PLACES


@pytest.mark.parametrize(
    ("split", "count", "kinds"),
    [("dev", 5, KINDS), ("test", 5, ("riddle",)), ("test", 5, ()), ("test", 5_000, ("greeting",))],
)
def test_what_cannot_be_asked_is_refused(split: Split, count: int, kinds: tuple[Kind, ...]) -> None:
    with pytest.raises(ConfigurationError):
        questions(split, count, kinds=kinds)


def test_noise_spoils_as_often_as_it_says() -> None:
    rng = random.Random(1)
    contents = ["4821", place(7).entry]
    results = [Noise().apply(contents[i % 2], rng) for i in range(20_000)]
    failed = sum(result is None for result in results)
    wrong = sum(result not in (None, *contents) for result in results)
    assert 0.007 < failed / len(results) < 0.013
    assert 0.07 < wrong / len(results) < 0.09


def test_noise_changes_the_value_but_not_the_name() -> None:
    spoiled = Noise(wrong=1, error=0).apply(place(7).entry, random.Random(0))
    assert spoiled is not None
    assert spoiled.startswith(place(7).name)
    assert spoiled != place(7).entry
    assert spoiled != ERROR
