"""`metis evaluate benchmark` end to end: a copy of each data set, a model behind an HTTP endpoint, figures by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

pytest.importorskip("langchain_openai")

from typer.testing import CliRunner, Result

from metis_agent.cli import app
from metis_agent.errors import ConfigurationError, InfrastructureError, InputError
from metis_agent.recording.store import TrajectoryStore
from tests.evaluation.benchmarks import copies
from tests.evaluation.benchmarks.endpoint import Endpoint, endpoint
from tests.models.test_vision import build_model, build_processor

pytestmark = pytest.mark.enable_socket

TOOLS = '''
def look() -> str:
    """Look closer."""
    return "seen"

TOOLS = [look]
'''


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Endpoint]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closer.py").write_text(TOOLS)
    with endpoint() as running:
        yield running


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def figures_of(server: Endpoint, name: str, data: Path, *further: str) -> dict[str, Any]:
    out = Path("figures.json")
    run(
        "benchmark", name, "--model", "painted", "--base-url", server.url, "--tools", "closer.py:TOOLS", "--data",
        str(data), "--json", str(out), "--retries", "0", *further,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def value(figures: dict[str, Any], name: str) -> float | None:
    found: float | None = figures["scores"][name]["value"]
    return found


def test_vstar(server: Endpoint, tmp_path: Path) -> None:
    """Deployed it looks closer at the three small things and at what is red: all right, by a call on 4 of 6.

    Known, for it is right without a tool each time: the three large ones. One of them is red: 1 call of 3 redundant.
    Necessary: the three small ones, on all of which it calls.
    """
    figures = figures_of(server, "vstar", copies.vstar(tmp_path / "copy"), "--direct", "2")
    assert value(figures, "accuracy") == 1
    assert [value(figures, part) for part in ("direct_attributes", "relative_position")] == [1, 1]
    use = figures["agent"]["overall"]
    assert use["tool_rate"]["value"] == pytest.approx(4 / 6)
    assert use["redundant_rate"]["value"] == pytest.approx(1 / 3)
    assert use["necessary_recall"]["value"] == 1
    assert 0 <= use["tool_rate"]["low"] <= 4 / 6 <= use["tool_rate"]["high"] <= 1
    assert figures["planned_runs"] == 6 * (1 + 2 + 1)
    assert figures["recording"]["failed"] == figures["unanswered"] == figures["unread_answers"] == 0
    assert figures["published"]["Metis-8B"]["accuracy"] == 0.911


def test_vstar_without_tools(server: Endpoint, tmp_path: Path) -> None:
    """By the gate "never": right are the three large things, all of them attributes, of which there are four."""
    data = copies.vstar(tmp_path / "copy")
    figures = figures_of(server, "vstar", data, "--gate", "never", "--direct", "0", "--forced", "0")
    assert value(figures, "accuracy") == 0.5
    assert value(figures, "direct_attributes") == 0.75
    assert value(figures, "relative_position") == 0
    assert figures["agent"]["overall"]["tool_rate"]["value"] == 0
    assert len(server.requests) == 6


def test_the_spelling_of_the_option(server: Endpoint, tmp_path: Path) -> None:
    data = copies.vstar(tmp_path / "copy")
    shared = ["--model", "painted", "--base-url", server.url, "--tools", "closer.py:TOOLS", "--data", str(data)]
    for spelling in (["--benchmark", "vstar", *shared], ["--model=painted", "--benchmark=vstar", *shared[2:]]):
        result = run(*spelling, "--limit", "2", "--direct", "1", "--dry-run")
        assert "vstar: 2 questions (2 units), each once as deployed, 1 times without a tool" in result.output
    assert not server.requests


def test_hrbench(server: Endpoint, tmp_path: Path) -> None:
    """Without tools: single things are seen in all four orders, the others in none: FSP 1, FCP 0, together .5."""
    data = copies.hrbench(tmp_path / "copy")
    figures = figures_of(server, "hrbench", data, "--gate", "never", "--direct", "0", "--forced", "0")
    for version in ("4k", "8k"):
        found = [value(figures, f"{version} {part}") for part in ("accuracy", "FSP", "FCP")]
        assert found == [0.5, 1, 0]
    assert (figures["questions"], figures["units"]) == (32, 8)
    assert figures["scores"]["4k accuracy"]["questions"] == 4
    one = figures_of(server, "hrbench-8k", data, "--gate", "never", "--direct", "0", "--forced", "0", "--limit", "3")
    assert (one["questions"], one["units"]) == (12, 3)
    assert "4k accuracy" not in one["scores"]


def test_wemath(server: Endpoint, tmp_path: Path) -> None:
    """Without tools: a problem mastered, one whose steps are right and the whole is not, one by rote.

    IK 0, IG 1/3, CM strict 1/3, RM strict 1/3. Score strict (3 - 0.5 - 1) / 3 = 0.5; loose, where one right step is
    enough for mastery, CM 2/3, RM 0 and (3 - 0.5) / 3. The rate of RM: strict 1 of 2, loose 0 of 2.
    One step: 2 + 2 + 2 of 7; two steps: 1 of 2; three: 1 of 1.
    """
    data = copies.wemath(tmp_path / "copy")
    figures = figures_of(server, "wemath", data, "--gate", "never", "--direct", "0", "--forced", "0")
    expected = {
        "score strict": 0.5, "score loose": 2.5 / 3, "IK": 0, "IG": 1 / 3, "CM strict": 1 / 3, "CM loose": 2 / 3,
        "RM strict": 0.5, "RM loose": 0, "one-step": 6 / 7, "two-step": 0.5, "three-step": 1,
    }  # fmt: skip
    assert {name: value(figures, name) for name in expected} == pytest.approx(expected)
    assert (figures["questions"], figures["units"]) == (10, 3)


@pytest.mark.parametrize("extractor", [None, "model"])
def test_mathvista(server: Endpoint, tmp_path: Path, extractor: str | None) -> None:
    """Without tools it sees the option and the whole number; "It is 99." is neither the decimal nor the list."""
    reads = []
    if extractor:
        Path("reader.py").write_text(
            f"from langchain_openai import ChatOpenAI\nreader = ChatOpenAI(model='r', base_url={server.url!r}, "
            "api_key='none')\n"
        )
        reads = ["--extractor", "reader.py:reader"]
    data = copies.mathvista(tmp_path / "copy")
    figures = figures_of(server, "mathvista", data, "--gate", "never", "--direct", "0", "--forced", "0", *reads)
    assert value(figures, "accuracy") == 0.5
    assert value(figures, "question_type: multi_choice") == 1
    assert value(figures, "answer_type: integer") == 1
    assert value(figures, "answer_type: float") == value(figures, "answer_type: list") == 0
    assert value(figures, "skills: statistical reasoning") == 0.5
    # By rule no list is found in "It is 99."; the extractor finds "99", which is another list than the right one.
    assert figures["unread_answers"] == (0 if extractor else 1)
    assert len(server.requests) == (8 if extractor else 4)


def test_a_run_that_broke_off_goes_on(server: Endpoint, tmp_path: Path) -> None:
    data = copies.vstar(tmp_path / "copy")
    server.fail_after = 11
    with pytest.raises(InfrastructureError, match="run the same again to go on"):
        figures_of(server, "vstar", data, "--direct", "2", "--concurrency", "4")
    kept = TrajectoryStore("runs/benchmarks/vstar", read_only=True)
    done = len(kept.ids())
    assert done
    assert done < kept.count()  # what failed is recorded as well, and does not count
    server.fail_after = None
    before = len(server.requests)
    whole = figures_of(server, "vstar", data, "--direct", "2", "--concurrency", "4")
    assert whole["recording"]["found"] == done
    assert whole["recording"]["finished"] == whole["planned_runs"] - done
    assert value(whole, "accuracy") == 1
    assert whole["unanswered"] == 0
    asked = len(server.requests)
    assert asked > before
    again = figures_of(server, "vstar", data, "--direct", "2")
    assert len(server.requests) == asked
    assert again["scores"] == whole["scores"]
    # Another temperature is another run in the same store.
    figures_of(server, "vstar", data, "--direct", "0", "--forced", "0", "--temperature", "1")
    assert len(server.requests) > asked


def test_an_endpoint_that_is_down_is_an_error_that_says_so(server: Endpoint, tmp_path: Path) -> None:
    data = copies.hrbench(tmp_path / "copy")
    server.fail_after = 0
    with pytest.raises(InfrastructureError, match="rollouts failed, each after 0 retries"):
        figures_of(server, "hrbench", data, "--concurrency", "5")


def test_pictures_are_kept_once_and_apart(server: Endpoint, tmp_path: Path) -> None:
    data = copies.hrbench(tmp_path / "copy", questions=1)
    figures_of(server, "hrbench-4k", data, "--direct", "1", "--store", "kept")
    runs = list(TrajectoryStore("kept", read_only=True).read())
    assert len(runs) == 2 * 4 * 3
    text = "".join(path.read_text() for path in Path("kept").glob("*.jsonl"))
    assert "iVBORw0KGgo" not in text
    pictures = {picture for run in runs for picture in run.question.metadata["images"]}
    # Both questions of the copy have a picture of their own, whatever the order of the options.
    assert len(pictures) == len(list(Path("kept/images").iterdir())) == 2
    assert runs[0].question.metadata["images"][0] in str(runs[0].messages[0]["data"]["content"][0])


def test_a_local_model_that_sees(tmp_path: Path, server: Endpoint) -> None:
    """A Qwen3-VL of random weights, from its folder: nothing it says is an answer, and all of it is recorded."""
    processor = build_processor()
    build_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data = copies.vstar(tmp_path / "copy")
    run(
        "benchmark", "vstar", "--model", str(tmp_path / "model"), "--tools", "closer.py:TOOLS", "--data", str(data),
        "--limit", "3", "--direct", "1", "--forced", "0", "--json", "figures.json", "--store", "kept",
    )  # fmt: skip
    figures = json.loads(Path("figures.json").read_text())
    assert (figures["recording"]["finished"], figures["recording"]["failed"]) == (6, 0)
    assert figures["agent"]["questions"] == 3
    assert figures["unread_answers"] <= 3
    calls = [model_call for run in TrajectoryStore("kept", read_only=True).read() for model_call in run.calls]
    # 64 x 48 pixels are 8 x 6 patches of 8, 4 x 3 places.
    pads = [(model_call.prompt_ids or ()).count(processor.image_token_id) for model_call in calls]
    assert set(pads) == {12}
    assert all(model_call.log_probs for model_call in calls)


def test_a_crop_comes_back_to_the_model(server: Endpoint, tmp_path: Path) -> None:
    """With the default tool, the sandboxed python: the picture goes in as image_1, its crop back over the wire."""
    server.tool, server.arguments = "python", json.dumps({"code": "image_1.crop((0, 0, 8, 6))"})
    data = copies.vstar(tmp_path / "copy")
    run(
        "benchmark", "vstar", "--model", "painted", "--base-url", server.url, "--data", str(data), "--limit", "1",
        "--direct", "0", "--json", "figures.json",
    )  # fmt: skip
    shown = [message for asked in server.requests for message in asked["messages"] if message["role"] == "tool"]
    assert len(shown) == 2
    assert [block["type"] for block in shown[0]["content"]] == ["text", "image_url"]
    figures = json.loads(Path("figures.json").read_text())
    assert value(figures, "accuracy") == 1
    # The picture and its crop, each once.
    assert len(list(Path("runs/benchmarks/vstar/images").iterdir())) == 2
    text = "".join(path.read_text() for path in Path("runs/benchmarks/vstar").glob("*.jsonl"))
    assert "iVBORw0KGgo" not in text


def test_hostile_pictures_are_left_out_and_named(server: Endpoint, tmp_path: Path) -> None:
    data = copies.vstar(tmp_path / "copy")
    (data / "direct_attributes" / "sa_0.png").write_bytes(b"<svg onload='alert(1)'/>")
    (data / "direct_attributes" / "sa_1.png").write_bytes(copies.picture("green")[:60])
    lines = [json.loads(line) for line in (data / "test_questions.jsonl").read_text().splitlines()]
    lines[4]["image"], lines[5]["image"] = "../../etc/passwd", "/etc/passwd"
    (data / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = figures_of(server, "vstar", data, "--direct", "0", "--forced", "0")
    assert figures["unanswered"] == 4
    assert figures["scores"]["accuracy"] == {"value": 1, "low": 1, "high": 1, "questions": 2}
    assert figures["scores"]["relative_position"]["value"] is None
    reasons = " ".join(figures["bad_pictures"])
    assert "SVG" in reasons
    assert reasons.count("outside of the data set's folder") == 2


def test_wrong_arguments_are_found_before_any_run(server: Endpoint, tmp_path: Path) -> None:
    data = copies.vstar(tmp_path / "copy")
    with pytest.raises(ConfigurationError, match="choose one of vstar, hrbench"):
        figures_of(server, "coco", data)
    with pytest.raises(ConfigurationError, match="is for mathvista alone"):
        figures_of(server, "vstar", data, "--extractor", "openai:gpt-5")
    with pytest.raises(InputError, match=r"has no 'hr_bench_4k.parquet'.*hf download DreamMr/HR-Bench"):
        figures_of(server, "hrbench", data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no 'test_questions.jsonl'"):
        figures_of(server, "vstar", tmp_path / "empty")
    assert not server.requests
