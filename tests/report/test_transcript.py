"""One run as the page shows it, and its images."""

from dataclasses import replace
from typing import Any

import pytest

from metis_agent.recording.images import ImageStore
from metis_agent.report.transcript import FIELD, STEPS, Pictures, transcript_of
from metis_agent.types import GateDecision, Trajectory
from tests.report.stores import hostile_runs, image_block, png, run


def shown(
    trajectory: Trajectory, pictures: Pictures | None = None, url: str = "memory://transcripts"
) -> dict[str, Any]:
    return transcript_of(trajectory, pictures or Pictures(), ImageStore(url))


def test_messages_calls_and_results_stand_in_order() -> None:
    steps = shown(run("q2", "6", "python"))["steps"]
    assert [step["role"] for step in steps] == ["human", "ai", "tool", "ai"]
    assert steps[1]["calls"] == [{"tool": "python", "arguments": [["code", "print(1)\nprint(2)"]]}]
    assert steps[2] == {
        "role": "tool", "parts": [{"text": "found"}], "tool": "python", "status": "ok", "seconds": 0.5, "cost": 0.01
    }  # fmt: skip
    assert steps[3]["parts"] == [{"text": "6"}]


def test_without_messages_the_tools_are_shown_all_the_same() -> None:
    steps = shown(replace(run("q2", "6", "python"), messages=()))["steps"]
    assert [(step["tool"], step["status"], step["arguments"][0][0]) for step in steps] == [("python", "ok", "code")]


def test_decisions() -> None:
    decision = GateDecision(
        allowed=("python",), required=True, probabilities={"python": 0.87654321}, threshold=0.5, gate="policy",
        version="abc", reason="sure", propensity=0.1, shadow={"allowed": [], "reason": "no"},
    )  # fmt: skip
    (found,) = shown(replace(run("q1", "4"), decisions=(decision,)))["decisions"]
    assert found == {
        "allowed": ["python"], "gate": "policy abc", "reason": "sure", "probabilities": [["python", 0.876543]],
        "threshold": 0.5, "propensity": 0.1, "required": True, "shadow": [["allowed", "[]"], ["reason", "no"]],
    }  # fmt: skip


def test_nothing_is_endless() -> None:
    long = replace(
        run("q1", "x" * 1_000_000),
        messages=tuple({"type": "ai", "data": {"content": "y" * 50_000}} for _ in range(STEPS + 5)),
    )
    found = shown(long)
    assert len(found["answer"]) < FIELD + 100
    assert len(found["steps"]) == STEPS
    assert found["more"] == 5


@pytest.mark.parametrize("number", range(12))
def test_hostile_runs_are_shown_without_harm(number: int) -> None:
    found = shown(hostile_runs()[number])
    assert "seconds" not in found  # not a number
    assert found["steps"][0]["parts"][1] == {"image": 0}
    notes = [part["note"] for part in found["steps"][0]["parts"] if "note" in part]
    assert "no PNG, JPEG, GIF or WebP" in notes[0]
    assert "fetches nothing" in notes[1]


def test_an_image_is_embedded_once() -> None:
    pictures, store = Pictures(), ImageStore("memory://once")
    reference = store.put_image(png(3, 3))
    parts = [pictures.part_of(block, store) for block in (
        image_block(png()), image_block(png()), {"type": "image", "url": reference},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + image_block(png())["base64"]}},
        {"type": "image", "source": {"type": "base64", "data": image_block(png())["base64"]}},
    )]  # fmt: skip
    assert parts == [{"image": 0}, {"image": 0}, {"image": 1}, {"image": 0}, {"image": 0}]
    assert all(uri.startswith("data:image/png;base64,") for uri in pictures.embedded)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"type": "image", "base64": "not base64!"}, "image not shown"),
        ({"type": "image", "url": "sha256:" + "0" * 64}, "can't be read"),
        ({"type": "image_url", "image_url": {"url": "https://example.invalid/a.png"}}, "fetches nothing"),
        ({"type": "image", "url": "data:text/html;base64,PGI+"}, "no PNG"),
        ({"type": "image"}, "fetches nothing"),
    ],
)
def test_an_image_that_is_not_shown_says_why(block: dict[str, Any], reason: str) -> None:
    pictures = Pictures()
    assert reason in pictures.part_of(block, ImageStore("memory://bad"))["note"]
    assert pictures.left_out == 1


def test_a_large_image_is_shrunk_and_room_is_limited() -> None:
    pytest.importorskip("PIL")
    import base64
    import io
    import random

    from PIL import Image

    noise = Image.frombytes("RGB", (1600, 400), random.Random(0).randbytes(1600 * 400 * 3))
    file = io.BytesIO()
    noise.save(file, "PNG")
    pictures = Pictures(total=800_000)
    assert pictures.part_of(image_block(file.getvalue()), ImageStore("memory://large")) == {"image": 0}
    content = base64.b64decode(pictures.embedded[0].partition(",")[2])
    assert len(content) <= 300_000
    assert max(Image.open(io.BytesIO(content)).size) == 1024
    full = Pictures(total=10)
    assert "room" in full.part_of(image_block(png()), ImageStore("memory://large"))["note"]
