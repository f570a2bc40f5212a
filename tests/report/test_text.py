"""Text of strangers, made visible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.report.document import clipped, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred\x00\r\nnext\rover", "␛[31mred␀\nnext␍over"),
        ("a\u202eb\u2066c\u200bd\ufeff", "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200B⟩d⟨U+FEFF⟩"),
        ("\x9b31m\x7f", "⟨U+009B⟩31m␡"),
        ("half \ud83d", "half \ufffd"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("שלום 👩\u200d🚀", "שלום 👩\u200d🚀"),
    ],
)
def test_nothing_is_hidden(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_long_text_says_how_much_is_missing() -> None:
    shown = clipped("a" * 900 + "b" * 200, 1000)
    assert shown.startswith("a" * 800 + "\n… 100 characters")
    assert shown.endswith("b" * 200)
    assert clipped("a" * 1000, 1000) == "a" * 1000


@given(st.text(alphabet=st.characters(exclude_categories=())), st.integers(10, 50))
def test_any_text_comes_out_writable_and_bounded(text: str, limit: int) -> None:
    shown = clipped(text, limit)
    shown.encode("utf-8")
    assert not set(shown) & {"\x1b", "\x00", "\u202e", "\u2028"}
    assert len(shown) <= 9 * limit + 100
