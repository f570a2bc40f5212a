import pytest

from metis_agent.audit.kinds import kinds_of

ORDERS = [f"Where is my order number {n}?" for n in range(20)]
CAPITALS = [f"What is the capital city of country {name}?" for name in "abcdefghijklmnopqrst"]


def test_labels_are_kept_where_there_are_any():
    assert kinds_of(["a", "b"], ["sum", ""]) == ["sum", "other"]


def test_clusters_are_named_by_their_words():
    names = kinds_of(ORDERS + CAPITALS, [""] * 40)
    assert len(set(names[:20]) & set(names[20:])) == 0
    assert all("order" in name for name in names[:20])
    assert all("capital" in name for name in names[20:])
    assert not {"the", "is", "of", "my"} & {word for name in names for word in name.split(", ")}
    assert kinds_of(ORDERS + CAPITALS, [""] * 40) == names


def test_scripts_without_spaces_have_words_too():
    names = kinds_of(
        [f"法国的首都是什么 {n}" for n in range(12)] + [f"我的订单在哪里 {n}" for n in range(12)], [""] * 24
    )
    assert set(names[:12]).isdisjoint(names[12:])


@pytest.mark.parametrize("questions", [["same"] * 30, ["a", "b"], [""] * 20, [f"w{n}" for n in range(30)]])
def test_where_there_is_nothing_to_tell_apart_there_are_no_kinds(questions):
    assert set(kinds_of(questions, [""] * len(questions))) == {""}
