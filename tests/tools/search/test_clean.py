import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.tools.search.base import plain_text, web_link


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("<b>bold</b> move", "bold move"),
        ("one<br>two", "one two"),
        ("a < b and c > d", "a < b and c > d"),
        ("fish &amp; chips &lt;b&gt;", "fish & chips"),
        ("x<script>steal()</script>y", "x y"),
        ("x<SCRIPT src='a'>1<b>2</script >y", "x y"),
        ("x<style>p{}</style><p>y", "x y"),
        ("x<!-- hidden <b> words > here --> y", "x y"),
        ("x<!-- never closed", "x"),
        ("x<script>never closed", "x"),
        ("cut <a href='http", "cut"),
        ("a\x00b\x1b[31mc\u202ed\u200b", "ab[31mcd"),
        (None, ""),
        (7, "7"),
        (["x"], "['x']"),
        ("日本<i>語</i>", "日本 語"),
    ],
)
def test_what_is_left_of_a_text(value, text):
    assert plain_text(value, 100) == text


@pytest.mark.parametrize(
    "unit", ["<", "<a", "<!--", "<script>", "</", "<a ", "&lt;", "a>", "<!-", "-->", "<script", "<a<!--", "&#60;!--"]
)
def test_no_text_takes_long(unit):
    text = unit * (10_000_000 // len(unit))
    began = time.thread_time()
    shown = plain_text(text, 1_000)
    assert time.thread_time() - began < 0.5
    assert len(shown) <= 1_000


@given(st.text(max_size=300), st.integers(1, 50))
def test_any_text_is_short_and_on_one_line(text, length):
    shown = plain_text(text, length)
    assert len(shown) <= length
    assert len(shown.splitlines()) <= 1
    shown.encode()


@pytest.mark.parametrize(
    "link",
    [
        "http://a.example",
        "https://a.example/b?c=d#e",
        " https://a.example/ ",
        "https://xn--p1ai/",
        "https://müller.de/ä",
    ],
)
def test_links_to_the_web_stay(link):
    assert web_link(link) == link.strip()


@pytest.mark.parametrize(
    "link",
    [
        "javascript:alert(1)", "data:text/html,x", "ftp://a.example", "//a.example", "a.example", "", None, 3,
        "https://bank.example@evil.example", "https://", "https:///path", "https://a.example/ b", "https://a.example/\n",
        "https://a.example:port/", "https://[::1", "https://a.example/\u202e", "https://a.example/<b>",
        "https://a.example/" + "a" * 3_000, "file:///etc/passwd", "https://a.example\\@b.example",
    ],
)  # fmt: skip
def test_other_links_go(link):
    assert web_link(link) == ("https://a.example/" if link == "https://a.example/\n" else "")
