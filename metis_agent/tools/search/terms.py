"""How text becomes search terms, for the index and for queries alike.

SQLite's `unicode61` tokenizer splits at spaces and punctuation, so a Chinese sentence would be one term.
Runs of the scripts that are written without spaces (and of Korean, whose particles stick to the words) are
cut into overlapping pairs of characters, as Lucene's CJKAnalyzer does; the last character also stands alone,
so that a query of one character finds every run that holds it, by prefix.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["TOKENIZER", "index_text", "query_terms"]

TOKENIZER = "unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'"
"""The FTS5 tokenizer that this module prepares text for: marks belong to words, as in Hindi and Thai."""

_MAX_QUERY = 2_000
_MAX_TERMS = 64

_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b"  # radicals, iteration marks, numerals
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3105-\u312f\u31a0-\u31bf"  # bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff"  # hangul
    "]+"
)


def index_text(text: str) -> str:
    """Return the text as it goes into the index."""
    if text.isascii():
        return text
    return _UNSPACED.sub(_with_last_alone, _normal(text))


def query_terms(query: str) -> dict[str, str]:
    """Return the query's distinct terms: each as it stands in the index -> the FTS5 expression for it.

    Every expression is quoted, so nothing in a query is an operator. Of a very long query, the start counts.
    """
    words = _letters(_normal(query[:_MAX_QUERY]))
    terms: dict[str, str] = {}
    for word in words.split():
        for start, end in _pieces(word):
            piece = word[start:end]
            alone = end - start == 1 and _UNSPACED.match(piece)
            terms.setdefault(_folded(piece), f'"{piece}"*' if alone else f'"{piece}"')
            if len(terms) == _MAX_TERMS:
                return terms
    return terms


def _normal(text: str) -> str:
    # Half-width kana, full-width Latin and ligatures become the usual characters. A lone surrogate is no
    # text, and SQLite would refuse it.
    return unicodedata.normalize("NFKC", text).encode("utf-8", "replace").decode()


def _letters(text: str) -> str:
    """Replace what the tokenizer takes for a separator by a space."""
    return "".join(c if _in_word(c) else " " for c in text)


def _in_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LN" or category in ("Co", "Mn", "Mc")


def _pieces(word: str) -> list[tuple[int, int]]:
    """Return the places of a word's terms: pairs in unspaced runs, the rest whole."""
    places: list[tuple[int, int]] = []
    done = 0
    for run in _UNSPACED.finditer(word):
        start, end = run.span()
        if done < start:
            places.append((done, start))
        places.extend((i, i + 2) for i in range(start, end - 1))
        if end - start == 1:
            places.append((start, end))
        done = end
    if done < len(word):
        places.append((done, len(word)))
    return places


def _with_last_alone(run: re.Match[str]) -> str:
    text = run[0]
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    return f" {' '.join((*pairs, text[-1]))} "


def _folded(term: str) -> str:
    """Return the term as the tokenizer stores it: lower case, no diacritics."""
    if term.isascii():
        return term.lower()
    decomposed = unicodedata.normalize("NFD", term.lower())
    bare = "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f")
    return unicodedata.normalize("NFC", bare)
