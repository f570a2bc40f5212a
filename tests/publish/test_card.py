from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("huggingface_hub")

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.export import set_threshold
from metis_agent.publish import CardFacts, model_card
from metis_agent.publish.push import inert, number, table
from tests.publish.trained import train

EVIL = (
    "Search.\n\n# Owned\n---\nlicense: evil\n---\n| x | <img src=x onerror=alert(1)> [a](javascript:b) `c` http://e.vil"
)
FIGURES = {
    "auc": 0.912, "auc_interval": [0.88, 0.94], "accuracy_at_half": 0.95,
    "at_threshold": {"threshold": 0.4, "accuracy": 0.93, "tool_rate": 0.41},
    "baselines": {"always": {"accuracy": 0.9}, "TF-IDF | worse": {"auc": 0.8, "accuracy": 0.91}},
}  # fmt: skip


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return train(tmp_path / "gate", metrics=FIGURES, description=EVIL)


def read(card: str) -> tuple[dict[str, Any], str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_is_known(gate: Path) -> None:
    metadata, body = read(model_card(gate, repo="me/gate", facts=CardFacts(license="apache-2.0")))
    assert metadata == {
        "library_name": "langgraph-metis", "license": "apache-2.0",
        "tags": ["metis", "hdpo", "tool-use", "gate", "features"],
    }  # fmt: skip
    assert "| this gate | 0.912 (0.880 to 0.940) | 0.950 | 0.930 | 0.410 |" in body
    assert r"| TF\-IDF \| worse | 0.800 |  | 0.910 |  |" in body
    assert "Nothing: the threshold, 0.500, was not chosen for a promise" in body
    assert 'PolicyGate.from_pretrained("me/gate"' in body
    assert "120 recorded questions, SHA\\-256" in body or "120 recorded questions, SHA-256" in body


def test_a_promise_is_repeated_as_it_was_made(gate: Path) -> None:
    note = {"value": 0.37, "chosen": "calls at most 0.5 with confidence 0.95", "rows": 800, "mean": 0.4,
            "tool_rate": 0.44, "accuracy": 0.91}  # fmt: skip
    set_threshold(gate, note)
    _, body = read(model_card(gate))
    assert "Threshold 0.370: calls at most 0.5 with confidence 0.95. On those 800 questions" in body


def test_words_of_others_stay_words(gate: Path) -> None:
    card = model_card(gate, repo="me/gate")
    metadata, body = read(card)
    assert "evil" not in str(metadata)
    (row,) = [line for line in body.splitlines() if line.startswith("| search |")]
    assert "Owned" in row
    assert r"\# Owned \-\-\- license\: evil" in row
    assert r"\<img" in row
    assert r"\]\(javascript\:b\)" in row
    assert r"http\://" in row
    assert row.replace("\\|", "").count("|") == 3
    assert "<img" not in body.replace("\\<", "")


def test_files_it_was_trained_on_are_named_by_their_hash(gate: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("x")
    _, body = read(model_card(gate, facts=CardFacts(data=(tmp_path / "prompts.jsonl",))))
    assert hashlib.sha256(b"x").hexdigest() in body
    assert str(tmp_path) not in body


def test_a_models_card_has_the_figures_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    figures = {"format": 1, "hdpo": {"accuracy": 0.9, "tool_rate": 0.1}, "name": "x", "bad": float("nan"), "n": 1200}
    facts = CardFacts(figures=figures, measured_on="1,200 fresh questions", base_model="Qwen/Qwen3-VL-8B-Instruct")
    metadata, body = read(model_card(tmp_path, facts=facts))
    assert metadata["base_model"] == "Qwen/Qwen3-VL-8B-Instruct"
    assert "| hdpo.accuracy | 0.900 |" in body
    assert "| n | 1,200 |" in body
    assert "bad" not in body
    assert "| format |" not in body
    _, bare = read(model_card(tmp_path))
    assert "Nothing is known: no figures were given." in bare
    assert "Licence: not stated" in bare


@pytest.mark.parametrize(
    "wrong", [{"license": "Apache 2\nx: y"}, {"base_model": "/home/me/model"}, {"base_model": "a"}]
)
def test_what_a_hub_would_misread_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="write it as"):
        CardFacts(**wrong)  # type: ignore[arg-type]


@given(st.text())
def test_inert_text_is_one_line_in_which_nothing_means_anything(text: str) -> None:
    line = inert(text)
    assert "\n" not in line
    bare = line.replace("\\\\", "")
    for char in "`*_[]<>#|~$&!@":
        assert bare.count(char) == bare.count("\\" + char)


def test_figures_and_tables() -> None:
    assert (number(True), number("x"), number(float("inf")), number(None), number(10**400)) == ("",) * 5
    assert number(0.5, [0, 10**400]) == number(0.5, [float("nan"), 1]) == "0.500"
    assert (number(1234), number(0.5), number(0.5, [0.25, 0.75])) == ("1,234", "0.500", "0.500 (0.250 to 0.750)")
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
