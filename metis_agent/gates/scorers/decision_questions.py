"""What a `decision_lm` gate asks its model, in the words of the decision-model standard.

A request `{"state": ..., "questions": {name: question}, "assets": {placeholder: image}}` as LangChain's
`BaseDecisionModel`, transformers' `pipeline("decision")` and `POST /v1/systemone` take it. Can this be answered rightly
without any tool? And with each tool, in one of two forms:

- "noul": a yes-or-no question a tool. What is said of a tool depends neither on the others nor on their order.
- "choice": can it be answered with the best of the tools, and which of the letters A, B, ... is that? Three questions
  however many tools there are, but letters are harder to learn, and the order of the tools counts a little.

A tool is known by its name and description alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from metis_agent.errors import GateError
from metis_agent.types import ToolSpec

__all__ = ["LETTERS", "Form", "decision_request", "questions_about", "state_of"]

Form = Literal["noul", "choice"]

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Labels of a choice; so many tools, and no more, can be asked about."""


def questions_about(tools: Sequence[ToolSpec], form: Form) -> dict[str, dict[str, Any]]:
    """The questions, by name: "direct" first.

    - "direct", a noul: its probability is the estimated accuracy of answering directly.
    - Form "noul": "tool NAME", a noul for each tool: that of the tool.
    - Form "choice": "tools", a noul: that of the tool which "tool" prefers; "tool", a choice (of several tools): each
      tool's share of the odds of being right.

    Raises:
        GateError: more tools than letters, for a choice.
    """
    questions: dict[str, dict[str, Any]] = {
        "direct": {"type": "noul", "instructions": "Can this be answered rightly without any tool?"}
    }
    if form == "noul":
        for tool in tools:
            asked = f"Can this be answered rightly with this tool?\n{_known(tool)}"
            questions[f"tool {tool.name}"] = {"type": "noul", "instructions": asked}
        return questions
    if len(tools) > len(LETTERS):
        raise GateError(
            f"There are {len(tools)} tools: this gate tells at most {len(LETTERS)} apart by a letter. Give fewer."
        )
    known = "\n".join(f"- {_known(tool)}" for tool in tools)
    asked = f"Can this be answered rightly with the best of the tools?\n{known}"
    questions["tools"] = {"type": "noul", "instructions": asked}
    if len(tools) > 1:
        criteria = {tool.name: tool.description or None for tool in tools}
        questions["tool"] = {"type": "choice", "instructions": "Which tool is best for this?", "criteria": criteria}
    return questions


def state_of(question: str, context: str = "", images: int = 0) -> str:
    """Placeholders of the images, the context, a blank line, the question."""
    shown = "".join(f"{_placeholder(index)}\n" for index in range(images))
    return shown + (f"{context}\n\n{question}" if context else question)


def decision_request(
    question: str, context: str = "", *, tools: Sequence[ToolSpec], form: Form, images: Sequence[Any] = ()
) -> dict[str, Any]:
    """The whole request; images are PIL images, or base64 strings of their files.

    Raises:
        GateError: more tools than letters, for a choice.
    """
    request: dict[str, Any] = {
        "state": state_of(question, context, len(images)),
        "questions": questions_about(tools, form),
    }
    if images:
        request["assets"] = {
            _placeholder(index): {"type": "image", "format": "png", "data_base64": image}
            if isinstance(image, str)
            else image
            for index, image in enumerate(images)
        }
    return request


def _placeholder(index: int) -> str:
    return f"<image_{index + 1}>"


def _known(tool: ToolSpec) -> str:
    return f"{tool.name}: {tool.description}" if tool.description else tool.name
