import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.tools.search.documents import index_text, query_terms


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("capital of France", ["capital", "of", "france"]),
        ("Café café CAFE", ["cafe"]),
        ('"quoted" OR (NEAR* -col:x ^y)', ["quoted", "or", "near", "col", "x", "y"]),
        ("state-of-the-art, isn't_it?", ["state", "of", "the", "art", "isn", "t", "it"]),
        ("日本の首都", ["日本", "本の", "の首", "首都"]),
        ("ﾄｳｷｮｳ", ["トウ", "ウキ", "キョ", "ョウ"]),  # half-width kana
        ("iPhone手机15", ["iphone", "手机", "15"]),
        ("서울은 어디", ["서울", "울은", "어디"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ＡＢＣ", ["abc"]),
        ("猫", ["猫"]),
        (" \t\n!?…「」", []),
        ("", []),
        ("a\x00b \ud800 c", ["a", "b", "c"]),
    ],
)
def test_query_terms(query, terms):
    assert list(query_terms(query)) == terms


def test_a_single_character_of_an_unspaced_script_matches_as_a_prefix():
    assert query_terms("猫") == {"猫": '"猫"*'}
    assert query_terms("x") == {"x": '"x"'}


@pytest.mark.parametrize(
    ("text", "indexed"),
    [
        ("Plain text, unchanged.", "Plain text, unchanged."),
        ("黒猫", " 黒猫 猫 "),
        ("私の iPhone", " 私の の  iPhone"),
        ("コーヒー", " コー ーヒ ヒー ー "),
        ("中", " 中 "),
    ],
)
def test_index_text(text, indexed):
    assert index_text(text) == indexed


@given(st.text(st.characters(), max_size=200))
def test_terms_are_quoted_words_and_what_is_indexed_is_utf8(text):
    for expression in query_terms(text).values():
        assert expression.startswith('"')
        assert expression.rstrip("*").endswith('"')
        assert '"' not in expression.rstrip("*")[1:-1]
    index_text(text).encode()


def test_a_very_long_query_is_cut():
    assert len(query_terms(" ".join(f"w{i}" for i in range(10_000)))) == 64
    assert list(query_terms("a" * 10**7)) == ["a" * 2_000]
