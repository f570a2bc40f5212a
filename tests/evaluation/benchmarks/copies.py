"""Copies of the four data sets in their own schema, a few rows each, with pictures drawn here.

The top left pixel of a picture says what is to be seen: red, green, blue or black; and in its blue channel's lowest
bit whether that can be seen without a closer look. `endpoint` reads it.
"""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "black": (0, 0, 0)}
LETTERS = "ABCD"


def picture(colour: str, *, small: bool = False, kind: str = "PNG") -> bytes:
    red, green, blue = COLOURS[colour]
    image = Image.new("RGB", (64, 48), (red, green, blue | small))
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def vstar(folder: Path) -> Path:
    """Six questions: four of attributes, one of them too small to see, and two of positions, both too small."""
    rows = [
        ("direct_attributes", "red", False), ("direct_attributes", "green", False),
        ("direct_attributes", "blue", False), ("direct_attributes", "black", True),
        ("relative_position", "red", True), ("relative_position", "blue", True),
    ]  # fmt: skip
    lines = []
    for number, (category, colour, small) in enumerate(rows):
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / category / f"sa_{number}.png").write_bytes(picture(colour, small=small))
        # The right option stands in another place each time.
        names = sorted(COLOURS, key=lambda name, place=number: (list(COLOURS).index(name) + place) % 4)  # type: ignore[misc]
        options = "\n".join(f"({letter}) {name}" for letter, name in zip(LETTERS, names, strict=True))
        lines.append(
            {
                "image": f"{category}/sa_{number}.png", "category": category, "question_id": str(number),
                "text": f"What is the color of thing {number}?\n{options}\nAnswer with the option's letter from the "
                "given choices directly.",
                "label": LETTERS[names.index(colour)],
            }
        )  # fmt: skip
    (folder / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def hrbench(folder: Path, *, questions: int = 2) -> Path:
    """Both resolutions: `questions` of a single thing, all to be seen, and as many of several, none of them."""
    for version in ("4k", "8k"):
        rows: list[dict[str, Any]] = []
        for number in range(2 * questions):
            single = number < questions
            colour = list(COLOURS)[number % 4]
            content = base64.b64encode(picture(colour, small=not single)).decode()
            for order in range(4):
                names = [*list(COLOURS)[order:], *list(COLOURS)[:order]]
                rows.append(
                    {
                        "index": len(rows), "question": f"What is the color of thing {number} in {version}?",
                        "answer": LETTERS[names.index(colour)], "category": "single" if single else "cross",
                        **dict(zip(LETTERS, names, strict=True)), "cycle_category": str(order), "image": content,
                    }
                )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"hr_bench_{version}.parquet")
    return folder


def wemath(folder: Path) -> Path:
    """Two problems of two steps and one of three; True: to be seen without a closer look.

    The first is seen throughout; of the second the whole is not; of the third a step is not.
    """
    problems = {(2, "1"): (True, True, True), (2, "2"): (True, True, False), (3, "1"): (True, False, True, True)}
    rows = []
    for (steps, problem), seen in problems.items():
        parts = [*(str(step) for step in range(1, steps + 1)), "multi"]
        for place, (part, plain) in enumerate(zip(parts, seen, strict=True)):
            colour = list(COLOURS)[place]
            rows.append(
                {
                    "ID": f"{steps}steps_{problem}", "split": "testmini", "knowledge concept": "Colours",
                    "question": f"Of problem {problem}, part {part} of {steps}: the color is ( ).",
                    "option": "A. red;B. green; C. blue; D. black; E. No correct answer",
                    "answer": LETTERS[place], "image_path": {"bytes": picture(colour, small=not plain), "path": None},
                    "key": f"{steps}steps_{part}", "question number": int(problem),
                    "knowledge concept description": "Colours:\n1. They are four.",
                }
            )  # fmt: skip
    return _parquet(rows, "image_path", folder / "data" / "testmini-00000-of-00001-0123456789abcdef.parquet")


def mathvista(folder: Path) -> Path:
    """One question of each type; what is to be seen is the answer."""
    about = {
        "category": "general-vqa", "context": "abstract scene", "grade": "elementary school", "img_height": 48,
        "img_width": 64, "language": "english", "source": "drawn here", "split": "testmini",
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        _mathvista("1", "multi_choice", "text", "green", ["red", "green", "blue", "black"], None, "green", False),
        _mathvista("2", "free_form", "integer", "3", None, None, "blue", False),
        _mathvista("3", "free_form", "float", "1.5", None, 1.0, "red", True),
        _mathvista("4", "free_form", "list", "[1, 2]", None, None, "black", True),
    ]
    for number, row in enumerate(rows):
        skills = ["arithmetic reasoning"] if number % 2 else ["arithmetic reasoning", "statistical reasoning"]
        row["metadata"] = {**about, "skills": skills, "task": "figure question answering" if number else "VQA"}
    return _parquet(rows, "decoded_image", folder / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet")


def _mathvista(
    pid: str, kind: str, answers: str, answer: str, choices: list[str] | None, precision: float | None, colour: str,
    small: bool,
) -> dict[str, Any]:  # fmt: skip
    listed = "\nChoices:\n" + "\n".join(f"({LETTERS[i]}) {c}" for i, c in enumerate(choices)) if choices else ""
    return {
        "pid": pid, "question": f"Question {pid}?", "image": f"images/{pid}.jpg",
        "decoded_image": {"bytes": picture(colour, small=small), "path": None}, "choices": choices, "unit": None,
        "precision": precision, "answer": answer, "question_type": kind, "answer_type": answers,
        "query": f"Hint: Please answer the question.\nQuestion: Question {pid}? The truth is <{answer}>{listed}",
    }  # fmt: skip


def _parquet(rows: list[dict[str, Any]], column: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).cast_column(column, datasets.Image()).to_parquet(path)
    return path.parents[1]
