import pytest

from metis_agent.gates.features import agreement


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
