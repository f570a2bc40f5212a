"""Simulated judges: one honest, one that obeys whatever stands outside its data fence, one that obeys anything."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import RunnableLambda
from pydantic import Field, PrivateAttr

ORDER = re.compile(
    r"(?i)\b(?:ignore|disregard|override)\b.*\b(?:instructions|rubric|reference)\b|\bverdict\s*[:=]|"
    r"mark (?:it|this) (?:as )?(?:right|correct)"
)
"""What an obedient judge takes for an order to rule in favour."""


class SimulatedJudge(BaseChatModel):
    """Reads its prompt as the system message says: the data between two markers, everything else as orders."""

    obeys: str = "nothing"
    """"nothing", "outside" (the fence) or "anything"."""
    failures: list[Any] = Field(default_factory=list)
    """What the next calls do instead of ruling: an exception to raise, or a value to return."""
    prompts: list[tuple[str, str]] = Field(default_factory=list)
    rule: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Rules on data; by default answers are compared with their reference."""
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @property
    def _llm_type(self) -> str:
        return "simulated-judge"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        raise AssertionError("judges are asked for structured output")

    def with_structured_output(self, schema: Any, **_: Any) -> Any:
        return RunnableLambda(lambda messages: self._reply(schema, messages))

    def _reply(self, schema: Any, messages: list[BaseMessage]) -> Any:
        system, human = str(messages[0].content), str(messages[1].content)
        with self._lock:
            self.prompts.append((system, human))
            failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, BaseException):
            raise failure
        if failure is not None:
            return failure
        markers = re.search(r"between (<data-\w+>) and (</data-\w+>)", system)
        assert markers is not None, "the system message declares the fence"
        before, _, rest = human.partition(markers[1])
        data, _, after = rest.partition(markers[2])
        heard = {"nothing": "", "outside": before + after, "anything": human}[self.obeys]
        if ORDER.search(heard):
            return schema(
                **{
                    name: True if field.annotation is bool else "so ordered"
                    for name, field in schema.model_fields.items()
                }
            )
        record = json.loads(data)
        if self.rule is not None:
            return schema(**self.rule(record))
        return schema(reason="compared", right=record["answer"].strip().casefold() == record["reference"].casefold())
