"""Gemini's generateContent: its replies, and the requests that it refuses.

The rules are those of the API reference and of the errors that it answers with; thought signatures are kept as
Gemini 3 demands it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from tests.providers.server import Dialect, Refused, Reply, words

__all__ = ["GenerateContent"]

_DATA = {
    "text", "inlineData", "fileData", "functionCall", "functionResponse", "executableCode", "codeExecutionResult",
}  # fmt: skip


class GenerateContent(Dialect):
    """Gemini."""

    path = "enerateContent"
    _ENDS: ClassVar[Any] = {"length": "MAX_TOKENS", "filter": "SAFETY"}

    def __init__(self) -> None:
        super().__init__()
        # The first is what Google documents for calls that its model has not made.
        self._signatures = {"skip_thought_signature_validator"}

    def is_streamed(self, path: str, body: dict[str, Any]) -> bool:
        return "streamGenerateContent" in path

    def error(self, reason: str) -> dict[str, Any]:
        return {"error": {"code": 400, "message": reason, "status": "INVALID_ARGUMENT"}}

    def check(self, body: dict[str, Any]) -> None:
        declared = {
            function["name"] for tool in body.get("tools") or () for function in tool.get("functionDeclarations") or ()
        }
        if any(tool.get("functionDeclarations") == [] for tool in body.get("tools") or ()):
            raise Refused("tools[0].function_declarations: should not be empty.")
        calling = (body.get("toolConfig") or {}).get("functionCallingConfig") or {}
        if calling.get("mode") == "ANY" and not declared:
            raise Refused("Function calling mode ANY is only allowed with function declarations.")
        if names := set(calling.get("allowedFunctionNames") or ()) - declared:
            raise Refused(f"allowed_function_names: {sorted(names)} are not declared.")
        contents = body["contents"]
        if contents[-1].get("role", "user") not in ("user", "function"):
            raise Refused("Please ensure that single turn requests end with a user role.")
        for place, content in enumerate(contents):
            self._check_parts(f"contents[{place}].parts", content.get("parts"))
            before = contents[place - 1].get("parts") if place else []
            if self._calls(content):
                if place == 0 or contents[place - 1].get("role") == "model":
                    raise Refused("A function call turn must come immediately after a user or function response turn.")
                self._check_answers(contents, place)
            elif any("functionResponse" in part for part in content["parts"]) and not any(
                "functionCall" in part for part in before
            ):
                raise Refused("A function response turn must come immediately after a function call turn.")

    def _check_parts(self, where: str, parts: Any) -> None:
        if not parts:
            raise Refused(f"{where}: must not be empty.")
        for part in parts:
            if len(set(part) & _DATA) != 1:
                raise Refused(f"{where}: required oneof field 'data' must have one initialized field: {sorted(part)}")
            if part.get("text") == "":
                raise Refused(f"{where}: Unable to submit request because it must have a text parameter.")
            if "functionResponse" in part and not isinstance(part["functionResponse"]["response"], dict):
                raise Refused(f"{where}.function_response.response: must be an object.")
            if (sign := part.get("thoughtSignature")) and sign not in self._signatures:
                raise Refused(f"{where}: Thought signature is not valid.")

    def _check_answers(self, contents: list[dict[str, Any]], place: int) -> None:
        calls = self._calls(contents[place])
        after = contents[place + 1] if place + 1 < len(contents) else {"parts": []}
        answers = [part["functionResponse"] for part in after["parts"] if "functionResponse" in part]
        if sorted(call["name"] for call in calls) != sorted(answer["name"] for answer in answers):
            raise Refused("The number of function response parts must equal that of the function call parts.")
        asked = max(i for i, c in enumerate(contents) if any("functionResponse" not in p for p in c["parts"]) and
                    c.get("role") == "user")  # fmt: skip
        first = next(part for part in contents[place]["parts"] if "functionCall" in part)
        if place > asked and not first.get("thoughtSignature"):
            raise Refused(f"Function call `{calls[0]['name']}` is missing a thought_signature in functionCall parts.")

    @staticmethod
    def _calls(content: dict[str, Any]) -> list[dict[str, Any]]:
        return [part["functionCall"] for part in content["parts"] if "functionCall" in part]

    def document(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        if body.get("generationConfig", {}).get("thinkingConfig", {}).get("includeThoughts"):
            parts.append({"text": "hmm", "thought": True})
        if reply.text:
            parts.append({"text": reply.text})
        malformed = any(isinstance(call.arguments, str) for call in reply.calls) and reply.end != "length"
        for call in reply.calls if not malformed else ():
            parts.append({"functionCall": {"name": call.tool, "args": call.parsed}})
            if call is reply.calls[0]:
                parts[-1]["thoughtSignature"] = self._sign()
        finish = "MALFORMED_FUNCTION_CALL" if malformed else self._ENDS.get(reply.end, "STOP")
        finish = "PROHIBITED_CONTENT" if reply.refusal else finish
        candidate: dict[str, Any] = {"finishReason": finish, "index": 0, "content": {"role": "model", "parts": parts}}
        if reply.searched:
            candidate["groundingMetadata"] = {"webSearchQueries": [reply.searched]}
        return {
            "candidates": [candidate], "modelVersion": "gemini-3-pro", "responseId": self.new_id("r"),
            "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15},
        }  # fmt: skip

    def _sign(self) -> str:
        # Base64, as clients decode it.
        sign = f"sig{self._count:05d}"
        self._count += 1
        self._signatures.add(sign)
        return sign

    def events(self, document: dict[str, Any], body: dict[str, Any]) -> Iterator[bytes]:
        candidate = document["candidates"][0]
        pieces: list[dict[str, Any]] = []
        for part in candidate["content"]["parts"]:
            if "text" in part:
                pieces += [{**part, "text": word} for word in words(part["text"])]
            else:
                pieces.append(part)
        for piece in pieces[:-1]:
            chunk = {"content": {"role": "model", "parts": [piece]}, "index": 0}
            yield f"data: {json.dumps({**document, 'candidates': [chunk]})}\n\n".encode()
        last = {**candidate, "content": {"role": "model", "parts": pieces[-1:]}}
        yield f"data: {json.dumps({**document, 'candidates': [last]})}\n\n".encode()
