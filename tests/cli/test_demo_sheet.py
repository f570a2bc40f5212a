"""The sheet of before and after needs nothing beside itself, and shows what each policy saw and said."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage, message_to_dict

from metis_agent.types import Question, ToolOutcome, Trajectory
from metis_agent.worlds.gallery.pictures import write_sheet
from metis_agent.worlds.gallery.questions import questions


def run(question: Question, answer: str, *, cropped: bool) -> Trajectory:
    messages = [message_to_dict(HumanMessage(question.text))]
    outcomes: tuple[ToolOutcome, ...] = ()
    if cropped:
        image = question.metadata["images"][0].partition(",")[2]
        block = {"type": "image", "base64": image, "mime_type": "image/png"}
        messages.append(message_to_dict(ToolMessage([{"type": "text", "text": "shown"}, block], tool_call_id="c")))
        outcomes = (ToolOutcome(call_id="c", tool="python", arguments={"code": "image_1 <&>"}, status="ok"),)
    return Trajectory(id=question.id, question=question, answer=answer, messages=tuple(messages), outcomes=outcomes)


def measured(*runs: Trajectory) -> Any:
    return SimpleNamespace(trajectories=runs)


def test_each_kind_is_shown_as_it_was_handled(tmp_path: Path) -> None:
    asked = [replace(question, text=f"{question.text} <b>") for question in questions("test", 4, kinds=["large word"])]
    before = measured(*(run(question, question.answer or "", cropped=True) for question in asked))
    after = measured(*(run(question, "wrong", cropped=False) for question in reversed(asked)))
    page = write_sheet(tmp_path / "pictures.html", before, after, of_each=2).read_text("utf-8")
    assert page.count("<section>") == 2
    assert page.count("python(image_1 &lt;&amp;&gt;)") == 2
    assert page.count("what it got to see") == 2
    assert page.count("At a glance") == 2
    assert page.count('class="right"') == page.count('class="wrong"') == 2
    assert "<b>" not in page
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
