"""Kinds of question where nobody labelled any: clusters of their words, named by the words that set each apart."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence

__all__ = ["kinds_of"]

_MOST = 8
_FEWEST = 12
"""Questions; of fewer no clusters are made."""
_NAMED_BY = 3
_WORD = re.compile(r"[^\W\d_]{2,}|\d+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}")
_OTHER = "other"


def kinds_of(questions: Sequence[str], labels: Sequence[str], *, seed: int = 0) -> list[str]:
    """A kind for each question: its label where any question has one, else the name of its cluster.

    Args:
        questions: Their texts.
        labels: "" where a question has none.
        seed: Of the clustering.

    Returns:
        Names; all empty where there are too few questions, or scikit-learn is not installed.
    """
    if any(labels):
        return [label or _OTHER for label in labels]
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
    except ImportError:
        return [""] * len(questions)
    texts = [" ".join(word for word in _words(it) if word not in ENGLISH_STOP_WORDS) for it in questions]
    if len(set(texts)) < _FEWEST:
        return [""] * len(questions)
    # Words that half of the questions have tell none apart, nor does one that stands in a single question.
    words = TfidfVectorizer(token_pattern=r"\S+", min_df=2, max_df=0.5, sublinear_tf=True)
    try:
        x = words.fit_transform(texts)
    except ValueError:  # no word is in two questions
        return [""] * len(questions)
    count = min(_MOST, max(2, round((len(questions) / 6) ** 0.5)), len(set(texts)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer kinds than were looked for are no fault
        clusters = KMeans(n_clusters=count, n_init=4, random_state=seed).fit_predict(x)
    names = _names(texts, clusters.tolist())
    return [names[cluster] for cluster in clusters]


def _names(texts: Sequence[str], clusters: Sequence[int]) -> dict[int, str]:
    """By the commonest words of each cluster that are commoner in it than elsewhere."""
    everywhere = Counter(word for text in texts for word in set(text.split()))
    names: dict[int, str] = {}
    for cluster in sorted(set(clusters)):
        inside = [text for text, its in zip(texts, clusters, strict=True) if its == cluster]
        here = Counter(word for text in inside for word in set(text.split()))

        def worth(word: str, here: Counter[str] = here) -> tuple[float, int, str]:
            return here[word] ** 2 / everywhere[word], here[word], word

        best = sorted((word for word in here if not word.isdigit()), key=worth, reverse=True)[:_NAMED_BY]
        name = ", ".join(best) or _OTHER
        names[cluster] = name if name not in names.values() else f"{name} ({cluster + 1})"
    return names


def _words(question: str) -> list[str]:
    """Words in lower case; of scripts without spaces, pairs of characters."""
    found = []
    for word in _WORD.findall(question[:2_000].casefold()):
        found += [word[i : i + 2] for i in range(len(word) - 1)] if _CJK.match(word) else [word]
    return found
